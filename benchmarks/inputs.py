"""Random inputs of the sections, seeded: logits, labels, padding, CutMix boxes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.eager import IGNORE, THRESHOLD, VIEWS, Batch, Logits

BATCH = 4
CLASSES = 6
CROP = 512
# Logits vary smoothly from token to token, as a decoder's do, with a little noise. With this spread
# about half the pixels pass the threshold of 0.95, the share that training reaches.
SPREAD, NOISE = 11.0, 0.3
STUDENTS = ("clip", "ssm")


def without_compile(providers: tuple[str, ...]) -> tuple[str, ...]:
    """An op's second case leaves torch.compile out: compiling is most of such a section's time."""
    return tuple(name for name in providers if name != "compile")


def make_logits(
    grid: int, seed: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """[B, K, grid, grid], the same numbers on every device."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(BATCH, CLASSES, CROP // 16, CROP // 16, generator=generator) * SPREAD
    values = F.interpolate(tokens, size=(grid, grid), mode="bilinear")
    values += torch.randn(values.shape, generator=generator) * NOISE
    return values.to(device, dtype)


def box_map(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """int64 [B, H, W], 1 inside (x1, y1, x2, y2)."""
    y = torch.arange(size[0])[None, :, None]
    x = torch.arange(size[1])[None, None, :]
    x1, y1, x2, y2 = (boxes[:, i, None, None] for i in range(4))
    return ((x >= x1) & (x < x2) & (y >= y1) & (y < y2)).long()


def make_boxes(seed: int, crop: int = CROP) -> Tensor:
    """int32 [B, 4]: boxes of a fifth of the crop's area on average, the last image without one."""
    generator = torch.Generator().manual_seed(seed)
    sides = torch.randint(crop // 4, 5 * crop // 8, (BATCH, 2), generator=generator)
    corner = (torch.rand(BATCH, 2, generator=generator) * (crop - sides)).int()
    boxes = torch.cat([corner, corner + sides], dim=1).int()
    boxes[-1] = 0
    return boxes


def make_batch(device: torch.device, crop: int = CROP, threshold: float = THRESHOLD) -> Batch:
    """Labels with a strip of ignored pixels, one padded image, two sets of boxes."""
    generator = torch.Generator().manual_seed(7)
    labels = torch.randint(CLASSES, (BATCH, crop, crop), generator=generator)
    labels[:, : crop // 16] = IGNORE
    ignore = torch.zeros(BATCH, crop, crop, dtype=torch.uint8)
    ignore[0, :, -crop // 8 :] = IGNORE
    boxes = (make_boxes(11, crop), make_boxes(12, crop))
    maps = tuple(box_map(b, (crop, crop)).to(device) for b in boxes)
    return Batch(
        labels=labels.to(device),
        ignore=ignore.to(device),
        boxes=tuple(b.to(device) for b in boxes),
        box_maps=maps,
        partner=torch.arange(BATCH).roll(-1).to(device),
        threshold=threshold,
    )


def make_section_logits(
    grid: int, device: torch.device, dtype: torch.dtype, batch: Batch
) -> Logits:
    """Leaves for both students and all views; w_other is the weak view of the in-batch partner."""
    logits: Logits = {}
    for s, student in enumerate(STUDENTS):
        views = {
            view: make_logits(grid, 100 * s + v, device, dtype).requires_grad_()
            for v, view in enumerate(VIEWS)
        }
        views["w_other"] = views["w"].detach()[batch.partner].clone()
        logits[student] = views
    return logits
