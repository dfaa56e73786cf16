"""CutMix inside a batch: the boxes, and the image each box is taken from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import co2s_fast.ops  # noqa: F401 - registers torch.ops.co2s
from co2s_fast.losses._checks import can_read, check_tensor
from co2s_fast.ops import reference
from co2s_fast.ops.dispatch import debugging

_INDICES = (torch.uint8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True, eq=False)
class CutMix:
    """Boxes to paste between the images of one batch.

    A pixel (y, x) of image b with x1 <= x < x2 and y1 <= y < y2 is taken from image partner[b]:

        mixed[b] = torch.where(inside_box[b], images[partner[b]], images[b])

    Given to `masked_cross_entropy`, the target, confidence and ignore mask are read through the
    boxes, so that no mixed copy of them is made.

    Args:
        boxes: int32 [B,4], (x1, y1, x2, y2) in pixels of the label grid, half-open; empty where
            x2 <= x1 or y2 <= y1; what lies outside the image is cut off.
        partner: int64 [B], index in [0, B) of the image in the batch that the box is taken from.

    Raises:
        TypeError: an argument is no tensor of integers.
        ValueError: a wrong shape, or the two lie on different devices.
        IndexError: a partner is outside [0, B) (tensors on the CPU; on a GPU only under
            `co2s_fast.ops.debug_checks`, such a box is otherwise treated as empty).

    Source:
        Yun et al., CutMix (ICCV 2019), section 3; in-batch boxes as in UniMatch (CVPR 2023).
    """

    boxes: Tensor  # int32 [B,4]
    partner: Tensor  # int64 [B]

    def __post_init__(self) -> None:
        check_tensor("boxes", self.boxes)
        check_tensor("partner", self.partner)
        if self.boxes.dim() != 2 or self.boxes.shape[1] != 4:
            raise ValueError(f"boxes: expected shape [B,4], got {list(self.boxes.shape)}")
        if self.partner.dim() != 1 or self.partner.shape[0] != self.boxes.shape[0]:
            raise ValueError(
                f"partner: expected shape [{self.boxes.shape[0]}], one for each box, "
                f"got {list(self.partner.shape)}"
            )
        for name in ("boxes", "partner"):
            if getattr(self, name).dtype not in _INDICES:
                raise TypeError(f"{name}: expected integers (uint8, int16, int32 or int64), "
                                f"got {getattr(self, name).dtype}")
        if self.boxes.device != self.partner.device:
            raise ValueError(
                f"partner: expected on {self.boxes.device} like the boxes, "
                f"got {self.partner.device}"
            )
        boxes = self.boxes
        if boxes.dtype == torch.int64:  # what lies beyond int32 is outside any image
            limits = torch.iinfo(torch.int32)
            boxes = boxes.clamp(limits.min, limits.max)
        object.__setattr__(self, "boxes", boxes.to(torch.int32).contiguous())
        object.__setattr__(self, "partner", self.partner.to(torch.int64).contiguous())
        if can_read(self.partner):
            reference.check_partner(self.partner)

    @classmethod
    def from_masks(cls, masks: Tensor, partner: Tensor) -> CutMix:
        """Of masks that are 1 (or True) inside one rectangle, as UniMatch's loader yields them.

        Args:
            masks: [B,H,W], any dtype; non-zero inside the box, all 0 for none.
            partner: int64 [B], see the class.

        Raises:
            TypeError: an argument is no tensor.
            ValueError: a wrong shape or device; a mask that is no filled rectangle (tensors on the
                CPU; on a GPU only under `co2s_fast.ops.debug_checks`, and the box is otherwise the
                smallest around it).
        """
        check_tensor("masks", masks)
        if masks.dim() != 3 or not all(masks.shape[1:]):
            raise ValueError(f"masks: expected shape [B,H,W], got {list(masks.shape)}")
        inside = masks != 0
        sides = []
        for across in (inside.any(1), inside.any(2)):  # columns, rows
            length = across.shape[1]
            place = torch.arange(length, device=masks.device)
            first = torch.where(across, place, length).amin(1)
            sides.append((first, torch.where(across, place + 1, 0).amax(1)))
        (x1, x2), (y1, y2) = sides
        boxes = torch.stack([x1, y1, x2, y2], 1)
        if can_read(masks) or debugging():
            area = (x2 - x1).clamp(min=0) * (y2 - y1).clamp(min=0)
            count = inside.sum((1, 2))
            wrong = (count != area).nonzero()
            if len(wrong):
                image = int(wrong[0])
                raise ValueError(
                    f"masks: image {image} is no filled rectangle, but {int(count[image])} of the "
                    f"{int(area[image])} pixels of one"
                )
        return cls(boxes, partner)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> CutMix:
        """The same boxes on another device."""
        return CutMix(
            self.boxes.to(device, non_blocking=non_blocking),
            self.partner.to(device, non_blocking=non_blocking),
        )

    def mix_(self, images: Tensor) -> Tensor:
        """Paste the boxes into `images` in place; every box shows its partner's original pixels.

        Args:
            images: [B,C,H,W] or [B,H,W], any dtype, not requiring grad.

        Returns:
            `images`.

        Raises:
            TypeError: `images` is no tensor.
            ValueError: a wrong shape or device, or `images` requires grad.
        """
        self._check("images", images, (3, 4))
        torch.ops.co2s.cutmix_(images, self.boxes, self.partner)
        return images

    def mix_maps(self, maps: Tensor) -> Tensor:
        """A mixed copy of labels, confidences or masks.

        Args:
            maps: [B,H,W], any dtype, not requiring grad.

        Returns:
            A new tensor of the same shape and dtype.

        Raises:
            TypeError: `maps` is no tensor.
            ValueError: a wrong shape or device, or `maps` requires grad.
        """
        self._check("maps", maps, (3,))
        mixed = maps.clone()
        torch.ops.co2s.cutmix_(mixed, self.boxes, self.partner)
        return mixed

    def _check(self, name: str, value: Tensor, dims: tuple[int, ...]) -> None:
        check_tensor(name, value)
        if value.dim() not in dims or value.shape[0] != self.boxes.shape[0]:
            shapes = " or ".join("[B,H,W]" if dim == 3 else "[B,C,H,W]" for dim in dims)
            raise ValueError(
                f"{name}: expected shape {shapes} with B = {self.boxes.shape[0]}, "
                f"got {list(value.shape)}"
            )
        if value.device != self.boxes.device:
            raise ValueError(
                f"{name}: expected on {self.boxes.device} like the boxes, got {value.device}"
            )
        if value.requires_grad:
            raise ValueError(f"{name}: expected a tensor without grad, got one that requires it")
