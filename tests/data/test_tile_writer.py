"""What tiles of rasters say about missing pixels."""

from __future__ import annotations

import numpy as np
import pytest
import rasterio.shutil
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


def test_a_band_keeps_the_number_that_means_no_data_in_another(tmp_path):
    """Also in tiles of which nothing is missing."""
    for name in "av":
        pixels = scene(2, 32, 64)
        pixels[1, :8], pixels[0, :4, 32:] = 7, 7
        source = write_tif(tmp_path / f"{name}.tif", pixels, nodata=7)
        path = tmp_path / f"raw/images/{name}.vrt"
        path.parent.mkdir(parents=True, exist_ok=True)
        rasterio.shutil.copy(source, path, driver="VRT")
        first, second, rest = path.read_text().split("<NoDataValue>7</NoDataValue>")
        path.write_text(f"{first}<NoDataValue>7</NoDataValue>{second}{rest}")
    spec = raster_spec(bands=2, files={"images": "images/{scene}.vrt", "group": "{scene}"})
    found = prepare_dataset(spec, tmp_path / "raw", tmp_path / "out", progress=False)
    assert found.tiles == 4 and found.statistics.pixels == [2 * (2 * 32 * 32 - 4 * 32),
                                                            2 * 2 * 32 * 32]
