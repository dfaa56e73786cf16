# ruff: noqa: ANN001, ANN201, ANN202 - device functions are typed by what they are called with
"""Gradient of the masked cross-entropy: everything is recomputed, nothing was saved.

Equal grids: one read and one write of the logits, none where a tile has nothing to learn. Through
the upsampling: `corner_sums`. Up to 16 classes its interval kernel computes each softmax itself;
beyond, a first kernel writes the softmax statistics of each pixel (16 bytes, whatever the number
of classes), so that blocks of classes run independently.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .corner_sums import (
    LANES,
    interval_corners,
    interval_rows,
    launch_gather_corners,
    load_corners,
    new_partial,
    plan,
    store_corners,
)
from .launch import (
    WARPS,
    Resampling,
    check_logits,
    device_guard,
    is_flat,
    is_wide,
    label_arguments,
    map_arguments,
    pixel_tile,
    resampling,
)
from .pixel_labels import load_box, pixel_scale, read_pixels
from .pixel_math import (
    axis_source,
    blend,
    load_tile,
    map_offset,
    online_softmax,
    pixel_stencil,
    reciprocal,
    softmax_tile,
    split_program,
    store_tile,
)

_SINGLE_PASS_CLASSES = 16  # above, four corners and four sums a class overflow the registers
_STATISTICS_BYTES = 16


@triton.jit
def cross_entropy_gradient(probability, classes, label, scale, taken):
    """Return scale · (p - onehot) [BLOCK_K, P], and 0 (never NaN) at pixels that are not taken."""
    hit = (classes[:, None] == label[None, :]).to(tl.float32)
    return tl.where(taken[None, :], scale[None, :] * (probability - hit), 0.0)


@triton.jit
def _masked_cross_entropy_backward_kernel(
    grad_ptr, grad_b_stride, grad_k_stride, grad_y_stride, grad_x_stride,
    shift_ptr, inverse_ptr, scale_ptr, label_ptr, first_image,
    upstream_ptr, upstream_b_stride, upstream_y_stride, upstream_x_stride,
    logits_ptr, logits_b_stride, logits_k_stride, logits_y_stride, logits_x_stride,
    h, w, y_scale, x_scale, height, width, batch, tiles,
    target_ptr, target_b_stride, target_y_stride, target_x_stride,
    ignore_ptr, ignore_b_stride, ignore_y_stride, ignore_x_stride, ignore_index,
    confidence_ptr, confidence_b_stride, confidence_y_stride, confidence_x_stride, threshold,
    weight_ptr, boxes_ptr, partner_ptr,
    HAS_IGNORE: tl.constexpr, HAS_CONFIDENCE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BOXES: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, P: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr, RESAMPLE: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """P output pixels a program: on equal grids their gradients, else (RESAMPLE) statistics.

    The statistics, each [images, H, W], are what the interval kernel needs of a pixel: the softmax
    shift, 1 / Σ exp, the scale of the gradient, and the class (-1 where the pixel is not taken).
    """
    group_image, p = split_program(tiles, P, WIDE)
    image = group_image + first_image
    y = p // width
    x = p - y * width
    in_tile = p < height * width
    box = load_box(boxes_ptr, partner_ptr, image, HAS_BOXES)
    label, _, taken = read_pixels(
        (target_ptr, target_b_stride, target_y_stride, target_x_stride),
        (ignore_ptr, ignore_b_stride, ignore_y_stride, ignore_x_stride), ignore_index,
        (confidence_ptr, confidence_b_stride, confidence_y_stride, confidence_x_stride), threshold,
        image, batch, p, y, x, box, in_tile, K, HAS_IGNORE, HAS_CONFIDENCE, HAS_BOXES, FLAT,
    )  # fmt: skip
    upstream = (upstream_ptr, upstream_b_stride, upstream_y_stride, upstream_x_stride)
    scale = pixel_scale(upstream, weight_ptr, image, y, x, label, taken, HAS_WEIGHT)
    stencil = pixel_stencil(
        p, y, x, h, w, logits_y_stride, logits_x_stride, y_scale, x_scale,
        ALIGN_CORNERS, RESAMPLE, FLAT,
    )  # fmt: skip
    image_ptr = logits_ptr + image * logits_b_stride
    # One mask for the whole tile: per-pixel masks would split the 16-byte loads.
    reads = in_tile & (tl.zeros([P], tl.int32) + tl.sum(taken.to(tl.int32), 0) > 0)
    if RESAMPLE:
        shift, total, _, _ = online_softmax(
            image_ptr, logits_k_stride, stencil, reads, label, K, BLOCK_K, RESAMPLE
        )
        out = group_image * (height * width) + p
        tl.store(shift_ptr + out, shift, mask=in_tile)
        tl.store(inverse_ptr + out, reciprocal(total), mask=in_tile)
        tl.store(scale_ptr + out, scale, mask=in_tile)
        tl.store(label_ptr + out, tl.where(taken, label, -1), mask=in_tile)
    else:
        grad_image_ptr = grad_ptr + image * grad_b_stride
        pixel = map_offset(p, y, x, grad_y_stride, grad_x_stride, FLAT)
        if K <= BLOCK_K:
            classes = tl.arange(0, BLOCK_K)
            z = load_tile(image_ptr, classes, logits_k_stride, stencil, reads, K, RESAMPLE)
            probability, _ = softmax_tile(z)
            gradient = cross_entropy_gradient(probability, classes, label, scale, taken)
            store_tile(grad_image_ptr, classes, grad_k_stride, pixel, gradient, in_tile, K)
        else:
            shift, total, _, _ = online_softmax(
                image_ptr, logits_k_stride, stencil, reads, label, K, BLOCK_K, RESAMPLE
            )
            inverse = reciprocal(total)
            for start in range(0, K, BLOCK_K):
                classes = start + tl.arange(0, BLOCK_K)
                z = load_tile(image_ptr, classes, logits_k_stride, stencil, reads, K, RESAMPLE)
                probability = tl.exp(z - shift[None, :]) * inverse[None, :]
                gradient = cross_entropy_gradient(probability, classes, label, scale, taken)
                store_tile(grad_image_ptr, classes, grad_k_stride, pixel, gradient, in_tile, K)


@triton.jit
def _masked_cross_entropy_interval_kernel(
    partial_ptr, images, rows, y_reach, x_reach, y_inverse, x_inverse,
    shift_ptr, inverse_ptr, scale_ptr, label_ptr, first_image,
    upstream_ptr, upstream_b_stride, upstream_y_stride, upstream_x_stride,
    logits_ptr, logits_b_stride, logits_k_stride, logits_y_stride, logits_x_stride,
    h, w, y_scale, x_scale, height, width, batch, tiles,
    target_ptr, target_b_stride, target_y_stride, target_x_stride,
    ignore_ptr, ignore_b_stride, ignore_y_stride, ignore_x_stride, ignore_index,
    confidence_ptr, confidence_b_stride, confidence_y_stride, confidence_x_stride, threshold,
    weight_ptr, boxes_ptr, partner_ptr,
    HAS_IGNORE: tl.constexpr, HAS_CONFIDENCE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BOXES: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, P: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr, STATISTICS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """P intervals a program, BLOCK_K classes (grid axis 1), `rows` pixel rows of each (axis 2).

    A lane keeps its interval's four corner logits and four corner sums in registers; the inner
    loop reads only labels (or, with STATISTICS, 16 bytes a pixel that replace the sum over
    classes).
    """
    group_image, lane = split_program(tiles, P, WIDE)
    image = group_image + first_image
    split = tl.program_id(2)
    classes = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    intervals = (h + 1) * (w + 1)
    mask = (classes < K)[:, None] & (lane < intervals)[None, :]
    interval_y, interval_x, y_start, x_start, offsets = interval_corners(
        lane, h, w, logits_y_stride, logits_x_stride, y_scale, x_scale, y_inverse, x_inverse,
        ALIGN_CORNERS, WIDE,
    )  # fmt: skip
    image_ptr = logits_ptr + image * logits_b_stride
    z00, z01, z10, z11 = load_corners(image_ptr, classes, logits_k_stride, offsets, mask)
    box = load_box(boxes_ptr, partner_ptr, image, HAS_BOXES)
    sum00, sum01 = tl.zeros_like(z00), tl.zeros_like(z00)
    sum10, sum11 = tl.zeros_like(z00), tl.zeros_like(z00)
    row_begin, row_end = interval_rows(split, rows, y_reach)
    for dy in range(row_begin, row_end):
        y = y_start + dy
        at_y, _top, _bottom, wt, wb = axis_source(y, h, y_scale, ALIGN_CORNERS)
        in_row = (lane < intervals) & (y < height) & (at_y == interval_y)
        z_left = blend(z00, z10, wt, wb)
        z_right = blend(z01, z11, wt, wb)
        sum_left, sum_right = tl.zeros_like(z00), tl.zeros_like(z00)
        for dx in range(0, x_reach):
            x = x_start + dx
            at_x, _left, _right, wl, wr = axis_source(x, w, x_scale, ALIGN_CORNERS)
            inside = in_row & (x < width) & (at_x == interval_x)
            z = blend(z_left, z_right, wl, wr)
            z = tl.where((classes < K)[:, None], z, float("-inf"))
            if STATISTICS:
                pixel = group_image * (height * width) + y.to(lane.dtype) * width + x
                label = tl.load(label_ptr + pixel, mask=inside, other=-1)
                taken = label >= 0
                scale = tl.load(scale_ptr + pixel, mask=taken, other=0.0)
                shift = tl.load(shift_ptr + pixel, mask=taken, other=0.0)
                inverse = tl.load(inverse_ptr + pixel, mask=taken, other=0.0)
                probability = tl.exp(z - shift[None, :]) * inverse[None, :]
            else:
                wide_y, wide_x = y.to(lane.dtype), x.to(lane.dtype)
                label, _valid, taken = read_pixels(
                    (target_ptr, target_b_stride, target_y_stride, target_x_stride),
                    (ignore_ptr, ignore_b_stride, ignore_y_stride, ignore_x_stride), ignore_index,
                    (confidence_ptr, confidence_b_stride, confidence_y_stride,
                     confidence_x_stride), threshold,
                    image, batch, wide_y, wide_y, wide_x, box, inside,
                    K, HAS_IGNORE, HAS_CONFIDENCE, HAS_BOXES, False,
                )  # fmt: skip
                upstream = (upstream_ptr, upstream_b_stride, upstream_y_stride, upstream_x_stride)
                scale = pixel_scale(
                    upstream, weight_ptr, image, wide_y, wide_x, label, taken, HAS_WEIGHT
                )
                probability, _sure = softmax_tile(z)
            gradient = cross_entropy_gradient(probability, classes, label, scale, taken)
            sum_left += wl[None, :] * gradient
            sum_right += wr[None, :] * gradient
        sum00 += wt[None, :] * sum_left
        sum01 += wt[None, :] * sum_right
        sum10 += wb[None, :] * sum_left
        sum11 += wb[None, :] * sum_right
    store_corners(
        partial_ptr, split, images, group_image, classes, lane, interval_y, interval_x, h, w,
        sum00, sum01, sum10, sum11, K,
    )  # fmt: skip


def launch_interval_backward(
    grad: Tensor, logits: Tensor, grid: Resampling, upstream: tuple, labels: tuple, flags: dict,
    align_corners: bool, wide: bool,
) -> None:  # fmt: skip
    """Fill `grad` [B,K,h,w] through the upsampling, in groups of images whose scratch fits."""
    batch, num_classes = logits.shape[:2]
    height, width = grid.y.out, grid.x.out
    statistics = num_classes > _SINGLE_PASS_CLASSES
    block_k = 8 if statistics else triton.next_power_of_2(num_classes)
    shape = plan(logits, grid, block_k, _STATISTICS_BYTES if statistics else 0)
    for group in shape.groups(batch):
        grads = grad[group]
        images = len(grads)
        size = (images, height, width) if statistics else (0,)
        shift, inverse, scale = (logits.new_empty(size, dtype=torch.float32) for _ in range(3))
        label = logits.new_empty(size, dtype=torch.int32)
        pixels = (shift, inverse, scale, label, group.start, *upstream, logits, *logits.stride())
        sizes = (*grid.arguments, height, width, batch)
        if statistics:
            pixel_block_k, p = pixel_tile(num_classes, logits.element_size(), True)
            tiles = triton.cdiv(height * width, p)
            _masked_cross_entropy_backward_kernel[(images * tiles,)](
                grad, 0, 0, 0, 0, *pixels, *sizes, tiles, *labels, **flags,
                K=num_classes, BLOCK_K=pixel_block_k, P=p, ALIGN_CORNERS=align_corners,
                RESAMPLE=True, FLAT=False, WIDE=wide, num_warps=WARPS,
            )  # fmt: skip
        partial = new_partial(grads, shape)
        _masked_cross_entropy_interval_kernel[shape.grid(images)](
            partial, images, shape.rows, grid.y.reach, grid.x.reach, grid.y.inverse,
            grid.x.inverse, *pixels, *sizes, shape.tiles, *labels, **flags,
            K=num_classes, BLOCK_K=block_k, P=LANES, ALIGN_CORNERS=align_corners,
            STATISTICS=statistics, WIDE=wide, num_warps=WARPS,
        )  # fmt: skip
        launch_gather_corners(partial, grads)
        del partial, pixels, shift, inverse, scale, label  # before the next group's are made


def masked_cross_entropy_backward(
    grad_loss: Tensor, logits: Tensor, target: Tensor, confidence: Tensor | None,
    threshold: float, ignore_mask: Tensor | None, ignore_index: int,
    class_weight: Tensor | None, boxes: Tensor | None, partner: Tensor | None,
    per_pixel: bool, align_corners: bool, saved: Tensor,
) -> Tensor:  # fmt: skip
    """Gradient of `masked_cross_entropy` with respect to the logits.

    Args:
        grad_loss: upstream gradient, one value on the device, or [B,H,W] where per_pixel.
        logits: and the rest: what the forward was given.
        target: see forward.
        confidence: see forward.
        threshold: see forward.
        ignore_mask: see forward.
        ignore_index: see forward.
        class_weight: see forward.
        boxes: see forward.
        partner: see forward.
        per_pixel: see forward.
        align_corners: see forward.
        saved: not used: everything is recomputed.

    Returns:
        [B,K,h,w] in the logits' dtype, contiguous.
    """
    check_logits(logits)
    grad = logits.new_empty(logits.shape)
    if target.numel() == 0 or grad.numel() == 0:
        return grad.zero_()
    batch, num_classes = logits.shape[:2]
    height, width = target.shape[1:]
    grid = resampling(logits, height, width, align_corners)
    upstream = map_arguments(grad_loss, logits) if per_pixel else (grad_loss, 0, 0, 0)
    labels, flags = label_arguments(
        logits, target, ignore_mask, ignore_index, confidence, threshold,
        class_weight, boxes, partner,
    )  # fmt: skip
    maps = (target, confidence, ignore_mask)
    wide = is_wide(logits, grad, *maps, grad_loss if per_pixel else None)
    with device_guard(logits):
        if grid.resample:
            launch_interval_backward(
                grad, logits, grid, upstream, labels, flags, align_corners, wide
            )
            return grad
        block_k, p = pixel_tile(num_classes, logits.element_size(), grid.resample)
        tiles = triton.cdiv(height * width, p)
        _masked_cross_entropy_backward_kernel[(batch * tiles,)](
            grad, *grad.stride(), grad, grad, grad, grad, 0, *upstream, logits, *logits.stride(),
            *grid.arguments, height, width, batch, tiles, *labels, **flags,
            K=num_classes, BLOCK_K=block_k, P=p, ALIGN_CORNERS=align_corners, RESAMPLE=False,
            FLAT=all(map(is_flat, (logits, grad, *maps))), WIDE=wide, num_warps=WARPS,
        )  # fmt: skip
    return grad
