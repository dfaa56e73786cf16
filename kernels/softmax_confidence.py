# ruff: noqa: ANN001, ANN202 - device functions are typed by what they are called with
"""Confidence and pseudo-label of every output pixel: `up(logits).softmax(1).max(1)`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import WARPS, check_logits, device_guard, is_flat, is_wide, pixel_tile, resampling
from .pixel_math import online_softmax, pixel_stencil, reciprocal, split_program


@triton.jit
def _softmax_confidence_kernel(
    confidence_ptr, label_ptr,
    logits_ptr, logits_b_stride, logits_k_stride, logits_y_stride, logits_x_stride,
    h, w, y_scale, x_scale, height, width, tiles,
    K: tl.constexpr, BLOCK_K: tl.constexpr, P: tl.constexpr, ALIGN_CORNERS: tl.constexpr,
    RESAMPLE: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """P consecutive output pixels a program: one pass over the classes, two stores a pixel."""
    image, p = split_program(tiles, P, WIDE)
    y = p // width
    x = p - y * width
    in_tile = p < height * width
    stencil = pixel_stencil(
        p, y, x, h, w, logits_y_stride, logits_x_stride, y_scale, x_scale,
        ALIGN_CORNERS, RESAMPLE, FLAT,
    )  # fmt: skip
    no_label = tl.full(in_tile.shape, -1, tl.int32)
    _, total, _, best = online_softmax(
        logits_ptr + image * logits_b_stride, logits_k_stride, stencil, in_tile, no_label,
        K, BLOCK_K, RESAMPLE,
    )  # fmt: skip
    confidence = reciprocal(total)
    label = tl.where(confidence == confidence, best, 0).to(label_ptr.dtype.element_ty)
    out = image * (height * width) + p
    tl.store(confidence_ptr + out, confidence, mask=in_tile)
    tl.store(label_ptr + out, label, mask=in_tile)


def softmax_confidence(
    logits: Tensor,
    height: int,
    width: int,
    align_corners: bool,
    label_dtype: torch.dtype = torch.int64,
) -> tuple[Tensor, Tensor]:
    """Highest class probability of every output pixel and its class, the lowest among equals.

    Args:
        logits: [B,K,h,w] float32, bfloat16 or float16, any strides.
        height: H of the output.
        width: W of the output.
        align_corners: as in `F.interpolate`.
        label_dtype: int64 or uint8.

    Returns:
        confidence float32 [B,H,W] and label [B,H,W]; NaN and 0 where a logit is NaN.

    Raises:
        TypeError: another dtype of logits.
        ValueError: another shape.
    """
    check_logits(logits)
    batch, num_classes = logits.shape[:2]
    confidence = logits.new_empty((batch, height, width), dtype=torch.float32)
    label = logits.new_empty((batch, height, width), dtype=label_dtype)
    if confidence.numel() == 0:
        return confidence, label
    grid = resampling(logits, height, width, align_corners)
    block_k, p = pixel_tile(num_classes, logits.element_size(), grid.resample)
    tiles = triton.cdiv(height * width, p)
    with device_guard(logits):
        _softmax_confidence_kernel[(batch * tiles,)](
            confidence, label, logits, *logits.stride(), *grid.arguments, height, width, tiles,
            K=num_classes, BLOCK_K=block_k, P=p, ALIGN_CORNERS=align_corners,
            RESAMPLE=grid.resample, FLAT=is_flat(logits), WIDE=is_wide(logits, confidence),
            num_warps=WARPS,
        )  # fmt: skip
    return confidence, label
