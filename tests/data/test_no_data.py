"""Where images have no data and masks no label: alike in tiles, in training and in prediction."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.enums import ColorInterp
from rasterio.warp import transform_geom
from toy_data import two_classes, write_raw
from toy_rasters import (
    CRS,
    NORTH,
    PIXEL,
    POLYGONS,
    WEST,
    raster_spec,
    scene,
    write_geojson,
    write_tif,
)

from co2s_fast.data import (
    DataConfig,
    Item,
    build_loader,
    load_dataset,
    load_label,
    open_split,
    prepare_dataset,
    split_dataset,
)
from co2s_fast.data.check import check_dataset
from co2s_fast.data.dali.source import encoded_image
from co2s_fast.data.describe import describe_folder, read_mask
from co2s_fast.data.pixels import open_pixels
from co2s_fast.data.splits import Split
from co2s_fast.data.tiles import list_images
from co2s_fast.engine.scenes import open_scene
from co2s_fast.engine.sliding_window import Window
from co2s_fast.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")

AS_PILLOW_READS = {"photometric": "RGB", "interleave": "pixel"}
HOLE = np.s_[8:24, 8:24]


def prepare(raw, out, spec):
    return prepare_dataset(spec, raw, out, progress=False)


def tiles(out):
    return {item.name: item for item in list_images(out)}


def images(raw, names="av", size=(64, 64)):
    for number, name in enumerate(names):
        write_tif(raw / f"images/{name}.tif", scene(3, *size, "uint8", number))
    return raw


def known(size=(64, 64)):
    there = np.ones(size, bool)
    there[HOLE] = False
    return there


def as_numbers(path, alpha):
    write_tif(path, np.ones((1, 64, 64), np.uint8), mask=known())


def as_colours(path, alpha):
    pixels = np.zeros((4, 64, 64), np.uint8)
    pixels[2], pixels[3] = 200, 255 * known()
    write_tif(path, pixels)
    with rasterio.open(path, "r+") as target:
        target.colorinterp = [ColorInterp.red, ColorInterp.green, ColorInterp.blue,
                              ColorInterp.alpha]  # fmt: skip


def as_colours_with_a_number(path, alpha):
    """Beside which GDAL does not heed alpha."""
    as_colours(path, alpha)
    with rasterio.open(path, "r+") as target:
        target.nodata = 9


@pytest.mark.parametrize("write", [as_numbers, as_colours, as_colours_with_a_number])
def test_what_a_mask_hides_has_no_label(tmp_path, write):
    """By a mask inside the file, and by alpha."""
    raw = images(tmp_path / "raw")
    for name in "av":
        write(raw / f"masks/{name}.tif", known())
    spec = raster_spec(mask={} if write is as_numbers else {"encoding": "color"})
    found = prepare(raw, tmp_path / "out", spec)
    assert found.pixels["ignored"] == 2 * 256
    assert found.pixels["sea"] == 2 * (64 * 64 - 256)


def test_what_a_picture_hides_has_no_label(tmp_path):
    raw = write_raw(tmp_path / "raw", ["s/a", "s/v"], size=(64, 64))
    for name in "av":
        path = raw / f"s/masks/{name}.png"
        mask = Image.open(path).convert("RGBA")
        mask.putalpha(Image.fromarray(known()))
        mask.save(path)
    assert prepare(raw, tmp_path / "out", two_classes()).pixels["ignored"] == 2 * 256


@pytest.mark.parametrize("dtype", ["int8", "int16", "int64", "float32"])
def test_signed_numbers_with_one_for_no_label(tmp_path, dtype):
    raw = images(tmp_path / "raw")
    for name in "av":
        write_tif(raw / f"masks/{name}.tif", np.where(known(), 1, -1)[None].astype(dtype),
                  nodata=-1)  # fmt: skip
    assert prepare(raw, tmp_path / "out", raster_spec()).pixels["ignored"] == 2 * 256


def collar(raw, **profile):
    """Scenes with a red roof (255, 20, 130) beside a hole without data."""
    pixels = np.full((3, 64, 64), 90, np.uint8)
    pixels[:, 30:50, 30:50] = np.array([255, 20, 130], np.uint8)[:, None, None]
    pixels[(slice(None), *HOLE)] = 255
    for name in "av":
        write_tif(raw / f"images/{name}.tif", pixels, **profile)
        write_tif(raw / f"masks/{name}.tif", np.ones((1, 64, 64), np.uint8))
    return raw


@pytest.mark.parametrize("profile", [{"nodata": 255}, {"mask": known()}], ids=["number", "mask"])
def test_training_and_prediction_see_the_same_bytes(tmp_path, profile):
    raw = collar(tmp_path / "raw", **profile)
    spec = raster_spec(tile={"size": 64})
    prepare(raw, tmp_path / "out", spec)
    tile = tiles(tmp_path / "out")["a_0_0"].image
    pixels, missing = open_pixels(tile, spec).whole()
    with open_scene(raw / "images/a.tif", 1.0, spec) as raster:
        window = Window(0, 0, 64, 64)
        seen, valid = raster.read(window), raster.valid(window)
    np.testing.assert_array_equal(pixels, seen)
    np.testing.assert_array_equal(missing, ~valid)
    np.testing.assert_array_equal(missing, ~known())
    assert tuple(pixels[:, 40, 40]) == (255, 20, 130) and not pixels[:, 10, 10].any()
    encoded, _ = encoded_image(tile)
    assert encoded[:2].tobytes() == b"P6"
    by_dali = encoded[-64 * 64 * 3 :].reshape(64, 64, 3).transpose(2, 0, 1)
    np.testing.assert_array_equal(by_dali, pixels)


@pytest.mark.parametrize("suffix", ["tif", "png"])
def test_at_half_the_size_too(tmp_path, suffix):
    """A saturated band stays one, and what is missing lends no colour to what is there."""
    raw = collar(tmp_path / "raw", nodata=255)
    if suffix == "png":
        for name in "av":
            with rasterio.open(raw / f"images/{name}.tif") as source:
                rgb = source.read().transpose(1, 2, 0)
            alpha = (255 * known()).astype(np.uint8)[..., None]
            (raw / f"images/{name}.tif").unlink()
            Image.fromarray(np.concatenate([rgb, alpha], 2)).save(raw / f"images/{name}.png")
    spec = raster_spec(tile={"size": 32, "scale": 0.5},
                       files={"images": f"images/{{scene}}.{suffix}", "group": "{scene}",
                              "labels": "masks/{scene}.tif"})  # fmt: skip
    prepare(raw, tmp_path / "out", spec)
    pixels, missing = open_pixels(tiles(tmp_path / "out")["a_0_0"].image, spec).whole()
    assert tuple(pixels[:, 20, 20]) == (255, 20, 130)
    there = ~missing if missing is not None else np.ones((32, 32), bool)
    around = there.copy()
    around[14:26, 14:26] = False  # the roof and what it blends with
    assert set(np.unique(pixels[:, around])) == {90}
    assert missing[5:11, 5:11].all()


def test_bands_with_several_numbers_for_no_data(tmp_path):
    """A tile has one: one that none of its pixels has."""
    values = scene(2, 64, 64, "uint16")
    values[0, :8], values[1, :8], values[1, 8:16] = 7, 9, 7
    for name in "av":
        for band in (0, 1):
            write_tif(tmp_path / f"parts/{name}{band}.tif", values[band][None],
                      nodata=(7, 9)[band])  # fmt: skip
        write_vrt(tmp_path / f"raw/images/{name}.vrt",
                  [tmp_path / f"parts/{name}{band}.tif" for band in (0, 1)])  # fmt: skip
        write_tif(tmp_path / f"raw/masks/{name}.tif", np.ones((1, 64, 64), np.uint8))
    spec = raster_spec(bands=2, tile={"size": 64},
                       files={"images": "images/{scene}.vrt", "labels": "masks/{scene}.tif",
                              "group": "{scene}"})  # fmt: skip
    prepare(tmp_path / "raw", tmp_path / "out", spec)
    with rasterio.open(tiles(tmp_path / "out")["a_0_0"].image) as tile:
        there = tile.read_masks() != 0
        np.testing.assert_array_equal(tile.read()[there], values[there])
    assert there[:, 8:].all() and not there[:, :8].any()


def write_vrt(path, parts):
    """Bands one after another, as `gdalbuildvrt -separate` makes them."""
    bands = "".join(
        f'<VRTRasterBand dataType="UInt16" band="{number}"><NoDataValue>{nodata}</NoDataValue>'
        f"<ComplexSource><SourceFilename>{part}</SourceFilename><SourceBand>1</SourceBand>"
        f"<NODATA>{nodata}</NODATA></ComplexSource></VRTRasterBand>"
        for number, (part, nodata) in enumerate(zip(parts, (7, 9), strict=True), 1))  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'<VRTDataset rasterXSize="64" rasterYSize="64"><SRS>{CRS}</SRS>'
                    f"<GeoTransform>{WEST}, {PIXEL}, 0, {NORTH}, 0, -{PIXEL}</GeoTransform>"
                    f"{bands}</VRTDataset>")


def test_scenes_whose_masks_say_nothing_are_unlabelled(tmp_path):
    raw = images(tmp_path / "raw", "abcd")
    for name in "abcd":
        label = np.full((1, 64, 64), 255, np.uint8)
        if name == "b":
            label[:, :, :32], label[:, :, 32:] = 0, 1
        write_tif(raw / f"masks/{name}.tif", label)
    spec = raster_spec(val=0.25)
    found = prepare(raw, tmp_path / "out", spec)
    assert (found.tiles, found.labeled) == (16, 4)
    split_dataset(tmp_path / "out", spec, labels=2, seed=0)
    config = DataConfig(root=tmp_path / "out", labels=2, batch_size=2, missing_classes="warn")
    split = open_split(config, spec)
    assert all(item.name.startswith("b_") for item in [*split.val, *split.labeled])
    assert check_dataset(tmp_path / "out", spec, progress=False).problems == []


def test_lists_that_name_tiles_keep_their_labels(tmp_path):
    raw = images(tmp_path / "raw", "av")
    for name in "av":
        write_tif(raw / f"masks/{name}.tif", np.full((1, 64, 64), 255 * (name == "a"), np.uint8))
    spec = raster_spec(tile={"size": 32, "name": "{scene}_{row}_{column}"})
    assert prepare(raw, tmp_path / "out", spec).labeled == 8


def test_nothing_to_validate_on_is_found_before_training(tmp_path):
    raw = images(tmp_path / "raw", "av")
    for name in "av":
        write_tif(raw / f"masks/{name}.tif", np.where(np.arange(64) < 32, 0, 1)[None]
                  .repeat(64, 0)[None].astype(np.uint8))  # fmt: skip
    spec = raster_spec()
    out = tmp_path / "out"
    prepare(raw, out, spec)
    split_dataset(out, spec, labels=4, seed=0)
    for item in list_images(out):
        if item.name.startswith("v_"):
            Image.fromarray(np.full((32, 32), 255, np.uint8)).save(item.label)
    for use in ("train", "evaluate"):
        with pytest.raises(DataError, match=r"no pixel of the 4 validation images has a class"):
            open_split(DataConfig(root=out, labels=4), spec, use)
    (problem,) = check_dataset(out, spec, progress=False).problems
    assert "validation images has a class" in problem


def test_polygons_across_the_antimeridian(tmp_path):
    """In degrees; the scene lies on both sides of it."""
    west, north = 300_000.0, 6_660_000.0  # in zone 1 north; the antimeridian is at about 333,000
    place = {"crs": "EPSG:32601",
             "transform": rasterio.transform.from_origin(west, north, 1000, 1000)}
    for name in "av":
        write_tif(tmp_path / f"raw/images/{name}.tif", scene(3, 64, 64, "uint8"), **place)
        corners = [(40, 10), (50, 10), (50, 20), (40, 20), (40, 10)]
        ring = [[west + 1000 * x, north - 1000 * y] for x, y in corners]
        shape = transform_geom("EPSG:32601", "EPSG:4326",
                               {"type": "Polygon", "coordinates": [ring]})  # fmt: skip
        rings = shape["coordinates"]
        rings = rings if shape["type"] == "Polygon" else rings[0]
        write_geojson(tmp_path / f"raw/polygons/{name}.geojson", [(rings, {"class": "sea"})],
                      "EPSG:4326")  # fmt: skip
    bounds = rasterio.warp.transform_bounds("EPSG:32601", "EPSG:4326", west, north - 64_000,
                                            west + 64_000, north, densify_pts=21)
    assert bounds[0] > bounds[2]  # it does lie across
    found = prepare(tmp_path / "raw", tmp_path / "out", raster_spec(**POLYGONS))
    assert found.pixels["sea"] == pytest.approx(2 * 100, abs=8)


def test_images_written_otherwise_are_told_of(tmp_path):
    raw = images(tmp_path / "raw")
    for name in "av":
        write_tif(raw / f"masks/{name}.tif", np.ones((1, 64, 64), np.uint8))
    assert prepare(raw, tmp_path / "out", raster_spec()).notes == []
    for name in ("b.tiff", "c.tiff", "readme.txt"):
        (raw / "images" / name).write_bytes((raw / "images/a.tif").read_bytes())
    found = prepare(raw, tmp_path / "other", raster_spec())
    assert found.images == 2
    assert str(found).endswith("note: 2 image files beside these match no template and are left "
                               "out, for example images/b.tiff")


def test_one_small_scene_does_not_decide_the_tiles(tmp_path):
    for number, size in enumerate([(1200, 1200), (1200, 1200), (40, 1200)]):
        write_tif(tmp_path / f"raw/images/s{number}.tif", np.zeros((3, *size), np.uint8))
        write_tif(tmp_path / f"raw/masks/s{number}.tif",
                  np.zeros((1, *size), np.uint8) + np.uint8(number))  # fmt: skip
    describe_folder(tmp_path / "raw", tmp_path / "toy.yaml")
    assert "tile: {size: 512}" in (tmp_path / "toy.yaml").read_text()


def test_labels_of_a_tile_are_read_back(tmp_path):
    raw = images(tmp_path / "raw")
    for name in "av":
        as_numbers(raw / f"masks/{name}.tif", known())
    prepare(raw, tmp_path / "out", raster_spec(tile={"size": 64}))
    spec = load_dataset(tmp_path / "out/dataset.yaml")
    label = load_label(tiles(tmp_path / "out")["a_0_0"], spec)
    np.testing.assert_array_equal(label == 255, ~known())


def authors_folder(root, save):
    """A folder that nobody prepared: one image whose class 1 is hidden but for one corner."""
    (root / "images").mkdir(parents=True)
    (root / "labels").mkdir()
    label = np.zeros((64, 64), np.uint8)
    label[HOLE], label[60:, 60:] = 1, 1
    path = save(root / "images")
    Image.fromarray(label).save(root / "labels/a.png")
    name = f"images/{path.name} labels/a.png\n"
    (root / "split").mkdir()
    for each in ("labeled", "val"):
        (root / f"split/{each}.txt").write_text(name)
    return Split([Item("a", path, root / "labels/a.png")], [], [])


def as_rgba(folder):
    pixels = np.full((64, 64, 4), 90, np.uint8)
    pixels[..., 3] = 255 * known()
    Image.fromarray(pixels).save(folder / "a.png")
    return folder / "a.png"


def as_tiff_with_a_number(folder):
    pixels = np.where(known(), np.uint8(90), np.uint8(0))[None].repeat(3, 0)
    return write_tif(folder / "a.tif", pixels, nodata=0, **AS_PILLOW_READS)


def as_tiff_with_a_mask(folder):
    pixels = np.full((3, 64, 64), 90, np.uint8)
    return write_tif(folder / "a.tif", pixels, mask=known(), **AS_PILLOW_READS)


@pytest.mark.parametrize("save", [as_rgba, as_tiff_with_a_number, as_tiff_with_a_mask])
@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_a_folder_that_nobody_prepared(tmp_path, save, loader):
    """What the image hides is no label, and class-aware crops show what can be seen of a class."""
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    split = authors_folder(tmp_path, save)
    spec = two_classes(crop=32, mask={"encoding": "index"}, tile={}, scale="native",
                       scale_range=(1, 1))  # fmt: skip
    config = DataConfig(root=tmp_path, split=tmp_path / "split", batch_size=1, workers=0,
                        loader=loader, sampling="class-aware")  # fmt: skip
    batches = build_loader(config, spec, split, views={"x"}, seed=0, start_step=0, total_steps=40)
    shown = [batch.y[0].numpy() for batch in batches]
    ones = [int((label == 1).sum()) for label in shown]
    assert max(ones) <= 16  # never the 256 that cannot be seen
    assert sum(count > 0 for count in ones) >= 30  # nearly always asked for, being rare


@pytest.mark.parametrize("bits", [2, 4])
def test_masks_of_few_bits(tmp_path, bits):
    """Pillow spreads grey of 2 and 4 bits over 0 to 255; class ids stay what the file says."""
    top = 2**bits - 1
    label = np.array([[0, top, 0, top]] * 4, np.uint8)
    path = tmp_path / "labels/a.png"
    path.parent.mkdir()
    path.write_bytes(grey_png(label, bits))
    classes = [{"name": f"c{i}", "color": [i, 1, 2]} for i in range(top + 1)]
    spec = two_classes(classes=classes, mask={"encoding": "index"}, tile={})
    for raw in (True, False):
        found = load_label(Item("a", tmp_path / "a.png", path, raw=raw), spec)
        np.testing.assert_array_equal(found, label)
    np.testing.assert_array_equal(read_mask(path)[0], label)  # so `describe` names what it is


def grey_png(pixels, bits):
    """A grey PNG of `bits` a pixel, by hand."""
    height, width = pixels.shape
    per_byte = 8 // bits
    rows = b""
    for row in pixels:
        values = [int(v) for v in row]
        packed = [sum(v << (8 - bits * (i + 1)) for i, v in enumerate(values[at : at + per_byte]))
                  for at in range(0, width, per_byte)]
        rows += b"\0" + bytes(packed)

    def chunk(kind, content):
        return (len(content).to_bytes(4, "big") + kind + content
                + zlib.crc32(kind + content).to_bytes(4, "big"))

    head = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
            + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
