"""Strong views made on the training device, in batch: for a GPU whose input pipeline is torch's.

Workers then ship the weak crop and the drawn numbers only. Kornia's functions take one factor an
image; jitter's parts come in another order for each image, so images that have the same part at
the same place are taken together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from co2s_fast.data.batch import Batch
from co2s_fast.data.draws import Colour
from co2s_fast.data.plan import STRONG

if TYPE_CHECKING:
    from co2s_fast.data.loader import Loader

PARTS = 4
NUMBERS = PARTS + 6
"""Of a `Colour` as a row: order (-1: nothing), four factors, grey, sigma."""


def pack(colour: Colour) -> list[float]:
    """A `Colour` as a row of NUMBERS."""
    order = [*colour.order, *[-1] * (PARTS - len(colour.order))]
    return [*order, colour.brightness, colour.contrast, colour.saturation, colour.hue,
            float(colour.gray), colour.sigma]


def unpack(row: Sequence[float]) -> Colour:
    """The `Colour` of a row."""
    order = tuple(int(part) for part in row[:PARTS] if part >= 0)
    *factors, gray, sigma = row[PARTS:]
    return Colour(order, *factors, gray=bool(gray), sigma=sigma)


class StrongOnDevice:
    """A loader that brings another's batches to the device and makes their strong views there."""

    def __init__(self, loader: Loader, device: torch.device) -> None:
        self.loader, self.device = loader, device

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.loader:
            colours = batch.colours  # read on the host: they decide what is launched
            moved = replace(batch, colours=None).to(self.device, non_blocking=True)
            yield moved if colours is None else add_strong_views(moved, colours)


@torch.no_grad()
def add_strong_views(batch: Batch, colours: Tensor) -> Batch:
    """The batch with the strong views whose boxes it has.

    Args:
        batch: with `w`, uint8 or float32 in [0, 1] [B, C, H, W].
        colours: float32 [B, V, NUMBERS] on the CPU, the V strong views in order.
    """
    names = [name for name in STRONG if getattr(batch, f"boxes{name[1:]}") is not None]
    rows = [unpack(row) for view in colours.unbind(1) for row in view.tolist()]
    views = strong_views(torch.cat([batch.w] * len(names)), rows)
    return replace(batch, **dict(zip(names, views.chunk(len(names)), strict=True)))


def strong_views(images: Tensor, colours: Sequence[Colour]) -> Tensor:
    """Jitter, grey and blur of each image by its own numbers.

    Means what `transforms.strong_view` means, rounded once at the end. Images of other than three
    bands have no hue, saturation or grey.

    Args:
        images: uint8, or float32 in [0, 1], [B, C, H, W].
        colours: B of them.

    Returns:
        [B, C, H, W] of the same type.
    """
    from kornia.color import rgb_to_grayscale
    from kornia.filters import gaussian_blur2d

    rgb = images.shape[1] == 3
    whole = images.dtype == torch.uint8
    x = images.float() / 255 if whole else images.clone()
    orders = [[p for p in c.order if rgb or p < 2] for c in colours]
    for slot in range(PARTS):
        for part, (name, change) in enumerate(_parts()):
            chosen = [i for i, order in enumerate(orders) if order[slot : slot + 1] == [part]]
            factors = [getattr(colours[i], name) for i in chosen]
            _change(x, chosen, change, factors)
    if rgb:
        chosen = [i for i, c in enumerate(colours) if c.gray]
        _change(x, chosen, lambda part: rgb_to_grayscale(part).expand_as(part))
    chosen = [i for i, c in enumerate(colours) if c.sigma]
    sigmas = [[colours[i].sigma] * 2 for i in chosen]
    side = 2 * max((math.ceil(3 * sigma) for sigma, _ in sigmas), default=0) + 1
    _change(x, chosen, lambda part, sigma: gaussian_blur2d(part, side, sigma, "replicate"), sigmas)
    if not whole:
        return x.clamp_(0, 1)
    return x.mul_(255).add_(0.5).clamp_(0, 255).to(torch.uint8)


def _parts() -> list[tuple[str, Callable[[Tensor, Tensor], Tensor]]]:
    """The parts of the jitter by their numbers in `Colour.order`."""
    from kornia import enhance

    return [
        ("brightness", enhance.adjust_brightness_accumulative),
        ("contrast", enhance.adjust_contrast_with_mean_subtraction),
        ("saturation", enhance.adjust_saturation_with_gray_subtraction),
        ("hue", lambda image, turns: enhance.adjust_hue(image, 2 * math.pi * turns)),
    ]


def _change(x: Tensor, chosen: Sequence[int], change: Callable[..., Tensor],
            factors: Iterable | None = None) -> None:
    """Replace the chosen images by their changed selves, in place."""
    if not chosen:
        return
    rows = torch.tensor(chosen, device=x.device)
    numbers = [] if factors is None else [torch.tensor(factors, device=x.device)]
    x[rows] = change(x[rows], *numbers)
