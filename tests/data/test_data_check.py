"""What `data check` finds, and what `open_split` refuses before any training."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from toy_data import truncate, two_classes, write_raw

from co2s_fast.data import DataConfig, check_dataset, open_split, prepare_dataset, split_dataset
from co2s_fast.errors import DataError

NAMES = [f"a/{p}" for p in range(6)]


@pytest.fixture
def tree(tmp_path):
    raw = write_raw(tmp_path / "raw", NAMES, size=(32, 64))
    root, spec = tmp_path / "toy", two_classes(val=["a/5"], tile={})
    prepare_dataset(spec, raw, root, progress=False)
    split_dataset(root, spec, labels=2, progress=False)
    return root, spec, DataConfig(root=root, labels=2, batch_size=1)


def labeled_name(root):
    return (root / "splits/labels_2/labeled.txt").read_text().split()[0].split("/")[1]


def test_report_of_a_good_folder(tree):
    root, spec, _ = tree
    report = check_dataset(root, spec, progress=False)
    assert report.problems == [] and report.warnings == []
    assert (report.images, report.labels, report.sizes) == (6, 6, {"64 x 32": 6})
    assert report.pixels == {"land": 6 * 32 * 32, "sea": 6 * 32 * 32, "ignored": 0}
    assert report.lists == {"labels_2/labeled": 2, "labels_2/unlabeled": 3, "labels_2/val": 1}
    assert json.loads(report.to_json())["pixels"] == report.pixels
    again = check_dataset(root, json_path=root.parent / "report.json", progress=False)
    assert again.to_json() == (root.parent / "report.json").read_text().strip()
    text = str(report)
    assert "no problems" in text and "50.00%" in text and "64 x 32" in text
    report.raise_problems()


def damage(root, kind, name, how):
    path = root / kind / name
    if how == "truncate":
        truncate(path)
    elif how == "remove":
        path.unlink()
    elif how == "resize":
        Image.new("L" if kind == "labels" else "RGB", (9, 7)).save(path)
    elif how == "value":
        Image.fromarray(np.full((32, 64), 77, np.uint8)).save(path)
    else:
        path.write_bytes(b"not an image")
    return path


@pytest.mark.parametrize(("kind", "how", "expected"), [
    ("images", "truncate", "damaged"),
    ("images", "garbage", "damaged or not an image"),
    ("images", "remove", "missing file"),
    ("labels", "truncate", "damaged"),
    ("labels", "remove", "missing file"),
    ("labels", "resize", "9 x 7 pixels, its image"),
    ("labels", "value", "undeclared value 77 in 2048 pixels"),
])
def test_each_damage_is_found_by_the_check_and_before_training(tree, kind, how, expected):
    root, spec, config = tree
    path = damage(root, kind, labeled_name(root), how)
    with pytest.raises(DataError, match=expected) as caught:
        open_split(config, spec)
    assert path.name in str(caught.value) and "\n" not in str(caught.value)
    report = check_dataset(root, spec, progress=False)
    assert any(expected in p and path.name in p for p in report.problems)
    assert f"problem: {report.problems[0]}" in str(report)


def unlabeled_name(root):
    return (root / "splits/labels_2/unlabeled.txt").read_text().split()[0].split("/")[1]


@pytest.mark.parametrize("how", ["truncate", "garbage"])
def test_damaged_unlabelled_images_are_named_and_forgiven_up_to_the_limit(tree, how):
    root, spec, config = tree
    name = unlabeled_name(root)
    damage(root, "images", name, how)
    notes = [note for note in open_split(config, spec).notes if note.startswith("warning")]
    assert len(notes) == 1 and name in notes[0] and "training will skip it" in notes[0]
    with pytest.raises(DataError, match=f"{name}: damaged"):
        open_split(config.model_copy(update={"max_damaged": 0}), spec)


def test_an_unlabelled_image_of_another_size_than_its_label(tree):
    root, spec, config = tree
    damage(root, "images", unlabeled_name(root), "resize")
    with pytest.raises(DataError, match=f"its image .*{unlabeled_name(root)} has 9 x 7"):
        open_split(config, spec)


@pytest.mark.parametrize("how", ["truncate", "remove"])
def test_what_broke_while_a_run_stood_still(tree, how):
    """Resuming forgives what a running training would; evaluating reads no training image."""
    root, spec, config = tree
    whole = open_split(config, spec)
    for name in (labeled_name(root), unlabeled_name(root)):
        damage(root, "images", name, how)
    resumed = open_split(config, spec, "resume")
    assert len([note for note in resumed.notes if "training will skip it" in note]) == 2
    assert (resumed.labeled, resumed.unlabeled) == (whole.labeled, whole.unlabeled)
    with pytest.raises(DataError, match=labeled_name(root)):
        open_split(config.model_copy(update={"max_damaged": 1}), spec, "resume")
    assert open_split(config, spec, "evaluate").notes == []
    damage(root, "images", whole.val[0].image.name, how)
    for use in ("resume", "evaluate"):
        with pytest.raises(DataError, match=whole.val[0].image.name):
            open_split(config, spec, use)


def test_pixels_of_each_labelled_image(tree):
    root, spec, config = tree
    assert open_split(config, spec).pixels.tolist() == [[1024, 1024], [1024, 1024]]
    report = check_dataset(root, spec, progress=False)
    assert report.labeled_pixels == {"labels_2": {"land": 2048, "sea": 2048, "ignored": 0}}


def test_a_class_never_seen(tree):
    root, spec, config = tree
    for path in (root / "labels").iterdir():
        Image.new("L", (64, 32), 1).save(path)
    with pytest.raises(DataError, match="class land: no pixel in any of 2 labelled images"):
        open_split(config, spec)
    warned = open_split(config.model_copy(update={"missing_classes": "warn"}), spec)
    assert any("class land" in note for note in warned.notes)
    assert "class land: no pixel in any label" in check_dataset(root, spec, progress=False).problems


def test_a_missing_class_is_said_when_a_split_is_made(tree):
    root, spec, _ = tree
    for path in (root / "labels").iterdir():
        Image.new("L", (64, 32), 1).save(path)
    created = split_dataset(root, spec, labels=3, progress=False)
    assert "warning: no labelled image shows land" in created.notes


def test_lists_are_checked(tree):
    root, spec, _ = tree
    folder = root / "splits" / "bad"
    shutil.copytree(root / "splits" / "labels_2", folder)
    (folder / "labeled.txt").write_text("../x.png labels/a_5.png\nimages/a_5.png labels/a_5.png\n")
    (root / "labels" / "stray.png").write_bytes(b"")
    report = check_dataset(root, spec, batch_size=8, progress=False)
    text = "\n".join(report.problems)
    assert "outside the data root" in text and "both labeled.txt and val.txt" in text
    assert "stray.png: label without an image" in text
    assert any("fewer than a batch of 8" in w for w in report.warnings)
    with pytest.raises(DataError):
        report.raise_problems()


def test_validation_images_are_looked_for_where_training_looks(tree, tmp_path):
    root, spec, _ = tree
    folder = tmp_path / "lists/method/1_4"
    shutil.copytree(root / "splits/labels_2", folder)
    shutil.copy(root / "splits/val.txt", tmp_path / "lists/val.txt")
    report = check_dataset(root, spec, split=folder, progress=False)
    assert report.problems == [] and report.lists["1_4/val"] == 1
    assert len(open_split(DataConfig(root=root, split=folder, batch_size=1), spec).val) == 1


def test_groups_in_both_lists_are_warned_about(tmp_path):
    raw = write_raw(tmp_path / "raw", ["a/1", "a/2"], size=(64, 64))
    root, spec = tmp_path / "toy", two_classes()
    prepare_dataset(spec, raw, root, progress=False)
    folder = root / "splits" / "mixed"
    folder.mkdir(parents=True)
    for list_, name in (("labeled", "a_1_0_0"), ("val", "a_1_32_0"), ("unlabeled", "a_2_0_0")):
        (folder / f"{list_}.txt").write_text(f"images/{name}.png labels/{name}.png\n")
    report = check_dataset(root, spec, progress=False)
    assert any("1 groups are in both training and validation, for example a/1" in w
               for w in report.warnings)


def test_a_class_called_ignored_keeps_its_pixels(tmp_path):
    raw = write_raw(tmp_path / "raw", ["a/1"])
    classes = [{"name": "land", "color": [200, 100, 0]}, {"name": "ignored", "color": [0, 0, 200]}]
    prepare_dataset(two_classes(classes=classes), raw, tmp_path / "toy", progress=False)
    report = check_dataset(tmp_path / "toy", progress=False)
    assert report.pixels == {"land": 64 * 48, "ignored": 64 * 48, "(no class)": 0}
