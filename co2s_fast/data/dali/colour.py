"""Strong views in DALI operators: the same parts in the same order as `data.colour`.

Each part means what torchvision's function of that name means and is rounded to 8 bits, as the
peers' PIL images are. DALI's own hue turns colours in YIQ; here it is turned in HSV, in integers.
The functions are converted by DALI: `if` decides image by image.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from nvidia.dali import fn, types
from nvidia.dali import math as dmath

from co2s_fast.data.dali.source import BRIGHTNESS, CONTRAST, SATURATION, SLOTS

Node = Any  # nvidia.dali.pipeline.DataNode, which has no public name


def strong_view(image: Node, colour: dict[str, Node]) -> Node:
    """Jitter, grey and blur of uint8 [H, W, 3] by the numbers of `source.colour_arrays`."""
    parts, factors = colour["parts"], colour["factors"]
    for slot in range(SLOTS):
        image = adjust(image, parts[slot], factors[slot])
    image = turn_hue_if(image, colour["turns"], colour["places"])
    for slot in range(SLOTS, 2 * SLOTS):
        image = adjust(image, parts[slot], factors[slot])
    image = gray_if(image, colour["gray"])
    return blur_if(image, colour["blurred"], colour["sigma"])


def adjust(image: Node, part: Node, factor: Node) -> Node:
    """One part of the jitter that is not the hue; any other number of `part` changes nothing."""
    if part == BRIGHTNESS:
        adjusted = fn.brightness_contrast(image, brightness=factor)
    elif part == CONTRAST:
        pivot = fn.reductions.mean(to_gray(image), axes=[0, 1, 2])
        adjusted = fn.brightness_contrast(image, contrast=factor, contrast_center=pivot.cpu())
    elif part == SATURATION:
        scale = beside(image, factor)
        blend = image * scale + to_gray(image) * (np.float32(1) - scale)
        adjusted = fn.cast(blend, dtype=types.UINT8)
    else:
        adjusted = image
    return adjusted


def turn_hue_if(image: Node, wanted: Node, places: Node) -> Node:
    if wanted:
        turned = turn_hue(image, places)
    else:
        turned = image
    return turned


def gray_if(image: Node, wanted: Node) -> Node:
    if wanted:
        gray = fn.color_space_conversion(to_gray(image), image_type=types.GRAY,
                                         output_type=types.RGB)
    else:
        gray = image
    return gray


def blur_if(image: Node, wanted: Node, sigma: Node) -> Node:
    if wanted:
        blurred = fn.gaussian_blur(image, sigma=sigma)
    else:
        blurred = image
    return blurred


def to_gray(image: Node) -> Node:
    return fn.color_space_conversion(image, image_type=types.RGB, output_type=types.GRAY)


def beside(image: Node, number: Node) -> Node:
    """The number where the image is: arithmetic does not mix devices."""
    return number.gpu() if image.device == "gpu" else number


def turn_hue(image: Node, places: Node) -> Node:
    """Shift the hue; value V and chroma C (of HSV) stay.

    A channel is V less C times a trapezoid of the hue's distance from the channel's place. Hue and
    places are multiplied by C, so that nothing is divided and all fits 16 bits.
    """
    planes = fn.transpose(image, perm=[2, 0, 1])
    red, green, blue = planes[0], planes[1], planes[2]
    value = dmath.max(dmath.max(red, green), blue)
    chroma = short(value - dmath.min(dmath.min(red, green), blue))
    of_red = value == red
    of_green = (value == green) & (value != red)
    of_blue = (value != red) & (value != green)
    red, green, blue, value = short(red), short(green), short(blue), short(value)
    twice, thrice = chroma * np.int16(2), chroma * np.int16(3)
    hue = (
        (green - blue) * of_red
        + (blue - red + twice) * of_green
        + (red - green + twice + twice) * of_blue
    )
    turned = [
        value - trapezoid(hue - short(chroma * beside(image, places[channel])), chroma,
                          twice, thrice)
        for channel in range(3)
    ]
    stacked = fn.cast(fn.stack(*turned), dtype=types.UINT8)
    return fn.transpose(stacked, perm=[1, 2, 0], output_layout="HWC")


def trapezoid(away: Node, chroma: Node, twice: Node, thrice: Node) -> Node:
    """C times min(max(2 - | |away / C| - 3 |, 0), 1)."""
    beyond = dmath.abs(dmath.abs(away) - thrice)
    return dmath.min(dmath.max(twice - beyond, np.int16(0)), chroma)


def short(node: Node) -> Node:
    return fn.cast(node, dtype=types.INT16)
