"""Rasters of any bands and number type: from raw scenes to tiles, statistics and batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
import yaml
from PIL import Image
from rasterio.errors import RasterioIOError
from toy_rasters import CRS, NORTH, PIXEL, WEST, raster_spec, scene, write_tif

from co2s_fast.data import (
    DataConfig,
    build_loader,
    load_dataset,
    load_label,
    open_split,
    prepare_dataset,
    split_dataset,
    tile_writer,
)
from co2s_fast.data.catalogue import change_bands, parse_dataset
from co2s_fast.data.check import check_dataset
from co2s_fast.data.draws import Colour, Geometry
from co2s_fast.data.loader import choose_loader
from co2s_fast.data.pixels import open_pixels
from co2s_fast.data.splits import open_dataset
from co2s_fast.data.strong_on_device import strong_views
from co2s_fast.data.tiles import list_images
from co2s_fast.data.transforms import strong_view
from co2s_fast.errors import DataError, UsageError

IMAGES = {"images": "images/{scene}.tif", "group": "{scene}"}

pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")


def prepare(raw, out, spec):
    return prepare_dataset(spec, raw, out, progress=False)


def sea(height, width):
    return (np.arange(width) >= width // 2)[None].repeat(height, 0).astype(np.uint8)


def write_scenes(raw, bands, dtype, names=("a", "b", "v"), unlabeled=(), size=(64, 96), **profile):
    for number, name in enumerate(names):
        write_tif(raw / f"images/{name}.tif", scene(bands, *size, dtype, number), **profile)
        if name not in unlabeled:
            write_tif(raw / f"masks/{name}.tif", sea(*size)[None])
    return raw


def test_bands_in_the_description():
    assert raster_spec().channels == 3
    spec = raster_spec(bands=[4, 3, 2], display=[2, 3, 4])
    assert spec.channels == 3 and spec.display_channels == (2, 1, 0)
    assert raster_spec(bands=5).bands == [1, 2, 3, 4, 5]
    assert raster_spec(bands=3).bands is None  # as runs of earlier versions say it
    named = raster_spec(bands=[2, 3, 4, 8], band_names=["blue", "green", "red", "nir"])
    assert named.display_channels == (2, 1, 0)
    assert change_bands(raster_spec(), "4,3,2").bands == [4, 3, 2]
    for bad, text in (({"bands": [0, 1, 2]}, "greater than or equal to 1"),
                      ({"bands": [1, 1]}, "band 1 is used twice"),
                      ({"bands": [1, 2, 4], "display": [1, 2, 3]}, "display: band 3 is not one of"),
                      ({"bands": [1, 2], "band_names": ["red"]}, "band_names has 1 names, bands 2"),
                      ({"raster": {"percentiles": [98, 2]}}, "0 <= low < high <= 100")):
        with pytest.raises(UsageError, match=text):
            raster_spec(**bad)
    with pytest.raises(UsageError, match=r"--bands '4;3': expected numbers like 4,3,2"):
        change_bands(raster_spec(), "4;3")


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_tiles_keep_bands_type_and_place(tmp_path, dtype):
    raw = write_scenes(tmp_path / "raw", 5, dtype)
    prepared = prepare(raw, tmp_path / "out", raster_spec(bands=[4, 3, 2, 1]))
    assert prepared.tiles == 18 and prepared.labeled == 18
    with rasterio.open(tmp_path / "out/images/a_32_64.tif") as tile:
        expected = scene(5, 64, 96, dtype, 0)[[3, 2, 1, 0], 32:64, 64:96]
        np.testing.assert_array_equal(tile.read(), expected)
        assert set(tile.dtypes) == {dtype} and tile.crs == CRS
        assert tile.transform[:6] == (PIXEL, 0, WEST + 640, 0, -PIXEL, NORTH - 320)
    statistics = load_dataset(tmp_path / "out/dataset.yaml").statistics
    train = np.concatenate([scene(5, 64, 96, dtype, n)[[3, 2, 1, 0]].reshape(4, -1)
                            for n in (0, 1)], 1).astype(float)  # scene v is for validation
    if dtype == "uint8":
        assert statistics.as_bytes
        low, high = np.zeros(4), np.full(4, 255.0)
    else:
        low, high = np.percentile(train, (2, 98), axis=1, method="lower")
    np.testing.assert_array_equal(statistics.low, low)
    np.testing.assert_array_equal(statistics.high, high)
    scaled = ((train - low[:, None]) / (high - low)[:, None]).clip(0, 1)
    np.testing.assert_allclose(statistics.mean, scaled.mean(1), atol=2e-6)
    np.testing.assert_allclose(statistics.std, scaled.std(1), atol=2e-6)
    assert statistics.pixels == [train.shape[1]] * 4


def test_stretch_by_minmax_and_none(tmp_path):
    raw = write_scenes(tmp_path / "raw", 3, "float32")
    values = np.concatenate([scene(3, 64, 96, "float32", n).reshape(3, -1) for n in (0, 1)], 1)
    minmax = values.min(1), values.max(1)
    for stretch, (low, high) in {"minmax": minmax, "none": ([0] * 3, [1] * 3)}.items():
        spec = change_bands(raster_spec(), stretch=stretch)
        found = prepare(raw, tmp_path / stretch, spec).statistics
        np.testing.assert_array_equal(found.low, low)
        np.testing.assert_array_equal(found.high, high)
    raw = write_scenes(tmp_path / "whole", 3, "int16")
    found = prepare(raw, tmp_path / "i", change_bands(raster_spec(), stretch="none")).statistics
    assert found.low == [-32768] * 3 and found.high == [32767] * 3  # the range of the type


def test_negative_and_constant_floats(tmp_path):
    pixels = np.random.default_rng(0).normal(-3, 2, (2, 64, 64)).astype(np.float32)
    pixels[1] = 7
    for name in "ab":
        write_tif(tmp_path / f"raw/images/{name}.tif", pixels)
    spec = raster_spec(bands=2, files=IMAGES, val=0.5)
    prepared = prepare(tmp_path / "raw", tmp_path / "out", spec)
    assert "band statistics are of all images" in prepared.notes[0]
    found = prepared.statistics
    low, high = np.percentile(pixels[0], (2, 98), method="lower")
    assert (found.low[0], found.high[0]) == (low, high)
    assert found.low[1] == 7 and found.high[1] == 8 and found.mean[1] == 0 and found.std[1] > 0


def test_colour_of_8_bits_is_as_ever(tmp_path):
    raw = write_scenes(tmp_path / "raw", 4, "uint8")
    prepared = prepare(raw, tmp_path / "out", raster_spec())
    assert prepared.statistics is None
    assert load_dataset(tmp_path / "out/dataset.yaml").statistics is None
    tile = Image.open(tmp_path / "out/images/b_0_32.png")
    assert tile.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(tile).transpose(2, 0, 1),
                                  scene(4, 64, 96, "uint8", 1)[:3, :32, 32:64])
    prepare(raw, tmp_path / "swapped", raster_spec(bands=[3, 2, 1]))
    swapped = np.asarray(Image.open(tmp_path / "swapped/images/b_0_32.png"))
    np.testing.assert_array_equal(swapped, np.asarray(tile)[..., ::-1])


def test_files_must_agree(tmp_path):
    raw = write_scenes(tmp_path / "raw", 4, "uint16")
    write_tif(raw / "images/b.tif", scene(3, 64, 96))
    with pytest.raises(DataError, match=r"b\.tif: has 3 bands, expected at least 4 for bands 4, 3"):
        prepare(raw, tmp_path / "out", raster_spec(bands=[4, 3]))
    write_tif(raw / "images/b.tif", scene(4, 64, 96, "float32"))
    with pytest.raises(DataError, match=r"one number type, found uint16 .*a\.tif.* float32 .*b"):
        prepare(raw, tmp_path / "out", raster_spec(bands=[4, 3]))
    write_tif(raw / "images/b.tif", scene(4, 64, 96).astype(np.float64))
    with pytest.raises(DataError, match=r"b\.tif: bands of float64, expected one of uint8, uint16"):
        prepare(raw, tmp_path / "out", raster_spec(bands=[4, 3]))
    write_tif(raw / "images/b.tif", scene(2, 64, 96))
    with pytest.raises(DataError, match=r"b\.tif: has 2 bands, expected 1 or at least 3"):
        prepare(raw, tmp_path / "out", raster_spec())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["descriptions", "colours"])
def test_bands_in_another_order_are_told(tmp_path, kind):
    raw = write_scenes(tmp_path / "raw", 3, "uint8", ("a", "b", "c", "v"), photometric="RGB")
    prepared = prepare(raw, tmp_path / "alike", raster_spec())
    assert not prepared.notes
    with rasterio.open(raw / "images/b.tif", "r+") as target:
        if kind == "colours":
            target.colorinterp = target.colorinterp[::-1]
        else:
            target.descriptions = ("Blue", "Green", "Red")
    (note,) = prepare(raw, tmp_path / "out", raster_spec()).notes
    assert note.startswith("note: bands are taken by their numbers, yet 'red' is band 1 of ")
    assert note.endswith(f"a.tif and band 3 of {raw}/images/b.tif")
    assert not prepare(raw, tmp_path / "green", raster_spec(bands=[2])).notes


@pytest.mark.parametrize("kind", ["value", "mask", "nan", "description"])
def test_no_data_is_ignored_and_left_out(tmp_path, kind):
    """Rows 0-15 of every scene have no data; columns 64-95 neither, which is two whole tiles."""
    dtype = "float32" if kind == "nan" else "uint16"
    known = np.ones((64, 96), bool)
    known[:16], known[:, 64:] = False, False
    raw = tmp_path / "raw"
    for number, name in enumerate("abv"):
        pixels = scene(4, 64, 96, dtype, number)
        marks = {"value": 0, "nan": np.nan, "description": 9999}
        if kind in marks:
            pixels[:, ~known] = marks[kind]
        else:
            pixels[:, ~known] = 60000
        write_tif(raw / f"images/{name}.tif", pixels, mask=known if kind == "mask" else None,
                  **({"nodata": 0} if kind == "value" else {}))
        if name != "b":
            write_tif(raw / f"masks/{name}.tif", sea(64, 96)[None])
    changes = {"raster": {"nodata": 9999}} if kind == "description" else {}
    spec = raster_spec(bands=4, **changes)
    prepared = prepare(raw, tmp_path / "out", spec)
    assert prepared.tiles == 12 and prepared.empty == 6
    train = np.concatenate([scene(4, 64, 96, dtype, n)[:, known] for n in (0, 1)], 1)
    low, high = np.percentile(train, (2, 98), axis=1, method="lower")
    np.testing.assert_array_equal(prepared.statistics.low, low)
    np.testing.assert_array_equal(prepared.statistics.high, high)
    spec = load_dataset(tmp_path / "out/dataset.yaml")
    items = {item.name: item for item in list_images(tmp_path / "out")}
    label = load_label(items["a_0_32"], spec)
    assert (label[:16] == 255).all() and (label[16:, 16:] == 1).all()
    image = open_pixels(items["b_0_32"].image, spec)
    pixels, missing = image.whole()
    np.testing.assert_array_equal(missing, ~known[:32, 32:64])
    assert pixels.dtype == np.float32
    assert (pixels[:, :16] == 0).all() and pixels[:, 16:].all(0).any()
    crop = image.crop(Geometry(32, 32, 8, 0, 32, flip=True), True)
    assert (crop.ignore[:8] == 255).all() and (crop.ignore[8:24] == 0).all()
    assert (crop.ignore[24:] == 255).all()
    turned = image.crop(Geometry(32, 32, 8, 0, 32, flip=True, turns=1), True)
    np.testing.assert_array_equal(turned.ignore, np.rot90(crop.ignore))
    np.testing.assert_array_equal(turned.pixels, np.rot90(crop.pixels, axes=(1, 2)))


def test_no_data_in_colour_of_8_bits(tmp_path):
    pixels = scene(3, 64, 64, "uint8")
    pixels[:, :40] = 0
    for name in ("a", "b", "v"):
        write_tif(tmp_path / f"raw/images/{name}.tif", pixels, nodata=0)
        if name != "b":
            write_tif(tmp_path / f"raw/masks/{name}.tif", sea(64, 64)[None])
    prepared = prepare(tmp_path / "raw", tmp_path / "out", raster_spec())
    assert prepared.tiles == 6 and prepared.empty == 6 and prepared.statistics is None
    assert Image.open(tmp_path / "out/images/b_32_0.png").mode == "RGBA"
    spec = load_dataset(tmp_path / "out/dataset.yaml")
    split_dataset(tmp_path / "out", spec, labels=1, progress=False)
    config = DataConfig(dataset=str(tmp_path / "out/dataset.yaml"), root=tmp_path / "out", labels=1,
                        batch_size=1, workers=0, scale_range=(1, 1), missing_classes="warn")
    split = open_split(config, spec)
    assert all(item.name.startswith("b") for item in split.unlabeled[-2:])
    batch = next(iter(build_loader(config, spec, split, views=["x", "w"], seed=0, start_step=0,
                                   total_steps=1)))
    assert batch.w.dtype == torch.uint8
    np.testing.assert_array_equal(batch.ignore[0].numpy() == 255, np.arange(32)[:, None].repeat(
        32, 1) < 8)
    assert (batch.y[0, :8] == 255).all() and (batch.y[0, 8:] != 255).all()


def test_a_fourth_band_called_alpha_is_data_where_it_is_chosen(tmp_path):
    pixels = scene(4, 64, 64, "uint8")
    pixels[3, :32] = 0
    for name in "av":
        write_tif(tmp_path / f"raw/images/{name}.tif", pixels, photometric="RGB", alpha="YES")
        write_tif(tmp_path / f"raw/masks/{name}.tif", sea(64, 64)[None])
    prepared = prepare(tmp_path / "raw", tmp_path / "all", raster_spec(bands=4))
    assert prepared.empty == 0 and prepared.statistics.pixels == [4096] * 4
    assert prepare(tmp_path / "raw", tmp_path / "rgb", raster_spec()).empty == 4


def test_scaled_tiles_are_those_of_the_scaled_scene(tmp_path):
    """8-bit tiles cut by windows equal the whole scene resized by Pillow, and cut."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 130, 200), np.uint8)
    for name in "av":
        write_tif(tmp_path / f"raw/images/{name}.tif", pixels)
    spec = raster_spec(files=IMAGES, tile={"size": 32, "scale": 0.37})
    prepare(tmp_path / "raw", tmp_path / "out", spec)
    whole = np.asarray(Image.fromarray(pixels.transpose(1, 2, 0)).resize(
        (74, 48), Image.Resampling.BILINEAR))
    for y in (0, 16):
        for x in (0, 32, 42):
            tile = np.asarray(Image.open(tmp_path / f"out/images/a_{y}_{x}.png")).astype(int)
            assert abs(tile - whole[y : y + 32, x : x + 32]).max() <= 1


def test_scaled_tiles_do_not_bleed_into_missing_pixels(tmp_path):
    pixels = np.full((3, 64, 64), 1000, np.uint16)
    pixels[:, :, 40:] = 0
    for name in "av":
        write_tif(tmp_path / f"raw/images/{name}.tif", pixels, nodata=0)
    spec = raster_spec(files=IMAGES, tile={"size": 32, "scale": 0.5})
    prepare(tmp_path / "raw", tmp_path / "out", spec)
    with rasterio.open(tmp_path / "out/images/a_0_0.tif") as tile:
        assert set(np.unique(tile.read())) == {0, 1000}
        assert (tile.read(1)[:, :20] == 1000).all() and (tile.read(1)[:, 20:] == 0).all()


def test_padding_of_raster_tiles_is_no_data(tmp_path):
    raw = write_scenes(tmp_path / "raw", 4, "uint16", size=(40, 40))
    prepare(raw, tmp_path / "out", raster_spec(bands=4, tile={"size": 32, "edge": "pad"}))
    spec = load_dataset(tmp_path / "out/dataset.yaml")
    _, missing = open_pixels(tmp_path / "out/images/a_32_32.tif", spec).whole()
    assert not missing[:8, :8].any() and missing.sum() == 32 * 32 - 64
    assert spec.statistics.pixels == [2 * 1600] * 4


@pytest.fixture(scope="module")
def four_bands(tmp_path_factory):
    root = tmp_path_factory.mktemp("rasters")
    raw = write_scenes(root / "raw", 4, "uint16", ("a", "b", "c", "v"), ("c",), size=(64, 64))
    spec = raster_spec(bands=[4, 1, 2, 3])
    prepare(raw, root / "out", spec)
    split_dataset(root / "out", labels=4, progress=False)
    return root / "out", spec


def test_batches_are_stretched_and_the_same_for_any_workers(four_bands):
    root, _ = four_bands
    config = DataConfig(dataset="toy.yaml", root=root, labels=4, batch_size=2, workers=0)
    spec = load_dataset(root / "dataset.yaml")
    split = open_split(config, spec)

    def batches(workers, strong=True):
        data = config.model_copy(update={"workers": workers, "strong_on_device": not strong})
        return list(build_loader(data, spec, split, views=["x", "w", "s1", "s2"], seed=1,
                                 start_step=0, total_steps=3))

    alone = batches(0)
    for one, other in zip(alone, batches(2), strict=True):
        for name in ("x", "y", "w", "s1", "s2", "ignore"):
            assert torch.equal(getattr(one, name), getattr(other, name))
    batch = alone[0]
    assert batch.x.shape == (2, 4, 32, 32) and batch.x.dtype == torch.float32
    for view in (batch.x, batch.w, batch.s1, batch.s2):
        assert 0 <= view.min() and view.max() <= 1
    assert not torch.equal(batch.s1, batch.w)
    for one, other in zip(alone, batches(0, strong=False), strict=True):
        assert torch.equal(one.w, other.w)
        assert (one.s1 - other.s1).abs().max() < 0.02  # the pivot is estimated on fewer pixels


def test_statistics_of_the_folder_go_with_a_description_by_hand(four_bands, tmp_path):
    root, written = four_bands
    path = tmp_path / "hand.yaml"
    path.write_text(yaml.safe_dump(written.model_dump(mode="json")))
    spec = open_dataset(DataConfig(dataset=str(path), root=root, labels=4))
    assert spec.statistics == load_dataset(root / "dataset.yaml").statistics
    assert spec.bands == [4, 1, 2, 3]
    other = change_bands(written, "1,2,3,4")
    path.write_text(yaml.safe_dump(other.model_dump(mode="json")))
    with pytest.raises(DataError, match=r"was prepared from bands 4, 1, 2, 3; .* has 1, 2, 3, 4"):
        open_dataset(DataConfig(dataset=str(path), root=root, labels=4))
    with pytest.raises(DataError, match="4 channels and no band statistics; `co2s-fast data prep"):
        open_split(DataConfig(root=root, labels=4), written)


def test_checks_read_raster_tiles(four_bands):
    root, _ = four_bands
    for level in ("quick", "deep"):
        report = check_dataset(root, level=level, progress=False, workers=1)
        assert report.problems == [] and report.images == 16
        assert "uint16 images, by channel" in str(report)
    tile = root / "images/a_0_0.tif"
    content = tile.read_bytes()
    tile.write_bytes(content[: len(content) // 2])
    try:
        for level in ("quick", "deep"):
            report = check_dataset(root, level=level, progress=False, workers=1)
            assert any(str(tile) in problem for problem in report.problems)
    finally:
        tile.write_bytes(content)


def test_dali_says_that_it_does_not_read_them(four_bands, monkeypatch):
    spec = load_dataset(four_bands[0] / "dataset.yaml")
    monkeypatch.setattr("co2s_fast.data.loader.dali_is_installed", lambda: True)
    with pytest.raises(UsageError, match="4 bands of uint16: use --loader torch"):
        choose_loader(DataConfig(loader="dali"), "cpu", spec)
    assert choose_loader(DataConfig(), "cuda", spec).loader == "torch"
    assert choose_loader(DataConfig(), "cuda").loader == "dali"


@pytest.mark.parametrize("bands", [3, 5])
def test_strong_views_of_floats_are_those_of_bytes(bands):
    pixels = np.random.default_rng(bands).integers(0, 256, (bands, 40, 48), np.uint8)
    colour = Colour((1, 0, 3, 2), 1.2, 0.7, 1.3, 0.1, gray=False, sigma=1.1)
    floats = (pixels / 255).astype(np.float32)
    expected = strong_view(pixels, colour).astype(float) / 255
    found = strong_view(floats, colour)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=2 / 255)
    batch = strong_views(torch.from_numpy(floats)[None], [colour])[0].numpy()
    np.testing.assert_allclose(batch, expected, atol=4 / 255)


def test_crops_read_what_they_show(tmp_path):
    """A crop of a raster equals the crop of the whole stretched image."""
    spec = raster_spec(bands=2, statistics={
        "dtype": "uint16", "low": [500, 500], "high": [4000, 4000], "mean": [0, 0], "std": [1, 1]})
    path = write_tif(tmp_path / "s.tif", scene(2, 100, 140), compress="deflate")
    image = open_pixels(path, spec)
    whole, _ = image.whole()
    np.testing.assert_allclose(whole, ((scene(2, 100, 140).astype(float) - 500) / 3500).clip(0, 1),
                               atol=1e-6)
    from co2s_fast.data.transforms import crop_image

    for geometry in (Geometry(100, 140, 30, 50, 40, False), Geometry(57, 80, 20, 11, 40, True),
                     Geometry(190, 266, 60, 200, 80, False), Geometry(20, 28, 0, 0, 32, True)):
        for antialias in (True, False):
            found = image.crop(geometry, antialias).pixels
            for plane, band in zip(found, whole, strict=True):
                expected = crop_image(Image.fromarray(band), geometry, antialias)
                np.testing.assert_allclose(plane, expected, atol=1e-4)


def test_one_band_is_repeated_as_grey(tmp_path):
    raw = write_scenes(tmp_path / "raw", 1, "uint16")
    prepare(raw, tmp_path / "out", raster_spec())
    spec = load_dataset(tmp_path / "out/dataset.yaml")
    with rasterio.open(tmp_path / "out/images/a_0_0.tif") as tile:
        assert tile.count == 1
    pixels, _ = open_pixels(tmp_path / "out/images/a_0_0.tif", spec).whole()
    assert pixels.shape == (3, 32, 32) and (pixels[0] == pixels[2]).all()
    assert len(spec.statistics.low) == 3


def test_a_palette_image_becomes_colour(tmp_path):
    values = np.random.default_rng(0).integers(0, 3, (1, 64, 64), np.uint8)
    colors = {0: (1, 2, 3, 255), 1: (40, 50, 60, 255), 2: (200, 100, 0, 255)}
    for name in "av":
        path = write_tif(tmp_path / f"raw/images/{name}.tif", values, photometric="PALETTE")
        with rasterio.open(path, "r+") as target:
            target.write_colormap(1, colors)
    prepare(tmp_path / "raw", tmp_path / "out", raster_spec(files=IMAGES))
    tile = np.asarray(Image.open(tmp_path / "out/images/a_32_0.png"))
    table = np.array([colors[i][:3] for i in range(3)])
    np.testing.assert_array_equal(tile, table[values[0, 32:, :32]])


def test_old_run_descriptions_are_read():
    content = raster_spec().model_dump(mode="json")
    for key in ("display", "band_names", "raster", "statistics"):
        del content[key]
    assert parse_dataset({**content, "bands": 3}, "old.yaml") == raster_spec()


def test_pictures_can_be_stretched_too(tmp_path):
    for name in "av":
        path = tmp_path / f"raw/images/{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene(3, 64, 64, "uint8").transpose(1, 2, 0)).save(path)
    spec = raster_spec(files={"images": "images/{scene}.png", "group": "{scene}"},
                       raster={"stretch": "percentile", "percentiles": [5, 95]})
    found = prepare(tmp_path / "raw", tmp_path / "out", spec).statistics
    values = scene(3, 64, 64, "uint8").reshape(3, -1)
    np.testing.assert_array_equal(found.low, np.percentile(values, 5, 1, method="lower"))
    pixels, _ = open_pixels(tmp_path / "out/images/a_0_0.tif",
                            load_dataset(tmp_path / "out/dataset.yaml")).whole()
    assert pixels.dtype == np.float32


def test_preparing_again_and_the_option_bands(tmp_path):
    from click.testing import CliRunner

    from co2s_fast.cli import main

    raw = write_scenes(tmp_path / "raw", 4, "int16")
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(raster_spec().model_dump(mode="json", exclude_defaults=True)))
    command = ["data", "prepare", str(path), "--raw", str(raw), "--out", str(tmp_path / "out"),
               "--bands", "4,2", "--stretch", "minmax"]
    first = CliRunner().invoke(main, command)
    assert first.exit_code == 0 and "int16 images, by channel" in first.output
    spec = load_dataset(tmp_path / "out/dataset.yaml")
    assert spec.bands == [4, 2] and spec.raster.stretch == "minmax"
    assert "already prepared, 18 tiles" in CliRunner().invoke(main, command).output
    other = CliRunner().invoke(main, [*command[:-4], "--bands", "4,9"])
    assert other.exit_code == 1 and "was not prepared from" in other.output


def test_the_example_is_a_description():
    root = Path(__file__).resolve().parents[2]
    spec = load_dataset(root / "examples/datasets/multispectral.yaml")
    assert spec.channels == 4 and spec.display_channels == (2, 1, 0)
    assert spec.mask.encoding == "polygons"


def test_nodata_of_the_description_is_finite(tmp_path):
    with pytest.raises(UsageError, match=r"raster\.nodata: expected a finite number, found inf; .*"
                                         "NaN always count as no data"):
        raster_spec(raster={"nodata": float("inf")})
    raw = write_scenes(tmp_path / "raw", 4, "float32")
    spec = raster_spec(bands=4, raster={"nodata": float("nan")})
    assert spec.raster.nodata is None
    prepare(raw, tmp_path / "out", spec)
    assert prepare(raw, tmp_path / "out", spec).already


def test_no_message_names_the_folder_of_the_meantime(tmp_path, monkeypatch):
    def save(path, *_):
        raise RasterioIOError("Write failed")

    raw = write_scenes(tmp_path / "raw", 4, "uint16", unlabeled="abv")
    found = prepare(raw, tmp_path / "out", raster_spec(bands=4, files=IMAGES, val=0.25))
    (note,) = [note for note in found.notes if "no image has a label" in note]
    assert f": {tmp_path / 'out'}: no image has a label" in note
    monkeypatch.setattr(tile_writer, "save_raster", save)
    with pytest.raises(DataError, match=rf"^{tmp_path}/other/images/\w+\.tif: cannot be written: "
                                        r"Write failed \(is the disk full\?\)"):
        prepare(raw, tmp_path / "other", raster_spec(bands=4, files=IMAGES))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "raw"]
