"""Images to predict on and maps to write, read and written by rectangles.

PNG and JPEG are held in memory; a GeoTIFF of any size passes through window by window, and its map
keeps its coordinate system, transform (or ground control points) and nodata.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from co2s_fast.data.catalogue import IGNORE
from co2s_fast.data.files import load_rgb, open_image, replacing
from co2s_fast.data.validation import resize_plain
from co2s_fast.engine.panels import indexed
from co2s_fast.engine.sliding_window import Window
from co2s_fast.errors import DataError

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
RASTERS = (".tif", ".tiff")
BLOCK = 256


class Scene(Protocol):
    """An open image."""

    path: Path
    height: int
    width: int

    def read(self, window: Window) -> NDArray[np.uint8]:
        """Pixels [3, h, w] of a window, cut at the border."""

    def valid(self, window: Window) -> NDArray[np.bool_] | None:
        """Where the window has data, bool [h, w]; None where all of it has."""

    def create(
        self, path: Path, bands: int, palette: Sequence[tuple[int, int, int]] | None = None
    ) -> Any:
        """A context manager whose value writes `(first row, uint8 [bands, rows, width])`."""


def is_raster(path: Path) -> bool:
    """Whether the file goes through rasterio."""
    return path.suffix.lower() in RASTERS


def size_of(path: Path) -> tuple[int, int]:
    """(height, width) from the header; a DataError names a file that is missing or no image."""
    if is_raster(path):
        with _open_raster(path) as scene:
            return scene.height, scene.width
    if not path.is_file():
        raise DataError(f"{path}: missing file")
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (OSError, SyntaxError, ValueError):
        open_image(path)  # says in one line what is wrong
        raise


@contextmanager
def open_scene(path: Path) -> Iterator[Scene]:
    """The image, closed at the end of the block."""
    if is_raster(path):
        with _open_raster(path) as scene:
            yield scene
    else:
        yield Picture(path)


class Picture:
    """A PNG or JPEG; maps become PNGs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._image = load_rgb(path)
        self._pixels = np.asarray(self._image).transpose(2, 0, 1)
        self.height, self.width = self._pixels.shape[1:]

    def resized(self, height: int, width: int) -> NDArray[np.uint8]:
        """The whole picture [3, height, width], resized as validation images are."""
        return np.asarray(resize_plain(self._image, (height, width))).transpose(2, 0, 1)

    def read(self, window: Window) -> NDArray[np.uint8]:
        """See `Scene`."""
        y, x = window.y, window.x
        return self._pixels[:, y : y + window.height, x : x + window.width]

    def valid(self, window: Window) -> None:
        """Every pixel of a picture is data."""

    @contextmanager
    def create(
        self, path: Path, bands: int, palette: Sequence[tuple[int, int, int]] | None = None
    ) -> Iterator[Any]:
        """See `Scene`."""
        canvas = np.zeros((self.height, self.width, bands), np.uint8)

        def write(top: int, rows: NDArray[np.uint8]) -> None:
            canvas[top : top + rows.shape[1]] = rows.transpose(1, 2, 0)

        yield write
        flat = canvas[..., 0] if bands == 1 else canvas
        image = Image.fromarray(flat) if palette is None else indexed(flat, palette, (0, 0, 0))
        with replacing(path) as temporary:
            image.save(temporary, format="PNG")


class Raster:
    """An open rasterio dataset; maps become tiled, compressed GeoTIFFs on the same grid."""

    def __init__(self, path: Path, source: Any) -> None:
        self.path, self._source = path, source
        self.height, self.width = source.height, source.width
        kinds = set(source.dtypes[: min(source.count, 3)])
        if kinds != {"uint8"} or source.count == 2:
            found = f"{source.count} bands of {', '.join(sorted(kinds))}"
            raise DataError(f"{path}: expected 1 or at least 3 bands of uint8, found {found}")
        self._bands = [1, 2, 3] if source.count >= 3 else [1, 1, 1]

    def read(self, window: Window) -> NDArray[np.uint8]:
        """See `Scene`."""
        return self._reading(lambda: self._source.read(self._bands, window=self._box(window)))

    def valid(self, window: Window) -> NDArray[np.bool_] | None:
        """From the nodata value, the mask band or the alpha band."""
        box = self._box(window)
        found = self._reading(lambda: self._source.dataset_mask(window=box)) != 0
        return None if found.all() else found

    @contextmanager
    def create(
        self, path: Path, bands: int, palette: Sequence[tuple[int, int, int]] | None = None
    ) -> Iterator[Any]:
        """See `Scene`."""
        import rasterio
        from rasterio.windows import Window as Box

        source = self._source
        profile = {
            "driver": "GTiff", "dtype": "uint8", "count": bands, "height": self.height,
            "width": self.width, "crs": source.crs, "transform": source.transform,
            "tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK, "compress": "deflate",
            "BIGTIFF": "IF_SAFER", "nodata": IGNORE if palette is not None else None,
        }  # fmt: skip
        with replacing(path) as temporary:
            with _quiet(), rasterio.open(temporary, "w", **profile) as target:
                points, points_crs = source.gcps
                if points:
                    target.gcps = (points, points_crs)
                if palette is not None:
                    target.write_colormap(1, {k: (*rgb, 255) for k, rgb in enumerate(palette)})

                def write(top: int, rows: NDArray[np.uint8]) -> None:
                    target.write(rows, window=Box(0, top, self.width, rows.shape[1]))

                yield write

    def _box(self, window: Window) -> Any:
        from rasterio.windows import Window as Box

        height = min(window.height, self.height - window.y)
        return Box(window.x, window.y, min(window.width, self.width - window.x), height)

    def _reading(self, read: Any) -> Any:
        from rasterio.errors import RasterioError

        try:
            return read()
        except RasterioError as error:
            reason = " ".join(str(error.__cause__ or error).split())
            raise DataError(f"{self.path}: damaged ({reason})") from error


@contextmanager
def _open_raster(path: Path) -> Iterator[Raster]:
    import rasterio
    from rasterio.errors import RasterioError

    if not path.is_file():
        raise DataError(f"{path}: missing file")
    try:
        with _quiet():
            source = rasterio.open(path)
    except RasterioError as error:
        reason = " ".join(str(error).split()).replace(f"'{path}' ", "")
        raise DataError(f"{path}: damaged or not an image ({reason})") from error
    with source:
        yield Raster(path, source)


@contextmanager
def _quiet() -> Iterator[None]:
    """A TIFF without georeference is fine; rasterio warns about each."""
    from rasterio.errors import NotGeoreferencedWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield
