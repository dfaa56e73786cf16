"""Scenes of any bands and number type under `predict`: chosen bands, stretch, no data, scale."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from toy_rasters import raster_spec, write_tif

from co2s_fast.data.rasters import CHOSEN
from co2s_fast.engine.outputs import find_images
from co2s_fast.engine.prediction import Outputs, predict
from co2s_fast.engine.scenes import open_scene
from co2s_fast.engine.sliding_window import Window
from co2s_fast.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")

SPEC = raster_spec(
    bands=[5, 2, 1], display=[1, 2, 5], crop=32,
    statistics={"dtype": "float32", "low": [-1, -1, -1], "high": [1, 1, 1], "mean": [0.5] * 3,
                "std": [0.2] * 3})  # fmt: skip


class Larger(nn.Module):
    """Class 1 where the first channel is larger than the second; a pixel is its own matter."""

    def forward(self, images):
        assert images.dtype == torch.float32 and images.shape[1] == 3
        assert images.min() >= 0 and images.max() <= 1
        return torch.stack([images[:, 1], images[:, 0]], 1) * 50


def numbers(height=50, width=70, seed=0):
    return np.random.default_rng(seed).uniform(-1.2, 1.2, (5, height, width)).astype(np.float32)


def run(paths, out, **options):
    return predict({"clip": Larger()}, paths, out, SPEC, progress=False, **options)


def test_bands_stretch_and_no_data(tmp_path):
    values = numbers()
    values[:, 10:20] = np.nan
    values[4, 30, 40] = np.nan  # one band: 0 there, and the pixel keeps its class
    path = write_tif(tmp_path / "a.tif", values)
    (target,) = run([path], tmp_path / "out", outputs=Outputs(overlay=True, confidence=True))
    with rasterio.open(target) as found, rasterio.open(path) as source:
        assert (found.crs, found.transform) == (source.crs, source.transform)
        labels = found.read(1)
    first, second = values[4].clip(-1, 1), values[1].clip(-1, 1)
    first[30, 40] = -1
    expected = np.where(first > second, 1, 0)
    expected[10:20] = 255
    np.testing.assert_array_equal(labels, expected)
    with rasterio.open(tmp_path / "out/a.confidence.tif") as shares:
        assert (shares.read(1)[10:20] == 0).all()
    with rasterio.open(tmp_path / "out/a.overlay.tif") as overlay:
        assert overlay.count == 3


def test_pictures_show_the_bands_of_display(tmp_path):
    values = numbers()
    with open_scene(write_tif(tmp_path / "a.tif", values), 1.0, SPEC) as scene:
        shown = scene.colours(Window(0, 0, 50, 70))
    expected = ((values[[0, 1, 4]].clip(-1, 1) + 1) / 2 * 255 + 0.5).astype(np.uint8)
    assert shown.dtype == np.uint8 and abs(shown.astype(int) - expected).max() <= 1


def test_scaled_scenes_leave_missing_pixels_out(tmp_path):
    values = np.full((5, 64, 64), 0.5, np.float32)
    values[:, :, 40:] = -9999
    path = write_tif(tmp_path / "a.tif", values, nodata=-9999)
    with open_scene(path, 0.5, SPEC) as scene:
        pixels, valid = scene.read(Window(0, 0, 32, 32)), scene.valid(Window(0, 0, 32, 32))
    np.testing.assert_array_equal(valid, (np.arange(32) < 20)[None].repeat(32, 0))
    np.testing.assert_allclose(pixels[:, valid], 0.75)
    assert (pixels[:, ~valid] == 0).all()
    (target,) = run([path], tmp_path / "out", scale=0.5)
    with rasterio.open(target) as found:
        assert found.shape == (32, 32) and (found.read(1)[:, 20:] == 255).all()


@pytest.mark.parametrize("kind", ["nan", "description"])
def test_no_data_that_gdal_does_not_know_lends_no_number(tmp_path, kind):
    values = np.full((5, 63, 63), 0.5, np.float32)
    values[:, :, 41:] = np.nan if kind == "nan" else -9999
    path = write_tif(tmp_path / "a.tif", values)
    spec = SPEC if kind == "nan" else SPEC.model_copy(
        update={"raster": SPEC.raster.model_copy(update={"nodata": -9999.0})})
    with open_scene(path, 0.5, spec) as scene:
        window = Window(0, 0, scene.height, scene.width)
        pixels, valid = scene.read(window), scene.valid(window)
    assert valid[:, :20].all() and not valid[:, 21:].any()
    np.testing.assert_allclose(pixels[:, valid], 0.75)
    assert (pixels[:, ~valid] == 0).all()


def test_tiles_that_hold_the_chosen_bands_are_read_as_they_are(tmp_path):
    values = numbers()
    path = write_tif(tmp_path / "tile.tif", values[[4, 1, 0]])
    with pytest.raises(DataError, match=r"tile\.tif: has 3 bands, expected at least 5"):
        run([path], tmp_path / "out")
    with rasterio.open(path, "r+") as target:
        target.update_tags(**{CHOSEN: "5,2,1"})
    (found,) = run([path], tmp_path / "out")
    (whole,) = run([write_tif(tmp_path / "whole.tif", values)], tmp_path / "out")
    np.testing.assert_array_equal(rasterio.open(found).read(1), rasterio.open(whole).read(1))


def test_virtual_rasters_by_name(tmp_path):
    write_tif(tmp_path / "a.tif", numbers())
    (tmp_path / "stack.vrt").write_text(
        '<VRTDataset rasterXSize="70" rasterYSize="50">' + "".join(
            f'<VRTRasterBand dataType="Float32" band="{band}"><SimpleSource><SourceFilename '
            f'relativeToVRT="1">a.tif</SourceFilename><SourceBand>{band}</SourceBand>'
            "</SimpleSource></VRTRasterBand>" for band in range(1, 6)) + "</VRTDataset>")
    assert find_images([tmp_path]) == [tmp_path / "a.tif"]
    found, expected = run([tmp_path / "stack.vrt", tmp_path / "a.tif"], tmp_path / "out")
    assert found.name == "stack.tif"
    with rasterio.open(found) as one, rasterio.open(expected) as other:
        np.testing.assert_array_equal(one.read(1), other.read(1))


def test_transparent_pixels_of_a_picture_have_no_class(tmp_path):
    class Bytes(nn.Module):
        def forward(self, images):
            return images[:, :2].float()

    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 4), np.uint8)
    pixels[..., 3] = 255
    pixels[:5, :, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (target,) = predict({"clip": Bytes()}, [tmp_path / "a.png"], tmp_path / "out", raster_spec(),
                        progress=False)
    labels = np.asarray(Image.open(target))
    assert (labels[:5] == 255).all() and (labels[5:] < 2).all()
