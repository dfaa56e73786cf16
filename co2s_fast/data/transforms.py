"""Applying the drawn choices to one image and its label (CPU, 8-bit).

Only the crop's window is resized, never the whole image: the window's pixels are the same either
way. Bilinear: "native" images as Pillow resizes them (antialiased when shrinking), "reference"
images as mmcv does (plain bilinear). Labels: nearest pixel centre in both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from co2s_fast.data.catalogue import IGNORE
from co2s_fast.data.colour import blur, recolour
from co2s_fast.data.draws import Colour, Geometry

if TYPE_CHECKING:
    from numpy.typing import NDArray


def crop_image(image: Image.Image, geometry: Geometry, antialias: bool) -> NDArray:
    """The crop of an image: resized, zero padded at right and bottom, flipped, turned.

    Returns:
        [C, crop, crop]; of an image of one band [crop, crop].
    """
    size, box = source_box(image.size, geometry)
    pixels = np.asarray(resampled(image, size, box, antialias or enlarges(image.size, geometry)))
    if pixels.ndim == 3:
        pixels = pixels.transpose(2, 0, 1)
    crop = np.zeros((*pixels.shape[:-2], geometry.crop, geometry.crop), pixels.dtype)
    crop[..., : size[1], : size[0]] = pixels
    return oriented(crop, geometry)


def enlarges(size: tuple[int, int], geometry: Geometry) -> bool:
    """Whether no side of an image of (width, height) is made smaller."""
    return geometry.width >= size[0] and geometry.height >= size[1]


def resampled(image: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float],
              antialias: bool) -> Image.Image:
    """What a box of an image shows, at a size, bilinear.

    Args:
        image: of one band (8-bit or float32), or RGB.
        size: (width, height) of the result.
        box: (left, top, right, bottom) in pixels of the image; the filter reads beyond it.
        antialias: as Pillow resizes; else plain bilinear, as mmcv does. Enlarging they are the
            same, and Pillow's resize is quicker than its affine transform.
    """
    if antialias:
        return image.resize(size, Image.Resampling.BILINEAR, box=box)
    step_x, step_y = (box[2] - box[0]) / size[0], (box[3] - box[1]) / size[1]
    return image.transform(size, Image.Transform.AFFINE, (step_x, 0, box[0], 0, step_y, box[1]),
                           Image.Resampling.BILINEAR)


def crop_label(label: NDArray[np.uint8], geometry: Geometry) -> NDArray[np.uint8]:
    """The crop of a label by nearest neighbour, 255 in the padding."""
    rows = nearest_pixels(label.shape[0], geometry.height, geometry.top, geometry.valid_height)
    columns = nearest_pixels(label.shape[1], geometry.width, geometry.left, geometry.valid_width)
    crop = label[rows][:, columns]
    out = np.full((geometry.crop, geometry.crop), IGNORE, np.uint8)
    out[: crop.shape[0], : crop.shape[1]] = crop
    return oriented(out, geometry)


def padding_map(geometry: Geometry) -> NDArray[np.uint8]:
    """255 where the crop is padding, 0 where it is image."""
    out = np.full((geometry.crop, geometry.crop), IGNORE, np.uint8)
    out[: geometry.valid_height, : geometry.valid_width] = 0
    return oriented(out, geometry)


def oriented(crop: NDArray, geometry: Geometry) -> NDArray:
    """A crop [..., crop, crop], padded at right and bottom, flipped and turned."""
    if geometry.flip:
        crop = crop[..., ::-1]
    return np.ascontiguousarray(np.rot90(crop, geometry.turns, (-2, -1)))


def source_box(
    size: tuple[int, int], geometry: Geometry
) -> tuple[tuple[int, int], tuple[float, float, float, float]]:
    """Where the pixels of a crop come from, before it is flipped and turned.

    Args:
        size: (width, height) of the source image.
        geometry: the drawn crop.

    Returns:
        (width, height) of the crop's image part, and (left, top, right, bottom) of what it shows,
        in source pixels.
    """
    across, down = size[0] / geometry.width, size[1] / geometry.height
    width, height = geometry.valid_width, geometry.valid_height
    box = (geometry.left * across, geometry.top * down,
           min((geometry.left + width) * across, size[0]),
           min((geometry.top + height) * down, size[1]))
    return (width, height), box


def nearest_pixels(source: int, target: int, start: int, count: int) -> NDArray[np.intp]:
    """Source pixel that holds each target pixel's centre, in whole numbers: no rounding."""
    return (2 * np.arange(start, start + count) + 1) * source // (2 * target)


def strong_view(pixels: NDArray, colour: Colour) -> NDArray:
    """Colour jitter, grey and blur of a crop [C, H, W], in this order; see `colour`."""
    pixels = recolour(pixels, colour)
    return blur(pixels, colour.sigma) if colour.sigma else pixels
