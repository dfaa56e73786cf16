"""Images and labels on disk: reading, decoding masks, writing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import yaml
from PIL import Image

from co2s_fast.data.catalogue import (
    DESCRIPTION,
    IGNORE,
    UNKNOWN,
    DatasetSpec,
    MaskSpec,
    class_values,
)
from co2s_fast.data.imagery import BandStatistics
from co2s_fast.data.orientation import as_stored, orientation
from co2s_fast.data.png import encode_png, png_bits
from co2s_fast.data.writing import replacing, write_text
from co2s_fast.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Orthophotos exceed Pillow's default guard (89 megapixels) by far; a header may claim this much.
Image.MAX_IMAGE_PIXELS = 1 << 31

_LARGEST_VALUE = (1 << 20) - 1  # of a class in a raw mask, so that tables stay small
_GDAL_NODATA = 42113  # a TIFF tag
_COLOR_MODES = ("RGB", "P", "L", "RGBA", "1", "LA", "PA")


class UndeclaredValueError(DataError):
    """A label holds a value or colour that the dataset does not declare."""


@dataclass(frozen=True)
class Item:
    """One image of a split.

    Args:
        name: stem of the image file.
        image: its path.
        label: path of its label, None where it has none.
        raw: the label holds raw values that the dataset's mask map turns into classes (folders
            as the authors distribute them), not class ids.
    """

    name: str
    image: Path
    label: Path | None = None
    raw: bool = False


def open_image(path: Path) -> Image.Image:
    """The decoded Pillow image, as it is stored; a DataError names the file where that fails."""
    try:
        image = Image.open(path)
        tag = orientation(image)
        image.load()
    except FileNotFoundError:
        raise DataError(f"{path}: missing file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if path.suffix.lower() in (".tif", ".tiff") and (kind := _raster_kind(path)):
            raise DataError(f"{path}: {kind}, expected 8-bit grey or RGB; `co2s-fast data prepare` "
                            "makes tiles of other rasters") from error
        reason = " ".join(str(error).split()).replace(f" '{path}'", "")
        raise DataError(f"{path}: damaged or not an image ({reason})") from error
    return as_stored(image, tag)


def _raster_kind(path: Path) -> str | None:
    """"4 bands of uint16" of a whole raster that Pillow cannot represent, else None."""
    from co2s_fast.data.rasters import open_source

    try:
        with open_source(path) as source:
            kinds = set(source.dtypes)
            plain = kinds == {"uint8"} and source.count <= 4
            return None if plain else f"{source.count} bands of {', '.join(sorted(kinds))}"
    except DataError:
        return None


def load_image(path: Path) -> NDArray[np.uint8]:
    """The image as uint8 [H, W, 3]; grey images are repeated, alpha is dropped.

    Raises:
        DataError: missing, damaged or not 8-bit.
    """
    return np.asarray(load_picture(path)[0])


def load_rgb(path: Path) -> Image.Image:
    """`load_image` as a Pillow image in mode RGB."""
    return _as_rgb(open_image(path), path)


def _as_rgb(image: Image.Image, path: Path) -> Image.Image:
    if image.mode not in _COLOR_MODES and image.mode not in ("CMYK", "YCbCr"):
        raise DataError(f"{path}: mode {image.mode}, expected 8-bit grey or RGB; `co2s-fast data "
                        "prepare` makes tiles of other rasters")
    if png_bits(path) > 8:  # of which Pillow has kept the upper eight
        raise DataError(f"{path}: 16 bits a channel, expected 8-bit grey or RGB; `co2s-fast data "
                        "prepare` makes tiles of such images")
    return image if image.mode == "RGB" else image.convert("RGB")


def load_picture(path: Path) -> tuple[Image.Image, NDArray[np.bool_] | None]:
    """`load_rgb`, and where the picture is fully transparent, bool [H, W]; None: nowhere.

    It is black there, whatever lies under it, as rasters are where they have no data.
    """
    image = open_image(path)
    if "transparency" in image.info:  # a colour that stands for no data
        image = image.convert("RGBA")
    if image.mode in ("RGBA", "LA", "PA"):
        transparent = np.asarray(image.getchannel("A")) == 0
    elif image.format == "TIFF" and _may_hide_pixels(path):
        transparent = _without_data(path)
    else:
        return _as_rgb(image, path), None
    picture = _as_rgb(image, path)
    if not transparent.any():
        return picture, None
    picture.paste(0, mask=Image.fromarray(transparent))
    return picture, transparent


def _may_hide_pixels(path: Path) -> bool:
    """Whether a TIFF has GDAL's number for no data, or a second image, as a mask is."""
    with Image.open(path) as image:
        try:
            return _GDAL_NODATA in image.tag_v2 or image.n_frames > 1
        except SyntaxError:  # there is one, of a kind that Pillow does not read
            return True


def _without_data(path: Path) -> NDArray[np.bool_]:
    """Where no band of a raster has data, bool [H, W], which Pillow does not tell."""
    from co2s_fast.data.rasters import open_source, reading

    with open_source(path) as source, reading(path):
        return source.dataset_mask() == 0


def load_label(item: Item, spec: DatasetSpec) -> NDArray[np.uint8]:
    """The label of an item as uint8 [H, W]: class ids, 255 for none.

    Raises:
        DataError: no label, damaged, or a value the dataset does not declare.
    """
    if item.label is None:
        raise DataError(f"{item.image}: has no label")
    if item.raw:
        return decode_mask(item.label, spec)
    label = one_band(open_image(item.label), item.label)
    wrong = (label >= spec.num_classes) & (label != IGNORE)
    if wrong.any():
        raise _undeclared(item.label, label, wrong, spec)
    return label


def decode_mask(path: Path, spec: DatasetSpec) -> NDArray[np.uint8]:
    """Read a raw mask and apply the dataset's value map: uint8 [H, W] class ids, 255 for none.

    Raises:
        DataError: damaged, or a value or colour the dataset does not declare.
    """
    image = open_image(path)
    if spec.mask.encoding == "color":
        raw = np.asarray(image.convert("RGB"))
        label = decode_colors(raw, spec)
    else:
        raw = one_band(image, path)
        label = decode_values(raw, spec)
    if image.mode in ("RGBA", "LA"):  # what cannot be seen has no label
        label[np.asarray(image.getchannel("A")) == 0] = IGNORE
    unknown = label == UNKNOWN
    if unknown.any():
        raise _undeclared(path, raw, unknown, spec)
    return label


def one_band(image: Image.Image, path: Path) -> NDArray:
    """The numbers [H, W] of a mask that is a picture."""
    if image.mode not in ("L", "P", "1", "I", "I;16"):
        raise DataError(f"{path}: mode {image.mode}, expected one band of class numbers")
    raw = np.asarray(image, dtype=np.uint8 if image.mode == "1" else None)
    bits = png_bits(path)
    if image.mode == "L" and bits in (2, 4):  # spread over 0 to 255 by Pillow, as grey images are
        return raw // (255 // (2**bits - 1))
    return raw


def decode_values(raw: NDArray, spec: DatasetSpec) -> NDArray[np.uint8]:
    """Class ids of raw mask values of any number type, UNKNOWN where one is not declared.

    NaN is no label.
    """
    missing = np.isnan(raw) if raw.dtype.kind == "f" else None
    if missing is not None:
        raw = np.where(raw == np.floor(raw), raw, -1).clip(-1, _LARGEST_VALUE + 1).astype(np.int64)
    elif raw.dtype == np.int8:  # holds no 255
        raw = raw.astype(np.int16)
    table = np.full(min(int(raw.max(initial=IGNORE)), _LARGEST_VALUE) + 2, UNKNOWN, np.uint8)
    last = len(table) - 1  # of all values that have no place in the table
    classes = {value: index for index in range(spec.num_classes)
               for value in class_values(spec, index)}
    for value, label in {**dict.fromkeys([*spec.mask.ignore, IGNORE], IGNORE), **classes}.items():
        if 0 <= value < last:
            table[value] = label
    if raw.min(initial=0) < 0 or raw.max(initial=0) > last:
        raw = np.where((raw < 0) | (raw > last), last, raw)
    labels = table[raw]
    if missing is not None:
        labels[missing] = IGNORE
    return labels


def decode_colors(rgb: NDArray[np.uint8], spec: DatasetSpec) -> NDArray[np.uint8]:
    """Class ids of colours [H, W, 3], UNKNOWN where one is not declared."""
    ignored = [c for c in spec.mask.ignore if isinstance(c, tuple)]
    colors = np.array([*spec.palette, *ignored], np.uint8)
    values = np.array([*range(spec.num_classes), *[IGNORE] * len(ignored)], np.uint8)
    try:
        from co2s_fast._native import decode_palette
    except ImportError:
        return decode_palette_numpy(rgb, colors, values, UNKNOWN)
    labels, _undeclared = decode_palette(np.ascontiguousarray(rgb), colors, values, UNKNOWN)
    return labels


def decode_palette_numpy(
    rgb: NDArray[np.uint8],  # [H, W, 3]
    colors: NDArray[np.uint8],  # [N, 3]
    values: NDArray[np.uint8],  # [N]
    unknown: int,
) -> NDArray[np.uint8]:
    """values[i] where rgb equals colors[i], `unknown` where it equals none."""
    weight = np.array([1 << 16, 1 << 8, 1], np.int32)
    keys = colors.astype(np.int32) @ weight
    order = np.argsort(keys)
    channels = rgb.astype(np.int32)
    packed = channels[..., 0] << 16 | channels[..., 1] << 8 | channels[..., 2]
    # Masks have long runs of one colour: look each run up once.
    flat = packed.ravel()
    starts = np.flatnonzero(np.diff(flat, prepend=-1))
    at = np.searchsorted(keys[order], flat[starts]).clip(max=len(keys) - 1)
    hit = keys[order][at] == flat[starts]
    found = np.where(hit, values[order][at], np.uint8(unknown)).astype(np.uint8)
    return np.repeat(found, np.diff(starts, append=flat.size)).reshape(packed.shape)


def _undeclared(path: Path, raw: NDArray, where: NDArray, spec: DatasetSpec
) -> UndeclaredValueError:
    return undeclared(path, count_values(raw, where), spec)


Values = dict[float | tuple[int, ...], int]


def count_values(raw: NDArray, where: NDArray[np.bool_]) -> Values:
    """Pixels of each value or colour of a raw mask among those marked."""
    values, counts = np.unique(raw[where], axis=0, return_counts=True)
    return {tuple(map(int, v)) if raw.ndim == 3 else v.item(): int(n)
            for v, n in zip(values, counts, strict=True)}


def undeclared(path: Path, values: Values, spec: DatasetSpec) -> UndeclaredValueError:
    """The error about values that a mask has and the dataset does not declare."""
    kind = "colour" if any(isinstance(v, tuple) for v in values) else "value"
    shown = ", ".join(f"{v} in {n} pixels" for v, n in sorted(values.items())[:5])
    more = f" and {len(values) - 5} more" if len(values) > 5 else ""
    return UndeclaredValueError(
        f"{path}: undeclared {kind} {shown}{more}; "
        f"dataset {spec.name!r} declares {spec.num_classes} classes: {declared(spec)}"
    )


def declared(spec: DatasetSpec) -> str:
    """The mask map in one line, for messages."""
    if spec.mask.encoding == "color":
        pairs = [f"{c.name} {c.color}" for c in spec.classes]
    else:
        pairs = [f"{c.name} {'/'.join(map(str, class_values(spec, i)))}"
                 for i, c in enumerate(spec.classes)]
    return ", ".join([*pairs, f"ignored {', '.join(map(str, spec.mask.ignore))}"])


def save_image(path: Path, image: NDArray[np.uint8]) -> None:
    """Write uint8 [H, W, 3] as PNG, or as TIFF where the path says so, atomically.

    A fourth channel is alpha, 0 where there is no data.
    """
    _write(path, image)


def save_label(path: Path, label: NDArray[np.uint8], palette: Sequence[Sequence[int]]) -> None:
    """Write class ids as an indexed PNG or TIFF with the dataset's colours, ignore black."""
    # All 256 entries: 255 is a value of its own.
    _write(path, label, [*palette, *[(0, 0, 0)] * (256 - len(palette))])


def _write(path: Path, pixels: NDArray[np.uint8],
           palette: Sequence[Sequence[int]] | None = None) -> None:
    with replacing(path) as temporary:
        if path.suffix.lower() not in (".tif", ".tiff"):
            temporary.write_bytes(encode_png(pixels, palette))
            return
        image = Image.fromarray(pixels)
        if palette is not None:
            image.putpalette([channel for color in palette for channel in color])
        image.save(temporary, format="TIFF", compression="tiff_lzw")


def write_description(root: Path, spec: DatasetSpec,
                      statistics: BandStatistics | None = None) -> None:
    """Write `dataset.yaml` of a prepared folder: the dataset, its labels now being class ids."""
    classes = [c.model_copy(update={"values": []}) for c in spec.classes]
    files = [each.model_copy(update={"mask": None}) for each in spec.layouts]
    prepared = spec.model_copy(update={
        "mask": MaskSpec(), "classes": classes, "statistics": statistics,
        "files": files if isinstance(spec.files, list) else next(iter(files), None)})
    content = prepared.model_dump(mode="json", exclude_defaults=True)
    write_text(root / DESCRIPTION, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
