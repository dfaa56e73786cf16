"""The generated dataset: same seed same pixels, every class, and not to be solved by colour."""

from __future__ import annotations

import numpy as np
import pytest

from co2s_fast.data import DataConfig, load_dataset, open_split
from co2s_fast.data.demo import demo_scene
from co2s_fast.data.files import load_image, load_label
from co2s_fast.data.tiles import list_images


def test_scenes_are_determined_by_the_seed():
    one, again, other = (demo_scene(seed, 1, side=128) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one[0], again[0])
    np.testing.assert_array_equal(one[1], again[1])
    assert (one[0] != other[0]).mean() > 0.5


def test_layout(demo_root, demo_spec):
    items = list_images(demo_root)
    assert len(items) == 64 and all(i.label is not None and not i.raw for i in items)
    assert load_dataset(demo_root / "dataset.yaml").class_names == demo_spec.class_names
    assert load_image(items[0].image).shape == (128, 128, 3)
    counts = sum(np.bincount(load_label(i, demo_spec).ravel(), minlength=256) for i in items)
    shares = counts[:6] / counts.sum()
    assert (shares > 0.01).all() and shares.max() < 0.7 and counts[255] / counts.sum() < 0.05


def test_generated_on_first_use(tmp_path, monkeypatch, demo_spec):
    import co2s_fast.data.demo as demo

    small = demo.generate_demo
    monkeypatch.setattr(demo, "generate_demo",
                        lambda root, spec: small(root, spec, scenes=4, progress=False))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CO2S_DATA", raising=False)
    split = open_split(DataConfig(labels=6), demo_spec)
    assert (len(split.labeled), len(split.unlabeled), len(split.val)) == (6, 42, 16)
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["demo"]


def test_colour_alone_does_not_solve_it():
    """The best label per colour cell, learnt on every training pixel, stays mediocre."""
    train, val = ([demo_scene(0, n, side=256) for n in numbers]
                  for numbers in (range(12), range(16, 20)))

    def pixels(scenes):
        colors = np.concatenate([image.reshape(-1, 3) for image, _ in scenes])
        labels = np.concatenate([label.ravel() for _, label in scenes])
        cells = (colors // 16) @ np.array([256, 16, 1])
        return cells[labels < 6], labels[labels < 6].astype(int)

    cells, labels = pixels(train)
    table = np.bincount(cells * 6 + labels, minlength=4096 * 6).reshape(4096, 6)
    cells, labels = pixels(val)
    confusion = np.bincount(labels * 6 + table[cells].argmax(1), minlength=36).reshape(6, 6)
    hit = np.diag(confusion)
    iou = hit / np.maximum(confusion.sum(0) + confusion.sum(1) - hit, 1)
    assert 0.12 < iou.mean() < 0.40


@pytest.mark.parametrize("kind", [0, 1, 2, 3, 4, 5])
def test_classes_overlap_in_colour(kind):
    """No class owns its colours: its mean lies within the spread of another class."""
    scenes = [demo_scene(0, n, side=256) for n in range(6)]
    colors = np.concatenate([image.reshape(-1, 3) for image, _ in scenes]).astype(float)
    labels = np.concatenate([label.ravel() for _, label in scenes])
    mean = colors[labels == kind].mean(0)
    others = [k for k in range(6) if k != kind and (labels == k).any()]
    distance = [np.abs((mean - colors[labels == k].mean(0)) / colors[labels == k].std(0)).max()
                for k in others]
    assert min(distance) < 1.5
