"""Writing tiles: 8-bit colour as pictures, all else as GeoTIFFs in the number type they came in."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from co2s_fast.data.catalogue import DatasetSpec, TileSpec
from co2s_fast.data.files import load_rgb, save_image
from co2s_fast.data.pairing import Source
from co2s_fast.data.rasters import CHOSEN, Raster, placed, quiet
from co2s_fast.data.raw import Piece, RawImage, RawPicture, RawRaster
from co2s_fast.data.tiles import SUFFIXES
from co2s_fast.data.writing import replacing
from co2s_fast.errors import DataError

_BLOCK = 256


@dataclass(frozen=True)
class Place:
    """Where a tile lies: its corner and place in the grid, and its part inside the image."""

    y: int
    x: int
    row: int
    column: int
    height: int
    width: int


class TileWriter:
    """Writes the tiles of a dataset.

    Args:
        spec: the dataset.
        dtype: number type of GeoTIFF tiles; None: pictures.
    """

    def __init__(self, spec: DatasetSpec, dtype: str | None) -> None:
        self.spec, self.dtype = spec, dtype

    def suffix(self, source: Source, tile: TileSpec, copied: bool) -> str:
        """Ending of the image files that an image's tiles go to."""
        if self.dtype is not None:
            return ".tif"
        return source.image.suffix.lower() if copied else f".{tile.format}"

    def is_copied(self, image: RawImage, tile: TileSpec) -> bool:
        """Not a pixel changes, so the file need not be encoded anew. See `copy`."""
        if self.dtype is not None or tile.size is not None or tile.scale != 1:
            return False
        if isinstance(image, RawPicture):
            return True
        raster: Raster = image.raster
        return (raster.is_complete and raster.palette is None and self.spec.bands is None
                and raster.source.count in (1, 3) and raster.path.suffix.lower() in SUFFIXES
                and _opens(raster.path))

    def copy(self, path: Path, source: Source) -> Callable[[], None]:
        """What copies the image file when it is called, in any thread."""
        return partial(_copy, source.image, path)

    def image(self, path: Path, piece: Piece, image: RawImage, place: Place, tile: TileSpec
              ) -> Callable[[], None]:
        """What writes the image file of a tile when it is called, in any thread."""
        height, width = (tile.size or place.height), (tile.size or place.width)
        if self.dtype is None:
            return partial(save_image, path, picture(piece, height, width))
        return partial(save_raster, path, *self._raster(piece, image, place, height, width))

    def _raster(self, piece: Piece, image: RawRaster, place: Place, height: int, width: int
                ) -> tuple[NDArray, NDArray[np.bool_] | None, dict[str, Any], dict[str, str]]:
        """Bands, where there is data, profile and tags of a GeoTIFF tile."""
        raster: Raster = image.raster
        pixels, valid, tags = piece.pixels, piece.valid, {}
        if self.spec.bands is None and len(set(raster.bands)) == 1:
            pixels, valid = pixels[:1], None if valid is None else valid[:1]  # grey: kept once
        else:
            tags[CHOSEN] = ",".join(map(str, raster.bands))
        if pixels.shape[1:] != (height, width):
            pixels, valid = _padded(pixels, valid, height, width)
        nodata = raster.nodata
        if nodata is None and pixels.dtype.kind == "f":
            nodata = float("nan")
        elif not raster.has_one_nodata:  # what means no data in one band is a number of another
            nodata = None if valid is None else _unused(pixels, valid)
        profile = {"nodata": nodata}
        if raster.crs and not raster.transform.is_identity:
            profile |= {"crs": raster.crs, "transform": placed(image.transform, place.y, place.x)}
        return pixels, valid, profile, tags


def picture(piece: Piece, height: int, width: int) -> NDArray[np.uint8]:
    """Pixels [height, width, 3] of a tile; a fourth channel is alpha, 0 in padding and no data."""
    pixels = piece.pixels.transpose(1, 2, 0)
    seen = None if piece.valid is None else piece.valid.any(0)
    if pixels.shape[:2] == (height, width) and (seen is None or seen.all()):
        return np.ascontiguousarray(pixels)
    out = np.zeros((height, width, 4), np.uint8)
    inside = out[: pixels.shape[0], : pixels.shape[1]]
    inside[..., :3] = pixels
    inside[..., 3] = 255 if seen is None else np.where(seen, 255, 0)
    return out


def save_raster(path: Path, pixels: NDArray, valid: NDArray[np.bool_] | None,
                profile: dict[str, Any], tags: dict[str, str]) -> None:
    """Write a compressed GeoTIFF, atomically.

    Where a band has no data it holds the nodata value; without one, a mask says where no band has.

    Args:
        path: of the file.
        pixels: [C, H, W].
        valid: where each band has data; None: everywhere.
        profile: nodata, and crs and transform where there are any.
        tags: metadata.
    """
    import rasterio
    from rasterio.io import MemoryFile

    nodata = profile["nodata"]
    if valid is not None:
        fill = np.asarray(0 if nodata is None else nodata).astype(pixels.dtype)
        pixels = np.where(valid, pixels, fill)
    bands, height, width = pixels.shape
    profile = {
        "driver": "GTiff", "dtype": pixels.dtype.name, "count": bands, "height": height,
        "width": width, "compress": "deflate", "predictor": 3 if pixels.dtype.kind == "f" else 2,
        "zlevel": 1, "interleave": "band", "photometric": "MINISBLACK", "alpha": "NO", **profile,
    }  # fmt: skip
    if min(height, width) >= _BLOCK:
        profile |= {"tiled": True, "blockxsize": _BLOCK, "blockysize": _BLOCK}
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), quiet(), MemoryFile() as memory:
        with memory.open(**profile) as target:
            target.write(pixels)
            target.update_tags(**tags)
            if valid is not None and nodata is None and not valid.any(0).all():
                target.write_mask(valid.any(0))
        with replacing(path) as temporary:  # on a full disk rasterio would close a damaged file
            temporary.write_bytes(memory.getbuffer())


def _unused(pixels: NDArray, valid: NDArray[np.bool_]) -> int | float:
    """A number that no pixel with data has, for rasters whose bands have several of no data."""
    if pixels.dtype.kind == "f":
        return float("nan")
    limits = np.iinfo(pixels.dtype)
    used = np.unique(pixels[valid])
    return next(value for value in range(limits.max, limits.min - 1, -1) if value not in used)


def _padded(pixels: NDArray, valid: NDArray[np.bool_] | None, height: int, width: int
            ) -> tuple[NDArray, NDArray[np.bool_]]:
    """Padding has no data."""
    shape = (len(pixels), height, width)
    out, known = np.zeros(shape, pixels.dtype), np.zeros(shape, bool)
    window = np.s_[:, : pixels.shape[1], : pixels.shape[2]]
    out[window], known[window] = pixels, True if valid is None else valid
    return out, known


def _opens(path: Path) -> bool:
    """Whether training, which reads 8-bit colour through Pillow, can read a raster as it is."""
    try:
        load_rgb(path)
    except DataError:
        return False
    return True


def _copy(source: Path, path: Path) -> None:
    with replacing(path) as temporary:
        shutil.copyfile(source, temporary)
