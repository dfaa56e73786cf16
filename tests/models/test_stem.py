"""The convolutional stem: the maps that the decoder's skips read."""

from __future__ import annotations

import torch

from co2s_fast.models.stem import ConvStem


def test_widths_double_down_to_the_tokens_and_skips_are_the_maps_above_them():
    stem = ConvStem(384, 16)
    maps, tokens = stem(torch.rand(1, 3, 32, 48))
    assert [m.shape[1:] for m in maps] == [(48, 16, 24), (96, 8, 12), (192, 4, 6), (384, 2, 3)]
    assert tokens.shape == (1, 384, 2, 3)
    assert [m.shape[1] for m in stem.skip_maps(maps, 2)] == stem.skip_widths(2) == [96, 192]
    assert ConvStem(64, 16).widths == [16, 16, 32, 64]
