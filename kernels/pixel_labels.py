# ruff: noqa: ANN001, ANN201 - device functions are typed by what they are called with
"""Device functions that read what a pixel should be: label, ignore mask, confidence, box."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_box(boxes_ptr, partner_ptr, image, HAS_BOXES: tl.constexpr):
    """Box (x1, y1, x2, y2) and partner of one image: boxes int32 [B,4], partner int64 [B]."""
    if HAS_BOXES:
        x1 = tl.load(boxes_ptr + image * 4)
        y1 = tl.load(boxes_ptr + image * 4 + 1)
        x2 = tl.load(boxes_ptr + image * 4 + 2)
        y2 = tl.load(boxes_ptr + image * 4 + 3)
        return x1, y1, x2, y2, tl.load(partner_ptr + image).to(tl.int64)
    else:
        return 0, 0, 0, 0, image


@triton.jit
def source_image(image, batch, y, x, box, HAS_BOXES: tl.constexpr):
    """The image that pixels (y, x) of `image` read their labels from.

    A partner outside the batch empties the box: nothing is ever read out of bounds.
    """
    if HAS_BOXES:
        x1, y1, x2, y2, partner = box
        inside = (x >= x1) & (x < x2) & (y >= y1) & (y < y2)
        candidate = tl.where(inside, partner, image)
        return tl.where((candidate >= 0) & (candidate < batch), candidate, image)
    else:
        return image


@triton.jit
def read_map(maps, source, p, y, x, mask, FLAT: tl.constexpr):
    """Values [P] of a map (pointer and three strides) at pixels of images `source`, 0 elsewhere.

    FLAT: pixel p lies p · x_stride from the first, as rows follow each other without gaps.
    """
    map_ptr, b_stride, y_stride, x_stride = maps
    if FLAT:
        offset = p * x_stride
    else:
        offset = y * y_stride + x * x_stride
    return tl.load(map_ptr + (source * b_stride + offset), mask=mask, other=0)


@triton.jit
def read_pixels(
    target, ignore, ignore_index, confidence, threshold, image, batch, p, y, x, box, in_tile,
    K: tl.constexpr, HAS_IGNORE: tl.constexpr, HAS_CONFIDENCE: tl.constexpr,
    HAS_BOXES: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """Class int32 [P], valid and taken (valid and confident) of pixels; stays inside the tensors.

    A class outside [0, K) makes a pixel not valid. `target`,
    `ignore` and `confidence` are maps: (pointer, b_stride, y_stride, x_stride).
    """
    source = source_image(image, batch, y, x, box, HAS_BOXES)
    label = read_map(target, source, p, y, x, in_tile, FLAT).to(tl.int64)
    valid = in_tile & (label != ignore_index) & (label >= 0) & (label < K)
    if HAS_IGNORE:
        padding = read_map(ignore, source, p, y, x, in_tile, FLAT).to(tl.int64)
        valid = valid & (padding != ignore_index)
    taken = valid
    if HAS_CONFIDENCE:
        sure = read_map(confidence, source, p, y, x, in_tile, FLAT).to(tl.float32)
        taken = valid & (sure >= threshold)
    return tl.where(valid, label, 0).to(tl.int32), valid, taken


@triton.jit
def pixel_scale(upstream, weight_ptr, image, y, x, label, taken, HAS_WEIGHT: tl.constexpr):
    """Upstream gradient times class weight [P]; a scalar upstream gradient has strides 0."""
    scale = read_map(upstream, image, y, y, x, taken, False).to(tl.float32)
    if HAS_WEIGHT:
        scale = scale * tl.load(weight_ptr + label, mask=taken, other=0.0).to(tl.float32)
    return scale


@triton.jit
def read_unmasked(
    ignore, ignore_index, image, p, y, x, in_tile, HAS_IGNORE: tl.constexpr, FLAT: tl.constexpr
):
    """Where a pixel [P] is no padding; `ignore` is (pointer, b_stride, y_stride, x_stride)."""
    if HAS_IGNORE:
        padding = read_map(ignore, image, p, y, x, in_tile, FLAT).to(tl.int64)
        return in_tile & (padding != ignore_index)
    else:
        return in_tile


@triton.jit
def learners(sure_a, sure_b, threshold, valid):
    """Where a learns from b, and b from a [P]: a NaN confidence teaches and learns nothing."""
    a_learns = valid & (sure_b >= threshold) & (sure_b >= sure_a)
    b_learns = valid & (sure_a >= threshold) & (sure_a >= sure_b)
    return a_learns, b_learns
