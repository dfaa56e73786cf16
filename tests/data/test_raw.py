"""Raw rasters and masks: the ground they share, numbers without a class, rounding."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from rasterio.transform import from_origin
from toy_rasters import NORTH, PIXEL, WEST, raster_spec, scene, write_tif

from co2s_fast.data import prepare_dataset
from co2s_fast.data.raw import as_type
from co2s_fast.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")


def prepare(folder, **mask_profile):
    """Scenes a and v, class 0 in the left half and 1 in the right, with masks written so."""
    mask = np.zeros((1, 32, 32), np.uint8)
    mask[:, :, 16:] = 1
    for number, name in enumerate("av"):
        write_tif(folder / f"raw/images/{name}.tif", scene(3, 32, 32, "uint8", number))
        write_tif(folder / f"raw/masks/{name}.tif", mask, **mask_profile)
    return prepare_dataset(raster_spec(), folder / "raw", folder / "out", progress=False)


def test_a_mask_of_other_pixels_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"masks/a\.tif: lies 32\.0 pixels off its image"):
        prepare(tmp_path, transform=from_origin(WEST, NORTH, 2 * PIXEL, 2 * PIXEL))


@pytest.mark.parametrize("kind", ["tags", "world files"])
def test_a_mask_of_other_ground_is_refused_without_a_system(tmp_path, kind):
    own = {"transform": None} if kind == "world files" else {}
    for folder in ("images", "masks"):
        for name in "av":
            path = write_tif(tmp_path / f"raw/{folder}/{name}.tif",
                             np.zeros((1, 32, 32), np.uint8), crs=None,
                             **own, west=WEST + 500 * (folder == "masks"))
            if own:
                world_file(path.with_suffix(".tfw"), 500 * (folder == "masks"))
    with pytest.raises(DataError, match=r"masks/a\.tif: lies 50\.0 pixels off its image"):
        prepare_dataset(raster_spec(), tmp_path / "raw", tmp_path / "out", progress=False)


@pytest.mark.parametrize("mask", ["tif", "png"])
def test_pictures_lie_where_their_world_files_say(tmp_path, mask):
    spec = raster_spec(files={"images": "images/{scene}.png", "labels": f"masks/{{scene}}.{mask}"})
    for folder, suffix in (("images", "png"), ("masks", mask)):
        for name in "av":
            path = tmp_path / f"raw/{folder}/{name}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.zeros((32, 32), np.uint8)).save(path)
    for number, east in enumerate((None, 0, 30)):  # no file says nothing
        if east is not None:
            for name in "av":
                world_file(tmp_path / f"raw/images/{name}.pgw", 0)
                world_file(tmp_path / f"raw/masks/{name}.{mask[0]}{mask[-1]}w", east)
        if east:
            with pytest.raises(DataError, match=r"masks/a\..* lies 3\.0 pixels off its image"):
                prepare_dataset(spec, tmp_path / "raw", tmp_path / f"{number}", progress=False)
        else:
            found = prepare_dataset(spec, tmp_path / "raw", tmp_path / f"{number}", progress=False)
            assert found.labeled == 2


def test_a_mask_that_lies_nowhere_is_on_its_image(tmp_path):
    assert prepare(tmp_path, crs=None, transform=None).labeled == 2


def world_file(path, east):
    """Beside a raster of the usual place, so many metres east of it."""
    path.write_text(f"{PIXEL}\n0\n0\n{-PIXEL}\n{WEST + east + PIXEL / 2}\n{NORTH - PIXEL / 2}\n")


def test_a_system_without_a_number_may_be_that_of_the_image(tmp_path):
    """Zone 40 as the image, on an ellipsoid that is given by its axes."""
    own = "+proj=utm +zone=40 +a=6378137 +b=6356752.5 +units=m +no_defs"
    assert prepare(tmp_path, crs=own).labeled == 2


def test_no_data_of_a_mask_that_is_the_number_of_a_class_is_that_class(tmp_path):
    prepare(tmp_path, nodata=0)
    label = np.asarray(Image.open(next((tmp_path / "out/labels").glob("a*"))))
    assert (label[:, :16] == 0).all() and (label[:, 16:] == 1).all()


def test_whole_numbers_are_the_nearest_within_their_range():
    found = as_type(np.array([-3, 0.6, 1.4, 70000], np.float32), np.dtype("uint16"))
    assert found.tolist() == [0, 1, 1, 65535]
