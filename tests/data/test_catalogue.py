"""The descriptions of datasets: the built-in ones, and what a wrong one is told."""

from __future__ import annotations

import pytest

from co2s_fast.data import dataset_names, load_dataset
from co2s_fast.data.catalogue import class_values
from co2s_fast.errors import UsageError

# Counts of concepts, class names included, and of classes, as the authors' word lists have them.
CONCEPTS = {"whdld": (37, 6), "loveda": (41, 7), "potsdam": (36, 6), "gid15": (90, 15),
            "mer": (54, 9), "msl": (54, 9)}


def write(path, text):
    path.write_text(text)
    return path


def test_every_entry_loads():
    assert set(dataset_names()) == {"demo", *CONCEPTS}
    for name in dataset_names():
        spec = load_dataset(name)
        assert spec.name == name and spec.info.licence != "unknown" and spec.info.source


@pytest.mark.parametrize("name", CONCEPTS)
def test_concepts_and_order(name):
    spec = load_dataset(name)
    assert (sum(len(c.concepts) for c in spec.classes), spec.num_classes) == CONCEPTS[name]
    assert all(c.concepts[0] == c.name for c in spec.classes)


def test_known_facts():
    assert load_dataset("whdld").class_names[:2] == ["building", "road"]
    assert load_dataset("whdld").palette[5] == (0, 0, 255)
    assert load_dataset("whdld").crop == 256
    assert load_dataset("loveda").scale == "native"
    assert load_dataset("potsdam").scale == (2048, 512)
    assert class_values(load_dataset("potsdam"), 0) == [1]
    assert class_values(load_dataset("gid15"), 0) == [0]
    assert load_dataset("msl").class_names == load_dataset("mer").class_names


def test_all_wrong_keys_are_named_at_once(tmp_path):
    path = write(tmp_path / "x.yaml", """
name: x
colour: red
classes:
  - {name: a, color: [1, 2, 3], concept: [b]}
  - {name: b, color: [1, 2, 300]}
  - {color: [9, 9, 9]}
tile: {sise: 128}
""")
    with pytest.raises(UsageError) as caught:
        load_dataset(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    for part in ("colour: unknown key", "classes.0.concept: unknown key", "tile.sise: unknown key",
                 "classes.2.name: missing", "classes.1.color.2", "found 300"):
        assert part in message


@pytest.mark.parametrize(("text", "expected"), [
    ("name: [", "is not YAML"),
    ("- a\n- b", "expected keys and values, found list"),
    ("name: !!python/object/apply:os.getcwd []", "is not YAML"),
    ("name: x\nclasses: [{name: a, color: [1, 1, 1]}, {name: a, color: [1, 1, 1]}]",
     "class name a is used twice"),
    ("name: x\nclasses: [{name: a, color: [1, 1, 1]}, {name: b, color: [2, 2, 2], values: [0]}]",
     "mask value 0 is used twice"),
    ("name: x\nclasses: [{name: a, color: [1, 1, 1]}, {name: b, color: [2, 2, 2]}]\n"
     "mask: {encoding: color, ignore: [7]}", "needs colours"),
    ("name: x\nclasses: [{name: no, color: [1, 1, 1]}, {name: null, color: [2, 2, 2]}]",
     r"found False \(words like no or null, .* quotes only\); .*1\.name.*found None \(words"),
])
def test_wrong_descriptions(tmp_path, text, expected):
    with pytest.raises(UsageError, match=expected):
        load_dataset(write(tmp_path / "x.yaml", text))


def test_unknown_name_and_missing_file(tmp_path):
    with pytest.raises(UsageError, match="unknown dataset 'postdam': expected one of demo"):
        load_dataset("postdam")
    with pytest.raises(UsageError, match=r"nothing\.yaml: No such file"):
        load_dataset(tmp_path / "nothing.yaml")


def test_a_folder_is_no_dataset_but_may_hold_its_description(tmp_path):
    with pytest.raises(UsageError, match=r"expected one of demo, .*a \.yaml description$"):
        load_dataset(tmp_path)
    (tmp_path / "dataset.yaml").write_text("name: x")
    with pytest.raises(UsageError, match=rf"this folder has one, {tmp_path}/dataset\.yaml$"):
        load_dataset(tmp_path)
