"""`torch.ops.co2s.confusion_matrix`: truth against prediction, accumulated in place."""

from __future__ import annotations

from torch import Tensor

from co2s_fast.ops import reference
from co2s_fast.ops.registration import register


def _reference(
    logits: Tensor, target: Tensor, ignore_index: int, align_corners: bool, out: Tensor
) -> None:
    out += reference.confusion_matrix(logits, target, ignore_index, align_corners)


def _fake(
    logits: Tensor, target: Tensor, ignore_index: int, align_corners: bool, out: Tensor
) -> None:
    return None


def _debug_check(
    logits: Tensor, target: Tensor, ignore_index: int, align_corners: bool, out: Tensor
) -> None:
    label = target.long()
    reference.check_classes(label, label != ignore_index, logits.shape[1], ignore_index)


register("confusion_matrix", reference=_reference, fake=_fake, debug_check=_debug_check)
