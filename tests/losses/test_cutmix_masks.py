"""Boxes of masks, as UniMatch's loader yields them."""

from __future__ import annotations

import pytest
import torch

from co2s_fast import ops
from co2s_fast.losses import CutMix, masked_cross_entropy


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32, torch.int64])
def test_masks_give_the_boxes_they_were_drawn_from(dtype):
    boxes = torch.tensor([[1, 2, 7, 5], [0, 0, 9, 6], [3, 3, 4, 4], [0, 0, 0, 0]])
    masks = torch.zeros(4, 6, 9, dtype=dtype)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    partner = torch.tensor([1, 2, 3, 0])
    found = CutMix.from_masks(masks, partner)
    assert torch.equal(found.boxes[:3], boxes[:3].int())
    assert found.boxes[3, 2] <= found.boxes[3, 0]  # empty
    maps = torch.arange(4)[:, None, None].expand(4, 6, 9).contiguous()
    expected = torch.where(masks != 0, partner[:, None, None], maps)
    assert torch.equal(found.mix_maps(maps), expected)


def test_what_is_no_mask_of_a_box():
    partner = torch.tensor([1, 0])
    holed = torch.zeros(2, 6, 9)
    holed[1, 1:4, 1:4] = 1
    holed[1, 2, 2] = 0
    with pytest.raises(ValueError, match="masks: image 1 is no filled rectangle"):
        CutMix.from_masks(holed, partner)
    with pytest.raises(ValueError, match=r"masks: expected shape \[B,H,W\], got \[6, 9\]"):
        CutMix.from_masks(holed[0], partner)
    with pytest.raises(TypeError, match="masks"):
        CutMix.from_masks([[1]], partner)
    with pytest.raises(ValueError, match=r"partner: expected shape \[2\]"):
        CutMix.from_masks(torch.zeros(2, 6, 9), partner[:1])


def test_in_a_compiled_loss():
    z, target = torch.randn(2, 3, 6, 9), torch.randint(0, 3, (2, 6, 9))
    masks = torch.zeros(2, 6, 9)
    masks[0, 1:4, 2:8] = 1

    def loss(z, masks):
        mix = CutMix.from_masks(masks, torch.tensor([1, 0]))
        return masked_cross_entropy(z, target, cutmix=mix)

    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    with ops.use_backend("reference"):
        torch.testing.assert_close(compiled(z, masks), loss(z, masks))


@pytest.mark.parametrize("shape", [(2, 0, 5), (2, 5, 0)], ids=str)
def test_masks_without_rows_or_columns(shape):
    with pytest.raises(ValueError, match="masks: expected shape"):
        CutMix.from_masks(torch.zeros(shape), torch.tensor([1, 0]))


@pytest.mark.parametrize("far", [torch.iinfo(torch.int64).max, 2**40])
def test_boxes_that_reach_beyond_any_image_are_cut_off(far):
    boxes = torch.tensor([[1, -far, far, 1], [0, 0, 0, 0]])
    mixed = CutMix(boxes, torch.tensor([1, 0])).mix_maps(torch.tensor([[[0] * 4], [[1] * 4]]))
    assert mixed[0].tolist() == [[0, 1, 1, 1]]
