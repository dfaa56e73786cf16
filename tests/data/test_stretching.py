"""From a raster's numbers to [0, 1] and to bytes."""

from __future__ import annotations

import numpy as np

from co2s_fast.data.imagery import BandStatistics
from co2s_fast.data.stretching import as_bytes, stretched


def test_no_data_is_0_where_the_number_0_is_not():
    statistics = BandStatistics(dtype="int16", low=[-100], high=[100], mean=[0.5], std=[0.1],
                                pixels=[4])
    values = np.array([[[0, 0, 100]]], np.int16)
    found = stretched(values, np.array([[[False, True, True]]]), statistics)
    assert found.tolist() == [[[0, 0.5, 1]]]


def test_bytes_are_the_nearest():
    assert as_bytes(np.array([0, 0.001, 0.999, 1], np.float32)).tolist() == [0, 0, 255, 255]
