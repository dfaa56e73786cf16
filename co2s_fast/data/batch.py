"""One step's images and labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from co2s_fast.data.damage import Damaged


@dataclass
class Batch:
    """Tensors of one step on one rank; B labelled and B unlabelled images.

    Args:
        x: labelled images, weak view, uint8 (or float in [0, 1]) [B, C, H, W].
        y: their labels, uint8 [B, H, W], 255 ignored.
        w: unlabelled images, weak view. None where the method asks for no unlabelled view.
        s1: first strong view of the same crops, before CutMix.
        s2: second strong view.
        ignore: uint8 [B, H, W], 255 where the unlabelled crop is padding or has no data, else 0.
        boxes1: CutMix boxes of s1, int32 [B, 4] as (x1, y1, x2, y2), half open, zeros: no box.
        boxes2: CutMix boxes of s2.
        colours: what strong views are still to be made with, float32 [B, views, 10]; only between a
            worker and the device that makes them.
        truth: labels of the unlabelled crops, uint8 [B, H, W], 255 where there is none.
        labeled_files: names of the labelled images.
        unlabeled_files: names of the unlabelled images.
        damaged: images that should have been here and could not be read; others are in their place.
    """

    x: Tensor
    y: Tensor
    w: Tensor | None = None
    s1: Tensor | None = None
    s2: Tensor | None = None
    ignore: Tensor | None = None
    boxes1: Tensor | None = None
    boxes2: Tensor | None = None
    colours: Tensor | None = None
    truth: Tensor | None = None
    labeled_files: list[str] = field(default_factory=list)
    unlabeled_files: list[str] = field(default_factory=list)
    damaged: list[Damaged] = field(default_factory=list)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch on another device."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; the DataLoader calls this."""
        return self._map(lambda t: t.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        changed = {f.name: function(value) for f in fields(self)
                   if isinstance(value := getattr(self, f.name), Tensor)}
        return replace(self, **changed)
