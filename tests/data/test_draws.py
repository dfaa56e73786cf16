"""Distributions of every random choice against 10 000 recorded draws of the released pipeline."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest

from co2s_fast.data.draws import (
    UNLABELED,
    Recipe,
    draw,
    draw_box,
    draw_colour,
    draw_geometry,
    draw_size,
    fit,
    generator,
)
from co2s_fast.data.validation import val_size

DRAWS = 6000
# Two-sample Kolmogorov-Smirnov bound at 1e-4 for 6000 against 5000 draws: 2.23 sqrt(1/n + 1/m).
KS = 2.23 * np.sqrt(1 / DRAWS + 1 / 5000)
# Four standard errors of the difference of two frequencies near one half.
FREQUENCY = 4 * 0.5 * np.sqrt(1 / DRAWS + 1 / 3000)


@pytest.fixture(scope="module")
def recorded(shared_dir):
    path = shared_dir / "golden" / "transforms.json"
    if not path.is_file():
        pytest.skip(f"golden file {path} is not here")
    return json.loads(path.read_text())


def assert_follows(values, golden, name):
    """The empirical distribution passes through the stored quantiles (ties count both ways)."""
    values = np.sort(np.asarray(values, float))
    for level, value in golden["quantiles"].items():
        below = np.searchsorted(values, value - 1e-9) / len(values)
        upto = np.searchsorted(values, value + 1e-9, "right") / len(values)
        assert below - KS <= float(level) <= upto + KS, (name, level, value, below, upto)
    assert values.min() >= golden["min"] - 0.25 * golden["std"] - 1e-9, name
    assert values.max() <= golden["max"] + 0.25 * golden["std"] + 1e-9, name


def rngs(count=DRAWS):
    return (generator(7, step, 0, UNLABELED) for step in range(count))


@pytest.mark.parametrize("size", [256, 512])
def test_cutmix_boxes(recorded, size):
    golden = recorded[f"cutmix_{size}"]
    boxes = np.array([draw_box(rng, size) for rng in rngs(2 * DRAWS)])
    present = boxes[:, 2] > boxes[:, 0]
    assert (boxes[~present] == 0).all() and (boxes >= 0).all() and (boxes <= size).all()
    assert abs(present.mean() - golden["p_box"]) < FREQUENCY
    x1, y1, x2, y2 = boxes[present].T
    width, height = x2 - x1, y2 - y1
    assert_follows(width * height / size**2, golden["area_fraction"], "area")
    assert_follows(height / width, golden["aspect_h_over_w"], "aspect")
    assert_follows(width / size, golden["width_fraction"], "width")
    assert_follows(height / size, golden["height_fraction"], "height")
    assert_follows(x1 / size, golden["x0_fraction"], "x")
    assert_follows(y1 / size, golden["y0_fraction"], "y")
    assert abs((height > width).mean() - golden["p_h_greater_than_w"]) < FREQUENCY


@pytest.mark.parametrize("source", ["256x256", "512x512", "560x500", "1024x1024"])
def test_reference_rescale(recorded, source):
    golden = recorded[f"resize_img_scale_2048x512_source_{source}"]
    height, width = map(int, source.split("x"))
    recipe = Recipe(512, (2048, 512))
    sizes = np.array([draw_size(rng, height, width, recipe) for rng in rngs()])
    assert_follows(sizes[:, 0], golden["out_h"], "height")
    assert_follows(sizes[:, 1], golden["out_w"], "width")
    assert_follows(sizes[:, 0] / height, golden["scale_h"], "scale")


def test_native_rescale(recorded):
    golden = recorded["resize_img_scale_none_1024"]
    sizes = np.array([draw_size(rng, 1024, 768, Recipe(512)) for rng in rngs()])
    assert_follows(sizes[:, 0], golden["long_side"], "long side")
    np.testing.assert_array_equal(sizes[:, 1], (768 * sizes[:, 0] / 1024 + 0.5).astype(int))
    assert draw_size(generator(0, 0, 0, 0), 50, 100, Recipe(8, "native", (1, 1))) == (50, 100)


CASES = {
    "potsdam_like: 64px image, img_scale 256x64, crop 64": Recipe(64, (256, 64)),
    "whdld_like: 64px image, img_scale 512x128, crop 64": Recipe(64, (512, 128)),
    "loveda_like: 64px image, img_scale None, crop 32": Recipe(32, "native"),
}


@pytest.mark.parametrize("case", CASES)
def test_whole_pipeline(recorded, case):
    golden = recorded[f"pipeline {case}"]
    recipe = CASES[case]
    drawn = [draw(rng, 64, 64, recipe, strong=True) for rng in rngs()]
    geometry = [d.geometry for d in drawn]
    assert_follows([g.height / 64 for g in geometry], golden["resized_over_source"], "scale")
    padding = np.array([1 - g.valid_height * g.valid_width / g.crop**2 for g in geometry])
    assert abs((padding > 0).mean() - golden["p_any_padding"]) < FREQUENCY
    if golden["p_any_padding"]:
        assert_follows(padding[padding > 0], golden["padding_fraction_when_padded"], "padding")
    frequencies = {
        "p_flip": [g.flip for g in geometry],
        "p_jitter_per_strong_view": [bool(c.order) for d in drawn for c in d.colours],
        "p_gray": [c.gray for d in drawn for c in d.colours],
        "p_blur_per_strong_view": [c.sigma > 0 for d in drawn for c in d.colours],
        "p_cutmix1": [d.boxes[0][2] > 0 for d in drawn],
        "p_cutmix2": [d.boxes[1][2] > 0 for d in drawn],
    }
    for name, values in frequencies.items():
        assert abs(np.mean(values) - golden[name]) < FREQUENCY, name


def test_colours(recorded):
    golden = recorded["pipeline potsdam_like: 64px image, img_scale 256x64, crop 64"]
    colours = [draw_colour(rng) for rng in rngs()]
    jittered = [c for c in colours if c.order]
    for name, expected in golden["jitter"].items():
        if name != "first_op_share":
            assert_follows([getattr(c, name) for c in jittered], expected, name)
    first = np.bincount([c.order[0] for c in jittered], minlength=4) / len(jittered)
    for part, share in zip(first, golden["jitter"]["first_op_share"].values(), strict=True):
        assert abs(part - share) < FREQUENCY
    assert_follows([c.sigma for c in colours if c.sigma], golden["blur_sigma"], "sigma")
    assert {c.order for c in jittered} == {*itertools.permutations(range(4))}


def test_views_and_boxes_are_drawn_independently():
    drawn = [draw(rng, 64, 64, Recipe(64), strong=True) for rng in rngs()]
    pairs = {
        "boxes": [(d.boxes[0][2] > 0, d.boxes[1][2] > 0) for d in drawn],
        "gray": [(d.colours[0].gray, d.colours[1].gray) for d in drawn],
        "gray, blur": [(d.colours[0].gray, d.colours[0].sigma > 0) for d in drawn],
        "flip, box": [(d.geometry.flip, d.boxes[0][2] > 0) for d in drawn],
        "sigma": [(d.colours[0].sigma, d.colours[1].sigma) for d in drawn
                  if d.colours[0].sigma and d.colours[1].sigma],
    }
    for name, values in pairs.items():
        correlation = np.corrcoef(np.array(values, float).T)[0, 1]
        assert abs(correlation) < 4 / np.sqrt(len(values)), name


def test_crops_are_uniform_and_inside():
    geometry = [draw_geometry(rng, 80, 64, Recipe(32, "native", (1, 1))) for rng in rngs()]
    tops, lefts = (np.bincount([getattr(g, side) for g in geometry]) for side in ("top", "left"))
    assert len(tops) == 49 and len(lefts) == 33  # every offset from 0 to side - crop
    for counts in (tops, lefts):
        expected = DRAWS / len(counts)
        # Chi-square of that many cells: mean n - 1, spread sqrt(2 (n - 1)); five spreads.
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert chi_square < len(counts) + 5 * np.sqrt(2 * len(counts))


def test_quarter_turns_are_alike_likely_and_shift_no_other_number():
    plain, turned = (
        [draw_geometry(rng, 80, 64, Recipe(32, "native", (1, 1), rotate90=on)) for rng in rngs()]
        for on in (False, True)
    )
    assert {g.turns for g in plain} == {0}
    assert [replace(g, turns=0) for g in turned] == plain
    counts = np.bincount([g.turns for g in turned])
    assert len(counts) == 4
    assert ((counts - DRAWS / 4) ** 2 / (DRAWS / 4)).sum() < 16.3  # chi-square, 3 free, p = 0.001


def test_validation_size(recorded):
    for source, expected in recorded["val_resize"].items():
        height, width = map(int, source.split("x"))
        assert list(val_size(height, width, (2048, 512))) == expected
    assert val_size(700, 900, "native") == (700, 900)
    assert fit(100, 50, (2048, 512)) == (1024, 512)


def test_same_place_same_draw_other_place_other_draw():
    one = draw(generator(1, 2, 3, UNLABELED), 64, 64, Recipe(64), strong=True)
    assert one == draw(generator(1, 2, 3, UNLABELED), 64, 64, Recipe(64), strong=True)
    for place in ((0, 2, 3, UNLABELED), (1, 1, 3, UNLABELED), (1, 2, 2, UNLABELED), (1, 2, 3, 0)):
        assert one != draw(generator(*place), 64, 64, Recipe(64), strong=True)
