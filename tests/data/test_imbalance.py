"""Class weights by their formulas, and class-aware crops by their distribution."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from test_damage import same
from toy_data import two_classes

from co2s_fast.data import DataConfig, build_loader, open_split
from co2s_fast.data.draws import LABELED, Geometry
from co2s_fast.data.files import load_label
from co2s_fast.data.imbalance import (
    ClassSampler,
    class_weights,
    labeled_pixels,
    read_class_weight,
)
from co2s_fast.data.plan import Plan
from co2s_fast.data.transforms import crop_label
from co2s_fast.errors import UsageError

NAMES = ["field", "road", "ship"]
# Two images of 1000 labelled pixels, one of 500; the last class is in the first image only.
PIXELS = np.array([[700, 250, 50], [900, 100, 0], [500, 0, 0]])


def test_median_frequency_by_hand():
    """Frequencies within the images that show a class: 2100/2500, 350/2000, 50/1000."""
    frequency = np.array([0.84, 0.175, 0.05])
    expected = 0.175 / frequency
    expected /= (expected * PIXELS.sum(0)).sum() / 2500
    found = class_weights("median-frequency", PIXELS, NAMES)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_array_equal(class_weights("balanced", PIXELS, NAMES), found)


@pytest.mark.parametrize("beta", [0.9, 0.99, 0.9999, None])
def test_effective_number_by_hand(beta):
    used = 1 - 3 / 2500 if beta is None else beta  # 833.3 labelled pixels in a mean image
    expected = (1 - used) / (1 - used ** PIXELS.sum(0).astype(float))
    expected /= (expected * PIXELS.sum(0)).sum() / 2500
    found = class_weights("effective-number", PIXELS, NAMES, beta)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    if beta in (0.9999, None):
        assert found[2] > 2 * found[1] > 2 * found[0]
    if beta == 0.9:  # 50 pixels are already as good as endless ones
        np.testing.assert_allclose(found, 1, atol=0.01)


def test_effective_number_with_pixels_as_many_as_there_are():
    pixels = np.array([[2_000_000_000, 30_000, 1]])
    for beta in (None, 0.0, 0.999999999):
        found = class_weights("effective-number", pixels, NAMES, beta)
        assert np.isfinite(found).all() and (found > 0).all()


@pytest.mark.parametrize(
    "rule", ["balanced", "effective-number", {"field": 3, "road": 0, "ship": 9}])
def test_the_mean_over_labelled_pixels_is_one(rule):
    weights = class_weights(rule, PIXELS, NAMES)
    assert (weights * PIXELS.sum(0)).sum() / PIXELS.sum() == pytest.approx(1)
    if isinstance(rule, dict):
        assert weights[2] / weights[0] == pytest.approx(3) and weights[1] == 0


def test_a_class_without_labels_weighs_one():
    pixels = PIXELS * [1, 1, 0]
    for rule in ("balanced", "effective-number"):
        weights = class_weights(rule, pixels, NAMES)
        assert np.isfinite(weights).all() and weights[1] > weights[0]
    assert class_weights("none", PIXELS, NAMES) is None
    assert class_weights("balanced", PIXELS * 0, NAMES).tolist() == [1, 1, 1]


def test_weights_from_files(tmp_path):
    content = {"field": 1, "road": 2.5, "ship": 4}
    (tmp_path / "w.json").write_text(json.dumps(content))
    (tmp_path / "w.yaml").write_text("field: 1\nroad: 2.5\nship: 4\n")
    for given in (tmp_path / "w.json", str(tmp_path / "w.yaml"), content):
        assert read_class_weight(given) == content
    for rule in ("none", "balanced", "median-frequency", "effective-number"):
        assert read_class_weight(rule) == rule


@pytest.mark.parametrize(("text", "expected"), [
    (None, "expected one of none, balanced, .* or a YAML or JSON file"),
    ("[1, 2]", "w.yaml: expected a weight for each class name"),
    ("field: [1", "w.yaml is not YAML or JSON"),
    ("field: -1\nroad: .nan\nship: many\nsea: true",
     r"w.yaml: expected numbers of at least 0, found field -1, road nan, ship 'many', sea True"),
])
def test_wrong_files(tmp_path, text, expected):
    path = tmp_path / "w.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=expected) as caught:
        read_class_weight(path)
    assert "\n" not in str(caught.value)


def test_weights_of_other_classes():
    with pytest.raises(UsageError, match=r"no weight for road, ship; unknown class rode; the "
                       "classes are field, road, ship"):
        class_weights({"field": 1, "rode": 2}, PIXELS, NAMES)
    with pytest.raises(UsageError, match="every class with a labelled pixel has weight 0"):
        class_weights({"field": 0, "road": 0, "ship": 1}, PIXELS * [1, 1, 0], NAMES)


@pytest.mark.parametrize("temperature", [0.05, 0.25, 2.0])
def test_classes_are_drawn_by_their_rarity(temperature):
    sampler = ClassSampler(PIXELS, temperature, seed=3)
    odds = np.exp((1 - PIXELS.sum(0) / 2500) / temperature)
    np.testing.assert_allclose(sampler.probabilities, odds / odds.sum(), rtol=1e-12)
    count = 6000
    drawn = np.bincount([sampler.class_of(s, p) for s in range(count // 4) for p in range(4)],
                        minlength=3)
    spread = 4.5 * np.sqrt(count * sampler.probabilities * (1 - sampler.probabilities)) + 1
    assert (abs(drawn - count * sampler.probabilities) < spread).all()


def test_images_show_the_class_and_each_as_often():
    sampler = ClassSampler(PIXELS, 0.5, seed=0)
    first = {0: np.zeros(3), 1: np.zeros(3), 2: np.zeros(3)}
    for step in range(3000):
        order = list(sampler.images(step, 1))
        wanted = sampler.class_of(step, 1)
        assert sorted(order) == np.flatnonzero(PIXELS[:, wanted]).tolist()
        first[wanted][order[0]] += 1
    for counts in first.values():
        shown = counts[counts > 0]
        share = shown / shown.sum()
        assert (abs(share - 1 / len(shown)) < 4.5 * np.sqrt(0.25 / shown.sum())).all()


def test_a_class_that_no_image_shows_is_never_drawn():
    sampler = ClassSampler(PIXELS * [0, 1, 0], 0.25, seed=0)
    assert {sampler.class_of(step, 0) for step in range(200)} == {1}
    with pytest.raises(UsageError, match="needs labelled pixels, found none"):
        ClassSampler(PIXELS * 0, 0.25, seed=0)


@pytest.mark.parametrize(("height", "width"), [(50, 80), (25, 40), (120, 191), (16, 20)])
def test_crops_show_the_pixel_wherever_it_is(height, width):
    """A ship of 2 x 2 pixels, at the corners and inside, at four scales, crop 20."""
    sampler = ClassSampler(np.array([[0, 0, 4]]), 1, seed=0)
    seen = set()
    for step, (y, x) in enumerate([(0, 0), (48, 78), (0, 78), (48, 0), (20, 33)] * 12):
        label = np.zeros((50, 80), np.uint8)
        label[y : y + 2, x : x + 2] = 2
        geometry = Geometry(height, width, 0, 0, 20, flip=step % 2 == 0)
        placed = sampler.place(geometry, label, step, 0)
        assert 0 <= placed.top <= max(height - 20, 0) and 0 <= placed.left <= max(width - 20, 0)
        assert (placed.height, placed.width, placed.flip) == (height, width, geometry.flip)
        rows = (2 * np.arange(height) + 1) * 50 // (2 * height)
        columns = (2 * np.arange(width) + 1) * 80 // (2 * width)
        if (label == 2)[rows][:, columns].any():  # not lost by shrinking
            assert (crop_label(label, placed) == 2).any()
        else:
            assert placed == geometry
        seen.add((placed.top, placed.left))
    assert len(seen) > {16: 0, 25: 5}.get(height, 20)


def test_every_pixel_of_the_class_is_aimed_at_as_often():
    label = np.zeros((64, 64), np.uint8)
    label[5, 5] = label[60, 60] = 1
    sampler = ClassSampler(np.array([[0, 2]]), 1, seed=0)
    tops = [sampler.place(Geometry(64, 64, 0, 0, 8, False), label, step, 0).top
            for step in range(100)]
    assert 25 < sum(top > 32 for top in tops) < 75


@pytest.fixture
def rare(tmp_path):
    """Six labelled images, one of which has a patch of sea; and their loader."""
    root, spec = tmp_path / "toy", two_classes(mask={}, tile={})
    for folder in ("images", "labels", "splits/s"):
        (root / folder).mkdir(parents=True)
    (root / "dataset.yaml").write_text(
        "name: toy\nclasses: [{name: land, color: [200, 100, 0]}, {name: sea, color: [0, 0, 200]}]")
    rng = np.random.default_rng(0)
    lines = []
    for number in range(14):
        label = np.zeros((64, 96), np.uint8)
        if number in (3, 13):
            label[50:53, 90:94] = 1
        Image.fromarray(label).save(root / f"labels/{number}.png")
        Image.fromarray(rng.integers(0, 255, (64, 96, 3), np.uint8)).save(
            root / f"images/{number}.png")
        lines.append(f"images/{number}.png labels/{number}.png\n")
    for name, part in (("labeled", lines[:6]), ("unlabeled", lines[6:13]), ("val", lines[13:])):
        (root / f"splits/s/{name}.txt").write_text("".join(part))
    config = DataConfig(root=root, split=root / "splits/s", batch_size=2, workers=0,
                        sampling="class-aware", sampling_temperature=1.0)
    split = open_split(config, spec)

    def load(start=0, stop=30, *, views=("x",), rank=0, world=1, **options):
        changed = config.model_copy(update=options)
        return list(build_loader(changed, spec, split, views=views, seed=1, start_step=start,
                                 total_steps=stop, rank=rank, world=world))

    load.plan = lambda **options: Plan(config.model_copy(update=options), spec, split, {"x"}, 1)
    load.split, load.spec = split, spec
    return load


def test_batches_have_the_rare_class_as_often_as_it_is_drawn(rare):
    plan = rare.plan()
    uniform, aware = rare(sampling="uniform"), rare()
    wanted = np.array([[plan.sampler.class_of(s, p) for p in range(2)] for s in range(30)])
    shown = np.array([[bool((y == 1).any()) for y in batch.y] for batch in aware])
    assert shown[wanted == 1].mean() > 0.95  # a scale of 0.5 may lose a patch of 3 x 4 pixels
    assert shown.mean() > 0.6 > 0.1 > np.mean([(b.y == 1).any((1, 2)).float().mean()
                                               for b in uniform])
    names = {name for batch in aware for name in batch.labeled_files}
    assert len(names) > 3  # images without the class still come when land is drawn


def test_a_batch_stays_a_function_of_seed_and_step(rare):
    whole = rare(0, 8, views=("x", "w", "s1"))
    assert all(map(same, whole, rare(0, 8, views=("x", "w", "s1"), workers=2)))
    assert all(map(same, whole[5:], rare(5, 8, views=("x", "w", "s1"))))
    parts = (rare(0, 8, rank=r, world=2) for r in range(2))
    for batch, first, second in zip(whole, *parts, strict=True):
        assert [*first.labeled_files, *second.labeled_files] == batch.labeled_files


def test_dali_makes_the_same_choice(rare):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    for one, other in zip(rare(0, 4, loader="dali", workers=1), rare(0, 4), strict=True):
        assert one.labeled_files == other.labeled_files and (one.y == other.y).all()


def test_unlabelled_images_do_not_change(rare):
    views = ("x", "w", "s1")
    for one, other in zip(rare(0, 6, views=views), rare(0, 6, views=views, sampling="uniform"),
                          strict=True):
        assert one.unlabeled_files == other.unlabeled_files and (one.w == other.w).all()


def test_a_damaged_image_is_replaced_by_one_of_its_class_or_any(rare):
    rare.split.labeled[3].image.write_bytes(b"")  # the only one with sea
    batches = rare()
    names = [name for batch in batches for name in batch.labeled_files]
    assert len(names) == 60 and "3" not in names
    assert {d.file for batch in batches for d in batch.damaged} == {"images/3.png"}


def test_pixels_are_counted_where_they_are_not_known(rare):
    known = rare.split.pixels.copy()
    rare.split.pixels = None
    assert (labeled_pixels(rare.split, rare.spec) == known).all()
    assert known[3].tolist() == [64 * 96 - 12, 12]
    item = next(rare.plan().candidates(LABELED, 0, 0))
    assert load_label(item, rare.spec).shape == (64, 96)
