"""What every launcher needs on the host: sizes, strides, tile shapes, checks. No device work."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass

import numpy as np
import torch
import triton
from torch import Tensor

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WARPS = 4
# Scratch of one backward launch; a larger batch is done in groups of images that fit.
SCRATCH_BYTES = 64 * 2**20
# Launch options of what compares two students: fused into one rounding, the product in p_a - p_b
# would differ from the rounded p_b, and equal students would learn from each other.
UNFUSED = {"enable_fp_fusion": False}


@dataclass(frozen=True)
class Axis:
    """One axis of a resampling from `size` cells to `out` pixels."""

    size: int
    out: int
    scale: float  # cells per pixel, the float32 value ATen uses
    inverse: float  # pixels per cell
    reach: int  # the most pixels that share one interval between neighbouring cells


@functools.lru_cache(maxsize=256)
def axis(size: int, out: int, align_corners: bool) -> Axis:
    """Float32 constants of one axis, as `F.interpolate(size=...)` computes them."""
    if align_corners:
        numerator, denominator = size - 1, out - 1
    else:
        numerator, denominator = size, out
    scale = np.float32(numerator) / np.float32(denominator) if denominator > 0 else np.float32(0)
    inverse = np.float32(1) / scale if scale > 0 else np.float32(0)
    return Axis(size, out, float(scale), float(inverse), _reach(size, out, scale, align_corners))


def _reach(size: int, out: int, scale: np.float32, align_corners: bool) -> int:
    """Largest count of pixels in one interval, whether or not the device fuses multiply and add."""
    pixel = np.arange(out, dtype=np.float32)
    if align_corners:
        sources = [pixel * scale]
    else:
        half = np.float32(0.5)
        fused = (pixel.astype(np.float64) + 0.5) * np.float64(scale) - 0.5
        sources = [(pixel + half) * scale - half, fused.astype(np.float32)]
    reach = 1
    for source in sources:
        interval = np.clip(np.floor(source).astype(np.int64), -1, size - 1) + 1
        reach = max(reach, int(np.bincount(interval).max(initial=0)))
    return reach


@dataclass(frozen=True)
class Resampling:
    """How logits [B,K,h,w] are read at output pixels [H,W]."""

    y: Axis
    x: Axis
    resample: bool

    @property
    def arguments(self) -> tuple[int, int, float, float]:
        """h, w and the two scales, in the order kernels take them."""
        return self.y.size, self.x.size, self.y.scale, self.x.scale


def resampling(logits: Tensor, height: int, width: int, align_corners: bool) -> Resampling:
    """The resampling from the grid of `logits` [B,K,h,w] to height × width."""
    h, w = logits.shape[2:]
    return Resampling(
        axis(h, height, align_corners), axis(w, width, align_corners), (h, w) != (height, width)
    )


def check_logits(logits: Tensor, name: str = "logits") -> None:
    """Raise TypeError or ValueError for logits the Triton kernels do not take."""
    if logits.dtype not in LOGIT_DTYPES:
        raise TypeError(
            f"{name}: the triton backend takes float32, bfloat16 or float16, got {logits.dtype}; "
            "float64 is served by the reference backend"
        )
    if logits.dim() != 4:
        raise ValueError(f"{name}: expected [B,K,h,w], got shape {tuple(logits.shape)}")
    if 0 in logits.shape[1:]:
        raise ValueError(f"{name}: expected classes and cells, got shape {tuple(logits.shape)}")


def matched_pair(logits_a: Tensor, logits_b: Tensor) -> tuple[Tensor, Tensor]:
    """Two students' logits, laid out alike where their shapes are.

    The compiled kernel adds the classes of a pixel in an order that hangs on the strides: equal
    logits of different strides would get confidences a rounding apart, and one would teach.

    Raises:
        TypeError, ValueError: they cannot be compared.
    """
    check_logits(logits_a, "logits_a")
    check_logits(logits_b, "logits_b")
    if logits_a.shape[:2] != logits_b.shape[:2]:
        raise ValueError(
            f"logits_b: expected batch and classes {tuple(logits_a.shape[:2])} of logits_a, "
            f"got {tuple(logits_b.shape[:2])}"
        )
    if logits_a.shape == logits_b.shape and logits_a.stride() != logits_b.stride():
        return logits_a.contiguous(), logits_b.contiguous()
    return logits_a, logits_b


def pixel_tile(num_classes: int, element_size: int, resample: bool) -> tuple[int, int]:
    """BLOCK_K and P of a kernel whose lanes are output pixels.

    Equal grids: rows of a tile are read 16 bytes a thread, and for few classes all logits of a
    pixel stay in one thread. Resampling: one pixel a thread, whose four gathers a class cannot be
    widened anyway, so that fewer registers leave room for more warps.
    """
    block_k = triton.next_power_of_2(num_classes)
    if resample:
        return min(block_k, 16), 32 * WARPS
    block_k = min(block_k, 32)
    elements = 8192 if element_size == 2 and block_k <= 8 else 4096
    return block_k, min(elements // block_k, 1024)


def is_flat(tensor: Tensor | None) -> bool:
    """Whether the pixels of one image and class stand at equal distances, row after row."""
    if tensor is None or tensor.shape[-2] <= 1:
        return True
    return tensor.stride(-2) == tensor.shape[-1] * tensor.stride(-1)


def is_wide(*tensors: Tensor | None) -> bool:
    """Whether an offset within one image may not fit in 31 bits, for any of the tensors."""
    reaches = [
        sum((n - 1) * s for n, s in zip(t.shape[1:], t.stride()[1:], strict=True))
        for t in tensors
        if t is not None and t.numel()
    ]
    # head room: pixel indices run past the end of the last tile
    return max(reaches, default=0) >= 2**31 - 2**20


def map_arguments(tensor: Tensor | None, stand_in: Tensor) -> tuple[Tensor, int, int, int]:
    """A [B,H,W] map as pointer and strides; `stand_in` is passed, never read, where it is None."""
    if tensor is None:
        return stand_in, 0, 0, 0
    if tensor.dtype == torch.bool:
        tensor = tensor.view(torch.uint8)
    return tensor, tensor.stride(0), tensor.stride(1), tensor.stride(2)


def box_arguments(
    boxes: Tensor | None, partner: Tensor | None, stand_in: Tensor
) -> tuple[Tensor, Tensor, bool]:
    """Boxes, partner (contiguous) and whether there are any."""
    if boxes is None or partner is None:
        return stand_in, stand_in, False
    return boxes.contiguous(), partner.contiguous(), True


def label_arguments(
    logits: Tensor, target: Tensor, ignore_mask: Tensor | None, ignore_index: int,
    confidence: Tensor | None, threshold: float, class_weight: Tensor | None,
    boxes: Tensor | None, partner: Tensor | None,
) -> tuple[tuple, dict[str, bool]]:  # fmt: skip
    """Arguments `target_ptr` to `partner_ptr` of the cross-entropy kernels, and their flags."""
    stand_in = logits
    boxes, partner, has_boxes = box_arguments(boxes, partner, stand_in)
    arguments = (
        *map_arguments(target, stand_in),
        *map_arguments(ignore_mask, stand_in), ignore_index,
        *map_arguments(confidence, stand_in), threshold,
        stand_in if class_weight is None else class_weight.contiguous(), boxes, partner,
    )  # fmt: skip
    flags = {
        "HAS_IGNORE": ignore_mask is not None,
        "HAS_CONFIDENCE": confidence is not None,
        "HAS_WEIGHT": class_weight is not None,
        "HAS_BOXES": has_boxes,
    }
    return arguments, flags


def device_guard(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the tensor's GPU the current one, on whose current stream Triton launches."""
    if tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()
