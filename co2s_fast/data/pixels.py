"""One prepared image as training and evaluation read it: its crops and its whole, stretched.

8-bit colour and grey pass through Pillow, transparent pixels being no data. Images of a dataset
with band statistics pass through rasterio, which reads the part that a crop shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from co2s_fast.data.catalogue import IGNORE, DatasetSpec
from co2s_fast.data.draws import Geometry
from co2s_fast.data.files import load_picture
from co2s_fast.data.rasters import Raster, open_raster
from co2s_fast.data.raw import covering
from co2s_fast.data.stretching import check_type, stretched
from co2s_fast.data.transforms import (
    crop_image,
    crop_label,
    enlarges,
    nearest_pixels,
    oriented,
    padding_map,
    resampled,
    source_box,
)


class Crop(NamedTuple):
    """Pixels, uint8 or float32 in [0, 1] [C, crop, crop]; 255 at padding and no data, else 0."""

    pixels: NDArray
    ignore: NDArray[np.uint8]


class Pixels(Protocol):
    """An image of a split."""

    height: int
    width: int

    def crop(self, geometry: Geometry, antialias: bool) -> Crop:
        """A crop by its geometry; see `transforms.crop_image`."""

    def whole(self) -> tuple[NDArray, NDArray[np.bool_] | None]:
        """All pixels [C, H, W], and where no band has data, bool [H, W]; None: nowhere."""

    def seen_of(self, label: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A label [H, W], 255 where it is known without reading that the image has no data."""


def open_pixels(path: Path, spec: DatasetSpec) -> Pixels:
    """The image of a file.

    Raises:
        DataError: missing, damaged, or of other bands or numbers than the dataset's.
    """
    return PicturePixels(path) if spec.statistics is None else RasterPixels(path, spec)


def seen_of(label: NDArray[np.uint8], hidden: NDArray[np.bool_] | None) -> NDArray[np.uint8]:
    """A label [H, W] with 255 where its image is `hidden`; None: nowhere."""
    return label if hidden is None else np.where(hidden, np.uint8(IGNORE), label)


class PicturePixels:
    """8-bit colour or grey."""

    def __init__(self, path: Path) -> None:
        self._image, self._transparent = load_picture(path)
        self.height, self.width = self._image.height, self._image.width

    def crop(self, geometry: Geometry, antialias: bool) -> Crop:
        """See `Pixels`."""
        crop = crop_image(self._image, geometry, antialias)
        if self._transparent is None:
            return Crop(crop, padding_map(geometry))
        nothing = np.where(self._transparent, np.uint8(IGNORE), np.uint8(0))
        return Crop(crop, crop_label(nothing, geometry))

    def whole(self) -> tuple[NDArray, NDArray[np.bool_] | None]:
        """See `Pixels`."""
        pixels = np.asarray(self._image).transpose(2, 0, 1)
        return np.ascontiguousarray(pixels), self._transparent

    def seen_of(self, label: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """See `Pixels`."""
        return seen_of(label, self._transparent)


class RasterPixels:
    """Any number of bands, stretched. Missing pixels are 0 and lend that to their neighbours."""

    def __init__(self, path: Path, spec: DatasetSpec) -> None:
        self.path, self.spec = path, spec
        with open_raster(path, spec) as raster:
            check_type(raster.dtype, spec, path)
            self.height, self.width = raster.height, raster.width

    def crop(self, geometry: Geometry, antialias: bool) -> Crop:
        """See `Pixels`."""
        size, box = source_box((self.width, self.height), geometry)
        across, down = (box[2] - box[0]) / size[0], (box[3] - box[1]) / size[1]
        left, top, right, bottom = covering(box, max(across, 1), max(down, 1), self.width,
                                            self.height)
        pixels, missing = self._read(top, left, bottom - top, right - left)
        inner = (box[0] - left, box[1] - top, box[2] - left, box[3] - top)
        smooth = antialias or enlarges((self.width, self.height), geometry)
        planes = [np.asarray(resampled(Image.fromarray(p), size, inner, smooth)) for p in pixels]
        crop = np.zeros((len(planes), geometry.crop, geometry.crop), pixels.dtype)
        crop[:, : size[1], : size[0]] = planes
        ignore = np.full((geometry.crop, geometry.crop), IGNORE, np.uint8)
        ignore[: size[1], : size[0]] = 0
        if missing is not None:
            rows = nearest_pixels(self.height, geometry.height, geometry.top, size[1]) - top
            columns = nearest_pixels(self.width, geometry.width, geometry.left, size[0]) - left
            ignore[: size[1], : size[0]][missing[rows][:, columns]] = IGNORE
        return Crop(oriented(crop, geometry), oriented(ignore, geometry))

    def whole(self) -> tuple[NDArray, NDArray[np.bool_] | None]:
        """See `Pixels`."""
        return self._read(0, 0, self.height, self.width)

    def seen_of(self, label: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """See `Pixels`; `data prepare` has seen to it."""
        return label

    def _read(self, row: int, column: int, height: int, width: int
              ) -> tuple[NDArray, NDArray[np.bool_] | None]:
        with open_raster(self.path, self.spec) as raster:
            return read_stretched(raster, self.spec, row, column, height, width)


def read_stretched(raster: Raster, spec: DatasetSpec, row: int, column: int, height: int,
                   width: int) -> tuple[NDArray, NDArray[np.bool_] | None]:
    """A window of a raster as students take it, and where no band has data (None: nowhere)."""
    values, valid = raster.read(row, column, height, width)
    missing = None if valid is None else ~valid.any(0)
    pixels = stretched(values, valid, spec.statistics)
    return pixels, missing if missing is not None and missing.any() else None


def resized_planes(pixels: NDArray, size: tuple[int, int]) -> NDArray:
    """[C, H, W] at (height, width), bilinear without antialias, as `validation.resize_plain`."""
    height, width = size
    box = (0.0, 0.0, float(pixels.shape[2]), float(pixels.shape[1]))
    return np.stack([np.asarray(resampled(Image.fromarray(np.ascontiguousarray(plane)),
                                          (width, height), box, False)) for plane in pixels])
