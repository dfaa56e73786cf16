"""CutMix boxes of half an image, as U2PL and WSCL draw them, and boxes as masks."""

from __future__ import annotations

import torch
from torch import Tensor

from co2s_fast.methods.base import own_rows


def half_area_boxes(
    images: int, size: tuple[int, int], generator: torch.Generator, part: int = 0, parts: int = 1
) -> torch.Tensor:
    """A rectangle of half the area for each image, drawn for the global batch, this rank's share.

    The width is uniform in [W / 2 + 1, W - 1] and so is the place (the releases of U2PL and WSCL).

    Args:
        images: of this rank's part of the batch.
        size: (H, W) of an image, at least 4 x 4.
        generator: a CPU generator in the same state on every rank.
        part: which of the equal parts of this rank's share the images are.
        parts: how many there are.

    Returns:
        int32 [images, 4] on the CPU, (x1, y1, x2, y2), half-open.
    """
    height, width = size
    draws = own_rows(images, 3, generator, part, parts)
    wide = (width // 2 + 1 + (draws[:, 0] * (width - 1 - width // 2)).floor()).clamp(max=width - 1)
    high = (height * width / 2 / wide).round()
    x = (draws[:, 1] * (width - wide + 1)).floor()
    y = (draws[:, 2] * (height - high + 1)).floor()
    return torch.stack([x, y, x + wide, y + high], 1).to(torch.int32)


def box_masks(boxes: Tensor, size: torch.Size) -> Tensor:
    """[B, H, W] bool, True inside each image's half-open box (x1, y1, x2, y2)."""
    height, width = size
    y = torch.arange(height, device=boxes.device)[None, :, None]
    x = torch.arange(width, device=boxes.device)[None, None, :]
    x1, y1, x2, y2 = (side[:, None, None] for side in boxes.unbind(1))
    return (x >= x1) & (x < x2) & (y >= y1) & (y < y2)
