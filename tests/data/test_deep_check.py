"""`data check --deep`: damage that no header shows, pictures in both training and validation."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image
from toy_data import two_classes

from co2s_fast.data import check_dataset
from co2s_fast.data import integrity as looks
from co2s_fast.data.duplicates import Likeness, fingerprint
from co2s_fast.data.files import Item, load_image
from co2s_fast.data.integrity import Look, Seen, inspect, inspect_all, looks_whole
from co2s_fast.errors import UsageError


def scene(seed, size=96):
    """A picture with structure at every scale, uint8 [size, size, 3]."""
    rng = np.random.default_rng(seed)
    total = np.zeros((size, size, 3))
    for cells in (3, 6, 12, 24):
        small = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += np.asarray(small.resize((size, size), Image.Resampling.BICUBIC), float) / cells
    total = (total - total.min()) / np.ptp(total) * 200 + 20
    return (total + rng.normal(0, 4, total.shape)).clip(0, 255).astype(np.uint8)


@pytest.fixture
def tree(tmp_path):
    """A prepared folder: scenes 0-8, of which 0-1 are labelled and 6-8 validate."""
    root, spec = tmp_path / "toy", two_classes(mask={}, tile={})
    for folder in ("images", "labels", "splits/two"):
        (root / folder).mkdir(parents=True)
    (root / "dataset.yaml").write_text(
        "name: toy\nclasses: [{name: land, color: [200, 100, 0]}, {name: sea, color: [0, 0, 200]}]")
    label = np.zeros((96, 96), np.uint8)
    label[:, 48:] = 1
    for number in range(9):
        Image.fromarray(scene(number)).save(root / f"images/t{number}.png")
        Image.fromarray(label).save(root / f"labels/t{number}.png")
    for name, numbers in (("labeled", (0, 1)), ("unlabeled", range(2, 6)), ("val", (6, 7, 8))):
        lines = [f"images/t{n}.png labels/t{n}.png\n" for n in numbers]
        (root / f"splits/two/{name}.txt").write_text("".join(lines))
    return root, spec


def deep(tree, **options):
    root, spec = tree
    return check_dataset(root, spec, level="deep", progress=False, **options)


def kinds(report):
    return [(f.kind, f.severity) for f in report.findings]


def corrupt(path):
    """Damage the middle of a PNG: header, size and ending stay."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 40] = bytes(40)
    path.write_bytes(bytes(content))


def test_a_good_folder(tree, tmp_path):
    report = deep(tree, json_path=tmp_path / "report.json")
    assert report.findings == [] and report.images == 9
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["format"] == 1 and content["level"] == "deep" and content["problems"] == []
    assert content["pixels"] == {"land": 9 * 96 * 48, "sea": 9 * 96 * 48, "ignored": 0}


def test_every_kind_of_damage_is_found_by_name(tree):
    root, spec = tree
    corrupt(root / "images/t3.png")
    Image.new("RGB", (50, 40)).save(root / "images/t4.png")
    Image.fromarray(np.full((96, 96), 9, np.uint8)).save(root / "labels/t5.png")
    shutil.copy(root / "images/t2.png", root / "images/t7.png")
    assert looks_whole(root / "images/t3.png")  # which is why a quick check passes it
    quick = check_dataset(root, spec, progress=False)
    assert kinds(quick) == [("size", "problem"), ("undeclared-value", "problem")]
    report = deep(tree)
    assert kinds(report) == [("unreadable", "problem"), *kinds(quick), ("duplicate", "problem")]
    files = [[path.rsplit("/", 1)[1] for path in f.files] for f in report.findings]
    assert files == [["t3.png"], ["t4.png", "t4.png"], ["t5.png"], ["t7.png", "t2.png"]]
    found = json.loads(report.to_json())
    assert [f["kind"] for f in found["findings"]] == [f.kind for f in report.findings]
    assert len(found["problems"]) == 4


def test_the_report_does_not_depend_on_the_number_of_processes(tree):
    root, _ = tree
    for number in range(9, 30):
        shutil.copy(root / f"images/t{number % 9}.png", root / f"images/t{number}.png")
    corrupt(root / "images/t11.png")
    one, two = deep(tree, workers=1), deep(tree, workers=2)
    assert one.to_json() == two.to_json()
    assert kinds(one) == [("unreadable", "problem"), ("duplicate", "warning")]


def test_a_report_that_cannot_be_written(tree, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"--json .*file/report.json: "):
        deep(tree, json_path=tmp_path / "file/report.json")


def likeness(*pictures):
    """The pairs of like pictures, by position."""
    found = Likeness([fingerprint(p) for p in pictures])
    return {(i, j) for i in range(len(pictures)) for j, _ in found.like(i) if i < j}


def jpeg(pixels, tmp_path, quality):
    path = tmp_path / f"{quality}.jpg"
    Image.fromarray(pixels).save(path, quality=quality)
    return load_image(path)


@pytest.mark.parametrize("seed", range(4))
def test_copies_are_found_and_others_are_not(seed, tmp_path):
    base = scene(seed, 192)
    brighter = (base * 0.9 + 25).clip(0, 255).astype(np.uint8)
    smaller = np.asarray(Image.fromarray(base).resize((120, 120), Image.Resampling.BILINEAR))
    nudged = np.roll(base, (1, 1), (0, 1))
    copies = [base, jpeg(base, tmp_path, 90), jpeg(base, tmp_path, 40), brighter, smaller, nudged]
    assert likeness(*copies) == {(i, j) for i in range(6) for j in range(i + 1, 6)}
    strangers = [scene(100 + 10 * seed + i, 192) for i in range(10)]
    assert likeness(base, *strangers) == set()
    assert likeness(base, base[:, ::-1], base.transpose(1, 0, 2)) == set()


def test_flat_pictures_are_not_copies_of_each_other(tmp_path):
    rng = np.random.default_rng(0)
    black = np.zeros((64, 64, 3), np.uint8)
    ramp = np.broadcast_to(np.linspace(40, 90, 64)[None, :, None], (64, 64, 3))
    water = [(ramp + rng.normal(0, 2, ramp.shape)).clip(0, 255).astype(np.uint8) for _ in range(4)]
    deep_sea = [(30 + rng.normal(0, 1.5, ramp.shape)).astype(np.uint8) for _ in range(4)]
    assert likeness(black, black, black + 1, black + 128) == set()
    assert likeness(*water, *deep_sea) == set()
    assert likeness(*(jpeg(each, tmp_path, 60 + i) for i, each in enumerate(water))) == set()
    assert likeness(water[0], water[1], water[0]) == {(0, 2)}  # noise does not repeat by chance


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_other_number_types_and_bands(dtype):
    one, other = (np.concatenate([scene(s), scene(s)[..., :1]], 2).astype(dtype) * 20
                  for s in (0, 1))
    again = (one * 1.02).astype(dtype)
    assert likeness(one, other, again) == {(0, 2)}
    assert likeness(one[..., :1], other[..., :1], again[..., :1]) == {(0, 2)}


def test_copies_within_training_are_a_warning(tree):
    root, _ = tree
    shutil.copy(root / "images/t2.png", root / "images/t1.png")
    report = deep(tree)
    assert kinds(report) == [("duplicate", "warning")] and report.problems == []
    assert "none of them in both training and validation" in report.warnings[0]
    shutil.rmtree(root / "splits")
    assert "give them one group" in deep(tree).warnings[0]


def test_each_validation_image_is_named_once_with_its_closest_copy(tree, tmp_path):
    root, _ = tree
    base = scene(50)
    for number, quality in ((2, 40), (3, 80), (7, 95)):
        Image.fromarray(jpeg(base, tmp_path, quality)).save(root / f"images/t{number}.png")
    shutil.copy(root / "images/t7.png", root / "images/t4.png")
    report = deep(tree)
    assert len(report.problems) == 1
    assert f"{root}/images/t7.png shows the same as training image {root}/images/t4.png (equal " \
        "pixels), and as 2 more" in report.problems[0]


def die(item, spec, look):
    """In place of `inspect`: some files kill the process."""
    if item.name == "t3":
        os._exit(11)
    return Seen(size=(1, int(item.name[1:])))


def test_a_file_that_kills_its_process_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(looks, "inspect", die)
    items = [Item(f"t{n}", tmp_path / f"t{n}.png") for n in range(20)]
    found = inspect_all(items, two_classes(), Look(decode=True), title="", progress=False,
                        workers=2)
    assert [seen.size[1] for n, seen in enumerate(found) if n != 3] == [
        n for n in range(20) if n != 3]
    assert "t3.png: decoding it or its label crashed the process" in found[3].findings[0].message


@pytest.mark.parametrize(("suffix", "options"), [
    ("png", {}), ("jpg", {}), ("tif", {}), ("tif", {"compression": "tiff_lzw"}),
    ("tif", {"compression": "tiff_adobe_deflate"})])
def test_a_cut_file_is_seen_by_its_ending(tmp_path, suffix, options):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(scene(0)).save(path, **options)
    assert looks_whole(path)
    content = path.read_bytes()
    for share in (0.0, 0.01, 0.5, 0.98):
        path.write_bytes(content[: int(len(content) * share)])
        seen = inspect(Item("a", path), two_classes(), Look())
        assert [f.kind for f in seen.findings] == ["unreadable"]
