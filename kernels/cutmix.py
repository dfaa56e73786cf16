# ruff: noqa: ANN001, ANN202 - device functions are typed by what they are called with
"""CutMix in place: each image's box becomes the same box of its partner's original."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import WARPS, device_guard

_PIXELS = 1024
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def _cutmix_copy_kernel(
    source_ptr, source_b_stride, source_c_stride, source_y_stride, source_x_stride,
    output_ptr, output_b_stride, output_c_stride, output_y_stride, output_x_stride,
    boxes_ptr, partner_ptr, batch, channels, height, width, tiles,
    P: tl.constexpr, FROM_PARTNER: tl.constexpr,
):  # fmt: skip
    """Copy P pixels of one channel where they lie in the box of image b, from b or its partner."""
    program = tl.program_id(0)
    plane = program // tiles
    image = (plane // channels).to(tl.int64)
    channel = (plane % channels).to(tl.int64)
    p = (program % tiles).to(tl.int64) * P + tl.arange(0, P)
    y = p // width
    x = p - y * width
    x1 = tl.load(boxes_ptr + image * 4)
    y1 = tl.load(boxes_ptr + image * 4 + 1)
    x2 = tl.load(boxes_ptr + image * 4 + 2)
    y2 = tl.load(boxes_ptr + image * 4 + 3)
    partner = tl.load(partner_ptr + image).to(tl.int64) + tl.zeros([P], tl.int64)
    inside = (p < height * width) & (x >= x1) & (x < x2) & (y >= y1) & (y < y2)
    inside = inside & (partner >= 0) & (partner < batch)
    origin = image + tl.zeros([P], tl.int64)
    if FROM_PARTNER:
        origin = partner
    offset = origin * source_b_stride + channel * source_c_stride
    offset += y * source_y_stride + x * source_x_stride
    value = tl.load(source_ptr + offset, mask=inside, other=0)
    offset = image * output_b_stride + channel * output_c_stride
    tl.store(output_ptr + (offset + y * output_y_stride + x * output_x_stride), value, mask=inside)


def launch_cutmix_copy(
    source: Tensor, output: Tensor, boxes: Tensor, partner: Tensor, from_partner: bool
) -> None:
    """Copy the boxes of `source` [B,C,H,W], or of its partners' images, to `output` [B,C,H,W]."""
    batch, channels, height, width = source.shape
    tiles = triton.cdiv(height * width, _PIXELS)
    _cutmix_copy_kernel[(batch * channels * tiles,)](
        source, *source.stride(), output, *output.stride(), boxes, partner,
        batch, channels, height, width, tiles,
        P=_PIXELS, FROM_PARTNER=from_partner, num_warps=WARPS,
    )  # fmt: skip


def cutmix_(images: Tensor, boxes: Tensor, partner: Tensor) -> None:
    """Paste into each image the box of its partner, in place.

    Two copies through scratch memory of which only the boxes are touched: a partner may itself be
    pasted over, and its original pixels are what counts. A partner outside the batch: no paste.

    Args:
        images: [B,C,H,W] or [B,H,W], any dtype of 1, 2, 4 or 8 bytes, any strides.
        boxes: int32 [B,4] as (x1, y1, x2, y2), half open, empty where x2 <= x1.
        partner: int64 [B].

    Raises:
        TypeError: a dtype of another size.
        ValueError: another number of dimensions.
    """
    if images.dim() not in (3, 4):
        raise ValueError(f"images: expected [B,C,H,W] or [B,H,W], got shape {tuple(images.shape)}")
    if images.element_size() not in _BITS:
        raise TypeError(f"images: the triton backend cannot copy {images.dtype}")
    if images.numel() == 0:
        return
    planes = images if images.dim() == 4 else images[:, None]
    planes = planes.view(_BITS[images.element_size()])
    scratch = torch.empty_like(planes)
    boxes, partner = boxes.contiguous(), partner.contiguous()
    with device_guard(images):
        launch_cutmix_copy(planes, scratch, boxes, partner, from_partner=True)
        launch_cutmix_copy(scratch, planes, boxes, partner, from_partner=False)
