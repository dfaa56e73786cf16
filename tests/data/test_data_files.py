"""Reading images and labels: the one value map, and damaged files named in one line."""

from __future__ import annotations

import errno

import numpy as np
import pytest
from PIL import Image
from toy_data import truncate, two_classes

from co2s_fast.data.catalogue import IGNORE, UNKNOWN, load_dataset
from co2s_fast.data.files import (
    Item,
    decode_mask,
    decode_palette_numpy,
    load_image,
    load_label,
    save_image,
    save_label,
)
from co2s_fast.data.writing import replacing
from co2s_fast.errors import DataError


def save(path, array, **options):
    Image.fromarray(np.asarray(array)).save(path, **options)
    return path


def test_index_mask_with_offset(tmp_path):
    # The authors' Potsdam labels: 0 none, 1..6 the classes, 255 none.
    path = save(tmp_path / "m.png", np.array([[0, 1, 6, 255]], np.uint8))
    assert decode_mask(path, load_dataset("potsdam")).tolist() == [[255, 0, 5, 255]]


def test_raw_items_go_through_the_map_and_prepared_ones_do_not(tmp_path):
    path = save(tmp_path / "m.png", np.array([[1, 2, 255]], np.uint8))
    spec = load_dataset("potsdam")
    assert load_label(Item("m", path, path, raw=True), spec).tolist() == [[0, 1, 255]]
    assert load_label(Item("m", path, path), spec).tolist() == [[1, 2, 255]]


def test_explicit_values_in_16_bits(tmp_path):
    classes = [{"name": "a", "color": [1, 1, 1], "values": [300, 7]},
               {"name": "b", "color": [2, 2, 2], "values": [4000]}]
    spec = two_classes(classes=classes, mask={"encoding": "index", "ignore": [0]})
    path = save(tmp_path / "m.png", np.array([[300, 7, 4000, 0]], np.uint16))
    assert decode_mask(path, spec).tolist() == [[0, 0, 1, 255]]
    path = save(tmp_path / "m.png", np.array([[301, 301, 4000, 0]], np.uint16))
    with pytest.raises(DataError, match=r"m\.png: undeclared value 301 in 2 pixels"):
        decode_mask(path, spec)


@pytest.mark.parametrize("mode", ["RGB", "P", "RGBA"])
def test_color_mask_in_any_mode(tmp_path, mode):
    colors = np.array([[[200, 100, 0], [0, 0, 200], [0, 0, 0]]], np.uint8)
    image = Image.fromarray(colors)
    image = image.quantize(8) if mode == "P" else image.convert(mode)
    image.save(tmp_path / "m.png")
    assert decode_mask(tmp_path / "m.png", two_classes()).tolist() == [[0, 1, 255]]


def test_undeclared_color_names_file_color_and_count(tmp_path):
    pixels = np.zeros((4, 5, 3), np.uint8)
    pixels[1, 1:4] = (200, 100, 1)
    path = save(tmp_path / "m.png", pixels)
    with pytest.raises(DataError) as caught:
        decode_mask(path, two_classes())
    message = str(caught.value)
    assert f"{path}: undeclared colour (200, 100, 1) in 3 pixels" in message
    assert "land (200, 100, 0)" in message and "\n" not in message


def test_palette_decoder_against_a_comparison_loop():
    rng = np.random.default_rng(0)
    colors = rng.integers(0, 256, (7, 3), dtype=np.uint8)
    values = np.array([0, 1, 2, 3, 4, 255, 255], np.uint8)
    rgb = colors[rng.integers(0, 7, (31, 17))]
    rgb[rng.random((31, 17)) < 0.2] = rng.integers(0, 256, 3, dtype=np.uint8)
    expected = np.full(rgb.shape[:2], UNKNOWN, np.uint8)
    for color, value in zip(colors, values, strict=True):
        expected[(rgb == color).all(-1)] = value
    np.testing.assert_array_equal(decode_palette_numpy(rgb, colors, values, UNKNOWN), expected)
    native = pytest.importorskip("co2s_fast._native", reason="the native part is not built")
    if not hasattr(native, "decode_palette"):
        pytest.skip("this build of the native part has no decode_palette")
    labels, undeclared = native.decode_palette(rgb, colors, values, UNKNOWN)
    np.testing.assert_array_equal(labels, expected)
    assert undeclared


@pytest.mark.parametrize("classes", [2, 6, 15, 17, 200])
def test_saved_labels_keep_every_value(tmp_path, classes):
    label = np.append(np.arange(classes), IGNORE).astype(np.uint8)[None]
    palette = [(i, 255 - i, 0) for i in range(classes)]
    save_label(tmp_path / "l.png", label, palette)
    image = Image.open(tmp_path / "l.png")
    assert image.mode == "P"
    np.testing.assert_array_equal(np.asarray(image), label)
    assert image.convert("RGB").getpixel((1, 0)) == palette[1]
    assert [p.name for p in tmp_path.iterdir()] == ["l.png"]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_images_become_rgb(tmp_path, mode):
    Image.new("RGB", (5, 3), (10, 10, 10)).convert(mode).save(tmp_path / "i.png")
    image = load_image(tmp_path / "i.png")
    assert image.shape == (3, 5, 3) and image.dtype == np.uint8


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_damaged_images_are_named(tmp_path, suffix):
    rng = np.random.default_rng(0)
    path = save(tmp_path / f"i.{suffix}", rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    truncate(path)
    with pytest.raises(DataError, match=rf"i\.{suffix}: damaged") as caught:
        load_image(path)
    assert "\n" not in str(caught.value)
    path.write_text("this is no image")
    with pytest.raises(DataError, match="damaged or not an image"):
        load_image(path)
    with pytest.raises(DataError, match=r"gone\.png: missing file"):
        load_image(tmp_path / "gone.png")


def test_deep_images_are_refused_not_squeezed(tmp_path):
    path = save(tmp_path / "i.png", np.full((4, 4), 30000, np.uint16))
    with pytest.raises(DataError, match="expected 8-bit"):
        load_image(path)


def test_a_full_disk_is_named(tmp_path, no_room):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    with no_room(1000), pytest.raises(OSError) as found:
        save_image(tmp_path / "a.png", noise)
    assert found.value.filename == str(tmp_path / "a.png")
    with pytest.raises(OSError) as found, replacing(tmp_path / "b.png"):  # as `shutil` copies
        raise OSError(errno.ENOSPC, "No space left on device", "source.png", None, ".b.png.tmp")
    assert found.value.filename == str(tmp_path / "b.png")
    assert list(tmp_path.iterdir()) == []
