"""Pseudo-labels and their confidence."""

from __future__ import annotations

import torch
from torch import Tensor

import co2s_fast.ops  # noqa: F401 - registers torch.ops.co2s
from co2s_fast.losses._checks import check_logits, check_size


def softmax_confidence(
    logits: Tensor, size: tuple[int, int] | None = None, *, align_corners: bool = False
) -> tuple[Tensor, Tensor]:
    r"""Confidence and pseudo-label of every pixel: maximum and argmax of the class probabilities.

    .. math:: c_i = \max_k p_{ik}, \quad \hat y_i = \arg\max_k p_{ik}, \quad p = \mathrm{softmax}(z)

    Equals ``F.interpolate(logits, size, mode="bilinear",
    align_corners=align_corners).softmax(1).max(1)`` without storing the upsampled logits.

    Args:
        logits: [B,K,h,w] float16, bfloat16, float32 or float64.
        size: (H, W) of the result in pixels; None: h × w.
        align_corners: as in `F.interpolate`; matters when h × w is not H × W.

    Returns:
        confidence float32 [B,H,W] (float64 for float64 logits) and label int64 [B,H,W]. Ties go to
        the lowest class; a pixel with a NaN logit has confidence NaN and label 0. No gradient.

    Raises:
        TypeError: `logits` is no float tensor, or `size` no pair of ints.
        ValueError: a wrong shape or size.

    Source:
        Sohn et al., FixMatch (NeurIPS 2020), section 2.2; per pixel as in UniMatch (CVPR 2023).
    """
    check_logits("logits", logits)
    height, width = logits.shape[2:] if size is None else check_size(size)
    return torch.ops.co2s.softmax_confidence(logits.detach(), height, width, align_corners)
