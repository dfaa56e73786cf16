"""`torch.ops.co2s.cutmix_`: pastes boxes between the images of a batch, in place."""

from __future__ import annotations

from torch import Tensor

from co2s_fast.ops import reference
from co2s_fast.ops.registration import register


def _reference(images: Tensor, boxes: Tensor, partner: Tensor) -> None:
    images.copy_(reference.cutmix(images, boxes, partner))


def _fake(images: Tensor, boxes: Tensor, partner: Tensor) -> None:
    return None


def _debug_check(images: Tensor, boxes: Tensor, partner: Tensor) -> None:
    reference.check_partner(partner)


register("cutmix_", reference=_reference, fake=_fake, debug_check=_debug_check)
