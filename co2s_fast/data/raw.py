"""Raw images and masks as `data prepare` cuts them: by windows of the grid that tiles lie on.

Pictures are decoded once and held; rasters are read window by window, whatever their size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from co2s_fast.data.burn import PolygonMask
from co2s_fast.data.catalogue import IGNORE, UNKNOWN, DatasetSpec, TileSpec
from co2s_fast.data.files import (
    Values,
    count_values,
    decode_colors,
    decode_mask,
    decode_values,
    load_picture,
    undeclared,
)
from co2s_fast.data.orientation import orientation_of
from co2s_fast.data.pairing import Source
from co2s_fast.data.rasters import (
    Raster,
    is_byte_picture,
    is_picture,
    open_raster,
    open_source,
    placed,
    read_bands,
    reading,
    unheeded_alpha,
)
from co2s_fast.data.transforms import nearest_pixels, resampled
from co2s_fast.errors import DataError

_OFF = 0.5  # pixels by which a mask's grid may lie off its image's


@dataclass(frozen=True)
class Piece:
    """A window of a raw image.

    Args:
        pixels: [C, h, w] in the image's number type.
        valid: where each band has data, bool [C, h, w]; None: everywhere.
        label: uint8 [h, w], 255 where there is no data; None where the image has no mask.
    """

    pixels: NDArray
    valid: NDArray[np.bool_] | None
    label: NDArray[np.uint8] | None

    @property
    def empty(self) -> bool:
        """No pixel has data."""
        return self.valid is not None and not self.valid.any()


class _Mask(Protocol):
    def part(self, row: int, column: int, height: int, width: int) -> NDArray[np.uint8]:
        """Labels of a window."""

    def finish(self) -> None:
        """Raise what was found to be wrong."""


class RawImage:
    """An open raw image and its mask, on the grid of its tiles (`tile.scale` times its own)."""

    def __init__(self, width: int, height: int, scale: float) -> None:
        self.native = height, width
        self.width = max(round(width * scale), 1) if scale != 1 else width
        self.height = max(round(height * scale), 1) if scale != 1 else height
        self.mask: _Mask | None = None
        self.raster: Raster | None = None

    def part(self, row: int, column: int, height: int, width: int) -> Piece:
        """A window, which must lie inside."""
        pixels, valid = self._pixels(row, column, height, width)
        if self.mask is None:
            return Piece(pixels, valid, None)
        label = self.mask.part(row, column, height, width)
        if valid is not None:
            label = np.where(valid.any(0), label, np.uint8(IGNORE))
        return Piece(pixels, valid, label)

    def finish(self) -> None:
        """Raise a DataError where windows of the mask had undeclared values."""
        if self.mask is not None:
            self.mask.finish()

    def _pixels(self, row: int, column: int, height: int, width: int
                ) -> tuple[NDArray, NDArray[np.bool_] | None]:
        raise NotImplementedError


class RawPicture(RawImage):
    """A PNG, JPEG, ...: transparent pixels are no data."""

    def __init__(self, path: Path, scale: float) -> None:
        image, transparent = load_picture(path)
        super().__init__(image.width, image.height, scale)
        if scale != 1:
            size = self.width, self.height
            if transparent is None:
                image = image.resize(size, Image.Resampling.BILINEAR)  # antialiased when shrinking
            else:
                image, transparent = _resized_around(image, transparent, size)
        self._array, self._transparent = np.asarray(image), transparent

    def _pixels(self, row: int, column: int, height: int, width: int
                ) -> tuple[NDArray, NDArray[np.bool_] | None]:
        window = np.s_[row : row + height, column : column + width]
        pixels = self._array[window].transpose(2, 0, 1)
        if self._transparent is None or not self._transparent[window].any():
            return pixels, None
        return pixels, np.broadcast_to(~self._transparent[window], pixels.shape)


class RawRaster(RawImage):
    """A raster, read through rasterio."""

    def __init__(self, raster: Raster, scale: float) -> None:
        super().__init__(raster.width, raster.height, scale)
        self.raster = raster

    @property
    def transform(self) -> Any:
        """Of the grid of the tiles."""
        rows, columns = self.native
        return placed(self.raster.transform, 0, 0, rows / self.height, columns / self.width)

    def _pixels(self, row: int, column: int, height: int, width: int
                ) -> tuple[NDArray, NDArray[np.bool_] | None]:
        if (self.height, self.width) == self.native:
            return self.raster.read(row, column, height, width)
        return self._scaled(row, column, height, width)

    def _scaled(self, row: int, column: int, height: int, width: int
                ) -> tuple[NDArray, NDArray[np.bool_] | None]:
        """Resampled as Pillow resizes the whole image; missing pixels lend no colour to others."""
        rows, columns = self.native
        down, across = rows / self.height, columns / self.width
        box = (column * across, row * down, (column + width) * across, (row + height) * down)
        left, top, right, bottom = covering(box, max(across, 1), max(down, 1), columns, rows)
        values, valid = self.raster.read(top, left, bottom - top, right - left)
        inner = (box[0] - left, box[1] - top, box[2] - left, box[3] - top)
        size = (width, height)

        def resize(plane: NDArray) -> NDArray:
            return np.asarray(resampled(Image.fromarray(plane), size, inner, True))

        if valid is None:
            if values.dtype == np.uint8:
                return np.stack([resize(plane) for plane in values]), None
            planes = [resize(plane.astype(np.float32)) for plane in values]
            return as_type(np.stack(planes), values.dtype), None
        weights, mean = weighted(values, valid, resize)
        near = (nearest_pixels(rows, self.height, row, height) - top,
                nearest_pixels(columns, self.width, column, width) - left)
        known = valid[:, near[0]][:, :, near[1]] & (weights > 0)
        return as_type(mean, values.dtype), known


def weighted(values: NDArray, valid: NDArray[np.bool_], resize: Callable[[NDArray], NDArray]
             ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Planes resized by what has data: its share of each new pixel, and its mean there."""
    shares = np.stack([resize(known.astype(np.float32)) for known in valid])
    sums = np.stack([resize(np.where(known, plane, 0).astype(np.float32))
                     for plane, known in zip(values, valid, strict=True)])
    return shares, sums / np.maximum(shares, 1e-6)


def _resized_around(image: Image.Image, transparent: NDArray[np.bool_], size: tuple[int, int]
                    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """A picture and its transparency, which lends no colour to what is seen."""
    def resize(plane: NDArray) -> NDArray:
        return np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.BILINEAR))

    seen = np.broadcast_to(~transparent, (3, *transparent.shape))
    shares, mean = weighted(np.asarray(image).transpose(2, 0, 1), seen, resize)
    hidden = np.asarray(Image.fromarray(transparent).resize(size, Image.Resampling.NEAREST))
    return as_type(mean, np.dtype(np.uint8)).transpose(1, 2, 0), hidden | (shares[0] == 0)


def as_type(values: NDArray[np.float32], dtype: np.dtype) -> NDArray:
    """Floats rounded to a whole-number type, or as they are."""
    if dtype.kind == "f":
        return values.astype(dtype)
    limits = np.iinfo(dtype)
    return np.floor(values + 0.5).clip(limits.min, limits.max).astype(dtype)


def covering(box: tuple[float, float, float, float], across: float, down: float, columns: int,
             rows: int) -> tuple[int, int, int, int]:
    """Whole pixels (left, top, right, bottom) that a bilinear filter over a box reads."""
    x, y = int(np.ceil(across)) + 1, int(np.ceil(down)) + 1
    return (max(int(box[0]) - x, 0), max(int(box[1]) - y, 0),
            min(int(np.ceil(box[2])) + x, columns), min(int(np.ceil(box[3])) + y, rows))


class DecodedMask:
    """A mask that is a picture, decoded as a whole."""

    def __init__(self, path: Path, spec: DatasetSpec, image: RawImage, image_path: Path) -> None:
        label = decode_mask(path, spec)
        _check_size(path, label.shape, image, image_path)
        _check_ground(path, None, image, image_path)
        if (image.height, image.width) != image.native:
            size = image.width, image.height
            label = np.asarray(Image.fromarray(label).resize(size, Image.Resampling.NEAREST))
        self._label = label

    def part(self, row: int, column: int, height: int, width: int) -> NDArray[np.uint8]:
        """See `_Mask`."""
        return self._label[row : row + height, column : column + width]

    def finish(self) -> None:
        """`decode_mask` has raised it."""


class RasterMask:
    """A mask that is a raster of class numbers, of a palette or of colours, read by windows."""

    def __init__(self, path: Path, source: Any, spec: DatasetSpec, image: RawImage,
                 image_path: Path) -> None:
        from rasterio.enums import MaskFlags

        self.path, self.source, self.spec, self.image = path, source, spec, image
        _check_size(path, (source.height, source.width), image, image_path)
        _check_ground(path, source, image, image_path)
        self._colors = spec.mask.encoding == "color"
        if self._colors and source.count < 3:
            self._table = _color_table(path, source)
        elif not self._colors and source.count != 1:
            raise DataError(f"{path}: has {source.count} bands, expected one of class numbers")
        # A mask band or alpha; a nodata value counts where no class has it, see `_decode`.
        self._masked = any(MaskFlags.per_dataset in flags for flags in source.mask_flag_enums)
        self._bands = [1, 2, 3] if self._colors and source.count >= 3 else [1]
        self._alpha = unheeded_alpha(source, self._bands)
        self._undeclared: Counter = Counter()

    def part(self, row: int, column: int, height: int, width: int) -> NDArray[np.uint8]:
        """See `_Mask`."""
        from rasterio.windows import Window

        rows = nearest_pixels(self.image.native[0], self.image.height, row, height)
        columns = nearest_pixels(self.image.native[1], self.image.width, column, width)
        window = Window(columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0])
        with reading(self.path):
            raw = read_bands(self.source, self._bands, window)
            hiding = [self.source.dataset_mask(window=window)] if self._masked else []
            if self._alpha is not None:
                hiding.append(self.source.read(self._alpha, window=window))
        label, raw = self._decode(raw)
        for known in hiding:
            label[known == 0] = IGNORE
        unknown = label == UNKNOWN
        if unknown.any():
            self._undeclared.update(count_values(raw, unknown))
        if label.shape == (height, width):
            return label
        return label[rows - rows[0]][:, columns - columns[0]]

    def _decode(self, raw: NDArray) -> tuple[NDArray[np.uint8], NDArray]:
        """Labels, and the values or colours they were made from."""
        if self._colors:
            rgb = raw.transpose(1, 2, 0) if len(raw) == 3 else self._table[raw[0]]
            return decode_colors(np.ascontiguousarray(rgb), self.spec), rgb
        label = decode_values(raw[0], self.spec)
        mark = self.source.nodatavals[0]
        if mark is not None:
            label[(raw[0] == mark) & (label == UNKNOWN)] = IGNORE
        return label, raw[0]

    def finish(self) -> None:
        """Raise one error about all undeclared values of the windows that were read."""
        if self._undeclared:
            values: Values = dict(self._undeclared)
            raise undeclared(self.path, values, self.spec)


class _BurntMask(PolygonMask):
    def finish(self) -> None:
        """`PolygonMask` has raised it."""


@contextmanager
def open_raw(source: Source, spec: DatasetSpec, tile: TileSpec) -> Iterator[RawImage]:
    """The raw image of a source with its mask, closed at the end of the block.

    Raises:
        DataError: a file is missing, damaged, or its mask does not fit it.
    """
    mask = source.files.mask or spec.mask
    spec = spec.model_copy(update={"mask": mask})
    with ExitStack() as files:
        image: RawImage
        plain = (spec.bands is None and spec.raster.nodata is None
                 and spec.raster.rule("uint8") == "none" and mask.encoding != "polygons")
        if plain and is_byte_picture(source.image):
            image = RawPicture(source.image, tile.scale)
        else:
            image = RawRaster(files.enter_context(open_raster(source.image, spec)), tile.scale)
        if source.label is not None:
            image.mask = _open_mask(source, spec, image, files)
        yield image


def _open_mask(source: Source, spec: DatasetSpec, image: RawImage, files: ExitStack) -> _Mask:
    path = source.label
    if spec.mask.encoding == "polygons":
        return _BurntMask(path, spec, image.raster.crs, image.transform, image.width, image.height,
                          source.image)
    if is_picture(path):
        return DecodedMask(path, spec, image, source.image)
    return RasterMask(path, files.enter_context(open_source(path)), spec, image, source.image)


def _check_size(path: Path, shape: tuple[int, int], image: RawImage, image_path: Path) -> None:
    if shape != image.native:
        turned = shape == image.native[::-1] and is_picture(image_path)
        hint = "; its EXIF orientation, by which viewers turn it, is not heeded" * (
            turned and orientation_of(image_path) != 1)
        raise DataError(f"{path}: {shape[1]} x {shape[0]} pixels, its image {image_path} has "
                        f"{image.native[1]} x {image.native[0]}{hint}")


def _check_ground(path: Path, source: Any, image: RawImage, image_path: Path) -> None:
    """A mask and an image that both say where they are must lie on the same ground.

    A coordinate system counts where both have one: world files know none.
    """
    own = _place(path, source)
    of_image = None if own is None else _place(image_path, image.raster and image.raster.source)
    if own is None or of_image is None:
        return
    crs, image_crs = own[0], of_image[0]
    if crs and image_crs:
        known = crs.to_epsg(), image_crs.to_epsg()
        if crs != image_crs and None not in known and known[0] != known[1]:
            raise DataError(f"{path}: coordinate system {crs}, its image {image_path} has "
                            f"{image_crs}")
    elif own[1].is_identity or of_image[1].is_identity:  # which says nothing
        return
    transform, wanted = own[1], of_image[1]
    pixel = max(abs(wanted[0]), abs(wanted[1]), 1e-300)
    off = max(abs(transform[i] - wanted[i]) for i in (2, 5)) / pixel
    sizes = [abs(transform[i] - wanted[i]) * max(image.native) / pixel for i in (0, 1, 3, 4)]
    if max(off, *sizes) > _OFF:
        raise DataError(f"{path}: lies {max(off, *sizes):.1f} pixels off its image {image_path}")


def _place(path: Path, source: Any) -> tuple[Any, Any] | None:
    """Coordinate system and transform of an open raster, or of a picture by its world file.

    None where a picture (`source` is None) has no such file.
    """
    if source is not None:
        return source.crs, source.transform
    world = f"{path.suffix[:2]}{path.suffix[-1]}w"  # .jgw of .jpg
    if not any(path.with_suffix(each).is_file() for each in (world.lower(), world.upper(), ".wld")):
        return None
    with open_source(path) as picture:
        return picture.crs, picture.transform


def _color_table(path: Path, source: Any) -> NDArray[np.uint8]:
    """Colours [256, 3] of a mask with one band: its palette, else grey."""
    from rasterio.enums import ColorInterp

    if source.dtypes[0] != "uint8":
        raise DataError(f"{path}: one band of {source.dtypes[0]}, expected colours")
    table = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, 1)
    if source.colorinterp[0] == ColorInterp.palette:
        for value, color in source.colormap(1).items():
            table[value] = color[:3]
    return table
