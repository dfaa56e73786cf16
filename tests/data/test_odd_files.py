"""Raw folders as they come: edited masks, deep PNGs, marked colours, links, names of any script."""

from __future__ import annotations

import fiona
import numpy as np
import pytest
import rasterio
from PIL import Image
from toy_data import two_classes, write_raw
from toy_rasters import raster_spec, rectangle, scene, write_geojson, write_tif

from co2s_fast.data import DataConfig, load_dataset, open_split, prepare_dataset, split_dataset
from co2s_fast.data import split_maker as maker
from co2s_fast.data.catalogue import change_bands, parse_dataset
from co2s_fast.data.dali.source import encoded_image
from co2s_fast.data.files import load_label, load_picture, load_rgb
from co2s_fast.data.loader import build_loader
from co2s_fast.data.splits import read_list
from co2s_fast.data.tiles import list_images
from co2s_fast.data.validation import val_dataset
from co2s_fast.errors import DataError, UsageError

INDEX = {"encoding": "index"}
FLAT = {"images": "images/{name}.png", "labels": "labels/{name}.png"}


def prepare(raw, out, spec):
    return prepare_dataset(spec, raw, out, progress=False)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def test_a_mask_that_was_edited_is_seen_and_stray_files_are_not(tmp_path):
    raw, out = write_raw(tmp_path / "raw", ["a/1"]), tmp_path / "out"
    for mask in raw.rglob("masks/*.png"):  # a format whose size does not change with its content
        Image.open(mask).save(mask.with_suffix(".bmp"))
        mask.unlink()
    files = {"images": "{scene}/images/{part}.png", "labels": "{scene}/masks/{part}.bmp"}
    spec = two_classes(files=files)
    prepare(raw, out, spec)
    (raw / "Thumbs.db").write_bytes(b"x")
    (raw / "a/images/1.png.aux.xml").write_text("<PAMDataset/>")
    (raw / "gone.txt").symlink_to(tmp_path / "nowhere")
    assert prepare(raw, out, spec).already
    mask = raw / "a/masks/1.bmp"
    size = mask.stat().st_size
    Image.fromarray(np.asarray(Image.open(mask))[:, ::-1].copy()).save(mask)
    assert mask.stat().st_size == size
    with pytest.raises(DataError, match=r"with this description: a/masks/1.bmp was changed"):
        prepare(raw, out, spec)
    Image.fromarray(np.asarray(Image.open(mask))[:, ::-1].copy()).save(mask)
    assert prepare(raw, out, spec).already  # another time, the same content
    Image.fromarray(np.asarray(Image.open(mask))[:, ::-1].copy()).save(mask)
    assert prepare_dataset(spec, raw, out, overwrite=True, progress=False).tiles == 6
    (raw / "a/images/2.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(DataError, match=r"images/2.png: No such file"):
        prepare(raw, out, spec)


def test_a_folder_inside_the_raw_one_is_not_raw(tmp_path):
    raw = tmp_path / "raw"
    save(raw / "images/a.png", np.zeros((32, 32, 3), np.uint8))
    save(raw / "labels/a.png", np.zeros((32, 32), np.uint8))
    spec = two_classes(files={"images": "**/images/{name}.png", "labels": "**/labels/{name}.png"},
                       mask=INDEX)
    assert prepare(raw, raw / "tiles", spec).tiles == 1
    assert prepare(raw, raw / "tiles", spec).already
    assert prepare_dataset(spec, raw, raw / "tiles", overwrite=True, progress=False).tiles == 1


def test_a_png_of_16_bits_keeps_them(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 4000, (3, 40, 40)).astype(np.uint16)
    for name in "ab":
        path = tmp_path / f"raw/images/{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with rasterio.open(path, "w", driver="PNG", dtype="uint16", count=3, height=40,
                           width=40) as target:
            target.write(pixels)
        save(tmp_path / f"raw/labels/{name}.png", np.zeros((40, 40), np.uint8))
    with pytest.raises(DataError, match="16 bits a channel, expected 8-bit"):
        load_rgb(path)
    spec = two_classes(files=FLAT, mask=INDEX, tile={}, val=0.5)
    prepared = prepare(tmp_path / "raw", tmp_path / "out", spec)
    assert prepared.statistics.dtype == "uint16" and max(prepared.statistics.high) > 3000
    with rasterio.open(tmp_path / "out/images/images_a.tif") as tile:
        np.testing.assert_array_equal(tile.read(), pixels)


@pytest.mark.parametrize("how", ["value", "chunk"])
def test_no_data_of_pictures(tmp_path, how):
    pixels = np.full((32, 32, 3), 90, np.uint8)
    pixels[:4] = 0
    save(tmp_path / "raw/images/a.png", pixels,
         **({"transparency": (0, 0, 0)} if how == "chunk" else {}))
    save(tmp_path / "raw/labels/a.png", np.zeros((32, 32), np.uint8))
    raster = {"raster": {"nodata": 0}} if how == "value" else {}
    for tile in ({"size": 32}, {}):
        spec = two_classes(files=FLAT, mask=INDEX, tile=tile, **raster)
        out = tmp_path / f"out{len(tile)}"
        assert prepare(tmp_path / "raw", out, spec).pixels["ignored"] == 4 * 32
        (item,) = list_images(out)
        _, transparent = load_picture(item.image)
        assert transparent[:4].all() and not transparent[4:].any()


def test_a_description_beside_raw_masks_applies_to_them(tmp_path):
    """A `dataset.yaml` of one's own does not make the folder a prepared one."""
    for name in "abcd":
        save(tmp_path / f"images/{name}.png", np.zeros((32, 32, 3), np.uint8))
        save(tmp_path / f"labels/{name}.png", np.ones((32, 32), np.uint8))
    (tmp_path / "dataset.yaml").write_text(
        "name: mine\nclasses:\n  - {name: a, color: [1, 1, 1], values: [1]}\n"
        "  - {name: b, color: [2, 2, 2], values: [0]}\ncrop: 16\n")
    spec = load_dataset(tmp_path / "dataset.yaml")
    assert {int(load_label(item, spec).max()) for item in list_images(tmp_path)} == {0}


def test_the_later_of_overlapping_polygons_wins_wherever_the_image_lies(tmp_path):
    generator = np.random.default_rng(0)
    shapes, expected = [], np.full((64, 96), 255, np.uint8)
    for _ in range(300):  # many enough for GDAL's index to have an order of its own
        row, column = int(generator.integers(-40, 90)), int(generator.integers(-40, 120))
        kind = int(generator.integers(2))
        shapes.append((rectangle((row, row + 30), (column, column + 30)),
                       {"class": ("land", "sea")[kind]}))
        expected[max(row, 0) : max(row + 30, 0), max(column, 0) : max(column + 30, 0)] = kind
    write_geojson(tmp_path / "all.geojson", shapes)
    with fiona.open(tmp_path / "all.geojson") as source:
        meta = {"schema": source.schema, "crs_wkt": source.crs_wkt, "layer": "drawn"}
        path = tmp_path / "raw/polygons/a.gpkg"
        path.parent.mkdir(parents=True)
        with fiona.open(path, "w", driver="GPKG", **meta) as target:
            target.writerecords(list(source))
    write_tif(tmp_path / "raw/images/a.tif", scene(3, 64, 96))
    mask = {"encoding": "polygons", "attribute": "class"}
    files = {"images": "images/{name}.tif", "labels": "polygons/{name}.gpkg"}
    prepare(tmp_path / "raw", tmp_path / "out", raster_spec(mask=mask, files=files, tile={}))
    np.testing.assert_array_equal(
        np.asarray(Image.open(tmp_path / "out/labels/images_a.png")), expected)
    with pytest.raises(DataError, match="no layer 'other', found drawn"):
        prepare(tmp_path / "raw", tmp_path / "no",
                raster_spec(mask={**mask, "layer": "other"}, files=files, tile={}))


def test_names_go_with_their_bands():
    spec = load_dataset("examples/datasets/multispectral.yaml")
    assert change_bands(spec, "4,3,2").band_names == ["red", "green", "blue"]
    assert change_bands(spec, "8,4,3").band_names == ["nir", "red", "green"]
    assert change_bands(spec, "4,11").band_names is None
    shown = parse_dataset({**spec.model_dump(mode="json"), "display": [4, 3, 2]}, "here")
    assert change_bands(shown, "8,4").display is None


def test_a_link_to_a_folder_elsewhere(tmp_path):
    raw = write_raw(tmp_path / "raw", ["a/1"])
    (tmp_path / "disk/toy").mkdir(parents=True)
    (tmp_path / "toy").symlink_to(tmp_path / "disk/toy")
    assert prepare(raw, tmp_path / "toy", two_classes()).tiles == 6
    assert (tmp_path / "toy").is_symlink() and len(list((tmp_path / "disk/toy/images").iterdir()))
    assert prepare(raw, tmp_path / "toy", two_classes()).already


@pytest.mark.parametrize("bands", [4, 5])
def test_rasters_that_training_cannot_read_are_not_copied(tmp_path, bands):
    write_tif(tmp_path / "raw/images/a.tif", scene(bands, 64, 96, "uint8"))
    write_tif(tmp_path / "raw/images/b.tif", scene(3, 64, 96, "uint8"), photometric="RGB")
    files = {"images": "images/{name}.tif"}
    prepare(tmp_path / "raw", tmp_path / "out", two_classes(files=files, tile={}))
    found = {item.name: item.image.suffix for item in list_images(tmp_path / "out")}
    assert found == {"images_a": ".png", "images_b": ".tif"}
    for item in list_images(tmp_path / "out"):
        assert load_rgb(item.image).size == (96, 64)


def test_names_of_any_script(tmp_path):
    for name in ("北京", "上海", "東京 1", "東京 2", "!!"):
        save(tmp_path / f"raw/images/{name}.png", np.zeros((32, 32, 3), np.uint8))
    spec = two_classes(files={"images": "images/{name}.png", "group": "{name}"}, tile={})
    assert prepare(tmp_path / "raw", tmp_path / "out", spec).tiles == 5
    found = {item.name for item in list_images(tmp_path / "out")}
    assert {"北京", "上海", "東京_1", "東京_2"} < found and len(found) == 5


def test_masks_of_unlabelled_images_only_measure(tmp_path):
    for number in range(14):
        save(tmp_path / f"images/{number:02}.png",
             np.random.default_rng(number).integers(0, 255, (32, 32, 3), np.uint8))
        label = np.zeros((32, 32), np.uint8)
        label[16:] = 1 if number < 6 else 7  # which is not declared
        save(tmp_path / f"labels/{number:02}.png", label)
    lines = [f"images/{n:02}.png labels/{n:02}.png\n" for n in range(14)]
    for name, part in (("labeled", lines[:4]), ("val", lines[4:6]), ("unlabeled", lines[6:])):
        (tmp_path / f"{name}.txt").write_text("\ufeff" + "".join(part))  # as Windows saves them
    truncated = tmp_path / "labels/06.png"
    truncated.write_bytes(truncated.read_bytes()[:60])
    spec = two_classes(mask=INDEX)
    config = DataConfig(root=tmp_path, split=tmp_path, batch_size=4, workers=0)
    split = open_split(config, spec)
    assert any("1 masks of unlabelled images cannot be used" in note for note in split.notes)
    loader = build_loader(config, spec, split, views=("x", "w"), seed=0, start_step=0,
                          total_steps=2)
    with pytest.warns(UserWarning, match="pseudo-labels are not measured: .* value"):
        batches = list(loader)
    noted = []  # the probe of a run reads the same masks
    probe = val_dataset(split.unlabeled, spec, config, noted)
    assert [label for _, label, _ in probe] == [None] * 8 and noted == []
    assert all((batch.truth == 255).all() and not batch.damaged for batch in batches)


def test_a_split_shows_up_with_its_last_file(demo_root, demo_spec, monkeypatch):
    """Another job that looks in between must not find a split without unlabelled images."""
    written = []
    write = maker.write_text
    monkeypatch.setattr(maker, "write_text", lambda p, t: (written.append(p.name), write(p, t)))
    split_dataset(demo_root, demo_spec, labels=7, progress=False)
    assert written[-2:] == ["unlabeled.txt", "labeled.txt"]
    problems = []
    assert len(read_list(demo_root / "splits/labels_7/labeled.txt", demo_root, problems,
                         need_label=True)) == 7


@pytest.mark.parametrize(("mask", "said"), [
    ({"encoding": "index", "ignore": ["clouds"]}, "mask.ignore clouds: encoding 'index' needs val"),
    ({"encoding": "color", "ignore": [3]}, "mask.ignore 3: encoding 'color' needs colours"),
])  # fmt: skip
def test_what_a_mask_may_ignore(mask, said):
    with pytest.raises(UsageError, match=said):
        two_classes(mask=mask)
    with pytest.raises(UsageError, match=said):
        two_classes(files=[{"images": "{a}.png", "mask": mask}])


def test_dali_leaves_a_transparent_colour_to_pillow(tmp_path):
    save(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8), transparency=(0, 0, 0))
    save(tmp_path / "b.png", np.zeros((8, 8, 3), np.uint8))
    starts = [encoded_image(tmp_path / f"{name}.png")[0][:2].tobytes() for name in "ab"]
    assert starts == [b"P6", b"\x89P"]


def test_what_belongs_to_a_file_is_part_of_it(tmp_path):
    raw = tmp_path / "raw"
    write_tif(raw / "images/a.tif", scene(3, 32, 32, "uint8"), photometric="RGB")
    spec = two_classes(files={"images": "images/{name}.tif"})
    prepare(raw, tmp_path / "out", spec)
    (raw / "images/a.tif.aux.xml").write_text("<PAMDataset/>")  # statistics, as QGIS leaves them
    assert prepare(raw, tmp_path / "out", spec).already
    (raw / "images/a.tfw").write_text("1\n0\n0\n-1\n0\n0\n")
    with pytest.raises(DataError, match=r"images/a.tfw is new"):
        prepare(raw, tmp_path / "out", spec)


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    raw, out = write_raw(tmp_path / "raw", ["a/1"]), tmp_path / "out"
    prepare(raw, out, two_classes())
    before = sorted(path.name for path in out.rglob("*"))
    rename = type(out).rename

    def fail(self, target):
        if self.name == ".out.partial":
            raise OSError(16, "Device or resource busy")
        return rename(self, target)

    monkeypatch.setattr(type(out), "rename", fail)
    with pytest.raises(OSError, match="busy"):
        prepare_dataset(two_classes(tile={"size": 16}), raw, out, overwrite=True, progress=False)
    assert sorted(path.name for path in out.rglob("*")) == before


def test_a_description_is_read_back_where_a_layout_has_a_mask_of_its_own(tmp_path):
    for name in "ab":
        save(tmp_path / f"raw/images/{name}.png", np.zeros((32, 32, 3), np.uint8))
        save(tmp_path / f"raw/labels/{name}.png", np.ones((32, 32), np.uint8))
    classes = [{"name": "a", "color": [1, 1, 1], "values": [1]},
               {"name": "b", "color": [2, 2, 2], "values": [2]}]
    files = [{**FLAT, "mask": {"encoding": "index", "ignore": [0]}}]
    prepare(tmp_path / "raw", tmp_path / "out",
            two_classes(classes=classes, files=files, mask={"encoding": "color", "ignore": []}))
    assert load_dataset(tmp_path / "out/dataset.yaml").class_names == ["a", "b"]
    assert {int(load_label(item, two_classes()).max())
            for item in list_images(tmp_path / "out")} == {0}
