# ruff: noqa: ANN001, ANN201, ANN202 - device functions are typed by what they are called with
"""Gradients of the stability loss: everything is recomputed, nothing was saved.

With d = p - q (own minus the other student's probabilities) the gradient of Σ_k d² with respect to
the own logits is 2 p (d - Σ_k p d). Equal grids: both gradients from one read of both logits.
Through the upsampling: `corner_sums`, one launch a student. Up to 8 classes its interval kernel
computes each softmax itself; beyond, a first kernel writes 32 bytes of statistics a pixel,
whatever the number of classes, so that blocks of classes run independently.
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
    UNFUSED,
    WARPS,
    Resampling,
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

_SINGLE_PASS_CLASSES = 8  # as in the cross-entropy, with the other student's logits besides
_STATISTICS = 8  # float32 a pixel


@triton.jit
def squared_distance_gradient(own, other, dot, scale, learns):
    """Return scale · own · (own - other - dot) [BLOCK_K, P]; 0, never NaN, where not learned."""
    gradient = scale[None, :] * own * ((own - other) - dot[None, :])
    return tl.where(learns[None, :], gradient, 0.0)


@triton.jit
def _stability_loss_backward_kernel(
    grad_a_ptr, grad_a_b_stride, grad_a_k_stride, grad_a_y_stride, grad_a_x_stride,
    grad_b_ptr, grad_b_b_stride, grad_b_k_stride, grad_b_y_stride, grad_b_x_stride,
    statistics_ptr, first_image, images, upstream_ptr, upstream_stride,
    a_ptr, a_b_stride, a_k_stride, a_y_stride, a_x_stride, a_h, a_w, a_y_scale, a_x_scale,
    b_ptr, b_b_stride, b_k_stride, b_y_stride, b_x_stride, b_h, b_w, b_y_scale, b_x_scale,
    height, width, tiles, threshold,
    ignore_ptr, ignore_b_stride, ignore_y_stride, ignore_x_stride, ignore_index,
    HAS_IGNORE: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, P: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr, RESAMPLE_A: tl.constexpr, RESAMPLE_B: tl.constexpr,
    WRITE_A: tl.constexpr, WRITE_B: tl.constexpr, STATISTICS: tl.constexpr,
    FLAT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """P output pixels a program: gradients on equal grids (WRITE_A, WRITE_B), or STATISTICS.

    `statistics` float32 [8, images, H, W]: shift and 1 / Σ exp of a and of b, then Σ p d and the
    scale of the gradient of a and of b; the scale is 0 where a pixel is not learned.
    """
    group_image, p = split_program(tiles, P, WIDE)
    image = group_image + first_image
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
    grad_a_image_ptr = grad_a_ptr + image * grad_a_b_stride
    grad_b_image_ptr = grad_b_ptr + image * grad_b_b_stride
    pixel_a = map_offset(p, y, x, grad_a_y_stride, grad_a_x_stride, FLAT)
    pixel_b = map_offset(p, y, x, grad_b_y_stride, grad_b_x_stride, FLAT)
    twice_a = tl.load(upstream_ptr).to(tl.float32) * 2.0 + tl.zeros([P], tl.float32)
    twice_b = tl.load(upstream_ptr + upstream_stride).to(tl.float32) * 2.0
    twice_b = twice_b + tl.zeros([P], tl.float32)
    if (K <= BLOCK_K) and (WRITE_A or WRITE_B):
        classes = tl.arange(0, BLOCK_K)
        z_a = load_tile(a_image_ptr, classes, a_k_stride, stencil_a, in_tile, K, RESAMPLE_A)
        z_b = load_tile(b_image_ptr, classes, b_k_stride, stencil_b, in_tile, K, RESAMPLE_B)
        p_a, sure_a = softmax_tile(z_a)
        p_b, sure_b = softmax_tile(z_b)
        a_learns, b_learns = learners(sure_a, sure_b, threshold, valid)
        if WRITE_A:
            dot = tl.sum(p_a * (p_a - p_b), 0)
            gradient = squared_distance_gradient(p_a, p_b, dot, twice_a, a_learns)
            store_tile(grad_a_image_ptr, classes, grad_a_k_stride, pixel_a, gradient, in_tile, K)
        if WRITE_B:
            dot = tl.sum(p_b * (p_b - p_a), 0)
            gradient = squared_distance_gradient(p_b, p_a, dot, twice_b, b_learns)
            store_tile(grad_b_image_ptr, classes, grad_b_k_stride, pixel_b, gradient, in_tile, K)
    if (K > BLOCK_K) or STATISTICS:
        no_label = tl.full([P], -1, tl.int32)
        shift_a, total_a, _, _ = online_softmax(
            a_image_ptr, a_k_stride, stencil_a, in_tile, no_label, K, BLOCK_K, RESAMPLE_A
        )
        shift_b, total_b, _, _ = online_softmax(
            b_image_ptr, b_k_stride, stencil_b, in_tile, no_label, K, BLOCK_K, RESAMPLE_B
        )
        sure_a = reciprocal(total_a)
        sure_b = reciprocal(total_b)
        a_learns, b_learns = learners(sure_a, sure_b, threshold, valid)
        dot_a = tl.zeros([P], tl.float32)
        dot_b = tl.zeros([P], tl.float32)
        for start in range(0, K, BLOCK_K):
            classes = start + tl.arange(0, BLOCK_K)
            z_a = load_tile(a_image_ptr, classes, a_k_stride, stencil_a, in_tile, K, RESAMPLE_A)
            z_b = load_tile(b_image_ptr, classes, b_k_stride, stencil_b, in_tile, K, RESAMPLE_B)
            p_a = tl.exp(z_a - shift_a[None, :]) * sure_a[None, :]
            p_b = tl.exp(z_b - shift_b[None, :]) * sure_b[None, :]
            dot_a += tl.sum(p_a * (p_a - p_b), 0)
            dot_b += tl.sum(p_b * (p_b - p_a), 0)
        if STATISTICS:
            plane = tl.full([], 1, tl.int64) * images * height * width
            out = statistics_ptr + group_image * (height * width) + p
            tl.store(out, shift_a, mask=in_tile)
            tl.store(out + plane, sure_a, mask=in_tile)
            tl.store(out + 2 * plane, shift_b, mask=in_tile)
            tl.store(out + 3 * plane, sure_b, mask=in_tile)
            tl.store(out + 4 * plane, dot_a, mask=in_tile)
            tl.store(out + 5 * plane, tl.where(a_learns, twice_a, 0.0), mask=in_tile)
            tl.store(out + 6 * plane, dot_b, mask=in_tile)
            tl.store(out + 7 * plane, tl.where(b_learns, twice_b, 0.0), mask=in_tile)
        if (K > BLOCK_K) and (WRITE_A or WRITE_B):
            for start in range(0, K, BLOCK_K):
                classes = start + tl.arange(0, BLOCK_K)
                z_a = load_tile(a_image_ptr, classes, a_k_stride, stencil_a, in_tile, K, RESAMPLE_A)
                z_b = load_tile(b_image_ptr, classes, b_k_stride, stencil_b, in_tile, K, RESAMPLE_B)
                p_a = tl.exp(z_a - shift_a[None, :]) * sure_a[None, :]
                p_b = tl.exp(z_b - shift_b[None, :]) * sure_b[None, :]
                if WRITE_A:
                    gradient = squared_distance_gradient(p_a, p_b, dot_a, twice_a, a_learns)
                    store_tile(
                        grad_a_image_ptr, classes, grad_a_k_stride, pixel_a, gradient, in_tile, K
                    )
                if WRITE_B:
                    gradient = squared_distance_gradient(p_b, p_a, dot_b, twice_b, b_learns)
                    store_tile(
                        grad_b_image_ptr, classes, grad_b_k_stride, pixel_b, gradient, in_tile, K
                    )


@triton.jit
def _stability_loss_interval_kernel(
    partial_ptr, images, rows, y_reach, x_reach, y_inverse, x_inverse,
    statistics_ptr, first_image, upstream_ptr,
    own_ptr, own_b_stride, own_k_stride, own_y_stride, own_x_stride, h, w, y_scale, x_scale,
    other_ptr, other_b_stride, other_k_stride, other_y_stride, other_x_stride,
    other_h, other_w, other_y_scale, other_x_scale,
    height, width, tiles, threshold,
    ignore_ptr, ignore_b_stride, ignore_y_stride, ignore_x_stride, ignore_index,
    HAS_IGNORE: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, P: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr, RESAMPLE_OTHER: tl.constexpr, OWN_IS_B: tl.constexpr,
    STATISTICS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """P intervals of the own grid a program, BLOCK_K classes (axis 1), `rows` pixel rows (axis 2).

    As in the cross-entropy; the other student's logits are gathered at each pixel, from cells that
    neighbouring lanes and the next pixels read too.
    """
    group_image, lane = split_program(tiles, P, WIDE)
    image = group_image + first_image
    split = tl.program_id(2)
    classes = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_grid = lane < (h + 1) * (w + 1)
    interval_y, interval_x, y_start, x_start, offsets = interval_corners(
        lane, h, w, own_y_stride, own_x_stride, y_scale, x_scale, y_inverse, x_inverse,
        ALIGN_CORNERS, WIDE,
    )  # fmt: skip
    mask = (classes < K)[:, None] & in_grid[None, :]
    own_image_ptr = own_ptr + image * own_b_stride
    other_image_ptr = other_ptr + image * other_b_stride
    z00, z01, z10, z11 = load_corners(own_image_ptr, classes, own_k_stride, offsets, mask)
    twice = tl.load(upstream_ptr).to(tl.float32) * 2.0 + tl.zeros([P], tl.float32)
    plane = tl.full([], 1, tl.int64) * images * height * width
    sum00, sum01 = tl.zeros_like(z00), tl.zeros_like(z00)
    sum10, sum11 = tl.zeros_like(z00), tl.zeros_like(z00)
    row_begin, row_end = interval_rows(split, rows, y_reach)
    for dy in range(row_begin, row_end):
        y = y_start + dy
        at_y, _top, _bottom, wt, wb = axis_source(y, h, y_scale, ALIGN_CORNERS)
        in_row = in_grid & (y < height) & (at_y == interval_y)
        z_left = blend(z00, z10, wt, wb)
        z_right = blend(z01, z11, wt, wb)
        sum_left, sum_right = tl.zeros_like(z00), tl.zeros_like(z00)
        for dx in range(0, x_reach):
            x = x_start + dx
            at_x, _left, _right, wl, wr = axis_source(x, w, x_scale, ALIGN_CORNERS)
            inside = in_row & (x < width) & (at_x == interval_x)
            z = blend(z_left, z_right, wl, wr)
            z = tl.where((classes < K)[:, None], z, float("-inf"))
            wide_y, wide_x = y.to(lane.dtype), x.to(lane.dtype)
            stencil = pixel_stencil(
                wide_y, wide_y, wide_x, other_h, other_w, other_y_stride, other_x_stride,
                other_y_scale, other_x_scale, ALIGN_CORNERS, RESAMPLE_OTHER, False,
            )  # fmt: skip
            if STATISTICS:
                pixel = statistics_ptr + group_image * (height * width) + wide_y * width + wide_x
                own_plane = pixel
                other_plane = pixel + 2 * plane
                gradient_plane = pixel + 4 * plane
                if OWN_IS_B:
                    own_plane = pixel + 2 * plane
                    other_plane = pixel
                    gradient_plane = pixel + 6 * plane
                scale = tl.load(gradient_plane + plane, mask=inside, other=0.0)
                learns = scale != 0.0
                dot = tl.load(gradient_plane, mask=learns, other=0.0)
                shift = tl.load(own_plane, mask=learns, other=0.0)
                sure = tl.load(own_plane + plane, mask=learns, other=0.0)
                other_shift = tl.load(other_plane, mask=learns, other=0.0)
                other_sure = tl.load(other_plane + plane, mask=learns, other=0.0)
                z_other = load_tile(
                    other_image_ptr, classes, other_k_stride, stencil, learns, K, RESAMPLE_OTHER
                )
                own = tl.exp(z - shift[None, :]) * sure[None, :]
                other = tl.exp(z_other - other_shift[None, :]) * other_sure[None, :]
            else:
                valid = read_unmasked(
                    (ignore_ptr, ignore_b_stride, ignore_y_stride, ignore_x_stride), ignore_index,
                    image, wide_y, wide_y, wide_x, inside, HAS_IGNORE, False,
                )  # fmt: skip
                z_other = load_tile(
                    other_image_ptr, classes, other_k_stride, stencil, valid, K, RESAMPLE_OTHER
                )
                own, sure = softmax_tile(z)
                other, other_sure = softmax_tile(z_other)
                learns, _other_learns = learners(sure, other_sure, threshold, valid)
                dot = tl.sum(own * (own - other), 0)
                scale = twice
            gradient = squared_distance_gradient(own, other, dot, scale, learns)
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


def launch_pixels(
    grads: tuple[Tensor | None, Tensor | None], statistics: Tensor | None, images: slice,
    grad_sums: Tensor, students: tuple[Tensor, Tensor], grids: tuple[Resampling, Resampling],
    ignore_mask: Tensor | None, options: dict,
) -> None:  # fmt: skip
    """Gradients on equal grids where `grads` has a tensor, and statistics where it is a tensor."""
    height, width = grids[0].y.out, grids[0].x.out
    count = images.stop - images.start
    block_k, p = pixel_tile(
        students[0].shape[1], students[0].element_size(), any(grid.resample for grid in grids)
    )
    tiles = triton.cdiv(height * width, p)
    stand_in = students[0]
    outputs = [(stand_in, 0, 0, 0, 0) if grad is None else (grad, *grad.stride()) for grad in grads]
    readings = [(z, *z.stride(), *grid.arguments) for z, grid in zip(students, grids, strict=True)]
    flat = all(map(is_flat, (*grads, *students, ignore_mask)))
    _stability_loss_backward_kernel[(count * tiles,)](
        *outputs[0], *outputs[1], grad_sums if statistics is None else statistics,
        images.start, count, grad_sums, grad_sums.stride(0), *readings[0], *readings[1],
        height, width, tiles, options["threshold"], *options["ignore"],
        HAS_IGNORE=options["HAS_IGNORE"], K=stand_in.shape[1], BLOCK_K=block_k, P=p,
        ALIGN_CORNERS=options["ALIGN_CORNERS"], RESAMPLE_A=grids[0].resample,
        RESAMPLE_B=grids[1].resample, WRITE_A=grads[0] is not None, WRITE_B=grads[1] is not None,
        STATISTICS=statistics is not None, FLAT=flat, WIDE=options["WIDE"], num_warps=WARPS,
        **UNFUSED,
    )  # fmt: skip


def launch_intervals(
    grads: list[Tensor | None], grad_sums: Tensor, students: tuple[Tensor, Tensor],
    grids: tuple[Resampling, Resampling], ignore_mask: Tensor | None, options: dict,
) -> None:  # fmt: skip
    """Fill the gradients of the students that are upsampled, in groups of images that fit."""
    batch, num_classes = students[0].shape[:2]
    height, width = grids[0].y.out, grids[0].x.out
    with_statistics = num_classes > _SINGLE_PASS_CLASSES
    block_k = 8 if with_statistics else triton.next_power_of_2(num_classes)
    pixel_bytes = 4 * _STATISTICS if with_statistics else 0
    plans = [plan(z, g, block_k, pixel_bytes) for z, g in zip(students, grids, strict=True)]
    sides = [side for side in range(2) if grads[side] is not None]
    for images in min((plans[side] for side in sides), key=lambda p: p.group).groups(batch):
        count = images.stop - images.start
        statistics = None
        if with_statistics:
            shape = (_STATISTICS, count, height, width)
            statistics = students[0].new_empty(shape, dtype=torch.float32)
            launch_pixels(
                (None, None), statistics, images, grad_sums, students, grids, ignore_mask, options
            )
        for side in sides:
            own, other = students[side], students[1 - side]
            grid, other_grid = grids[side], grids[1 - side]
            shape = plans[side]
            part = grads[side][images]
            partial = new_partial(part, shape)
            _stability_loss_interval_kernel[shape.grid(count)](
                partial, count, shape.rows, grid.y.reach, grid.x.reach, grid.y.inverse,
                grid.x.inverse, grad_sums if statistics is None else statistics, images.start,
                grad_sums[side:], own, *own.stride(), *grid.arguments,
                other, *other.stride(), *other_grid.arguments, height, width, shape.tiles,
                options["threshold"], *options["ignore"], HAS_IGNORE=options["HAS_IGNORE"],
                K=num_classes, BLOCK_K=block_k, P=LANES, ALIGN_CORNERS=options["ALIGN_CORNERS"],
                RESAMPLE_OTHER=other_grid.resample, OWN_IS_B=side == 1,
                STATISTICS=with_statistics, WIDE=options["WIDE"], num_warps=WARPS, **UNFUSED,
            )  # fmt: skip
            launch_gather_corners(partial, part)
            del partial  # before the next one is made


def stability_loss_backward(
    grad_sums: Tensor, logits_a: Tensor, logits_b: Tensor, threshold: float,
    height: int, width: int, ignore_mask: Tensor | None, ignore_index: int,
    align_corners: bool, need_a: bool, need_b: bool, saved_a: Tensor, saved_b: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of `stability_loss`: of sums[0] for logits_a, of sums[1] for logits_b.

    Args:
        grad_sums: upstream gradient [2], on the device.
        logits_a: and the rest: what the forward was given.
        logits_b: see forward.
        threshold: see forward.
        height: see forward.
        width: see forward.
        ignore_mask: see forward.
        ignore_index: see forward.
        align_corners: see forward.
        need_a: whether the gradient of logits_a is wanted.
        need_b: whether the gradient of logits_b is wanted.
        saved_a: not used: everything is recomputed.
        saved_b: not used.

    Returns:
        Gradients in the logits' shapes and dtypes, contiguous; empty for the one not wanted.
    """
    logits_a, logits_b = matched_pair(logits_a, logits_b)
    students = (logits_a, logits_b)
    needs = (need_a, need_b)
    grads = [
        z.new_empty(z.shape) if n else z.new_empty(0) for z, n in zip(students, needs, strict=True)
    ]
    batch = len(logits_a)
    if batch * height * width == 0:
        return grads[0].zero_(), grads[1].zero_()
    grids = tuple(resampling(z, height, width, align_corners) for z in students)
    options = {
        "threshold": threshold,
        "ignore": (*map_arguments(ignore_mask, logits_a), ignore_index),
        "HAS_IGNORE": ignore_mask is not None,
        "ALIGN_CORNERS": align_corners,
        "WIDE": is_wide(*students, ignore_mask),
    }
    # a gradient is written per pixel on equal grids, gathered from corner sums otherwise
    outputs = list(zip(grads, needs, grids, strict=True))
    direct, gathered = (
        [grad if need and grid.resample == up else None for grad, need, grid in outputs]
        for up in (False, True)
    )
    with device_guard(logits_a):
        if any(grad is not None for grad in direct):
            launch_pixels(
                tuple(direct), None, slice(0, batch), grad_sums, students, grids,
                ignore_mask, options,
            )  # fmt: skip
        if any(grad is not None for grad in gathered):
            launch_intervals(gathered, grad_sums, students, grids, ignore_mask, options)
    return grads[0], grads[1]
