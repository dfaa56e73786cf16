"""Images to predict on and maps to write, read and written by rectangles.

PNG and JPEG are held in memory; a GeoTIFF (VRT, JPEG 2000, ...) of any size passes through window
by window, and its map is a cloud-optimised GeoTIFF that keeps its coordinate system, transform (or
ground control points, or rational polynomials) and nodata. Every map carries the signature of what
made it, so that finished ones are recognised.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from co2s_fast.data import rasters
from co2s_fast.data.catalogue import IGNORE
from co2s_fast.data.files import load_picture, open_image
from co2s_fast.data.imagery import Imagery, PlainImages
from co2s_fast.data.stretching import as_bytes, check_type, stretched
from co2s_fast.data.validation import resize_plain
from co2s_fast.data.writing import gdal_sidecar, remove_leftovers, replacing, temporary_for
from co2s_fast.engine.panels import indexed
from co2s_fast.engine.sliding_window import Window
from co2s_fast.errors import DataError

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
RASTERS = (".tif", ".tiff", ".jp2", ".img")
VIRTUAL = (".vrt",)  # other rasters put together, which may lie in the same folder
BLOCK = 256
_BEGINNINGS = (b"\x89PNG", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # PNG, TIFF, BigTIFF
SIGNATURE = "CO2S_FAST"
PLAIN = PlainImages()


class Scene(Protocol):
    """An open image."""

    path: Path
    height: int
    width: int

    def read(self, window: Window) -> NDArray:
        """Pixels [C, h, w] of a window, cut at the border: uint8, or float32 in [0, 1]."""

    def colours(self, window: Window) -> NDArray[np.uint8]:
        """The same as a picture [3, h, w]."""

    def valid(self, window: Window) -> NDArray[np.bool_] | None:
        """Where the window has data, bool [h, w]; None where all of it has."""

    def create(
        self,
        path: Path,
        bands: int,
        palette: Sequence[tuple[int, int, int]] | None = None,
        signature: str = "",
    ) -> Any:
        """A context manager whose value writes `(first row, first column, uint8 [bands, h, w])`."""


def is_raster(path: Path) -> bool:
    """Whether the file goes through rasterio."""
    return path.suffix.lower() in RASTERS + VIRTUAL


def size_of(path: Path, spec: Imagery = PLAIN) -> tuple[int, int]:
    """(height, width) from the header.

    Raises:
        DataError: the file is missing, no image, or not of the dataset's bands and number type.
    """
    if is_raster(path):
        with _open_raster(path, spec) as scene:
            return scene.height, scene.width
    if spec.channels != 3 or not (spec.statistics is None or spec.statistics.as_bytes):
        kind = "uint8" if spec.statistics is None else spec.statistics.dtype
        raise DataError(f"{path}: a picture of 8-bit colour; the run takes rasters of "
                        f"{spec.channels} bands of {kind}")
    if not path.is_file():
        raise DataError(f"{path}: missing file")
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (OSError, SyntaxError, ValueError):
        open_image(path)  # says in one line what is wrong
        raise


@contextmanager
def open_scene(path: Path, scale: float = 1.0, spec: Imagery = PLAIN) -> Iterator[Scene]:
    """The image, closed at the end of the block.

    Args:
        path: a picture or a GeoTIFF.
        scale: factor on a GeoTIFF's size: it is read, and its map written, on a grid that much
            finer or coarser over the same ground. Pictures keep their size here.
        spec: the run's dataset: bands, number type and stretch of rasters.
    """
    if is_raster(path):
        with _open_raster(path, spec, scale) as scene:
            yield scene
    else:
        yield Picture(path)


class Picture:
    """A PNG or JPEG; maps become PNGs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._image, self._transparent = load_picture(path)
        self._pixels = np.asarray(self._image).transpose(2, 0, 1)
        self.height, self.width = self._pixels.shape[1:]

    def resized(self, height: int, width: int) -> NDArray[np.uint8]:
        """The whole picture [3, height, width], resized as validation images are."""
        return np.asarray(resize_plain(self._image, (height, width))).transpose(2, 0, 1)

    def read(self, window: Window) -> NDArray[np.uint8]:
        """See `Scene`."""
        y, x = window.y, window.x
        return self._pixels[:, y : y + window.height, x : x + window.width]

    colours = read

    def valid(self, window: Window) -> NDArray[np.bool_] | None:
        """Every pixel of a picture is data but those that are transparent."""
        if self._transparent is None:
            return None
        y, x = window.y, window.x
        found = ~self._transparent[y : y + window.height, x : x + window.width]
        return None if found.all() else found

    @contextmanager
    def create(
        self,
        path: Path,
        bands: int,
        palette: Sequence[tuple[int, int, int]] | None = None,
        signature: str = "",
    ) -> Iterator[Any]:
        """See `Scene`."""
        canvas = np.zeros((self.height, self.width, bands), np.uint8)

        def write(top: int, left: int, part: NDArray[np.uint8]) -> None:
            rows, columns = part.shape[1:]
            canvas[top : top + rows, left : left + columns] = part.transpose(1, 2, 0)

        yield write
        flat = canvas[..., 0] if bands == 1 else canvas
        image = Image.fromarray(flat) if palette is None else indexed(flat, palette, (0, 0, 0))
        info = PngImagePlugin.PngInfo()
        info.add_text(SIGNATURE, signature)
        remove_leftovers(path)
        with replacing(path) as temporary:
            image.save(temporary, format="PNG", pnginfo=info)


class Raster:
    """An open rasterio dataset; maps become cloud-optimised GeoTIFFs on the same grid."""

    def __init__(self, path: Path, source: Any, spec: Imagery, scale: float = 1.0) -> None:
        from rasterio.enums import Resampling

        self.path, self._source, self._spec = path, source, spec
        self._raster = rasters.Raster(path, source, spec)
        check_type(self._raster.dtype, spec, path)
        self.height = max(round(source.height * scale), 1)
        self.width = max(round(source.width * scale), 1)
        self._down, self._across = source.height / self.height, source.width / self.width
        self._resampling = Resampling.average if scale < 1 else Resampling.bilinear
        # Numbers of colours cannot be averaged, nor those that GDAL does not know to be no data.
        if self._raster.palette is not None or self._raster.marked_by_us:
            self._resampling = Resampling.nearest

    def read(self, window: Window) -> NDArray:
        """See `Scene`."""
        values, valid = self._values(window)
        return stretched(values, valid, self._spec.statistics)

    def colours(self, window: Window) -> NDArray[np.uint8]:
        """See `Scene`."""
        return as_bytes(self.read(window))[list(self._spec.display_channels)]

    def valid(self, window: Window) -> NDArray[np.bool_] | None:
        """From the nodata value, the mask band, the alpha band, or NaN: where any band has data."""
        if self._raster.is_complete:
            return None
        _, valid = self._values(window)
        if valid is None:
            return None
        found = valid.any(0)
        return None if found.all() else found

    def _values(self, window: Window) -> tuple[NDArray, NDArray[np.bool_] | None]:
        """Numbers of the chosen bands on this scene's grid, and where each has data."""
        from rasterio.enums import Resampling

        box, shape = self._box(window)
        raster, shape = self._raster, (len(self._raster.bands), *shape)
        plain = shape[1:] == (box.height, box.width)
        with rasters.reading(self.path):
            values = self._source.read(raster.bands, window=box, out_shape=shape,
                                       resampling=self._resampling)
            masks = raster.masks(box, shape[1:])
            # A mean of numbers says no longer which were missing: the nearest one does.
            alone = plain or (raster.is_complete and raster.false_alpha is None)
            nearest = values if alone else self._source.read(
                raster.bands, window=box, out_shape=shape, resampling=Resampling.nearest)
            if nearest is not values:
                values = self._unblended(values, nearest, box)
        valid = raster.check(nearest, masks)
        if nearest is not values and values.dtype.kind == "f":  # a mean of NaN and a number
            known = np.isfinite(values)
            valid = known if valid is None else valid & known
        if raster.palette is not None:
            values = raster.palette[values[0]].transpose(2, 0, 1)
        return values, valid

    def _unblended(self, values: NDArray, nearest: NDArray, box: Any) -> NDArray:
        """Means, the nearest number in the place of those that GDAL takes of the wrong pixels.

        It leaves out those whose alpha is 0 although that is data, and takes those in whose alpha
        it does not heed.
        """
        from rasterio.enums import Resampling

        raster = self._raster
        if raster.false_alpha is not None:
            hidden = nearest[raster.bands.index(raster.false_alpha)] == 0
            values = np.where(hidden, nearest, values)
        if raster.alpha is not None:
            mean, one = (self._source.read(raster.alpha, window=box, out_shape=values.shape[1:],
                                           resampling=kind)
                         for kind in (self._resampling, Resampling.nearest))
            values = np.where(mean != one, nearest, values)
        return values

    @contextmanager
    def create(
        self,
        path: Path,
        bands: int,
        palette: Sequence[tuple[int, int, int]] | None = None,
        signature: str = "",
    ) -> Iterator[Any]:
        """See `Scene`. A COG cannot be written in pieces: a plain GeoTIFF beside it comes first."""
        import rasterio
        import rasterio.shutil
        from affine import Affine
        from rasterio.windows import Window as Box

        source, (a, b, c, d, e, f) = self._source, self._source.transform[:6]
        across, down = self._across, self._down
        transform = Affine(a * across, b * down, c, d * across, e * down, f)
        profile = {
            "driver": "GTiff", "dtype": "uint8", "count": bands, "height": self.height,
            "width": self.width, "crs": source.crs, "transform": transform,
            "tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK, "compress": "deflate",
            "BIGTIFF": "IF_SAFER", "nodata": IGNORE if palette is not None else None,
        }  # fmt: skip
        optimised = {
            "driver": "COG", "COMPRESS": "DEFLATE", "BIGTIFF": "IF_SAFER",
            "OVERVIEW_RESAMPLING": "AVERAGE" if palette is None else "NEAREST",
        }  # fmt: skip
        remove_leftovers(path)
        with replacing(path) as temporary, _scratch(path) as parts, rasters.writing(path):
            with rasters.quiet(), rasterio.open(parts, "w", **profile) as target:
                points, points_crs = source.gcps
                if points:
                    target.gcps = ([self._moved(point) for point in points], points_crs)
                if polynomials := source.tags(ns="RPC"):
                    target.update_tags(ns="RPC", **self._moved_polynomials(polynomials))
                if palette is not None:
                    target.write_colormap(1, {k: (*rgb, 255) for k, rgb in enumerate(palette)})
                target.update_tags(**{SIGNATURE: signature})

                def write(top: int, left: int, part: NDArray[np.uint8]) -> None:
                    target.write(part, window=Box(left, top, part.shape[2], part.shape[1]))

                yield write
            with rasters.quiet():
                rasterio.shutil.copy(parts, temporary, **optimised)

    def _box(self, window: Window) -> tuple[Any, tuple[int, int]]:
        """The part of the source that a window shows, and the window's shape cut at the border."""
        from rasterio.windows import Window as Box

        height = min(window.height, self.height - window.y)
        width = min(window.width, self.width - window.x)
        box = Box(window.x * self._across, window.y * self._down,
                  width * self._across, height * self._down)  # fmt: skip
        return box, (height, width)

    def _moved(self, point: Any) -> Any:
        """A ground control point on this scene's grid."""
        from rasterio.control import GroundControlPoint

        return GroundControlPoint(
            point.row / self._down, point.col / self._across, point.x, point.y, point.z
        )

    def _moved_polynomials(self, tags: dict[str, str]) -> dict[str, str]:
        """Rational polynomial coefficients on this scene's grid; 0 is the centre of a pixel."""
        moved = dict(tags)
        for name, factor in (("LINE", self._down), ("SAMP", self._across)):
            if factor != 1:
                offset, scale = float(tags[f"{name}_OFF"]), float(tags[f"{name}_SCALE"])
                moved[f"{name}_OFF"] = str((offset + 0.5) / factor - 0.5)
                moved[f"{name}_SCALE"] = str(scale / factor)
        return moved


@contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """A hidden path beside `path` whose file is gone at the end of the block."""
    scratch = temporary_for(path, "parts")
    try:
        yield scratch
    finally:
        for each in (scratch, gdal_sidecar(scratch)):
            each.unlink(missing_ok=True)


@contextmanager
def _open_raster(path: Path, spec: Imagery, scale: float = 1.0) -> Iterator[Raster]:
    with rasters.open_source(path) as source:
        yield Raster(path, source, spec, scale)


def read_signature(path: Path) -> str | None:
    """The signature of a finished map; "" of a file of others, None of a missing or broken one.

    Broken is what is empty, or begins as a map does and cannot be opened.
    """
    import rasterio
    from rasterio.errors import RasterioError

    if not path.is_file():
        return None
    with path.open("rb") as file:
        head = file.read(4)
    if head and not head.startswith(_BEGINNINGS):
        return ""
    try:
        if is_raster(path):
            with rasters.quiet(), rasterio.open(path) as found:
                return found.tags().get(SIGNATURE, "")
        with Image.open(path) as image:
            return image.info.get(SIGNATURE, "")
    except (RasterioError, OSError, SyntaxError, ValueError):
        return None
