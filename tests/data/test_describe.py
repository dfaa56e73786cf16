"""Descriptions proposed for raw folders: which files pair up, which classes their masks have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
from click.testing import CliRunner
from PIL import Image
from toy_data import write_raw
from toy_rasters import rectangle, scene, write_geojson, write_tif

from co2s_fast.cli import main
from co2s_fast.data import describe, describe_folder, load_dataset, prepare_dataset
from co2s_fast.data.files import load_label
from co2s_fast.data.guess import guess_templates
from co2s_fast.data.pairing import find_sources
from co2s_fast.data.tiles import list_images
from co2s_fast.errors import DataError, UsageError


@pytest.mark.parametrize(("names", "images", "labels"), [
    (["images/a.jpg", "images/b.jpg", "masks/a.png"], "images/{name}.jpg", "masks/{name}.png"),
    (["t 1/images/1.jpg", "t 2/images/1.jpg", "t 1/masks/1.png", "t 2/masks/1.png"],
     "{scene}/images/{name}.jpg", "{scene}/masks/{name}.png"),
    (["img_dir/train/a.jpg", "img_dir/val/b.jpg", "ann_dir/train/a.png", "ann_dir/val/b.png"],
     "img_dir/{scene}/{name}.jpg", "ann_dir/{scene}/{name}.png"),
    (["1_sat.jpg", "1_mask.png", "2_sat.jpg", "2_mask.png"], "{name}_sat.jpg", "{name}_mask.png"),
    (["top_2_10_RGB.tif", "top_2_10_label.tif", "top_2_11_RGB.tif", "top_2_11_label.tif"],
     "{name}_RGB.tif", "{name}_label.tif"),
    (["a.jpg", "b.png", "mask_a.png", "mask_b.png"], "{name}.{type}", "mask_{name}.png"),
    (["x/tiles/a.png", "x/tiles/a1.png", "x/gt/a_gt.png", "x/gt/a1_gt.png"],
     "x/tiles/{name}.png", "x/gt/{name}_gt.png"),
    (["scenes/a.tif", "scenes/b.tif", "drawn/a.gpkg"], "scenes/{name}.tif", "drawn/{name}.gpkg"),
    (["x/a.tif", "x/b.tif", "all.gpkg"], "x/{name}.tif", "all.gpkg"),
    (["x/a.tif", "masks/a.png", "area.gpkg"], "x/{name}.tif", "masks/{name}.png"),
    (["segmentation/a.jpg", "segmentation/a-gt.png"],  # the folder of all says nothing
     "segmentation/{name}.jpg", "segmentation/{name}-gt.png"),
])  # fmt: skip
def test_templates_follow_from_names(names, images, labels):
    assert guess_templates(names, Path("raw")) == (images, labels)


@pytest.mark.parametrize(("names", "said"), [
    ([], "found no images"),
    (["a.jpg", "b.jpg"], r"found no masks .*a\.jpg.*--labels"),
    (["images/a.jpg", "masks/x/a.png"], "1 to 2 folders deep"),
    (["north/a.jpg", "south/a.jpg", "gt/a.png"], "masks lie in folders gt, images in north"),
    (["a.jpg", "b.jpg", "a_mask.png", "b_mask.tif"], r"masks end with \.png, \.tif"),
])  # fmt: skip
def test_what_cannot_be_guessed_is_said(names, said):
    with pytest.raises(DataError, match=said):
        guess_templates(names, Path("raw"))


def save(path: Path, pixels: np.ndarray, palette: list[int] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels.astype(np.uint8))
    if palette is not None:
        image.putpalette(palette)
    image.save(path)


def write_pairs(raw: Path, mask: np.ndarray, count: int = 3, **options) -> None:
    for number in range(count):
        save(raw / f"images/{number}.png", np.full((*mask.shape[:2], 3), 9))
        save(raw / f"labels/{number}.png", mask, **options)


def described(raw: Path, tmp_path: Path, **options):
    out = tmp_path / "mine.yaml"
    describe_folder(raw, out, progress=False, **options)
    return load_dataset(out)


def test_from_a_folder_to_prepared_tiles(tmp_path):
    raw = write_raw(tmp_path / "raw", ["a/1", "a/2", "b/1"], size=(40, 64), without_mask=("b/1",))
    spec = described(raw, tmp_path)
    assert [c.color for c in spec.classes] == [(0, 0, 200), (200, 100, 0)]
    assert (spec.name, spec.mask.encoding, spec.crop, spec.tile.size) == ("mine", "color", 32, None)
    assert len(find_sources(raw, spec)) == 3
    prepared = prepare_dataset(spec, raw, tmp_path / "out", progress=False)
    assert (prepared.images, prepared.labeled) == (3, 2)
    labels = [load_label(item, spec) for item in list_images(tmp_path / "out") if item.label]
    assert all(set(np.unique(label)) == {0, 1} for label in labels)


def test_numbers_and_what_255_means(tmp_path):
    mask = np.zeros((32, 48), np.uint8)
    mask[:, 10:20], mask[:, 20:30], mask[0] = 2, 7, 255
    write_pairs(tmp_path / "three", mask)
    spec = described(tmp_path / "three", tmp_path)
    assert [c.values for c in spec.classes] == [[], [2], [7]]
    assert spec.mask.ignore == [255] and len(set(spec.palette)) == 3
    (tmp_path / "mine.yaml").unlink()
    write_pairs(tmp_path / "two", np.where(mask == 2, 255, 0))
    spec = described(tmp_path / "two", tmp_path)
    assert [c.values for c in spec.classes] == [[], [255]] and spec.mask.ignore == []
    prepare_dataset(spec, tmp_path / "two", tmp_path / "out", progress=False)
    label = load_label(list_images(tmp_path / "out")[0], spec)
    np.testing.assert_array_equal(label, mask == 2)


def test_palettes(tmp_path):
    mask = np.tile(np.array([0, 1, 3], np.uint8), (32, 16))
    colors = [10, 20, 30, 40, 50, 60, 0, 0, 0, 70, 80, 90]
    write_pairs(tmp_path / "one", mask, palette=colors)
    spec = described(tmp_path / "one", tmp_path)
    assert spec.mask.encoding == "index"
    assert spec.palette == [(10, 20, 30), (40, 50, 60), (70, 80, 90)]
    assert spec.classes[2].values == [3]
    (tmp_path / "mine.yaml").unlink()
    # The same colours by other numbers, as editors write them: the colours tell.
    save(tmp_path / "one/labels/2.png", 3 - mask, palette=[c for i in (9, 0, 3, 0) for c in
                                                          colors[i : i + 3]])  # fmt: skip
    spec = described(tmp_path / "one", tmp_path)
    assert spec.mask.encoding == "color"
    assert {(10, 20, 30), (40, 50, 60), (70, 80, 90)} <= set(spec.palette)
    (tmp_path / "mine.yaml").unlink()
    save(tmp_path / "one/labels/2.png", np.tile(np.uint8([40, 50, 60]), (32, 48, 1)))
    assert described(tmp_path / "one", tmp_path).mask.encoding == "color"


def test_rasters_of_more_bands(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(2):
        for folder, bands, dtype in (("scenes", 4, "uint16"), ("gt", 1, "uint8")):
            path = tmp_path / f"raw/{folder}/{number}.tif"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 3, (bands, 1100, 1300)).astype(dtype)
            with rasterio.open(path, "w", driver="GTiff", width=1300, height=1100, count=bands,
                               dtype=dtype) as file:  # fmt: skip
                file.write(pixels)
    spec = described(tmp_path / "raw", tmp_path)
    assert (spec.bands, spec.num_classes) == ([1, 2, 3, 4], 3)
    assert (spec.tile.size, spec.crop) == (512, 512)


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
def test_polygons(tmp_path):
    pytest.importorskip("fiona")
    raw = tmp_path / "raw"
    for number, name in enumerate("abv"):
        write_tif(raw / f"images/{name}.tif", scene(3, 48, 64, "uint8", number))
    places = [rectangle((4, 30), (2, 40)), rectangle((10, 20), (30, 50)),
              rectangle((40, 48), (0, 64))]
    fields = [{"id": 1, "size": 0.5, "class": "land"}, {"id": 2, "size": 1.5, "class": "sea"},
              {"id": 3, "size": 2.5, "class": "land"}]
    for name in "av":
        write_geojson(raw / f"polygons/{name}.geojson", list(zip(places, fields, strict=True)))
    spec = described(raw, tmp_path)
    assert (spec.mask.encoding, spec.mask.attribute) == ("polygons", "class")
    assert spec.class_names == ["land", "sea"]
    found = prepare_dataset(spec, raw, tmp_path / "out", progress=False)
    assert found.labeled == 2 and found.pixels["sea"] == 2 * 10 * 20
    (tmp_path / "mine.yaml").unlink()
    given = {"images": "images/{scene}.tif", "labels": "all.geojson"}
    codes = [{"id": i, "landcover_class": v} for i, v in enumerate((10, 9, 10))]
    write_geojson(raw / "all.geojson", list(zip(places, codes, strict=True)))
    spec = described(raw, tmp_path, **given)
    assert [c.values for c in spec.classes] == [[9], [10]]
    assert spec.mask.attribute == "landcover_class"
    (tmp_path / "mine.yaml").unlink()
    write_geojson(raw / "all.geojson", [(place, {"size": 0.5}) for place in places])
    with pytest.raises(DataError, match=r"all\.geojson: polygons, of which no attribute has 2 to "
                                        r"64 .* classes, found size; .*multispectral\.yaml"):
        described(raw, tmp_path, **given)
    (raw / "all.geojson").write_text("{")
    with pytest.raises(DataError, match=r"all\.geojson: cannot be read as polygons"):
        described(raw, tmp_path, **given)


def test_templates_that_are_given(tmp_path):
    write_pairs(tmp_path / "raw", np.tile(np.uint8([0, 1]), (32, 16)))
    (tmp_path / "raw/labels").rename(tmp_path / "raw/painted")
    with pytest.raises(DataError, match="found no masks"):
        described(tmp_path / "raw", tmp_path)
    given = {"images": "images/{tile}.png", "labels": "painted/{tile}.png"}
    assert described(tmp_path / "raw", tmp_path, **given).layouts[0].labels == given["labels"]
    with pytest.raises(UsageError, match="exists already"):
        described(tmp_path / "raw", tmp_path, **given)
    (tmp_path / "mine.yaml").unlink()
    with pytest.raises(UsageError, match="give --images as well"):
        described(tmp_path / "raw", tmp_path, labels="painted/{tile}.png")
    with pytest.raises(UsageError, match=r"field \{x\} is not in files.images"):
        described(tmp_path / "raw", tmp_path, images="images/{tile}.png", labels="painted/{x}.png")
    with pytest.raises(DataError, match="none of 3 images has a mask"):
        described(tmp_path / "raw", tmp_path, images="images/{tile}.png")


def test_masks_without_classes(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (32, 48, 3))
    write_pairs(tmp_path / "photos", noise)
    with pytest.raises(DataError, match=r"0\.png: 1\d+ different colours .*not JPEG"):
        described(tmp_path / "photos", tmp_path)
    write_pairs(tmp_path / "flat", np.full((32, 48), 4))
    with pytest.raises(DataError, match="hold nothing but 4; a dataset needs two classes"):
        described(tmp_path / "flat", tmp_path)
    save(tmp_path / "flat/labels/0.png", np.eye(32))
    (tmp_path / "flat/images/1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1\.png: damaged or not an image"):
        described(tmp_path / "flat", tmp_path)
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed/all.zip").touch()
    with pytest.raises(DataError, match=r"all\.zip: an archive; .* unpack it first"):
        described(tmp_path / "packed", tmp_path)
    with pytest.raises(DataError, match="nowhere: missing"):
        described(tmp_path / "nowhere", tmp_path)
    with pytest.raises(UsageError, match=r"ends with \.yaml"):
        describe_folder(tmp_path / "flat", tmp_path / "mine.txt")
    assert not list(tmp_path.glob("mine*"))


def test_paths_with_spaces_are_quoted(tmp_path):
    raw, out = tmp_path / "my data", tmp_path / "my mine.yaml"
    write_pairs(raw, np.tile(np.uint8([0, 1]), (32, 16)))
    with pytest.raises(UsageError, match=r"gives the dataset the name 'my mine'.*; give --name"):
        describe_folder(raw / "nowhere", out, progress=False)
    with pytest.raises(UsageError, match=r"--name 'a b', expected letters"):
        describe_folder(raw / "nowhere", out, name="a b", progress=False)
    said = describe_folder(raw, out, name="mine", progress=False)
    command = f"co2s-fast data prepare '{out}' --raw '{raw}' --out data/mine"
    assert command in said and f"#   {command}\n" in out.read_text()


def test_masks_that_are_jpegs_are_warned_about(tmp_path):
    write_pairs(tmp_path / "raw", np.tile(np.repeat(np.uint8([0, 200]), 16), (32, 1)))
    for mask in (tmp_path / "raw/labels").iterdir():
        Image.open(mask).save(mask.with_suffix(".jpg"), quality=100)
        mask.unlink()
    said = describe_folder(tmp_path / "raw", tmp_path / "mine.yaml", progress=False)
    assert "warning: 3 masks are JPEGs, for example" in said


def test_dubai(shared_dir, tmp_path):
    out = tmp_path / "dubai.yaml"
    raw = shared_dir / "data/dubai-raw"
    result = CliRunner().invoke(main, ["data", "describe", str(raw), "-o", str(out)])
    assert result.exit_code == 0, result.output
    assert "63 images, 63 with a mask; 7 classes by colour" in result.output
    spec = load_dataset(out)
    assert {(60, 16, 152), (226, 169, 41), (155, 155, 155)} <= set(spec.palette)
    assert spec.layouts[0].images == "{scene}/images/{name}.jpg"


def test_many_files_are_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr(describe, "SAMPLE", 3)
    write_pairs(tmp_path / "raw", np.tile(np.uint8([0, 1]), (32, 16)), count=7)
    looked, read = [], describe.read_mask

    def noted(path: Path):
        looked.append(path.stem)
        return read(path)

    monkeypatch.setattr(describe, "read_mask", noted)
    assert described(tmp_path / "raw", tmp_path).num_classes == 2
    assert looked == ["0", "3", "6"]


def test_what_is_transparent_is_no_class(tmp_path):
    """`prepare` gives it no label."""
    mask = np.zeros((32, 32, 4), np.uint8)
    mask[:8, :, 3], mask[:8, :, 0] = 255, 200
    mask[:4, :, 1] = 90
    write_pairs(tmp_path / "raw", mask)
    spec = described(tmp_path / "raw", tmp_path)
    assert sorted(c.color for c in spec.classes) == [(200, 0, 0), (200, 90, 0)]
    write_pairs(tmp_path / "hidden", mask * np.uint8([1, 1, 1, 0]))
    with pytest.raises(DataError, match="nothing but what is transparent"):
        described(tmp_path / "hidden", tmp_path / "b")
