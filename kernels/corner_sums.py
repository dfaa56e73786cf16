# ruff: noqa: ANN001, ANN201, ANN202 - device functions are typed by what they are called with
"""Transpose of the bilinear stencil, in two steps without atomics and without recomputation.

Output pixels whose source position lies between the same four cells form an *interval* of the
(h+1) × (w+1) interval grid (one row before the first centre, one behind the last). A lane of a
backward kernel owns an interval: it loads its four corner logits once, visits its pixels, and
writes four corner sums, `partial` [S,4,B,K,h+1,w+1]. The kernel here adds, for every cell, the
corner sums of the four intervals that touch it, in one order: every pixel's softmax is computed
exactly once, at the price of 4·S low-resolution float32 arrays written and read. S > 1 splits the
rows of the intervals among programs where the low-resolution grid alone is too small for a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import SCRATCH_BYTES, WARPS, Resampling
from .pixel_math import axis_start

LANES = 128  # intervals a program
GPU_PROGRAMS = 1024  # wanted at least: several for each multiprocessor of a large GPU
CPU_PROGRAMS = 1  # the interpreter runs one program after the other
# Of what upsampled logits would take, whose absence is the point: at most so much for the corner
# sums (at four times the grid, those of half a batch) and for other scratch.
PARTIAL_SHARE, PIXEL_SHARE = 1 / 8, 1 / 16
_CELLS = 1024


@triton.jit
def interval_corners(
    lane, h, w, y_stride, x_stride, y_scale, x_scale, y_inverse, x_inverse,
    ALIGN_CORNERS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """An interval's position, first pixel and the offsets of its four corner cells, each [P].

    Returns:
        interval_y, interval_x (-1 is the one before the first centre), y_start, x_start, and the
        offsets of the upper left, upper right, lower left and lower right cell in a class plane.
    """
    interval_y = (lane // (w + 1)).to(tl.int32) - 1
    interval_x = (lane % (w + 1)).to(tl.int32) - 1
    y_start = axis_start(interval_y, h, y_scale, y_inverse, ALIGN_CORNERS)
    x_start = axis_start(interval_x, w, x_scale, x_inverse, ALIGN_CORNERS)
    # tail lanes run past the last row: keep their (unused) cells inside
    top = tl.minimum(tl.maximum(interval_y, 0), h - 1)
    left = tl.maximum(interval_x, 0)
    bottom = tl.minimum(top + 1, h - 1)
    right = tl.minimum(left + 1, w - 1)
    if WIDE:
        top, bottom = top.to(tl.int64), bottom.to(tl.int64)
        left, right = left.to(tl.int64), right.to(tl.int64)
    upper, lower = top * y_stride, bottom * y_stride
    left, right = left * x_stride, right * x_stride
    offsets = (upper + left, upper + right, lower + left, lower + right)
    return interval_y, interval_x, y_start, x_start, offsets


@triton.jit
def load_corners(image_ptr, classes, class_stride, offsets, mask):
    """Logits [BLOCK_K, P] of the four corners, float32."""
    o00, o01, o10, o11 = offsets
    rows = (classes.to(o00.dtype) * class_stride)[:, None]
    z00 = tl.load(image_ptr + (rows + o00[None, :]), mask=mask, other=0.0).to(tl.float32)
    z01 = tl.load(image_ptr + (rows + o01[None, :]), mask=mask, other=0.0).to(tl.float32)
    z10 = tl.load(image_ptr + (rows + o10[None, :]), mask=mask, other=0.0).to(tl.float32)
    z11 = tl.load(image_ptr + (rows + o11[None, :]), mask=mask, other=0.0).to(tl.float32)
    return z00, z01, z10, z11


@triton.jit
def interval_rows(split, rows, reach):
    """First and past-the-last pixel row of an interval that program `split` visits."""
    begin = split * rows
    return begin, tl.minimum(begin + rows, reach)


@triton.jit
def fold(low, high, interval, size):
    """Sums [BLOCK_K, P] for the cells `interval` and `interval + 1` of one axis.

    Interval -1 (before the first centre) reads cells 0 and 1, and all of it belongs to cell 0, the
    upper one of its pair; the last interval reads its lower cell twice.
    """
    first, last = (interval < 0)[None, :], (interval == size - 1)[None, :]
    both = low + high
    to_low = tl.where(first, 0.0, tl.where(last, both, low))
    return to_low, tl.where(first, both, tl.where(last, 0.0, high))


@triton.jit
def store_corners(
    partial_ptr, split, images, image, classes, lane, interval_y, interval_x, h, w,
    sum00, sum01, sum10, sum11, K: tl.constexpr,
):  # fmt: skip
    """Write the corner sums [BLOCK_K, P] of one program to `partial` [S,4,B,K,h+1,w+1]."""
    intervals = (h + 1) * (w + 1)
    mask = (classes < K)[:, None] & (lane < intervals)[None, :]
    sum00, sum01 = fold(sum00, sum01, interval_x, w)
    sum10, sum11 = fold(sum10, sum11, interval_x, w)
    sum00, sum10 = fold(sum00, sum10, interval_y, h)
    sum01, sum11 = fold(sum01, sum11, interval_y, h)
    one = tl.full([], 1, tl.int64)  # a launch argument equal to 1 is a plain int, with no .to()
    corner_stride = one * images * K * intervals
    base = split * 4 * corner_stride + image * K * intervals
    offset = base + classes.to(tl.int64)[:, None] * intervals + lane.to(tl.int64)[None, :]
    tl.store(partial_ptr + offset, sum00, mask=mask)
    tl.store(partial_ptr + corner_stride + offset, sum01, mask=mask)
    tl.store(partial_ptr + 2 * corner_stride + offset, sum10, mask=mask)
    tl.store(partial_ptr + 3 * corner_stride + offset, sum11, mask=mask)


@triton.jit
def _gather_corners_kernel(
    grad_ptr, grad_b_stride, grad_k_stride, grad_y_stride, grad_x_stride,
    partial_ptr, planes, num_classes, h, w, splits, tiles, CELLS: tl.constexpr,
):  # fmt: skip
    """CELLS cells of one class plane a program: each adds the sums of its four intervals."""
    program = tl.program_id(0)
    plane = program // tiles
    cell = (program - plane * tiles) * CELLS + tl.arange(0, CELLS)
    i = cell // w
    j = cell - i * w
    in_tile = cell < h * w
    intervals = (h + 1) * (w + 1)
    corner_stride = tl.full([], 1, tl.int64) * planes * intervals
    # interval (i, j) of the grid shifted by one lies up and to the left of cell (i, j)
    base = plane.to(tl.int64) * intervals + i * (w + 1) + j
    total = tl.zeros([CELLS], tl.float32)
    for split in range(0, splits):
        part = partial_ptr + split * 4 * corner_stride + base
        s00 = tl.load(part + (w + 2), mask=in_tile, other=0.0)
        s01 = tl.load(part + corner_stride + (w + 1), mask=in_tile, other=0.0)
        s10 = tl.load(part + 2 * corner_stride + 1, mask=in_tile, other=0.0)
        s11 = tl.load(part + 3 * corner_stride, mask=in_tile, other=0.0)
        total += (s00 + s01) + (s10 + s11)
    image = (plane // num_classes).to(tl.int64)
    class_index = (plane % num_classes).to(tl.int64)
    offset = image * grad_b_stride + class_index * grad_k_stride
    offset = offset + i.to(tl.int64) * grad_y_stride + j.to(tl.int64) * grad_x_stride
    tl.store(grad_ptr + offset, total.to(grad_ptr.dtype.element_ty), mask=in_tile)


@dataclass(frozen=True)
class Plan:
    """How the corner sums of a batch are computed: launch shapes and scratch."""

    group: int  # images a launch
    splits: int  # S
    rows: int  # rows of an interval a split visits
    tiles: int  # programs an image, class block and split
    block_k: int
    class_blocks: int

    def grid(self, images: int) -> tuple[int, int, int]:
        """Launch grid for `images` images."""
        return images * self.tiles, self.class_blocks, self.splits

    def groups(self, batch: int) -> Iterator[slice]:
        """Slices of the batch whose scratch fits."""
        for start in range(0, batch, self.group):
            yield slice(start, min(start + self.group, batch))


def plan(logits: Tensor, grid: Resampling, block_k: int, pixel_bytes: int) -> Plan:
    """Launch shapes for logits [B,K,h,w]; `pixel_bytes` is other scratch an output pixel needs."""
    batch, num_classes, h, w = logits.shape
    tiles = triton.cdiv((h + 1) * (w + 1), LANES)
    class_blocks = triton.cdiv(num_classes, block_k)
    # half the reach at most: a split must have rows enough to be worth its corner sums
    most = max(1, grid.y.reach // 2)
    programs = GPU_PROGRAMS if logits.is_cuda else CPU_PROGRAMS
    wanted = triton.cdiv(programs, batch * tiles * class_blocks)
    border = (h + 1) * (w + 1) / (h * w)
    pixels = grid.y.out * grid.x.out
    partial_limit = PARTIAL_SHARE * border * 4 * batch * num_classes * pixels
    image_bytes = 16 * num_classes * (h + 1) * (w + 1)  # with one split
    fitting = int(partial_limit // (batch * image_bytes))
    rows = triton.cdiv(grid.y.reach, max(1, min(most, wanted, fitting)))
    splits = triton.cdiv(grid.y.reach, rows)
    image_bytes *= splits
    groups = [partial_limit // image_bytes]
    if pixel_bytes:
        groups.append(PIXEL_SHARE * 4 * batch * num_classes / pixel_bytes)
        image_bytes += pixel_bytes * pixels
    groups.append(SCRATCH_BYTES // image_bytes)
    group = min(batch, max(1, int(min(groups))))
    return Plan(group, splits, rows, tiles, block_k, class_blocks)


def new_partial(logits: Tensor, plan: Plan) -> Tensor:
    """Scratch for the corner sums [S,4,B,K,h+1,w+1] of one group of images."""
    batch, num_classes, h, w = logits.shape
    shape = (plan.splits, 4, batch, num_classes, h + 1, w + 1)
    return torch.empty(shape, dtype=torch.float32, device=logits.device)


def launch_gather_corners(partial: Tensor, grad: Tensor) -> None:
    """Write the gradient [B,K,h,w] from corner sums [S,4,B,K,h+1,w+1]; any strides, any dtype."""
    batch, num_classes, h, w = grad.shape
    tiles = triton.cdiv(h * w, _CELLS)
    _gather_corners_kernel[(batch * num_classes * tiles,)](
        grad, *grad.stride(), partial, batch * num_classes, num_classes, h, w, len(partial), tiles,
        CELLS=_CELLS, num_warps=WARPS,
    )  # fmt: skip
