"""Folders that were made by hand: which images belong together, and which label is whose."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest
from PIL import Image
from toy_data import two_classes

from co2s_fast.data import check_dataset, split_dataset
from co2s_fast.data.files import write_description
from co2s_fast.data.tiles import guess_groups, list_images
from co2s_fast.errors import DataError

CAMERA = [f"DJI_20230101_{n:04d}" for n in range(1, 13)]


def by_hand(root, names, labelled=None, **changes):
    """`images/`, `labels/` and `dataset.yaml` without `tiles.csv`."""
    rng = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (root / kind).mkdir(parents=True)
    for name in names:
        image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(image).save(root / f"images/{name}.jpg")
    for name in names[:labelled]:
        label = np.repeat(np.uint8([0, 1]), 16)[None].repeat(32, 0)
        Image.fromarray(label).save(root / f"labels/{name}.png")
    write_description(root, two_classes(mask={"encoding": "index"}, files=None, **changes))
    return root


def grid(scene, ys, xs):
    return [f"{scene}_{y}_{x}" for y in ys for x in xs]


@pytest.mark.parametrize("names", [
    grid("a", (0, 17), (0, 13)) + grid("b_1", (0, 17), (13,)),  # rows and columns
    grid("a", (512, 1024), (512, 5488)) + grid("b", (512,), (6000,)),  # corners of some tiles
    grid("a", (1, 2), (1, 2, 3)) + grid("b", (1, 2), (2, 3)),  # counted from 1
    grid("a", ("0000", "0512"), ("0000", "0512")),
])  # fmt: skip
def test_places_of_tiles_are_no_part_of_the_group(names):
    assert guess_groups(names) == {name: name.rsplit("_", 2)[0] for name in names}


@pytest.mark.parametrize("names", [
    CAMERA,
    ["IMG_20230101_120000", "IMG_20230101_120010", "IMG_20230102_093000"],
    ["potsdam_2_10", "potsdam_2_11", "potsdam_7_13"],
    ["wh0718", "1558", "a_1"],
])  # fmt: skip
def test_other_numbers_are(names):
    assert guess_groups(names) == {name: name for name in names}


def test_names_of_cameras_can_be_split(tmp_path):
    root = by_hand(tmp_path / "toy", CAMERA, 8, val=0.25)
    made = split_dataset(root, labels=3, progress=False)
    assert (made.labeled, made.unlabeled, made.val) == (3, 7, 2) and len(made.notes) == 2


def test_tiles_of_one_scene_by_name_are_split_and_it_is_said(tmp_path):
    root = by_hand(tmp_path / "toy", grid("north", (0, 32), (0, 32)), val=0.25)
    made = split_dataset(root, labels=2, progress=False)
    assert (made.labeled, made.unlabeled, made.val) == (2, 1, 1)
    assert any("by their names all images are tiles of one scene, north" in n for n in made.notes)


def test_a_guessed_group_that_alone_has_labels_is_named(tmp_path):
    names = grid("north", (0, 32), (0, 32)) + grid("south", (0,), (0, 32))
    root = by_hand(tmp_path / "toy", names, 4)
    with pytest.raises(DataError, match=r"alone has labels, north, and .* a guess by 4 names, "
                                        r"which a tiles\.csv with columns tile and group"):
        split_dataset(root, labels=2, progress=False)


def test_labels_and_images_of_one_name_are_a_problem(tmp_path):
    root = by_hand(tmp_path / "toy", ["a0", "a1", "a2", "a3"], 3)
    assert check_dataset(root, progress=False).problems == []
    for name in ("images/a0", "images/a3", "labels/a1"):
        source = root / "images/a2.jpg" if name.startswith("images") else root / "labels/a2.png"
        Image.open(source).save(root / f"{name}.tif")
    report = check_dataset(root, progress=False)
    assert [set(each.files) for each in report.findings] == [
        {str(root / f"labels/a1.{end}") for end in ("png", "tif")},
        {str(root / f"images/a0.{end}") for end in ("jpg", "tif")}]
    with pytest.raises(DataError, match=r"a1\.png and .*a1\.tif: have one name.*a0\.jpg and .*a0"):
        split_dataset(root, labels=1, progress=False)


def test_labels_are_found_however_accents_are_composed(tmp_path):
    root = by_hand(tmp_path / "toy", ["área"])
    label = root / "labels/área.png"
    label.rename(label.with_name(unicodedata.normalize("NFD", label.name)))
    (item,) = list_images(root)
    assert item.label is not None
