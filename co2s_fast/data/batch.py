"""One step's images and labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from itertools import chain

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
        part: which of the equal parts of a step's batch this is, counted from 0; see `parts`.
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
    part: int = 0

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch on a device: itself where all of it is there.

        Even a copy that has nothing to do lets another thread run Python first.
        """
        if all(tensor.device == torch.device(device) for tensor in self._tensors().values()):
            return self
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; the DataLoader calls this."""
        return self._map(lambda t: t.pin_memory())

    def parts(self, count: int) -> list[Batch]:
        """The batch in `count` equal parts, views of its tensors.

        Of unlabelled images that come in two augmentations, 2B of them, a part has both.

        Raises:
            ValueError: B is not divisible by `count`.
        """
        size = len(self.x)
        if size % count:
            raise ValueError(f"a batch of {size} images cannot be divided into {count} parts")
        if count == 1:
            return [self]
        share = size // count

        def cut(value: Tensor | list[str], start: int) -> Tensor | list[str]:
            pieces = [value[at : at + share] for at in range(start, len(value), size)]
            if len(pieces) == 1:
                return pieces[0]
            return list(chain(*pieces)) if isinstance(value, list) else torch.cat(pieces)

        whole = {f.name: value for f in fields(self)
                 if isinstance(value := getattr(self, f.name), (Tensor, list)) and len(value)}
        damaged = whole.pop("damaged", [])
        return [
            replace(self, part=part, damaged=damaged if part == 0 else [],
                    **{name: cut(value, part * share) for name, value in whole.items()})
            for part in range(count)
        ]  # fmt: skip

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        return replace(self, **{name: function(t) for name, t in self._tensors().items()})

    def _tensors(self) -> dict[str, Tensor]:
        return {f.name: value for f in fields(self)
                if isinstance(value := getattr(self, f.name), Tensor)}
