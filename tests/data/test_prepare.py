"""From raw folders to tiles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toy_data import truncate, two_classes, write_raw

from co2s_fast.data import load_dataset, prepare_dataset, split_dataset
from co2s_fast.data.catalogue import TileSpec
from co2s_fast.data.pairing import find_sources, pattern
from co2s_fast.data.prepare import starts
from co2s_fast.data.tiles import list_images, read_groups
from co2s_fast.errors import DataError, UsageError

REPOSITORY = Path(__file__).resolve().parents[2]


def prepare(raw, out, spec):
    return prepare_dataset(spec, raw, out, progress=False)


def test_templates_match_whole_paths_and_repeat_fields():
    assert pattern("{s}/images/{p}.jpg").fullmatch("a b/images/01.jpg").groupdict() == {
        "s": "a b", "p": "01"}
    assert not pattern("{s}/{p}.jpg").fullmatch("a/b/c.jpg")
    assert pattern("{s}/{s}_{p}.jpg").fullmatch("x/x_1.jpg")
    assert not pattern("{s}/{s}_{p}.jpg").fullmatch("x/y_1.jpg")
    assert not pattern("{p}.jpg").fullmatch("axjpg")


def test_pairs_and_groups(tmp_path):
    raw = write_raw(tmp_path, ["a/1", "a/2", "b/1"], without_mask=("a/2",))
    sources = find_sources(raw, two_classes())
    assert [(s.group, s.label is not None) for s in sources] == [
        ("a/1", True), ("a/2", False), ("b/1", True)]


def test_hidden_files_are_no_images(tmp_path):
    raw = write_raw(tmp_path / "raw", ["a/1"])
    (raw / "a/images/._1.png").write_bytes(b"\0\5\x16\7")  # as a Mac leaves on foreign drives
    (raw / ".trash/a").mkdir(parents=True)
    (raw / "a/.ipynb_checkpoints/images").mkdir(parents=True)
    for hidden in (".trash/a/2.png", "a/.ipynb_checkpoints/images/1-checkpoint.png", "._old.zip"):
        (raw / hidden).write_bytes(b"")
    assert prepare(raw, tmp_path / "out", two_classes(tile={})).images == 1


def test_wrong_pairing_is_explained(tmp_path):
    raw = write_raw(tmp_path, ["a/1"])
    files = {"images": "{scene}/images/{part}.png", "labels": "{scene}/{mask}.png",
             "group": "{area}"}
    with pytest.raises(UsageError, match=r"files.labels: field \{mask\}.*field \{area\}"):
        find_sources(raw, two_classes(files=files))
    with pytest.raises(UsageError, match="does not say how its raw files pair up"):
        find_sources(raw, two_classes(files=None))
    with pytest.raises(DataError, match="no file matches"):
        find_sources(raw, two_classes(files={"images": "{scene}/images/{part}.jpg"}))
    with pytest.raises(DataError, match="missing"):
        find_sources(tmp_path / "nothing", two_classes())
    (raw / "a" / "images" / "1.png").rename(raw / "a" / "images" / "2.png")
    with pytest.raises(DataError, match=r"1 masks have no image, for example a/masks/1\.png"):
        find_sources(raw, two_classes())


@pytest.mark.parametrize(("length", "tile", "expected"), [
    (6000, {"size": 512}, [*range(0, 5121, 512), 5488]),  # Potsdam: 12 windows, the last shifted
    (100, {"size": 32, "edge": "pad"}, [0, 32, 64, 96]),
    (100, {"size": 32, "edge": "drop"}, [0, 32, 64]),
    (96, {"size": 32}, [0, 32, 64]),
    (80, {"size": 32, "stride": 16}, [0, 16, 32, 48]),
    (20, {"size": 32}, [0]),
    (20, {"size": 32, "edge": "drop"}, []),
    (77, {}, [0]),
])
def test_tile_positions(length, tile, expected):
    assert starts(length, TileSpec(**tile)) == expected


def test_tiles_hold_the_right_pixels(tmp_path):
    raw = write_raw(tmp_path / "raw", ["a/1"], size=(40, 70))
    out = tmp_path / "out"
    prepared = prepare(raw, out, two_classes())
    assert (prepared.images, prepared.tiles, prepared.labeled) == (1, 6, 6)
    whole = np.asarray(Image.open(raw / "a/images/1.png"))
    for item in list_images(out):
        y, x = map(int, item.name.removeprefix("a_1_").split("_"))
        np.testing.assert_array_equal(np.asarray(Image.open(item.image)),
                                      whole[y : y + 32, x : x + 32])
        expected = (np.arange(x, x + 32) >= 35).astype(np.uint8)
        label = np.asarray(Image.open(item.label))
        np.testing.assert_array_equal(label, np.tile(expected, (32, 1)))
    assert set(read_groups(out).values()) == {"a/1"}
    assert load_dataset(out / "dataset.yaml").mask.encoding == "index"


def test_small_images_are_padded_with_ignore(tmp_path):
    raw = write_raw(tmp_path / "raw", ["a/1"], size=(20, 70))
    prepare(raw, tmp_path / "out", two_classes())
    label = np.asarray(Image.open(tmp_path / "out/labels/a_1_0_0.png"))
    image = np.asarray(Image.open(tmp_path / "out/images/a_1_0_0.png"))
    assert (label[20:] == 255).all() and (label[:20] != 255).all() and (image[20:] == 0).all()


def test_scale_keeps_image_and_label_together(tmp_path):
    raw = write_raw(tmp_path / "raw", ["a/1"], size=(64, 128))
    mask = np.asarray(Image.open(raw / "a/masks/1.png"))
    Image.fromarray(mask).save(raw / "a/images/1.png")
    prepare(raw, tmp_path / "out", two_classes(tile={"scale": 0.5}))
    image = np.asarray(Image.open(tmp_path / "out/images/a_1.png"))
    label = np.asarray(Image.open(tmp_path / "out/labels/a_1.png"))
    assert label.shape == (32, 64)
    np.testing.assert_array_equal(image[..., 2] > 100, label == 1)


def test_unlabeled_images_need_no_mask(tmp_path):
    raw = write_raw(tmp_path / "raw", ["a/1", "a/2"], without_mask=("a/2",))
    prepared = prepare(raw, tmp_path / "out", two_classes())
    assert (prepared.tiles, prepared.labeled) == (12, 6)
    assert prepared.pixels == {"land": 64 * 48, "sea": 64 * 48, "ignored": 0}


def test_again_changes_nothing_and_another_description_is_refused(tmp_path):
    raw, out = write_raw(tmp_path / "raw", ["a/1"]), tmp_path / "out"
    prepare(raw, out, two_classes())
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    again = prepare(raw, out, two_classes())
    assert again.already and again.tiles == 6 and "already prepared" in str(again)
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    other = two_classes(tile={"size": 16})
    with pytest.raises(DataError, match="exists and was not prepared"):
        prepare(raw, out, other)
    assert prepare_dataset(other, raw, out, overwrite=True, progress=False).tiles == 24
    for damaged in ("[1]", "{"):
        (out / "prepared.json").write_text(damaged)
        with pytest.raises(DataError, match="exists and was not prepared"):
            prepare(raw, out, other)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    for overwrite in (False, True):  # what was not prepared is never replaced
        for folder in (tmp_path / "mine", raw, raw / "a", tmp_path):
            with pytest.raises(DataError, match="is no prepared folder"):
                prepare_dataset(two_classes(), raw, folder, overwrite=overwrite, progress=False)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    inside = write_raw(out / "more", ["a/1"])
    with pytest.raises(DataError, match="is no prepared folder"):
        prepare_dataset(two_classes(), inside, out, overwrite=True, progress=False)


def test_all_bad_files_are_named_and_nothing_is_written(tmp_path):
    raw, out = write_raw(tmp_path / "raw", ["a/1", "a/2", "a/3", "a/4"]), tmp_path / "out"
    truncate(raw / "a/images/1.png")
    truncate(raw / "a/masks/2.png", 0.5)
    Image.new("RGB", (9, 9)).save(raw / "a/masks/3.png")
    Image.new("RGB", (96, 64), (1, 2, 3)).save(raw / "a/masks/4.png")
    with pytest.raises(DataError) as caught:
        prepare(raw, out, two_classes())
    message = str(caught.value)
    for part in ("images/1.png: damaged", "masks/2.png: damaged", "masks/3.png: 9 x 9 pixels",
                 "undeclared colour (1, 2, 3) in 6144 pixels"):
        assert part in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["raw"]


def test_names_that_collide(tmp_path):
    raw = write_raw(tmp_path / "raw", ["a b/1", "a_b/1"])
    with pytest.raises(DataError, match="would both be named a_b_1"):
        prepare(raw, tmp_path / "out", two_classes())


def test_generated_and_raw_datasets_from_one_command(tmp_path, demo_spec, monkeypatch):
    import co2s_fast.data.demo as demo

    small = demo.generate_demo
    monkeypatch.setattr(demo, "generate_demo", lambda root, spec, progress: small(
        root, spec, scenes=16, progress=progress))
    (tmp_path / "demo").mkdir()
    made = prepare_dataset(demo_spec, None, tmp_path / "demo", progress=False)
    assert made.tiles == 64 and not made.already
    assert prepare_dataset(demo_spec, None, tmp_path / "demo", progress=False).already
    with pytest.raises(UsageError, match="give their folder with --raw"):
        prepare_dataset(two_classes(), None, tmp_path / "out")


def test_dubai(shared_dir, tmp_path):
    """One real scene by the example description: nine parts of 509 x 544, linked, not copied."""
    raw = shared_dir / "data" / "dubai-raw"
    if not raw.is_dir():
        pytest.skip(f"no imagery at {raw}")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "tile2").symlink_to(raw / "tile2")
    spec = load_dataset(REPOSITORY / "examples" / "datasets" / "dubai.yaml")
    out = tmp_path / "out"
    prepared = prepare(tmp_path / "raw", out, spec)
    # 254 x 272 after halving: 2 x 3 tiles, the last of each row and column shifted back.
    assert (prepared.images, prepared.tiles, prepared.labeled) == (9, 9 * 6, 9 * 6)
    assert sum(prepared.pixels.values()) == 9 * 6 * 128 * 128
    assert prepared.pixels["building"] > 0
    created = split_dataset(out, spec, ratio="1/16", progress=False)
    assert created.val == 18 and created.labeled == 36 // 16
    val = (out / "splits" / "val.txt").read_text().split()
    assert {name.split("_")[1] for name in val} == {"007", "008", "009"}


def test_the_first_layout_that_matches_is_taken_with_its_own_map_and_cut(tmp_path):
    raw = write_raw(tmp_path / "raw", ["a/1"], size=(40, 70))
    layouts = [
        {"images": "{scene}/photos/{part}.png"},
        {"images": "**/images/{part}.png", "labels": "**/masks/{part}.png",
         "tile": {"size": 16, "name": "t{part}_{row}_{column}_{x1}_{y2}", "format": "tif"}},
    ]  # fmt: skip
    spec = two_classes(files=layouts)
    prepare(raw, tmp_path / "out", spec)
    names = {item.name for item in list_images(tmp_path / "out")}
    assert {"t1_0_0_0_16", "t1_2_4_54_40"} <= names and len(names) == 3 * 5
    assert {p.suffix for p in (tmp_path / "out").rglob("t1_*")} == {".tif"}
    layouts[1]["tile"]["name"] = "{part}_{room}"
    with pytest.raises(UsageError, match=r"tile.name: field \{room\}"):
        prepare(raw, tmp_path / "other", two_classes(files=layouts))
    layouts[1]["tile"]["name"] = "{part}"
    with pytest.raises(DataError, match="both give the tile"):
        prepare(write_raw(tmp_path / "raw", ["a/1", "b/1"]), tmp_path / "other",
                two_classes(files={**layouts[1], "images": "{scene}/images/{part}.png",
                                   "labels": "{scene}/masks/{part}.png"}))  # fmt: skip
    assert not (tmp_path / "other").exists()


def test_whole_images_keep_their_file(tmp_path):
    raw = write_raw(tmp_path / "raw", ["a/1"])
    image = raw / "a/images/1.png"
    Image.open(image).save(image.with_suffix(".jpg"))
    image.unlink()
    files = {"images": "{scene}/images/{part}.jpg", "labels": "{scene}/masks/{part}.png"}
    prepare(raw, tmp_path / "out", two_classes(files=files, tile={}))
    (item,) = list_images(tmp_path / "out")
    assert item.image.suffix == ".jpg" and item.label.suffix == ".png"
    assert item.image.read_bytes() == image.with_suffix(".jpg").read_bytes()


def test_two_masks_for_one_image(tmp_path):
    raw = write_raw(tmp_path / "raw", ["a/1"])
    (raw / "b/masks").mkdir(parents=True)
    (raw / "b/masks/1.png").write_bytes((raw / "a/masks/1.png").read_bytes())
    files = {"images": "**/images/{part}.png", "labels": "**/masks/{part}.png"}
    with pytest.raises(DataError, match="two masks for one image"):
        find_sources(raw, two_classes(files=files))
