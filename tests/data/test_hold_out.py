"""Which images validate where one scene alone has labels, and what a given list leaves to train."""

from __future__ import annotations

import csv

import pytest
from toy_data import two_classes, write_raw

from co2s_fast.data import prepare_dataset, split_dataset
from co2s_fast.data.tiles import read_corners
from co2s_fast.errors import DataError


def prepare(raw, out, spec):
    return prepare_dataset(spec, raw, out, progress=False)


def lists(root, name):
    folder = root / "splits" / name
    files = {"labeled": folder, "unlabeled": folder, "val": root / "splits"}
    return {key: [line.split()[0].removeprefix("images/")
                  for line in (where / f"{key}.txt").read_text().splitlines()]
            for key, where in files.items()}


def overlapping(root, one, other, side=32):
    corners = read_corners(root)
    pairs = ((corners[a], corners[b]) for a in one for b in other)
    return [(a, b) for a, b in pairs if a.group == b.group
            and abs(a.y - b.y) < side and abs(a.x - b.x) < side]


@pytest.mark.parametrize("stride", [32, 16])
def test_one_labelled_scene_is_divided(tmp_path, stride):
    raw = write_raw(tmp_path / "raw", ["a/1", "a/2"], size=(96, 160), without_mask=("a/2",))
    prepare(raw, tmp_path / "out", two_classes(tile={"size": 32, "stride": stride}, val=0.2))
    (tmp_path / "out/labels/a_1_0_128.png").unlink()  # at the end that validates
    made = split_dataset(tmp_path / "out", labels=4, progress=False)
    assert any("a/1 alone has labels" in note and "right end validate" in note
               for note in made.notes)
    found = lists(tmp_path / "out", "labels_4")
    assert found["val"] and all(name.startswith("a_1_") for name in found["val"])
    trained = found["labeled"] + found["unlabeled"]
    assert not overlapping(tmp_path / "out", trained, found["val"])
    assert sum(name.startswith("a_2_") for name in found["unlabeled"]) == made.unlabeled - sum(
        name.startswith("a_1_") for name in found["unlabeled"]) > 0
    # With the list of validation tiles there already, the next split leaves out the same ones.
    split_dataset(tmp_path / "out", labels=2, progress=False)
    again = lists(tmp_path / "out", "labels_2")
    assert again["val"] == found["val"]
    assert sorted(again["labeled"] + again["unlabeled"]) == sorted(trained)


def test_what_cannot_be_divided_says_what_to_do(tmp_path):
    raw = write_raw(tmp_path / "raw", ["a/1", "a/2"], without_mask=("a/2",))
    prepare(raw, tmp_path / "whole", two_classes(tile={}))
    with pytest.raises(DataError, match="label another image, or cut this one"):
        split_dataset(tmp_path / "whole", labels=1, progress=False)
    raw = write_raw(tmp_path / "small", ["a/1"], size=(40, 40))
    prepare(raw, tmp_path / "tiles", two_classes(tile={"size": 32, "stride": 8}))
    with pytest.raises(DataError, match="overlap so that none would be left"):
        split_dataset(tmp_path / "tiles", labels=1, progress=False)


def test_a_group_of_a_given_list_stays_whole_where_others_have_labels(tmp_path):
    raw = write_raw(tmp_path / "raw", ["a/1", "a/2"])
    prepare(raw, tmp_path / "out", two_classes())
    (tmp_path / "out/splits").mkdir()
    (tmp_path / "out/splits/val.txt").write_text("images/a_1_0_0.png labels/a_1_0_0.png\n")
    split_dataset(tmp_path / "out", labels=2, progress=False)
    found = lists(tmp_path / "out", "labels_2")
    assert all(name.startswith("a_2_") for name in found["labeled"] + found["unlabeled"])


def test_a_scene_taller_than_wide_is_divided_across(tmp_path):
    raw = write_raw(tmp_path / "raw", ["a/1"], size=(160, 96))
    prepare(raw, tmp_path / "out", two_classes(tile={"size": 32}, val=0.2))
    made = split_dataset(tmp_path / "out", labels=4, progress=False)
    assert any("lower end validate" in note for note in made.notes)


def test_the_block_of_a_lone_scene_is_its_share_in_whole_columns(tmp_path):
    raw = write_raw(tmp_path / "raw", ["a/1"], size=(64, 320))
    prepare(raw, tmp_path / "out", two_classes(tile={"size": 32}, val=0.3))
    made = split_dataset(tmp_path / "out", labels=4, progress=False)
    assert (made.labeled + made.unlabeled, made.val) == (14, 6)


def test_a_lone_scene_of_a_layout_with_tiles_of_its_own_is_divided(tmp_path):
    raw = write_raw(tmp_path / "raw", ["a/1"], size=(96, 160))
    layout = {"images": "{scene}/images/{part}.png", "labels": "{scene}/masks/{part}.png",
              "group": "{scene}/{part}", "tile": {"size": 32, "stride": 16}}
    prepare(raw, tmp_path / "out", two_classes(tile={}, files=[layout], val=0.2))
    split_dataset(tmp_path / "out", labels=4, progress=False)
    found = lists(tmp_path / "out", "labels_4")
    trained = found["labeled"] + found["unlabeled"]
    assert trained and found["val"]
    assert not overlapping(tmp_path / "out", trained, found["val"])


def test_unlabelled_tiles_of_a_group_that_validates_are_left_out(tmp_path):
    raw = write_raw(tmp_path / "raw", ["a/1", "a/2"], size=(64, 64))
    prepare(raw, tmp_path / "out", two_classes(val=["a/2"]))
    (tmp_path / "out/labels/a_2_0_0.png").unlink()
    made = split_dataset(tmp_path / "out", labels=2, progress=False)
    assert (made.labeled, made.unlabeled, made.val) == (2, 2, 3)
    assert all(name.startswith("a_1_") for name in lists(tmp_path / "out", "labels_2")["unlabeled"])


def test_tiles_without_a_place_are_left_out_beside_a_listed_one_of_their_scene(tmp_path):
    raw = write_raw(tmp_path / "raw", ["a/1"])
    prepare(raw, tmp_path / "out", two_classes())
    with (tmp_path / "out/tiles.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        if row["tile"] == "a_1_32_64.png":
            row |= {"y": "", "x": ""}
    with (tmp_path / "out/tiles.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    (tmp_path / "out/splits").mkdir()
    (tmp_path / "out/splits/val.txt").write_text("images/a_1_0_0.png labels/a_1_0_0.png\n")
    split_dataset(tmp_path / "out", labels=2, progress=False)
    found = lists(tmp_path / "out", "labels_2")
    assert sorted(found["labeled"] + found["unlabeled"]) == [
        "a_1_0_32.png", "a_1_0_64.png", "a_1_32_0.png", "a_1_32_32.png"]
