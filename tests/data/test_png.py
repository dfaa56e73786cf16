"""The PNG writer, read back with Pillow."""

import io

import numpy as np
import pytest
from PIL import Image

from co2s_fast.data import png
from co2s_fast.data.png import encode_png


def pixels(*shape, high=256):
    return np.random.default_rng(0).integers(0, high, shape, np.uint8)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (33, 50)])
@pytest.mark.parametrize(("channels", "mode"), [(None, "L"), (3, "RGB"), (4, "RGBA")])
def test_pillow_reads_the_same_pixels(shape, channels, mode):
    image = pixels(*shape, *([] if channels is None else [channels]))
    read = Image.open(io.BytesIO(encode_png(image)))
    assert (read.format, read.mode) == ("PNG", mode)
    read.load()
    np.testing.assert_array_equal(np.asarray(read), image)


@pytest.mark.parametrize("colors", [1, 2, 16, 17, 256])
def test_indices_and_palette_are_kept(colors):
    palette = [(i, 255 - i, i // 2) for i in range(colors)]
    label = pixels(20, 31, high=colors)
    read = Image.open(io.BytesIO(encode_png(label, palette)))
    assert read.mode == "P"
    np.testing.assert_array_equal(np.asarray(read), label)
    np.testing.assert_array_equal(np.asarray(read.convert("RGB")), np.array(palette)[label])


def test_views_are_written_as_they_look():
    image = pixels(40, 60, 3)
    for view in (image[::2, 5:], image.transpose(1, 0, 2), image[..., ::-1]):
        np.testing.assert_array_equal(
            np.asarray(Image.open(io.BytesIO(encode_png(view)))), view)


def test_long_pictures_are_written_in_several_chunks(monkeypatch):
    monkeypatch.setattr(png, "_CHUNK", 100)
    image = pixels(20, 31, 3)
    written = encode_png(image)
    assert written.count(b"IDAT") > 10
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(written))), image)


def test_smooth_pictures_and_labels_shrink():
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (256, 256, 3))
    assert len(encode_png(ramp)) < ramp.size / 50
    label = np.kron(pixels(4, 4, high=6), np.ones((64, 64), np.uint8))
    assert len(encode_png(label, [(0, 0, 0)] * 6)) < label.size / 20


@pytest.mark.parametrize(
    ("image", "palette", "message"),
    [
        (np.zeros((2, 2), np.int64), None, r"pixels: expected uint8 .*, found int64 \[2, 2\]"),
        (np.zeros((2, 0), np.uint8), None, r"at least one pixel, found uint8 \[2, 0\]"),
        (np.zeros((2, 2, 2), np.uint8), None, "pixels: expected 3 or 4 channels, found 2"),
        (np.zeros((2, 2, 3), np.uint8), [(0, 0, 0)], r"palette: .* for \[H, W\], found 1 for"),
        (np.zeros((2, 2), np.uint8), [(0, 0, 0)] * 257, "palette: expected 1 to 256 colours"),
        (np.full((2, 2), 3, np.uint8), [(0, 0, 0)] * 3, "indices below 3, .*, found 3"),
    ],
)
def test_bad_arguments_are_named(image, palette, message):
    with pytest.raises(ValueError, match=message):
        encode_png(image, palette)
