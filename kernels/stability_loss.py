# ruff: noqa: ANN001, ANN202 - device functions are typed by what they are called with
"""Stability loss between two students: squared distance of their probabilities where one learns.

One program a tile of P consecutive output pixels of both students; partial sums and counts are
added by a second kernel. The two grids of logits may differ.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import (
    UNFUSED,
    WARPS,
    device_guard,
    is_flat,
    is_wide,
    map_arguments,
    matched_pair,
    pixel_tile,
    resampling,
)
from .pixel_labels import learners, read_unmasked
from .pixel_math import (
    load_tile,
    online_softmax,
    pixel_stencil,
    reciprocal,
    softmax_tile,
    split_program,
)
from .stability_loss_backward import stability_loss_backward
from .sums import launch_mean_of_partials, launch_sum_partials

__all__ = ["stability_loss", "stability_loss_backward"]


@triton.jit
def _stability_loss_kernel(
    values_ptr, counts_ptr, programs,
    a_ptr, a_b_stride, a_k_stride, a_y_stride, a_x_stride, a_h, a_w, a_y_scale, a_x_scale,
    b_ptr, b_b_stride, b_k_stride, b_y_stride, b_x_stride, b_h, b_w, b_y_scale, b_x_scale,
    height, width, tiles, threshold,
    ignore_ptr, ignore_b_stride, ignore_y_stride, ignore_x_stride, ignore_index,
    HAS_IGNORE: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, P: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr, RESAMPLE_A: tl.constexpr, RESAMPLE_B: tl.constexpr,
    FLAT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """P output pixels a program: `values` float32 and `counts` int32, each [2, programs]."""
    image, p = split_program(tiles, P, WIDE)
    y = p // width
    x = p - y * width
    in_tile = p < height * width
    valid = read_unmasked(
        (ignore_ptr, ignore_b_stride, ignore_y_stride, ignore_x_stride), ignore_index,
        image, p, y, x, in_tile, HAS_IGNORE, FLAT,
    )  # fmt: skip
    stencil_a = pixel_stencil(
        p, y, x, a_h, a_w, a_y_stride, a_x_stride, a_y_scale, a_x_scale,
        ALIGN_CORNERS, RESAMPLE_A, FLAT,
    )  # fmt: skip
    stencil_b = pixel_stencil(
        p, y, x, b_h, b_w, b_y_stride, b_x_stride, b_y_scale, b_x_scale,
        ALIGN_CORNERS, RESAMPLE_B, FLAT,
    )  # fmt: skip
    a_image_ptr = a_ptr + image * a_b_stride
    b_image_ptr = b_ptr + image * b_b_stride
    if K <= BLOCK_K:
        classes = tl.arange(0, BLOCK_K)
        z_a = load_tile(a_image_ptr, classes, a_k_stride, stencil_a, in_tile, K, RESAMPLE_A)
        z_b = load_tile(b_image_ptr, classes, b_k_stride, stencil_b, in_tile, K, RESAMPLE_B)
        p_a, sure_a = softmax_tile(z_a)
        p_b, sure_b = softmax_tile(z_b)
        distance = tl.sum((p_a - p_b) * (p_a - p_b), 0)
    else:
        no_label = tl.full([P], -1, tl.int32)
        shift_a, total_a, _, _ = online_softmax(
            a_image_ptr, a_k_stride, stencil_a, in_tile, no_label, K, BLOCK_K, RESAMPLE_A
        )
        shift_b, total_b, _, _ = online_softmax(
            b_image_ptr, b_k_stride, stencil_b, in_tile, no_label, K, BLOCK_K, RESAMPLE_B
        )
        sure_a = reciprocal(total_a)
        sure_b = reciprocal(total_b)
        # a second pass: expanding the square to stay in one would cancel near agreement
        distance = tl.zeros([P], tl.float32)
        for start in range(0, K, BLOCK_K):
            classes = start + tl.arange(0, BLOCK_K)
            z_a = load_tile(a_image_ptr, classes, a_k_stride, stencil_a, in_tile, K, RESAMPLE_A)
            z_b = load_tile(b_image_ptr, classes, b_k_stride, stencil_b, in_tile, K, RESAMPLE_B)
            p_a = tl.exp(z_a - shift_a[None, :]) * sure_a[None, :]
            p_b = tl.exp(z_b - shift_b[None, :]) * sure_b[None, :]
            distance += tl.sum((p_a - p_b) * (p_a - p_b), 0)
    a_learns, b_learns = learners(sure_a, sure_b, threshold, valid)
    program = tl.program_id(0)
    tl.store(values_ptr + program, tl.sum(tl.where(a_learns, distance, 0.0), 0))
    tl.store(values_ptr + programs + program, tl.sum(tl.where(b_learns, distance, 0.0), 0))
    tl.store(counts_ptr + program, tl.sum(a_learns.to(tl.int32), 0))
    tl.store(counts_ptr + programs + program, tl.sum(b_learns.to(tl.int32), 0))


def stability_loss(
    logits_a: Tensor, logits_b: Tensor, threshold: float, height: int, width: int,
    ignore_mask: Tensor | None, ignore_index: int, align_corners: bool,
    with_grad_a: bool, with_grad_b: bool, mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Σ_k (p_a - p_b)² summed where a learns and where b learns, with the counts of those pixels.

    a learns where b is confident and no less sure than a; b likewise; equal and confident: both.

    Args:
        logits_a: [B,K,h,w] float32, bfloat16 or float16, any strides.
        logits_b: [B,K,h',w'], likewise; its grid may differ.
        threshold: smallest confidence to learn from.
        height: H of the output grid.
        width: W of the output grid.
        ignore_mask: integer [B,H,W], padding where it equals ignore_index, or None.
        ignore_index: see ignore_mask.
        align_corners: as in `F.interpolate`.
        with_grad_a: not used: the backward recomputes.
        with_grad_b: not used.
        mean: divide each sum by K times its count, taken as at least 1.

    Returns:
        sums float32 [2], counts int64 [2], two empty float32 tensors, and one over the divisors,
        float32 [2], or empty.

    Raises:
        TypeError: another dtype of logits.
        ValueError: another shape.
    """
    logits_a, logits_b = matched_pair(logits_a, logits_b)
    batch, num_classes = logits_a.shape[:2]
    empty = [logits_a.new_empty(0, dtype=torch.float32) for _ in range(2)]
    if batch * height * width == 0:
        sums = logits_a.new_zeros(2, dtype=torch.float32)
        scale = logits_a.new_full((2 if mean else 0,), 1 / num_classes, dtype=torch.float32)
        return sums, logits_a.new_zeros(2, dtype=torch.int64), *empty, scale
    grid_a = resampling(logits_a, height, width, align_corners)
    grid_b = resampling(logits_b, height, width, align_corners)
    block_k, p = pixel_tile(
        num_classes, logits_a.element_size(), grid_a.resample or grid_b.resample
    )
    tiles = triton.cdiv(height * width, p)
    programs = batch * tiles
    values = logits_a.new_empty((2, programs), dtype=torch.float32)
    counts = logits_a.new_empty((2, programs), dtype=torch.int32)
    with device_guard(logits_a):
        _stability_loss_kernel[(programs,)](
            values, counts, programs, logits_a, *logits_a.stride(), *grid_a.arguments,
            logits_b, *logits_b.stride(), *grid_b.arguments, height, width, tiles, threshold,
            *map_arguments(ignore_mask, logits_a), ignore_index,
            HAS_IGNORE=ignore_mask is not None, K=num_classes, BLOCK_K=block_k, P=p,
            ALIGN_CORNERS=align_corners, RESAMPLE_A=grid_a.resample, RESAMPLE_B=grid_b.resample,
            FLAT=all(map(is_flat, (logits_a, logits_b, ignore_mask))),
            WIDE=is_wide(logits_a, logits_b, ignore_mask), num_warps=WARPS, **UNFUSED,
        )  # fmt: skip
        if mean:
            sums, totals, scale = launch_mean_of_partials(values, counts, times=num_classes)
        else:
            sums, totals = launch_sum_partials(values, counts)
            scale = logits_a.new_empty(0, dtype=torch.float32)
    return sums, totals, *empty, scale
