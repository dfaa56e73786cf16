"""What MUCA does to unlabelled images: turns that can be undone, noise, something pasted or erased.

All of it is drawn on the CPU as a few numbers an image, for the global batch, and made on the
device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from co2s_fast.errors import UsageError

TURNS = 8  # four rotations, mirrored or not


def turn(maps: Tensor, turns: Tensor, *, back: bool = False) -> Tensor:
    """Rotate and mirror each map by its own of the eight ways.

    Args:
        maps: [B, C, n, n], any type.
        turns: int64 [B]; t is t mod 4 quarter turns, mirrored afterwards where t >= 4.
        back: undo it.

    Raises:
        UsageError: the maps are not square.
    """
    height, width = maps.shape[-2:]
    if height != width:
        raise UsageError(f"method muca turns images by 90 degrees, which takes square ones, found "
                         f"{height} x {width}")  # fmt: skip
    places = torch.arange(height * width, device=maps.device).view(height, width)
    turned = [places.rot90(quarters) for quarters in range(4)]
    table = torch.stack([*turned, *(each.flip(1) for each in turned)]).flatten(1)
    if back:
        table = table.argsort(1)
    source = table[turns][:, None].expand(-1, maps.shape[1], -1)
    return maps.flatten(2).gather(2, source).unflatten(2, (height, width))


def noise(keys: Tensor, shape: torch.Size) -> Tensor:
    """Standard normal numbers that are a function of one key an image, on the keys' device.

    A hash counts through an image's places, so that neither the device nor a generator's state
    matters; 32 bits make one number (Box and Muller).

    Args:
        keys: int64 [B], in [0, 2^32).
        shape: of one image.

    Returns:
        float32 [B, *shape].
    """
    places = torch.arange(math.prod(shape), device=keys.device)
    bits = _hash(_hash(places) ^ keys[:, None])
    radius = (-2 * (((bits >> 16).float() + 0.5) / 2**16).log()).sqrt()
    angle = ((bits & 0xFFFF).float() + 0.5) * (2 * math.pi / 2**16)
    return (radius * angle.cos()).unflatten(1, shape)


def _hash(x: Tensor) -> Tensor:
    """A bijection of 32-bit numbers, held in int64; the factors keep products inside of it."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * (0x846CA68B - 2**32)) & 0xFFFFFFFF
    return x ^ (x >> 16)


def strong_boxes(side: int, common: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Where a step's strong views are changed: all by one CutMix box, or each by a square.

    The box has 1 - λ of the area, λ ~ Beta(1, 1), around a uniform centre, cut off at the border
    (Yun et al., CutMix, ICCV 2019). A square has 1 to 5 % of the area and lies inside the image.

    Args:
        side: of the images, in pixels.
        common: uniform numbers, [4]: which of the two, λ, and the centre.
        own: uniform numbers, [B, 3]: area and place of each image's square.

    Returns:
        boxes int32 [B, 4], (x1, y1, x2, y2), half-open; and bool [], whether they are the one box.
    """
    half = ((1 - common[1]).sqrt() * side / 2).floor()
    centre = (common[2:] * side).floor()
    box = torch.cat([centre - half, centre + half]).clamp(0, side)
    length = ((0.01 + 0.04 * own[:, :1]).sqrt() * side).round().clamp(1, side)
    corner = (own[:, 1:] * (side - length + 1)).floor()
    squares = torch.cat([corner, corner + length], 1)
    pastes = common[0] < 0.5
    return torch.where(pastes, box, squares).to(torch.int32), pastes
