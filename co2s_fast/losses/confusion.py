"""Confusion matrix straight from the decoder's logits."""

from __future__ import annotations

import torch
from torch import Tensor

import co2s_fast.ops  # noqa: F401 - registers torch.ops.co2s
from co2s_fast.losses._checks import (
    check_device,
    check_flag,
    check_ignore_index,
    check_logits,
    check_map,
    check_tensor,
)


def confusion_matrix(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = 255,
    out: Tensor | None = None,
    align_corners: bool = False,
) -> Tensor:
    """Count the pixels of each true class (rows) by predicted class (columns).

    With ``prediction = F.interpolate(logits, target.shape[1:], mode="bilinear",
    align_corners=align_corners).argmax(1)``, which is not stored, and ``valid = target !=
    ignore_index`` it equals ``torch.bincount((K * target + prediction)[valid],
    minlength=K * K).view(K, K)``, without a host synchronisation.

    Args:
        logits: [B,K,h,w] float16, bfloat16, float32 or float64 (the last on the CPU).
        target: [B,H,W] uint8, int32 or int64, classes in [0, K) or `ignore_index`.
        ignore_index: value that marks pixels without a label.
        out: int64 [K,K] to add the counts to, on the logits' device; None: start from zero.
        align_corners: as in `F.interpolate`; matters when h × w is not H × W.

    Returns:
        int64 [K,K] in pixels: `out`, or a new tensor.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape or device.
        IndexError: a class outside [0, K) that is not `ignore_index` (tensors on the CPU; on a GPU
            under `co2s_fast.ops.debug_checks`, such a pixel is otherwise not counted).
    """
    check_logits("logits", logits)
    check_map("target", target, logits, None, "integer")
    ignore_index = check_ignore_index(ignore_index)
    check_flag("align_corners", align_corners)
    classes = logits.shape[1]
    if out is None:
        out = torch.zeros(classes, classes, dtype=torch.int64, device=logits.device)
    else:
        check_tensor("out", out)
        if list(out.shape) != [classes, classes]:
            raise ValueError(f"out: expected shape [{classes}, {classes}], got {list(out.shape)}")
        if out.dtype != torch.int64:
            raise TypeError(f"out: expected int64, got {out.dtype}")
        check_device("out", out, logits.device)
    torch.ops.co2s.confusion_matrix(logits.detach(), target, ignore_index, align_corners, out)
    return out
