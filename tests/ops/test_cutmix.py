"""CutMix's definition: what a box shows, by hand."""

from __future__ import annotations

import torch

from co2s_fast.ops import reference


def test_paste_reads_originals_and_clips():
    maps = torch.arange(3.0)[:, None, None].expand(3, 4, 4)
    boxes = torch.tensor([[0, 0, 2, 4], [-5, -5, 1, 1], [2, 2, 2, 4]])
    mixed = reference.paste(maps, boxes, torch.tensor([1, 2, 0]))
    assert mixed[0, :, :2].eq(1).all() and mixed[0, :, 2:].eq(0).all()
    assert mixed[1, 0, 0] == 2 and mixed[1].sum() == 15 + 2
    assert mixed[2].eq(2).all()
