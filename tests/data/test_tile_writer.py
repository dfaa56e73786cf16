"""What tiles of rasters say about missing pixels."""

from __future__ import annotations

import numpy as np
import pytest
from toy_rasters import raster_spec, scene, write_tif

from co2s_fast.data import prepare_dataset

pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")


def test_what_one_band_of_floats_lacks_is_missing_in_that_band_alone(tmp_path):
    for number, name in enumerate("av"):
        pixels = scene(2, 32, 32, "float32", number)
        pixels[0, :8] = np.nan
        write_tif(tmp_path / f"raw/images/{name}.tif", pixels)
        write_tif(tmp_path / f"raw/masks/{name}.tif", np.zeros((1, 32, 32), np.uint8))
    spec = raster_spec(bands=2)
    found = prepare_dataset(spec, tmp_path / "raw", tmp_path / "out", progress=False)
    assert found.statistics.pixels == [32 * 24, 32 * 32]
