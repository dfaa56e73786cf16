# ruff: noqa: ANN001, ANN202 - device functions are typed by what they are called with
"""Cross-entropy over valid and confident pixels, read through CutMix boxes.

One program a tile of P consecutive output pixels, one online-softmax pass over the classes,
partial sums added by a second kernel. A tile without a confident pixel reads no logit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import (
    WARPS,
    check_logits,
    device_guard,
    is_flat,
    is_wide,
    label_arguments,
    pixel_tile,
    resampling,
)
from .masked_cross_entropy_backward import masked_cross_entropy_backward
from .pixel_labels import load_box, read_pixels
from .pixel_math import online_softmax, pixel_stencil, split_program
from .sums import launch_mean_of_partials, launch_sum_partials

__all__ = ["masked_cross_entropy", "masked_cross_entropy_backward"]


@triton.jit
def _masked_cross_entropy_kernel(
    map_ptr, values_ptr, counts_ptr, programs,
    logits_ptr, logits_b_stride, logits_k_stride, logits_y_stride, logits_x_stride,
    h, w, y_scale, x_scale, height, width, batch, tiles,
    target_ptr, target_b_stride, target_y_stride, target_x_stride,
    ignore_ptr, ignore_b_stride, ignore_y_stride, ignore_x_stride, ignore_index,
    confidence_ptr, confidence_b_stride, confidence_y_stride, confidence_x_stride, threshold,
    weight_ptr, boxes_ptr, partner_ptr,
    HAS_IGNORE: tl.constexpr, HAS_CONFIDENCE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BOXES: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, P: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr, RESAMPLE: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
    PER_PIXEL: tl.constexpr,
):  # fmt: skip
    """P output pixels a program: their losses to `map` [B,H,W], or their sum to `values`.

    `values` float32 [1, programs]; `counts` int32 [2, programs]: valid, and valid and confident.
    """
    image, p = split_program(tiles, P, WIDE)
    y = p // width
    x = p - y * width
    in_tile = p < height * width
    box = load_box(boxes_ptr, partner_ptr, image, HAS_BOXES)
    label, valid, taken = read_pixels(
        (target_ptr, target_b_stride, target_y_stride, target_x_stride),
        (ignore_ptr, ignore_b_stride, ignore_y_stride, ignore_x_stride), ignore_index,
        (confidence_ptr, confidence_b_stride, confidence_y_stride, confidence_x_stride), threshold,
        image, batch, p, y, x, box, in_tile, K, HAS_IGNORE, HAS_CONFIDENCE, HAS_BOXES, FLAT,
    )  # fmt: skip
    loss = tl.zeros([P], tl.float32)
    taken_count = tl.sum(taken.to(tl.int32), 0)
    if taken_count > 0:
        stencil = pixel_stencil(
            p, y, x, h, w, logits_y_stride, logits_x_stride, y_scale, x_scale,
            ALIGN_CORNERS, RESAMPLE, FLAT,
        )  # fmt: skip
        shift, total, picked, _ = online_softmax(
            logits_ptr + image * logits_b_stride, logits_k_stride, stencil, in_tile, label,
            K, BLOCK_K, RESAMPLE,
        )  # fmt: skip
        loss = tl.log(total) - (picked - shift)
        if HAS_WEIGHT:
            loss = loss * tl.load(weight_ptr + label, mask=taken, other=0.0).to(tl.float32)
        loss = tl.where(taken, loss, 0.0)
    program = tl.program_id(0)
    if PER_PIXEL:
        tl.store(map_ptr + image * (height * width) + p, loss, mask=in_tile)
        tl.store(values_ptr + program, 0.0)
    else:
        tl.store(values_ptr + program, tl.sum(loss, 0))
    tl.store(counts_ptr + program, tl.sum(valid.to(tl.int32), 0))
    tl.store(counts_ptr + programs + program, taken_count)


def masked_cross_entropy(
    logits: Tensor, target: Tensor, confidence: Tensor | None, threshold: float,
    ignore_mask: Tensor | None, ignore_index: int, class_weight: Tensor | None,
    boxes: Tensor | None, partner: Tensor | None, per_pixel: bool, align_corners: bool,
    with_grad: bool, mean_over: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Sum (or map) of cross-entropy over valid and confident pixels.

    Args:
        logits: [B,K,h,w] float32, bfloat16 or float16, any strides.
        target: uint8, int32 or int64 [B,H,W], any strides; a class outside [0,K) is not valid.
        confidence: [B,H,W] in [0, 1], or None where every valid pixel counts.
        threshold: smallest confidence that counts.
        ignore_mask: integer [B,H,W], padding where it equals ignore_index.
        ignore_index: the label of pixels that do not count.
        class_weight: [K], multiplies the losses.
        boxes: int32 [B,4] (x1, y1, x2, y2), in which the maps are read from the partner image.
        partner: int64 [B].
        per_pixel: return a map instead of the sum.
        align_corners: as in `F.interpolate`.
        with_grad: not used: the backward recomputes.
        mean_over: which count divides the sum, 0 or 1; -1: none.

    Returns:
        loss float32, [] or [B,H,W]; counts int64 [2] = (valid, taken); an empty float32 tensor; one
        over the divisor, float32 [], or empty.

    Raises:
        TypeError: another dtype of logits.
        ValueError: another shape.
    """
    check_logits(logits)
    batch, num_classes = logits.shape[:2]
    height, width = target.shape[1:]
    loss_map = logits.new_empty((batch, height, width) if per_pixel else 0, dtype=torch.float32)
    saved = logits.new_empty(0, dtype=torch.float32)
    if target.numel() == 0:
        loss = loss_map if per_pixel else logits.new_zeros((), dtype=torch.float32)
        scale = logits.new_ones((0,) if mean_over < 0 else (), dtype=torch.float32)
        return loss, logits.new_zeros(2, dtype=torch.int64), saved, scale
    grid = resampling(logits, height, width, align_corners)
    block_k, p = pixel_tile(num_classes, logits.element_size(), grid.resample)
    tiles = triton.cdiv(height * width, p)
    programs = batch * tiles
    values = logits.new_empty((1, programs), dtype=torch.float32)
    counts = logits.new_empty((2, programs), dtype=torch.int32)
    labels, flags = label_arguments(
        logits, target, ignore_mask, ignore_index, confidence, threshold,
        class_weight, boxes, partner,
    )  # fmt: skip
    with device_guard(logits):
        _masked_cross_entropy_kernel[(programs,)](
            loss_map, values, counts, programs, logits, *logits.stride(), *grid.arguments,
            height, width, batch, tiles, *labels, **flags,
            K=num_classes, BLOCK_K=block_k, P=p, ALIGN_CORNERS=align_corners,
            RESAMPLE=grid.resample,
            FLAT=all(map(is_flat, (logits, target, confidence, ignore_mask))),
            WIDE=is_wide(logits, target, confidence, ignore_mask), PER_PIXEL=per_pixel,
            num_warps=WARPS,
        )  # fmt: skip
        if mean_over >= 0:
            mean, totals, scale = launch_mean_of_partials(values, counts, mean_over)
            return mean.view(()), totals, saved, scale.view(())
        sums, totals = launch_sum_partials(values, counts)
    scale = logits.new_empty(0, dtype=torch.float32)
    return (loss_map if per_pixel else sums.view(())), totals, saved, scale
