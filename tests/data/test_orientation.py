"""Pictures that a viewer would turn are taken as they are stored, and the user is told."""

from __future__ import annotations

import numpy as np
import pytest
import rasterio
from PIL import ExifTags, Image
from toy_data import two_classes, write_raw

from co2s_fast.data import check_dataset, prepare_dataset, split_dataset
from co2s_fast.data.files import load_image
from co2s_fast.data.integrity import header_size
from co2s_fast.errors import DataError

TAGS = range(1, 9)


def turn(path, tag, size=None):
    """Write the EXIF orientation into a picture, or another picture in its place."""
    picture = Image.open(path)
    picture.load()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = tag
    (picture if size is None else Image.new("RGB", size)).save(path, exif=exif)


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_a_tiff_has_the_pixels_that_gdal_reads(tmp_path, tag, compression):
    pixels = np.random.default_rng(tag).integers(0, 256, (5, 9, 3), np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = tag
    path = tmp_path / "a.tif"
    Image.fromarray(pixels).save(path, exif=exif, compression=compression)
    with rasterio.open(path) as source:
        assert (source.read().transpose(1, 2, 0) == pixels).all()
    assert header_size(path) == (9, 5)
    np.testing.assert_array_equal(load_image(path), pixels)


@pytest.mark.parametrize("tag", TAGS)
def test_prepare_and_check_tell_of_turned_pictures_with_labels(tmp_path, tag):
    raw = write_raw(tmp_path / "raw", ["a/1", "b/1", "c/1", "d/1"], without_mask=("d/1",))
    before = np.asarray(Image.open(raw / "a/images/1.png"))
    for scene in "ad":
        turn(raw / f"{scene}/images/1.png", tag)
    spec = two_classes(tile={}, val=["c/*"])
    found = prepare_dataset(spec, raw, tmp_path / "out", progress=False)
    notes = [note for note in found.notes if "EXIF orientation" in note]
    assert len(notes) == (tag != 1)
    assert all("1 labelled images" in note and "a/images/1.png" in note for note in notes)
    (image,) = (tmp_path / "out/images").glob("a*")
    np.testing.assert_array_equal(load_image(image), before)
    turn(image, tag)  # as in a folder prepared by hand
    split_dataset(tmp_path / "out", labels=1, progress=False)
    warned = [w for w in check_dataset(tmp_path / "out", progress=False).warnings
              if "EXIF orientation" in w]
    assert len(warned) == (tag != 1) and all(str(image) in each for each in warned)


def test_a_mask_over_what_a_viewer_shows_is_refused_with_the_reason(tmp_path):
    raw = write_raw(tmp_path / "raw", ["a/1", "b/1"])
    turn(raw / "a/images/1.png", 6, size=(64, 96))
    with pytest.raises(DataError, match=r"96 x 64 pixels, .* 64 x 96; its EXIF orientation"):
        prepare_dataset(two_classes(), raw, tmp_path / "out", progress=False)
