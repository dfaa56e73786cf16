"""Scenes of any bands and number type under `predict`: chosen bands, stretch, no data, scale."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rasterio.shutil
import torch
from PIL import Image
from rasterio.enums import ColorInterp, Resampling
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from toy_rasters import raster_spec, write_tif

from co2s_fast.data.rasters import CHOSEN, open_raster
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


COLOURS = [ColorInterp.red, ColorInterp.green, ColorInterp.blue]
ALPHAS = {
    "after four": [*COLOURS, ColorInterp.undefined, ColorInterp.alpha],
    "before three": [ColorInterp.alpha, *COLOURS],
    "beside a nodata value": [*COLOURS, ColorInterp.alpha],
    "of floats": [*COLOURS, ColorInterp.alpha],
}


def linear(dtype, bands, **changes):
    """A description whose stretch divides numbers by 250."""
    each = {"low": 0, "high": 250, "mean": 0.5, "std": 0.2}
    statistics = {name: [value] * len(bands) for name, value in each.items()}
    return raster_spec(statistics={"dtype": dtype, **statistics}, bands=bands, **changes)


@pytest.mark.parametrize("where", ALPHAS)
def test_alpha_hides_pixels_wherever_it_is(tmp_path, where):
    kinds = ALPHAS[where]
    dtype = "float32" if where == "of floats" else "uint16"
    known = np.ones((64, 64), bool)
    known[8:24, 16:41] = False
    pixels = np.full((len(kinds), 64, 64), 100, dtype)
    pixels[:, ~known] = 0
    alpha = kinds.index(ColorInterp.alpha)
    pixels[alpha] = np.where(known, 200, 0)
    nodata = {"nodata": 7} if "nodata" in where else {}
    path = write_tif(tmp_path / "a.tif", pixels, **nodata)
    with rasterio.open(path, "r+") as target:
        target.colorinterp = kinds
    bands = [band for band in range(1, len(kinds) + 1) if band != alpha + 1]
    spec = linear(dtype, bands)
    with open_raster(path, spec) as raster:
        np.testing.assert_array_equal(raster.read(0, 0, 64, 64)[1].any(0), known)
    for scale in (1, 0.5, 2):
        with open_scene(path, scale, spec) as scene:
            window = Window(0, 0, scene.height, scene.width)
            seen, valid = scene.read(window), scene.valid(window)
        if scale == 1:
            np.testing.assert_array_equal(valid, known)
        assert 0.05 < 1 - valid.mean() < 0.15
        np.testing.assert_allclose(seen[:, valid], 0.4)  # nothing of what is hidden
        assert not seen[:, ~valid].any()


@pytest.mark.parametrize("nodata", [None, 0])
def test_infrared_that_is_called_alpha_hides_nothing(tmp_path, nodata):
    """Water is dark in it: its colours are there, at any scale."""
    pixels = np.full((4, 64, 64), 100, np.uint8)
    pixels[3, :, :33] = 0
    path = write_tif(tmp_path / "a.tif", pixels, photometric="RGB", alpha="YES")
    spec = linear("uint8", [1, 2, 3, 4], raster={"nodata": nodata})
    with open_raster(path, spec) as raster:
        assert raster.source.colorinterp[3] == ColorInterp.alpha
        assert raster.read(0, 0, 64, 64)[1] is None
    for scale in (1, 0.5, 2):
        with open_scene(path, scale, spec) as scene:
            window = Window(0, 0, scene.height, scene.width)
            seen = scene.read(window)
            assert scene.valid(window) is None
        np.testing.assert_allclose(seen[:3], 0.4)
        assert not seen[3, :, : int(32 * scale)].any() and seen[3, :, -1].all()


@pytest.mark.parametrize("suffix", ["tif", "vrt"])
def test_overviews_change_nothing(tmp_path, suffix):
    values = np.random.default_rng(0).uniform(-1, 1, (5, 300, 300)).astype(np.float32)
    path = write_tif(tmp_path / "a.tif", values, mask=values[0] > 0)
    if suffix == "vrt":
        rasterio.shutil.copy(path, tmp_path / "a.vrt", driver="VRT")

    def halved():
        with open_scene(tmp_path / f"a.{suffix}", 0.5, SPEC) as scene:
            window = Window(0, 0, 150, 150)
            return scene.read(window), scene.valid(window)

    before = halved()
    with rasterio.open(path, "r+") as target:
        target.build_overviews([2, 4], Resampling.nearest)
    for one, other in zip(before, halved(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_bands_that_are_named_in_another_order_are_told(tmp_path, capsys):
    spec = SPEC.model_copy(update={"band_names": ["nir", "green", "blue"]})  # of 5, 2 and 1
    names = ("Blue", "green", "red", "edge", "NIR")
    for name, order in (("a", names), ("b", names[::-1])):
        path = write_tif(tmp_path / f"{name}.tif", numbers())
        with rasterio.open(path, "r+") as target:
            target.descriptions = order
        predict({"clip": Larger()}, [path], tmp_path / "out", spec, progress=False)
        said = capsys.readouterr().err
        assert ("'nir' is band 5 of band_names and band 1 of" in said) == (name == "b")
