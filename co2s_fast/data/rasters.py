"""Reading raster files through rasterio, by windows: which bands, and where they have no data.

A band has no data where the file's mask, its nodata value or its alpha band says so, where it
equals `raster.nodata` of the description, and where it is NaN or infinite. A pixel has none where
none of the chosen bands has. A file of any size is read in pieces, so memory does not grow with it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from co2s_fast.data.imagery import DTYPES, Imagery
from co2s_fast.data.png import png_bits
from co2s_fast.errors import DataError

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif")
GDAL_CACHE_MB = 256  # of raster blocks; GDAL's own default is a share of the machine's memory
CHOSEN = "CO2S_FAST_BANDS"
"""Tag of a tile: the bands of its source that it holds, in order. It is read as it is."""


def is_picture(path: Path) -> bool:
    """Whether Pillow reads the file as a whole; all others go through rasterio."""
    return path.suffix.lower() in PICTURES


def is_byte_picture(path: Path) -> bool:
    """Whether it is a picture of at most 8 bits a channel: of 16, Pillow keeps the upper ones."""
    return is_picture(path) and png_bits(path) <= 8


class Raster:
    """An open raster and the bands of it that are the dataset's channels.

    Args:
        path: of the file.
        source: the open rasterio dataset.
        spec: the dataset.

    Raises:
        DataError: fewer bands than the dataset takes, or numbers of another type.
    """

    def __init__(self, path: Path, source: Any, spec: Imagery) -> None:
        from rasterio.enums import ColorInterp, MaskFlags

        self.path, self.source = path, source
        self.width, self.height = source.width, source.height
        self.crs, self.transform = source.crs, source.transform
        colors = [i for i, kind in enumerate(source.colorinterp, 1) if kind != ColorInterp.alpha]
        self.palette = _palette(source) if len(colors) == 1 and spec.bands is None else None
        self.bands = _chosen(path, source, spec, colors)
        self.dtype = _dtype(path, source, self.bands)
        marks = [source.nodatavals[band - 1] for band in self.bands]
        self._marks = [_representable((mark, spec.raster.nodata), self.dtype) for mark in marks]
        self.has_one_nodata = all(marks == self._marks[0] for marks in self._marks)
        self.nodata = next((mark.item() for marks in self._marks for mark in marks), None)
        all_flags = source.mask_flag_enums
        flags = [set(all_flags[band - 1]) for band in self.bands]
        # Writers call a fourth band of 8 bits alpha, whatever it is; one that is chosen is data.
        self.false_alpha = next((band for band in self.bands if band not in colors
                                 and any(MaskFlags.alpha in each for each in flags)), None)
        self.alpha = unheeded_alpha(source, self.bands)
        not_masks = {MaskFlags.all_valid, *([MaskFlags.alpha] if self.false_alpha else [])}
        self._masked = any(not each & not_masks for each in flags)

    @property
    def marked_by_us(self) -> bool:
        """The description calls a number no data which the file does not."""
        return any(len(set(marks)) > (self.source.nodatavals[band - 1] in marks)
                   for band, marks in zip(self.bands, self._marks, strict=True))

    @property
    def is_complete(self) -> bool:
        """Nothing in the file's header says that data may be missing."""
        return (not self._masked and self.alpha is None and not any(self._marks)
                and self.dtype != "float32")

    def read(self, row: int, column: int, height: int, width: int
             ) -> tuple[NDArray, NDArray[np.bool_] | None]:
        """Pixels of a window in the file's number type, and where each band has data.

        Args:
            row: first row.
            column: first column.
            height: rows; the window must lie inside.
            width: columns.

        Returns:
            [C, height, width], and bool of the same shape or None where all of it has data.

        Raises:
            DataError: the file is damaged.
        """
        from rasterio.windows import Window

        window = Window(column, row, width, height)
        with reading(self.path):
            values = read_bands(self.source, self.bands, window)
            masks = self.masks(window)
        valid = None if self.is_complete else self.check(values, masks)
        if self.palette is not None:
            values = self.palette[values[0]].transpose(2, 0, 1)
        return values, valid

    def masks(self, window: Any, shape: tuple[int, int] | None = None) -> NDArray[np.bool_] | None:
        """Where the file's nodata value, mask or alpha band says that there is data, [C, h, w].

        Args:
            window: of rasterio.
            shape: (rows, columns) wanted, the nearest pixel for each; None: the window's own.

        Returns:
            None where the file says nothing.
        """
        found = None
        if self._masked:
            size = None if shape is None else (len(self.bands), *shape)
            found = self.source.read_masks(self.bands, window=window, out_shape=size) != 0
        if self.alpha is None:
            return found
        seen = self.source.read(self.alpha, window=window, out_shape=shape) != 0
        return np.repeat(seen[None], len(self.bands), 0) if found is None else found & seen

    def check(self, values: NDArray, masks: NDArray[np.bool_] | None) -> NDArray[np.bool_] | None:
        """Where each band has data, [C, h, w], `masks` being the file's; None: everywhere."""
        valid = np.ones(values.shape, bool) if masks is None else masks
        for band, marks in enumerate(self._marks):
            for mark in marks:
                valid[band] &= values[band] != mark
        if values.dtype.kind == "f":
            valid &= np.isfinite(values)
        if values.dtype == np.uint8:  # a number of no data is a colour, too: one band's is data
            valid[:] = valid.any(0)
        return None if valid.all() else valid


def unheeded_alpha(source: Any, bands: Sequence[int]) -> int | None:
    """The alpha band beside these bands, where GDAL does not take it for their mask.

    It does so for the last one of 2 or 4 bands of 8 or 16 bits, in files that have no nodata value.
    """
    from rasterio.enums import ColorInterp, MaskFlags

    flags = source.mask_flag_enums
    if any(MaskFlags.alpha in flags[band - 1] for band in bands):
        return None
    return next((band for band, kind in enumerate(source.colorinterp, 1)
                 if kind == ColorInterp.alpha and band not in bands), None)


def read_bands(source: Any, bands: list[int], window: Any) -> NDArray:
    """Bands [C, h, w] of a window; 8-bit colours lie in memory pixel by pixel, as pictures do."""
    if len(bands) != 3 or any(source.dtypes[band - 1] != "uint8" for band in bands):
        return source.read(bands, window=window)
    pixels = np.empty((window.height, window.width, 3), np.uint8)
    return source.read(bands, window=window, out=pixels.transpose(2, 0, 1))


@contextmanager
def open_raster(path: Path, spec: Imagery) -> Iterator[Raster]:
    """The raster, closed at the end of the block. See `Raster` for errors."""
    with open_source(path) as source:
        yield Raster(path, source, spec)


@contextmanager
def open_source(path: Path) -> Iterator[Any]:
    """The rasterio dataset; a DataError names a file that is missing or no raster."""
    import rasterio
    from rasterio.errors import RasterioError

    if not path.is_file():
        raise DataError(f"{path}: missing file")
    # No overviews (GDAL 3.9 and newer): whether there are any, and how made, changes no image.
    # OVERVIEW_LEVEL=NONE would leave those of masks and of a VRT's sources.
    with rasterio.Env(GDAL_CACHEMAX=GDAL_CACHE_MB, GDAL_TIFF_INTERNAL_MASK=True,
                      GDAL_OVERVIEW_OVERSAMPLING_THRESHOLD=0):
        try:
            with quiet():
                source = rasterio.open(path)
        except RasterioError as error:
            reason = " ".join(str(error).split()).replace(f"'{path}' ", "")
            raise DataError(f"{path}: damaged or not an image ({reason})") from error
        with source:
            yield source


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an error of GDAL into a DataError that names the file."""
    from rasterio.errors import RasterioError

    try:
        yield
    except RasterioError as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise DataError(f"{path}: damaged ({reason})") from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what GDAL says of a file that cannot be written into a DataError that names it."""
    from rasterio._err import CPLE_BaseError  # copying raises GDAL's errors as they are
    from rasterio.errors import RasterioError

    try:
        yield
    except (RasterioError, CPLE_BaseError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise DataError(f"{path}: cannot be written: {reason} (is the disk full?)") from error


@contextmanager
def quiet() -> Iterator[None]:
    """A TIFF without georeference is fine, or with nodata and alpha; rasterio warns about each.

    The filters stay: `warnings.catch_warnings` cannot be used by several threads.
    """
    from rasterio.errors import NodataShadowWarning, NotGeoreferencedWarning

    for kind in (NotGeoreferencedWarning, NodataShadowWarning):
        if not any(each[2] is kind for each in warnings.filters):
            warnings.simplefilter("ignore", kind)
    yield


def placed(transform: Any, row: int = 0, column: int = 0, down: float = 1, across: float = 1
           ) -> Any:
    """The transform of a grid that begins at a pixel and has pixels of `down` x `across`."""
    from affine import Affine

    a, b, c, d, e, f = transform[:6]
    return Affine(a * across, b * down, a * column + b * row + c,
                  d * across, e * down, d * column + e * row + f)


def ground(transform: Any, row: int, column: int, height: int, width: int
           ) -> tuple[float, float, float, float]:
    """(left, bottom, right, top) of a window in the raster's coordinates."""
    a, b, c, d, e, f = transform[:6]
    corners = [(a * x + b * y + c, d * x + e * y + f)
               for x in (column, column + width) for y in (row, row + height)]
    xs, ys = zip(*corners, strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def _representable(marks: Sequence[float | None], dtype: str) -> list[Any]:
    """Nodata values as numbers of a type; those that the type cannot have never occur.

    Neither are NaN and infinite ones among them, which are no data as they are.
    """
    kind = np.dtype(dtype)
    numbers = [mark for mark in marks if mark is not None and np.isfinite(mark)]
    if kind.kind == "f":
        return [kind.type(mark) for mark in numbers]
    limits = np.iinfo(kind)
    return [kind.type(mark) for mark in numbers
            if mark == int(mark) and limits.min <= mark <= limits.max]


def _chosen(path: Path, source: Any, spec: Imagery, colors: Sequence[int]) -> list[int]:
    """The bands of a file, counted from 1, that are the dataset's channels."""
    count, made_from = source.count, source.tags().get(CHOSEN)
    if made_from is not None:
        if count < spec.channels:
            raise DataError(f"{path}: a tile of {count} bands ({made_from}), the dataset takes "
                            f"{spec.channels}")
        return list(range(1, spec.channels + 1))
    if spec.bands is not None:
        if max(spec.bands) > count:
            raise DataError(f"{path}: has {count} bands, expected at least {max(spec.bands)} for "
                            f"bands {', '.join(map(str, spec.bands))}")
        return list(spec.bands)
    if len(colors) == 1:
        return list(colors) * 3
    if len(colors) < 3:
        raise DataError(f"{path}: has {len(colors)} bands, expected 1 or at least 3; `bands` says "
                        "which to take")
    return list(colors[:3])


def _dtype(path: Path, source: Any, bands: Sequence[int]) -> str:
    kinds = {source.dtypes[band - 1] for band in bands}
    if len(kinds) > 1 or not kinds <= set(DTYPES):
        raise DataError(f"{path}: bands of {', '.join(sorted(kinds))}, expected one of "
                        f"{', '.join(DTYPES)} for all")
    return kinds.pop()


def _palette(source: Any) -> NDArray[np.uint8] | None:
    """Colours [256, 3] of a paletted raster."""
    from rasterio.enums import ColorInterp

    if source.colorinterp[0] != ColorInterp.palette or source.dtypes[0] != "uint8":
        return None
    table = np.zeros((256, 3), np.uint8)
    for value, color in source.colormap(1).items():
        table[value] = color[:3]
    return table
