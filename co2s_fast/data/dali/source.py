"""The host's share of the DALI pipeline: files, drawn numbers and labels of a step, as arrays.

Images travel encoded; DALI decodes them. Labels are cut here, by the same function and geometry as
in the torch pipeline: DALI expands indexed PNG to colours, and nearest neighbour is a look-up that
must not depend on the rounding of a device.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from co2s_fast.data.catalogue import IGNORE
from co2s_fast.data.draws import LABELED, UNLABELED, Colour, Geometry
from co2s_fast.data.files import Item, load_image, load_picture
from co2s_fast.data.pixels import seen_of
from co2s_fast.data.plan import STRONG, Plan
from co2s_fast.data.transforms import crop_label, padding_map, source_box
from co2s_fast.errors import DataError

Arrays = dict[str, NDArray]

NOTHING, BRIGHTNESS, CONTRAST, SATURATION = -1, 0, 1, 2
HUE = 3
SLOTS = 3
"""Parts of the jitter before the hue, and as many after it."""

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"IEND\xaeB`\x82"
_JPEG, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"


def step_arrays(plan: Plan, stream: int, step: int, position: int,
                left_to_pillow: frozenset[Path], item: Item) -> Arrays:
    """Everything the graph needs for one image, by the names of its inputs.

    Args:
        plan: of the run.
        stream: LABELED or UNLABELED.
        step: of the batch.
        position: in the global batch.
        left_to_pillow: files that DALI has failed to decode.
        item: the image, which need not be the plan's for that place.

    Raises:
        DataError: a file that is missing, damaged or not what it should be.
    """
    encoded, (height, width) = encoded_image(item.image, item.image in left_to_pillow)
    transparent = _transparent(item.image, encoded)
    label = None
    if stream == LABELED:
        label = seen_of(plan.label(item, height, width), transparent)
    drawn = plan.draw(step, position, stream, height, width, label)
    geometry = drawn.geometry
    prefix = "x" if stream == LABELED else "u"
    of_image = {"image": encoded, **geometry_arrays(geometry, height, width)}
    if plan.recipe.rotate90:
        of_image |= turn_arrays(geometry)
    arrays = {f"{prefix}_{key}": value for key, value in of_image.items()}
    ignore = padding_map(geometry) if transparent is None else crop_label(
        np.where(transparent, np.uint8(IGNORE), np.uint8(0)), geometry)
    if label is not None:
        arrays["y"] = np.maximum(crop_label(label, geometry), ignore)
        return arrays
    arrays["ignore"] = ignore
    if plan.truth:
        arrays["truth"] = plan.true_crop(item, geometry, height, width)
    for number, view in enumerate(STRONG):
        if view in plan.views:
            colour = colour_arrays(drawn.colours[number])
            arrays |= {f"{view}_{key}": value for key, value in colour.items()}
            arrays[f"boxes{number + 1}"] = np.array(drawn.boxes[number], np.int32)
    return arrays


def input_names(plan: Plan, stream: int) -> list[str]:
    """Names of the arrays of one image, in the order the graph takes them."""
    geometry = Geometry(1, 1, 0, 0, 1, False)
    image = ["image", *geometry_arrays(geometry, 1, 1)]
    image += turn_arrays(geometry) if plan.recipe.rotate90 else ()
    if stream == LABELED:
        return [*(f"x_{key}" for key in image), "y"]
    if not plan.has_unlabeled:
        return []
    names = [*(f"u_{key}" for key in image), "ignore", *(["truth"] if plan.truth else [])]
    for number, view in enumerate(STRONG):
        if view in plan.views:
            names += [*(f"{view}_{key}" for key in colour_arrays(Colour())), f"boxes{number + 1}"]
    return names


def geometry_arrays(geometry: Geometry, height: int, width: int) -> Arrays:
    """A crop as numbers for DALI: the source region (mirrored: right to left), its size, its place.

    `start` and `end` are (row, column) in source pixels, `size` is (rows, columns) of the crop's
    image part, `corner` where the crop begins relative to it (negative: padding at the left).
    """
    size, (left, top, right, bottom) = source_box((width, height), geometry)
    across = (right, left) if geometry.flip else (left, right)
    corner = size[0] - geometry.crop if geometry.flip else 0
    return {
        "start": np.array((top, across[0]), np.float32),
        "end": np.array((bottom, across[1]), np.float32),
        "size": np.array((size[1], size[0]), np.float32),
        "corner": np.array((0, corner), np.int32),
        "padded": np.array(size != (geometry.crop, geometry.crop)),
    }


def turn_arrays(geometry: Geometry) -> Arrays:
    """Quarter turns as numbers for DALI: `transposed`, and what is flipped after that."""
    return {
        "transposed": np.array(geometry.turns % 2 == 1),
        "upside_down": np.array(geometry.turns in (1, 2), np.int32),
        "mirrored": np.array(geometry.turns in (2, 3), np.int32),
    }


def colour_arrays(colour: Colour) -> Arrays:
    """A strong view as numbers for DALI: jitter's parts before and after the hue, grey, blur.

    Of `parts` and `factors` (two times SLOTS), unused ones are NOTHING. `places` are the hues of
    red, green and blue after the shift, in sixths of a turn within [-1, 5).
    """
    parts, factors = np.full(2 * SLOTS, NOTHING, np.int32), np.ones(2 * SLOTS, np.float32)
    values = (colour.brightness, colour.contrast, colour.saturation)
    slot = 0
    for part in colour.order:
        if part == HUE:
            slot = SLOTS
        else:
            parts[slot], factors[slot] = part, values[part]
            slot += 1
    places = [(centre - 6 * colour.hue + 1) % 6 - 1 for centre in (0, 2, 4)]
    return {
        "parts": parts,
        "factors": factors,
        "turns": np.array(HUE in colour.order),
        "places": np.array(places, np.float32),
        "gray": np.array(colour.gray),
        "blurred": np.array(colour.sigma > 0),
        "sigma": np.array(colour.sigma or 1, np.float32),
    }


def encoded_image(path: Path, by_pillow: bool = False) -> tuple[NDArray, tuple[int, int]]:
    """An image file as bytes that DALI decodes to what `load_image` gives, and (height, width).

    Whole 8-bit JPEG and PNG in RGB or grey pass as they are. All else (TIFF, palettes, alpha,
    CMYK) is decoded here and passes as PNM, so both pipelines accept and refuse the same files.

    Args:
        path: of the image.
        by_pillow: decode it here whatever it is.

    Raises:
        DataError: missing, damaged or not 8-bit.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        reason = "missing file" if isinstance(error, FileNotFoundError) else error.strerror
        raise DataError(f"{path}: {reason}") from None
    if _is_plain(content) and not by_pillow:
        try:
            with Image.open(io.BytesIO(content)) as image:
                if image.mode in ("RGB", "L") and "transparency" not in image.info:
                    return np.frombuffer(content, np.uint8), (image.height, image.width)
        except (OSError, SyntaxError, ValueError, UnidentifiedImageError):
            pass  # load_image says what is wrong with it
    pixels = load_image(path)
    height, width = pixels.shape[:2]
    head = b"P6\n%d %d\n255\n" % (width, height)
    return np.frombuffer(head + pixels.tobytes(), np.uint8), (height, width)


def _transparent(path: Path, encoded: NDArray) -> NDArray[np.bool_] | None:
    """Where an image has no data; one that passes as it is has no alpha."""
    if encoded[:2].tobytes() != b"P6":
        return None
    return load_picture(path)[1]


def _is_plain(content: bytes) -> bool:
    """A file with a beginning and an end, JPEG or an 8-bit grey or RGB PNG."""
    if content.startswith(_PNG):
        return content.endswith(_PNG_END) and content[24] == 8 and content[25] in (0, 2)
    return content.startswith(_JPEG) and content.endswith(_JPEG_END)


__all__ = ["LABELED", "UNLABELED", "encoded_image", "input_names", "step_arrays"]
