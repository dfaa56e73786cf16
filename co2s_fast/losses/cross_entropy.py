"""Cross-entropy over confident pixels, with virtual upsampling and CutMix read through the box."""

from __future__ import annotations

import torch
from torch import Tensor

from co2s_fast.losses._checks import (
    check_class_weight,
    check_device,
    check_flag,
    check_ignore_index,
    check_logits,
    check_map,
    check_threshold,
    recordable,
)
from co2s_fast.losses.cutmix import CutMix
from co2s_fast.ops.masked_cross_entropy import masked_cross_entropy as masked_cross_entropy_op

REDUCTIONS = ("valid", "confident", "sum", "none")
MEAN_OVER = {"valid": 0, "confident": 1}  # which of the counts divides the sum


def masked_cross_entropy(
    logits: Tensor,
    target: Tensor,
    confidence: Tensor | None = None,
    *,
    threshold: float = 0.95,
    ignore_mask: Tensor | None = None,
    ignore_index: int = 255,
    class_weight: Tensor | None = None,
    cutmix: CutMix | None = None,
    reduction: str = "valid",
    align_corners: bool = False,
) -> Tensor:
    r"""Cross-entropy summed over valid, confident pixels, divided by the count of valid pixels.

    .. math:: L = \frac{\sum_i v_i\,[c_i \ge \tau]\; w_{y_i}\,(-\log p_{i,y_i})}{\sum_i v_i}

    where pixel i is valid (v_i = 1) if ``target != ignore_index`` and ``ignore_mask !=
    ignore_index``. With ``z = F.interpolate(logits, target.shape[1:], mode="bilinear",
    align_corners=align_corners)``, which is never stored, it equals::

        loss = F.cross_entropy(z, target, weight=class_weight, ignore_index=255, reduction="none")
        valid = (target != 255) & (ignore_mask != 255)
        loss = (loss * (valid & (confidence >= threshold))).sum() / valid.sum()

    Args:
        logits: [B,K,h,w] float16, bfloat16, float32 or float64 (the last on the CPU), any strides.
        target: [B,H,W] uint8, int32 or int64, classes in [0, K) or `ignore_index`.
        confidence: [B,H,W] floating, of the pseudo-labels; None: every pixel is confident. NaN is
            not confident. No gradient flows into it.
        threshold: τ in [0, 1].
        ignore_mask: [B,H,W] uint8, int32 or int64; a pixel is left out where it is `ignore_index`.
        ignore_index: value that marks pixels without a label, in `target` and `ignore_mask`.
        class_weight: [K] floating, multiplies the cross-entropy; the counts stay unweighted.
        cutmix: boxes through which `target`, `confidence` and `ignore_mask` are read.
        reduction: "valid" (as above), "confident" (divide by the count of valid and confident
            pixels), "sum", or "none" (map [B,H,W], 0 at pixels that do not take part).
        align_corners: as in `F.interpolate`; matters when h × w is not H × W.

    Returns:
        Scalar, or [B,H,W] for "none"; float32, float64 for float64 logits. Without a pixel to
        divide by it is 0 with gradient 0.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape or device, `threshold` outside [0, 1], an unknown reduction.
        IndexError: a class outside [0, K) that is not `ignore_index` (tensors on the CPU; on a GPU
            under `co2s_fast.ops.debug_checks`, such a pixel is otherwise not valid).

    Source:
        Yang et al., UniMatch (CVPR 2023), equations (2) and (4), with the divisors of its release.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    loss, _counts = _terms(
        logits, target, confidence, threshold, ignore_mask, ignore_index, class_weight, cutmix,
        reduction, align_corners,
    )  # fmt: skip
    return loss


def masked_cross_entropy_terms(
    logits: Tensor,
    target: Tensor,
    confidence: Tensor | None = None,
    *,
    threshold: float = 0.95,
    ignore_mask: Tensor | None = None,
    ignore_index: int = 255,
    class_weight: Tensor | None = None,
    cutmix: CutMix | None = None,
    align_corners: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum and the two divisors of `masked_cross_entropy`, for a global mean over processes.

    Equals ``masked_cross_entropy(..., reduction="sum")`` with the counts it can be divided by.

    Args:
        logits: as in `masked_cross_entropy`, and so are the others.
        target: [B,H,W].
        confidence: [B,H,W] or None.
        threshold: τ in [0, 1].
        ignore_mask: [B,H,W] or None.
        ignore_index: value that marks pixels without a label.
        class_weight: [K] or None.
        cutmix: boxes through which the maps are read, or None.
        align_corners: as in `F.interpolate`.

    Returns:
        (sum, valid, confident): the differentiable sum, a float scalar; the count of valid pixels
        and of valid and confident pixels, int64 scalars on the logits' device.

    Raises:
        TypeError, ValueError, IndexError: as `masked_cross_entropy`.
    """
    loss, counts = _terms(
        logits, target, confidence, threshold, ignore_mask, ignore_index, class_weight, cutmix,
        "sum", align_corners,
    )  # fmt: skip
    return loss, counts[0], counts[1]


def _terms(
    logits: Tensor,
    target: Tensor,
    confidence: Tensor | None,
    threshold: float,
    ignore_mask: Tensor | None,
    ignore_index: int,
    class_weight: Tensor | None,
    cutmix: CutMix | None,
    reduction: str,
    align_corners: bool,
) -> tuple[Tensor, Tensor]:
    """Checked arguments into the op: (loss, counts)."""
    check_logits("logits", logits)
    check_map("target", target, logits, None, "integer")
    size = target.shape[1:]
    threshold = check_threshold(threshold)
    ignore_index = check_ignore_index(ignore_index)
    check_flag("align_corners", align_corners)
    if confidence is not None:
        check_map("confidence", confidence, logits, size, "float")
        confidence = confidence.detach()
        # Compared in its own dtype, as `confidence >= threshold` is. A compiled graph would be made
        # anew for every threshold that the operator gets.
        if confidence.dtype != torch.float32 or torch.compiler.is_compiling():
            confidence, threshold = (confidence >= threshold).float(), 0.5
    if ignore_mask is not None:
        check_map("ignore_mask", ignore_mask, logits, size, "integer")
    if class_weight is not None:
        check_class_weight(class_weight, logits)
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        class_weight = class_weight.to(wide).contiguous()
    boxes = partner = None
    if cutmix is not None:
        if not isinstance(cutmix, CutMix):
            raise TypeError(f"cutmix: expected a CutMix, got {type(cutmix).__name__}")
        if cutmix.boxes.shape[0] != logits.shape[0]:
            raise ValueError(
                f"cutmix: expected {logits.shape[0]} boxes, one for each image, "
                f"got {cutmix.boxes.shape[0]}"
            )
        check_device("cutmix", cutmix.boxes, logits.device)
        boxes, partner = cutmix.boxes, cutmix.partner
    # On equal grids a saved gradient is as large as the logits: recomputing it moves fewer bytes.
    small = logits.shape[2:] != target.shape[1:]
    with_grad = logits.requires_grad and torch.is_grad_enabled() and small
    if logits.requires_grad:
        target, confidence, ignore_mask, class_weight, boxes, partner = map(
            recordable, (target, confidence, ignore_mask, class_weight, boxes, partner))
    loss, counts, *_ = masked_cross_entropy_op(
        logits, target, confidence, threshold, ignore_mask, ignore_index, class_weight,
        boxes, partner, reduction == "none", align_corners, with_grad, MEAN_OVER.get(reduction, -1),
    )  # fmt: skip
    return loss, counts
