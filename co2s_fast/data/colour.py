"""Colour jitter, grey and blur of a strong view, on images [C, H, W], 8-bit or float in [0, 1].

The whole chain runs in float32 over a few rows at a time, so intermediate values stay in the
cache and are rounded once, at the end. Each part means what torchvision's function of that name
means on float tensors. The blur is a separable Gaussian, of 8-bit images in 16-bit fixed point.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from co2s_fast.data.draws import Colour

_LUMA = (np.float32(0.299), np.float32(0.587), np.float32(0.114))
_SAMPLE = 17  # every 17th pixel of a large image gives the mean grey; textures have other periods
_PIXELS_AT_ONCE = 1 << 15


def recolour(pixels: NDArray, colour: Colour) -> NDArray:
    """Jitter and grey of an image [C, H, W], uint8 or float32 in [0, 1].

    Images of other than three bands have no hue, saturation or grey: those parts are left out, and
    contrast turns about the mean of all bands.
    """
    bands, height, width = pixels.shape
    order = tuple(p for p in colour.order if bands == 3 or p < 2)
    gray = colour.gray and bands == 3
    if not order and not gray:
        return pixels
    pivot, scale = 0.0, np.float32(1 if pixels.dtype == np.uint8 else 255)
    if 1 in order:
        every = _SAMPLE if height * width > _PIXELS_AT_ONCE else 1
        sample = pixels.reshape(bands, 1, -1)[..., ::every].astype(np.float32) * scale
        pivot = float(_gray(_steps(sample, order[: order.index(1)], colour, 0.0)).mean())
    out = np.empty_like(pixels)
    rows = max(_PIXELS_AT_ONCE // width, 1)
    for top in range(0, pixels.shape[1], rows):
        part = pixels[:, top : top + rows].astype(np.float32)
        if scale != 1:
            part *= scale
        part = _steps(part, order, colour, pivot)
        if gray:
            part[:] = _gray(part)
        if scale != 1:
            part /= scale
        else:
            part += np.float32(0.5)
        out[:, top : top + rows] = part
    return out


def _gray(colors: NDArray[np.float32]) -> NDArray[np.float32]:
    if len(colors) != 3:
        return colors.mean(0)
    gray = colors[0] * _LUMA[0]
    gray += colors[1] * _LUMA[1]
    gray += colors[2] * _LUMA[2]
    return gray


def _steps(colors: NDArray[np.float32], order: tuple[int, ...], colour: Colour,
           pivot: float) -> NDArray[np.float32]:
    """Apply parts of the jitter, in order, to colours [C, ...] in 0..255, in place."""
    for part in order:
        if part == 0:
            colors *= np.float32(colour.brightness)
        elif part == 1:
            colors *= np.float32(colour.contrast)
            colors += np.float32((1 - colour.contrast) * pivot)
        elif part == 2:
            gray = _gray(colors)
            gray *= np.float32(1 - colour.saturation)
            colors *= np.float32(colour.saturation)
            colors += gray
        else:
            _turn_hue(colors, colour.hue)
            continue
        np.maximum(colors, np.float32(0), out=colors)
        np.minimum(colors, np.float32(255), out=colors)
    return colors


def _turn_hue(colors: NDArray[np.float32], turns: float) -> None:
    """Shift the hue by that many turns, in place; value and saturation (of HSV) stay.

    With hues in sixths of a turn, a channel keeps the full value within one sixth of its own hue,
    and is less by the whole chroma beyond two sixths.
    """
    red, green, blue = colors
    value = np.maximum(np.maximum(red, green), blue)
    chroma = value - np.minimum(np.minimum(red, green), blue)
    scale = np.float32(1) / np.maximum(chroma, np.float32(1e-3))
    hue = (red - green) * scale + np.float32(4)
    np.copyto(hue, (blue - red) * scale + np.float32(2), where=value == green)
    np.copyto(hue, (green - blue) * scale, where=value == red)
    for channel, centre in enumerate((0, 2, 4)):
        # |hue - centre| stays below 6: hue is in [-1, 5], the centre is brought into [-1, 5).
        place = (centre - 6 * turns + 1) % 6 - 1
        away = np.abs(hue - np.float32(place))
        away -= np.float32(3)
        np.abs(away, out=away)
        np.subtract(np.float32(2), away, out=away)
        np.maximum(away, np.float32(0), out=away)
        np.minimum(away, np.float32(1), out=away)
        away *= chroma
        np.subtract(value, away, out=colors[channel])


def blur(pixels: NDArray, sigma: float) -> NDArray:
    """Gaussian blur of [C, H, W], edges repeated; weights are multiples of 1/256."""
    weights = _weights(sigma)
    if len(weights) == 1:
        return pixels
    return _smooth(_smooth(pixels, weights, 1), weights, 2)


def _weights(sigma: float) -> list[int]:
    """Weights at distance 0, 1, ..., radius, in 1/256; their two-sided sum is 256."""
    radius = max(math.ceil(3 * sigma), 1)
    bell = [math.exp(-0.5 * (i / sigma) ** 2) for i in range(radius + 1)]
    total = bell[0] + 2 * sum(bell[1:])
    weights = [round(256 * b / total) for b in bell]
    weights[0] = 256 - 2 * sum(weights[1:])
    while len(weights) > 1 and weights[-1] == 0:
        weights.pop()
    return weights


def _smooth(pixels: NDArray, weights: list[int], axis: int) -> NDArray:
    radius, length = len(weights) - 1, pixels.shape[axis]
    margin = [(0, 0)] * 3
    margin[axis] = (radius, radius)
    whole = pixels.dtype == np.uint8
    kind = np.uint16 if whole else np.float32
    padded = np.pad(pixels, margin, mode="edge").astype(kind)

    def shifted(by: int) -> NDArray:
        where = [slice(None)] * 3
        where[axis] = slice(radius + by, radius + by + length)
        return padded[tuple(where)]

    total = shifted(0) * kind(weights[0])
    if whole:  # 255 * 256 + 128 still fits 16 bits
        total += np.uint16(128)
    pair = np.empty_like(total)
    for distance, weight in enumerate(weights[1:], 1):
        np.add(shifted(distance), shifted(-distance), out=pair)
        pair *= kind(weight)
        total += pair
    if not whole:
        return total * np.float32(1 / 256)
    total >>= 8
    return total.astype(np.uint8)
