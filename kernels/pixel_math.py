# ruff: noqa: ANN001, ANN201 - device functions are typed by what they are called with
"""Device functions shared by the kernels: bilinear stencils, class tiles and softmax statistics.

A *tile* is a float32 array [BLOCK_K, P]: some classes of P output pixels. Rows past the last class
hold -inf, which no maximum and no sum of exponentials notices.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def axis_source(index, in_size, scale, ALIGN_CORNERS: tl.constexpr):
    """Where output `index` reads along one axis, as `F.interpolate` does in float32.

    Args:
        index: int32, output coordinates.
        in_size: length of the low-resolution axis.
        scale: float32, low-resolution cells per output pixel (`launch.source_scale`).
        ALIGN_CORNERS: as in `F.interpolate`.

    Returns:
        interval (the cell left of the source position, -1 before the first centre), low, high
        (the two cells read), and their weights.
    """
    # An explicit fma: the compiler must not round two uses of this function differently, because
    # the backward finds each pixel's interval by it.
    if ALIGN_CORNERS:
        source = index.to(tl.float32) * scale
    else:
        source = tl.fma(index.to(tl.float32) + 0.5, scale, -0.5)
    clamped = tl.maximum(source, 0.0)
    low = tl.minimum(clamped.to(tl.int32), in_size - 1)
    high = tl.minimum(low + 1, in_size - 1)
    high_weight = tl.minimum(tl.maximum(clamped - low.to(tl.float32), 0.0), 1.0)
    interval = tl.where(source < 0.0, -1, low)
    return interval, low, high, 1.0 - high_weight, high_weight


@triton.jit
def axis_start(interval, in_size, scale, inverse, ALIGN_CORNERS: tl.constexpr):
    """First output index whose interval is at least `interval` (int32): exact, see axis_source."""
    if ALIGN_CORNERS:
        guess = interval.to(tl.float32) * inverse
    else:
        guess = (interval.to(tl.float32) + 0.5) * inverse - 0.5
    start = tl.maximum(tl.ceil(guess).to(tl.int32), 0)
    before = tl.maximum(start - 1, 0)
    interval_before, _, _, _, _ = axis_source(before, in_size, scale, ALIGN_CORNERS)
    interval_here, _, _, _, _ = axis_source(start, in_size, scale, ALIGN_CORNERS)
    later = tl.where(interval_here >= interval, start, start + 1)
    return tl.where(interval_before >= interval, before, later)


@triton.jit
def split_program(tiles, P: tl.constexpr, WIDE: tl.constexpr):
    """Image (int64 scalar) and pixel indices [P] of this program; `tiles` programs an image."""
    program = tl.program_id(0)
    image = program // tiles
    tile = program - image * tiles
    if WIDE:
        tile = tile.to(tl.int64)
    return image.to(tl.int64), tile * P + tl.arange(0, P)


@triton.jit
def map_offset(p, y, x, y_stride, x_stride, FLAT: tl.constexpr):
    """Offset of pixels in one image; FLAT when rows follow each other without gaps."""
    if FLAT:
        return p * x_stride
    else:
        return y * y_stride + x * x_stride


@triton.jit
def pixel_stencil(
    p, y, x, h, w, y_stride, x_stride, y_scale, x_scale,
    ALIGN_CORNERS: tl.constexpr, RESAMPLE: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """Offsets [P] of the four cells a pixel reads and its weights along y and x.

    Without RESAMPLE all four offsets are the pixel's own, and the weights are not used.
    """
    if RESAMPLE:
        _, top, bottom, top_weight, bottom_weight = axis_source(
            y.to(tl.int32), h, y_scale, ALIGN_CORNERS
        )
        _, left, right, left_weight, right_weight = axis_source(
            x.to(tl.int32), w, x_scale, ALIGN_CORNERS
        )
        # p carries the index width: 64 bits where offsets need it
        top, bottom = top.to(p.dtype) * y_stride, bottom.to(p.dtype) * y_stride
        left, right = left.to(p.dtype) * x_stride, right.to(p.dtype) * x_stride
        return (
            top + left, top + right, bottom + left, bottom + right,
            top_weight, bottom_weight, left_weight, right_weight,
        )  # fmt: skip
    else:
        own = map_offset(p, y, x, y_stride, x_stride, FLAT)
        one = tl.full(p.shape, 1.0, tl.float32)
        return own, own, own, own, one, one, one, one


@triton.jit
def blend(low, high, low_weight, high_weight):
    """Low · low_weight + high · high_weight for tiles [BLOCK_K, P] and weights [P].

    The one place that interpolates, columns first, with an explicit fma: every kernel must get the
    same bits, or students that tie in the forward would not in the backward.
    """
    return tl.fma(
        high, tl.broadcast_to(high_weight[None, :], high.shape), low * low_weight[None, :]
    )


@triton.jit
def load_tile(
    image_ptr, classes, class_stride, stencil, in_tile, K: tl.constexpr, RESAMPLE: tl.constexpr
):
    """Upsampled logits [BLOCK_K, P] of `classes` at the pixels of a stencil, in float32."""
    o00, o01, o10, o11, top_weight, bottom_weight, left_weight, right_weight = stencil
    mask = (classes < K)[:, None] & in_tile[None, :]
    rows = (classes.to(o00.dtype) * class_stride)[:, None]
    z = tl.load(image_ptr + (rows + o00[None, :]), mask=mask, other=0.0).to(tl.float32)
    if RESAMPLE:
        z01 = tl.load(image_ptr + (rows + o01[None, :]), mask=mask, other=0.0).to(tl.float32)
        z10 = tl.load(image_ptr + (rows + o10[None, :]), mask=mask, other=0.0).to(tl.float32)
        z11 = tl.load(image_ptr + (rows + o11[None, :]), mask=mask, other=0.0).to(tl.float32)
        left = blend(z, z10, top_weight, bottom_weight)
        z = blend(left, blend(z01, z11, top_weight, bottom_weight), left_weight, right_weight)
    return tl.where((classes < K)[:, None], z, float("-inf"))


@triton.jit
def finite_shift(top):
    """The maximum to subtract before exp; 0 where every logit is -inf, as -inf - -inf is NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def softmax_total(total):
    """Σ exp as a divisor: NaN, not 0, where every logit is -inf, as in `torch.softmax`."""
    return tl.where(total == 0.0, float("nan"), total)


@triton.jit
def reciprocal(total):
    """1 / total, correctly rounded: of Σ exp(z - max), the confidence."""
    return tl.div_rn(tl.full(total.shape, 1.0, tl.float32), total)


@triton.jit
def softmax_tile(z):
    """Softmax [BLOCK_K, P] of a tile that holds all classes, and its maximum [P]."""
    # finite_shift, softmax_total and reciprocal, spelt out: calls are dear in the interpreter, and
    # this stands in the innermost loops
    top = tl.max(z, 0)
    e = tl.exp(z - tl.where(top == float("-inf"), 0.0, top)[None, :])
    total = tl.sum(e, 0)
    total = tl.where(total == 0.0, float("nan"), total)
    confidence = tl.div_rn(tl.full(total.shape, 1.0, tl.float32), total)
    return e * confidence[None, :], confidence


@triton.jit
def online_softmax(
    image_ptr, class_stride, stencil, in_tile, label,
    K: tl.constexpr, BLOCK_K: tl.constexpr, RESAMPLE: tl.constexpr,
):  # fmt: skip
    """One pass over all classes of a stencil's pixels.

    Returns:
        shift [P] (the maximum), total [P] (Σ exp(z - shift), NaN where a logit is), the logit of
        class `label` [P], and the argmax [P]: the lowest class among equals, the first NaN if any.
    """
    top = tl.full(in_tile.shape, float("-inf"), tl.float32)
    total = tl.full(in_tile.shape, 0.0, tl.float32)
    picked = tl.full(in_tile.shape, 0.0, tl.float32)
    best = tl.full(in_tile.shape, 0, tl.int32)
    first_nan = tl.full(in_tile.shape, K, tl.int32)
    for start in range(0, K, BLOCK_K):
        classes = start + tl.arange(0, BLOCK_K)
        z = load_tile(image_ptr, classes, class_stride, stencil, in_tile, K, RESAMPLE)
        tile_top = tl.max(z, 0)
        tile_best = tl.min(tl.where(z == tile_top[None, :], classes[:, None], K), 0)
        best = tl.where(tile_top > top, tile_best, best)
        first_nan = tl.minimum(first_nan, tl.min(tl.where(z != z, classes[:, None], K), 0))
        new_top = tl.maximum(top, tile_top)
        shift = finite_shift(new_top)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(z - shift[None, :]), 0)
        picked += tl.sum(tl.where(classes[:, None] == label[None, :], z, 0.0), 0)
        top = new_top
    best = tl.where(first_nan < K, first_nan, best)
    return finite_shift(top), softmax_total(total), picked, best


@triton.jit
def store_tile(grad_image_ptr, classes, class_stride, pixel, gradient, in_tile, K: tl.constexpr):
    """Store a tile [BLOCK_K, P] at offsets `pixel` [P] of each class plane, in the target dtype."""
    mask = (classes < K)[:, None] & in_tile[None, :]
    offset = (classes.to(pixel.dtype) * class_stride)[:, None] + pixel[None, :]
    tl.store(grad_image_ptr + offset, gradient.to(grad_image_ptr.dtype.element_ty), mask=mask)
