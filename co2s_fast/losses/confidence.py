"""Pseudo-labels and their confidence."""

from __future__ import annotations

import torch
from torch import Tensor

import co2s_fast.ops  # noqa: F401 - registers torch.ops.co2s
from co2s_fast.losses._checks import check_flag, check_logits, check_size


def softmax_confidence(
    logits: Tensor,
    size: tuple[int, int] | None = None,
    *,
    align_corners: bool = False,
    label_dtype: torch.dtype = torch.int64,
) -> tuple[Tensor, Tensor]:
    r"""Confidence and pseudo-label of every pixel: maximum and argmax of the class probabilities.

    .. math:: c_i = \max_k p_{ik}, \quad \hat y_i = \arg\max_k p_{ik}, \quad p = \mathrm{softmax}(z)

    Equals ``F.interpolate(logits, size, mode="bilinear",
    align_corners=align_corners).softmax(1).max(1)`` without storing the upsampled logits.

    Args:
        logits: [B,K,h,w] float16, bfloat16, float32 or float64 (the last on the CPU).
        size: (H, W) of the result in pixels; None: h × w.
        align_corners: as in `F.interpolate`; matters when h × w is not H × W.
        label_dtype: int64, or uint8 for K up to 255: an eighth of the memory, and the other
            losses take it as it is.

    Returns:
        confidence float32 [B,H,W] (float64 for float64 logits) and label [B,H,W]. Ties go to the
        lowest class; a pixel with a NaN logit has confidence NaN and label 0. No gradient.

    Raises:
        TypeError: `logits` is no float tensor, `size` no pair of ints, `align_corners` no bool, or
            another label_dtype.
        ValueError: a wrong shape or size, or more classes than label_dtype holds.

    Source:
        Sohn et al., FixMatch (NeurIPS 2020), section 2.2; per pixel as in UniMatch (CVPR 2023).
    """
    check_logits("logits", logits)
    height, width = logits.shape[2:] if size is None else check_size(size)
    check_flag("align_corners", align_corners)
    if label_dtype not in (torch.int64, torch.uint8):
        raise TypeError(f"label_dtype: expected torch.int64 or torch.uint8, found {label_dtype}")
    if label_dtype == torch.uint8 and logits.shape[1] > 255:
        raise ValueError(
            f"label_dtype: uint8 holds up to 255 classes beside ignore_index 255, found logits "
            f"of {logits.shape[1]} classes"
        )
    return torch.ops.co2s.softmax_confidence(
        logits.detach(), height, width, align_corners, label_dtype
    )
