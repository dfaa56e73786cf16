# ruff: noqa: ANN001, ANN202 - device functions are typed by what they are called with
"""Confusion matrix of upsampled logits, accumulated on the device."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import (
    WARPS,
    check_logits,
    device_guard,
    is_flat,
    is_wide,
    map_arguments,
    pixel_tile,
    resampling,
)
from .pixel_labels import read_pixels
from .pixel_math import online_softmax, pixel_stencil, split_program

_MOST_BINS = 4096  # of a histogram in shared memory; beyond, every pixel adds to the matrix itself


@triton.jit
def _confusion_matrix_kernel(
    out_ptr, out_row_stride, out_column_stride,
    logits_ptr, logits_b_stride, logits_k_stride, logits_y_stride, logits_x_stride,
    h, w, y_scale, x_scale, height, width, batch, tiles,
    target_ptr, target_b_stride, target_y_stride, target_x_stride, ignore_index,
    K: tl.constexpr, BLOCK_K: tl.constexpr, P: tl.constexpr, BINS: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr, RESAMPLE: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """P output pixels a program: their histogram over (truth, prediction), then one addition a bin.

    Additions are of integers: their order does not change the result. BINS is 0 where the matrix
    is too large for a histogram.
    """
    image, p = split_program(tiles, P, WIDE)
    y = p // width
    x = p - y * width
    in_tile = p < height * width
    target = (target_ptr, target_b_stride, target_y_stride, target_x_stride)
    label, valid, _ = read_pixels(
        target, target, ignore_index, target, 0.0, image, batch, p, y, x, (0, 0, 0, 0, image),
        in_tile, K, False, False, False, FLAT,
    )  # fmt: skip
    stencil = pixel_stencil(
        p, y, x, h, w, logits_y_stride, logits_x_stride, y_scale, x_scale,
        ALIGN_CORNERS, RESAMPLE, FLAT,
    )  # fmt: skip
    _, _, _, best = online_softmax(
        logits_ptr + image * logits_b_stride, logits_k_stride, stencil, in_tile, label,
        K, BLOCK_K, RESAMPLE,
    )  # fmt: skip
    if BINS > 0:
        # pixels that do not count fall into a bin past the matrix
        counts = tl.histogram(tl.where(valid, label * K + best, K * K), BINS)
        cell = tl.arange(0, BINS)
        offset = (cell // K) * out_row_stride + (cell % K) * out_column_stride
        wanted = (cell < K * K) & (counts > 0)
        tl.atomic_add(out_ptr + offset, counts.to(tl.int64), mask=wanted)
    else:
        offset = label * out_row_stride + best * out_column_stride
        tl.atomic_add(out_ptr + offset, tl.full([P], 1, tl.int64), mask=valid)


def confusion_matrix(
    logits: Tensor, target: Tensor, ignore_index: int, align_corners: bool, out: Tensor
) -> None:
    """Add to `out` the counts of (true class, argmax of `up(logits)`), without a host sync.

    Args:
        logits: [B,K,h,w] float32, bfloat16 or float16, any strides.
        target: uint8, int32 or int64 [B,H,W]; a class outside [0,K) does not count.
        ignore_index: the label of pixels that do not count.
        align_corners: as in `F.interpolate`.
        out: int64 [K,K], any strides; rows are the truth.

    Raises:
        TypeError: another dtype of logits.
        ValueError: another shape.
    """
    check_logits(logits)
    batch, num_classes = logits.shape[:2]
    height, width = target.shape[1:]
    if target.numel() == 0:
        return
    grid = resampling(logits, height, width, align_corners)
    block_k, p = pixel_tile(num_classes, logits.element_size(), grid.resample)
    bins = triton.next_power_of_2(num_classes**2 + 1)
    tiles = triton.cdiv(height * width, p)
    with device_guard(logits):
        _confusion_matrix_kernel[(batch * tiles,)](
            out, *out.stride(), logits, *logits.stride(), *grid.arguments, height, width, batch,
            tiles, *map_arguments(target, logits), ignore_index, K=num_classes, BLOCK_K=block_k,
            P=p, BINS=bins if bins <= _MOST_BINS else 0, ALIGN_CORNERS=align_corners,
            RESAMPLE=grid.resample, FLAT=is_flat(logits) and is_flat(target),
            WIDE=is_wide(logits, target), num_warps=WARPS,
        )  # fmt: skip
