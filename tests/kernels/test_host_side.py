"""Host-side arithmetic of the launchers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from co2s_fast.kernels import launch


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    ("size", "out"), [(128, 512), (7, 21), (4, 13), (13, 4), (1, 5), (5, 1), (1, 1), (37, 512)]
)
def test_axis_scale_and_reach(size: int, out: int, align_corners: bool) -> None:
    axis = launch.axis(size, out, align_corners)
    if align_corners:
        exact = (size - 1) / (out - 1) if out > 1 else 0.0
        source = np.arange(out) * exact
    else:
        exact = size / out
        source = (np.arange(out) + 0.5) * exact - 0.5
    assert axis.scale == float(np.float32(exact))
    most = np.unique(np.floor(source), return_counts=True)[1].max()
    # rounding may move one pixel over a cell's centre, never two
    assert most - 1 <= axis.reach <= most + 1
    if (size, out, align_corners) == (128, 512, False):
        assert axis.reach == 4


def test_strides_decide_flat_and_wide() -> None:
    x = torch.zeros(2, 3, 4, 6)
    assert launch.is_flat(x) and launch.is_flat(x.to(memory_format=torch.channels_last))
    assert not launch.is_flat(x[..., :5]) and not launch.is_flat(x.transpose(2, 3))
    assert launch.is_flat(x[:, :, ::2, :1][:, :, :1])
    assert not launch.is_wide(x, None)
    assert launch.is_wide(torch.empty(1, 3, 2**15, 2**15, device="meta"))
    # the batch is always addressed with 64 bits
    assert not launch.is_wide(torch.empty(64, 3, 2**13, 2**13, device="meta"))


def test_tiles_are_powers_of_two() -> None:
    for classes in (1, 2, 6, 9, 33, 150, 256):
        for element_size in (2, 4):
            for resample in (False, True):
                block_k, p = launch.pixel_tile(classes, element_size, resample)
                assert block_k & (block_k - 1) == 0 and p & (p - 1) == 0 and block_k * p <= 8192
