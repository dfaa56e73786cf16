"""The native module: what it says about itself, and its raster helpers."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

native = pytest.importorskip("co2s_fast._native", reason="the native part is not built here")

COLORS = np.array([[255, 255, 255], [0, 0, 255], [0, 255, 0], [0, 0, 0]], np.uint8)
VALUES = np.array([0, 1, 2, 255], np.uint8)


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def test_build_info_matches_this_process():
    info = native.build_info()
    assert info["torch"] == torch.__version__
    assert info["instruction_set"] in info["instruction_sets"]
    assert "baseline" in info["instruction_sets"]
    assert info["compiler"] and info["cuda_archs"]


@pytest.mark.parametrize("first", ["torch", "co2s_fast._native"])
def test_import_in_either_order(first):
    code = f"import {first}; import co2s_fast._native as n; import torch; print(n.build_info())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_unknown_instruction_set_is_an_error():
    code = "import torch, co2s_fast._native as n; n.build_info()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "CO2S_CPU_ISA": "mmx"},
    )
    assert done.returncode != 0
    assert "CO2S_CPU_ISA=mmx: expected baseline, avx2 or avx512" in done.stderr


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (200, 333), (0, 4), (3, 0)])
def test_decode_palette(rng, shape):
    truth = rng.integers(0, 4, shape)
    labels, undeclared = native.decode_palette(COLORS[truth], COLORS, VALUES)
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, VALUES[truth])
    assert undeclared == {}


def test_decode_palette_runs_of_every_length(rng):
    lengths = rng.integers(1, 70, 300)
    truth = np.repeat(rng.integers(0, 4, 300), lengths)[None]
    labels, _ = native.decode_palette(COLORS[truth], COLORS, VALUES)
    np.testing.assert_array_equal(labels, VALUES[truth])


def test_decode_palette_counts_undeclared(rng):
    rgb = COLORS[rng.integers(0, 4, (150, 80))]
    rgb[3, 4] = (1, 2, 3)
    rgb[140, 10:15] = (9, 8, 7)
    labels, undeclared = native.decode_palette(rgb, COLORS, VALUES, unknown=254)
    assert undeclared == {(1, 2, 3): 1, (9, 8, 7): 5}
    assert (labels == 254).sum() == 6 and labels[3, 4] == 254


def test_decode_palette_limit_and_threads_do_not_change_the_answer(rng):
    noise = rng.integers(0, 256, (400, 50, 3), dtype=np.uint8)
    before, answers = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            answers.append(native.decode_palette(noise, COLORS, VALUES, limit=7))
    finally:
        torch.set_num_threads(before)
    assert len(answers[0][1]) == 7
    assert answers[0][1] == answers[1][1]
    np.testing.assert_array_equal(answers[0][0], answers[1][0])


def test_decode_palette_many_colors(rng):
    colors = np.unique(rng.integers(0, 256, (250, 3), dtype=np.uint8), axis=0)
    values = np.arange(len(colors), dtype=np.uint8)
    truth = rng.integers(0, len(colors), (64, 64))
    labels, undeclared = native.decode_palette(colors[truth], colors, values)
    np.testing.assert_array_equal(labels, truth)
    assert undeclared == {}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((np.zeros((4, 4), np.uint8), COLORS, VALUES), ValueError, r"rgb: expected shape \(H, W"),
        ((np.zeros((4, 4, 3), np.uint8), COLORS[:, :2], VALUES), ValueError, "colors: expected"),
        ((np.zeros((4, 4, 3), np.uint8), COLORS, VALUES[:2]), ValueError, "values: expected"),
        ((np.zeros((4, 4, 3), np.uint8), COLORS, VALUES, 256), ValueError, "unknown: expected"),
        ((np.zeros((4, 4, 3), np.float32), COLORS, VALUES), TypeError, "decode_palette"),
    ],
)
def test_decode_palette_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        native.decode_palette(*arguments)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_remap_labels(rng, dtype):
    label = rng.integers(0, 5, (130, 71)).astype(dtype)
    labels, undeclared = native.remap_labels(label[::-1], {0: 255, 1: 0, 2: 1, 3: 1, 4: 2})
    np.testing.assert_array_equal(labels, np.array([255, 0, 1, 1, 2], np.uint8)[label[::-1]])
    assert undeclared == {}


def test_remap_labels_counts_undeclared():
    label = np.array([[1, -5, 70000, 2], [2, 2, 1, 70000]], np.int32)
    labels, undeclared = native.remap_labels(label, {1: 0}, unknown=254)
    assert undeclared == {-5: 1, 2: 3, 70000: 2}
    assert labels.tolist() == [[0, 254, 254, 254], [254, 254, 0, 254]]


def test_remap_labels_errors():
    label = np.zeros((2, 2), np.uint8)
    with pytest.raises(TypeError, match="expected uint8, uint16 or int32, found float64"):
        native.remap_labels(label.astype(float), {0: 0})
    with pytest.raises(ValueError, match=r"label: expected shape \(H, W\)"):
        native.remap_labels(label[0], {0: 0})
    with pytest.raises(ValueError, match=r"table: expected a number in \[0, 255\], found 256"):
        native.remap_labels(label, {0: 256})
    with pytest.raises(ValueError, match="table: expected values in"):
        native.remap_labels(label, {-1: 0})
