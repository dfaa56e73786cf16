"""Applying the drawn choices to one image and its label (CPU, 8-bit).

Only the crop's window is resized, never the whole image: the window's pixels are the same either
way. Bilinear: "native" images as Pillow resizes them (antialiased when shrinking), "reference"
images as mmcv does (plain bilinear). Labels: nearest pixel centre in both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from co2s_fast.data.catalogue import IGNORE
from co2s_fast.data.draws import Colour, Geometry

if TYPE_CHECKING:
    from numpy.typing import NDArray


def crop_image(image: Image.Image, geometry: Geometry, antialias: bool) -> Image.Image:
    """The crop of an image: resized, zero padded at right and bottom, flipped."""
    size, box = _window(image.size, geometry)
    if antialias:
        crop = image.resize(size, Image.Resampling.BILINEAR, box=box)
    else:
        step_x, step_y = (box[2] - box[0]) / size[0], (box[3] - box[1]) / size[1]
        crop = image.transform(size, Image.Transform.AFFINE, (step_x, 0, box[0], 0, step_y, box[1]),
                               Image.Resampling.BILINEAR)
    if geometry.flip:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if size != (geometry.crop, geometry.crop):
        whole = Image.new(image.mode, (geometry.crop, geometry.crop))
        whole.paste(crop, (geometry.crop - size[0] if geometry.flip else 0, 0))
        crop = whole
    return crop


def crop_label(label: NDArray[np.uint8], geometry: Geometry) -> NDArray[np.uint8]:
    """The crop of a label by nearest neighbour, 255 in the padding."""
    rows = _nearest(label.shape[0], geometry.height, geometry.top, geometry.valid_height)
    columns = _nearest(label.shape[1], geometry.width, geometry.left, geometry.valid_width)
    crop = label[rows][:, columns]
    out = np.full((geometry.crop, geometry.crop), IGNORE, np.uint8)
    out[: crop.shape[0], : crop.shape[1]] = crop
    return np.ascontiguousarray(out[:, ::-1]) if geometry.flip else out


def padding_map(geometry: Geometry) -> NDArray[np.uint8]:
    """255 where the crop is padding, 0 where it is image."""
    out = np.full((geometry.crop, geometry.crop), IGNORE, np.uint8)
    out[: geometry.valid_height, : geometry.valid_width] = 0
    return np.ascontiguousarray(out[:, ::-1]) if geometry.flip else out


def _window(
    size: tuple[int, int], geometry: Geometry
) -> tuple[tuple[int, int], tuple[float, float, float, float]]:
    """Size of the crop's image part, and the part of the source it shows, in source pixels."""
    across, down = size[0] / geometry.width, size[1] / geometry.height
    width, height = geometry.valid_width, geometry.valid_height
    box = (geometry.left * across, geometry.top * down,
           min((geometry.left + width) * across, size[0]),
           min((geometry.top + height) * down, size[1]))
    return (width, height), box


def _nearest(source: int, target: int, start: int, count: int) -> NDArray[np.intp]:
    positions = (np.arange(start, start + count) + 0.5) * (source / target)
    return np.minimum(positions.astype(np.intp), source - 1)


def strong_view(image: Image.Image, colour: Colour) -> Image.Image:
    """Colour jitter, grey and blur, with torchvision's meaning of each on Pillow images."""
    for part in colour.order:
        if part == 0:
            image = ImageEnhance.Brightness(image).enhance(colour.brightness)
        elif part == 1:
            image = ImageEnhance.Contrast(image).enhance(colour.contrast)
        elif part == 2:
            image = ImageEnhance.Color(image).enhance(colour.saturation)
        else:
            image = _shift_hue(image, colour.hue)
    if colour.gray:
        image = image.convert("L").convert("RGB")
    if colour.sigma:
        image = image.filter(ImageFilter.GaussianBlur(colour.sigma))
    return image


def _shift_hue(image: Image.Image, turns: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    shift = int(turns * 255)
    hue = hue.point([(i + shift) % 256 for i in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")
