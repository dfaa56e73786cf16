"""Applying drawn choices: crops against resizing the whole, image and label alignment, colours."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy.ndimage import gaussian_filter
from torch.nn.functional import interpolate
from torchvision.transforms import functional as tv

from co2s_fast.data.colour import blur, recolour
from co2s_fast.data.draws import (
    UNLABELED,
    Colour,
    Geometry,
    Recipe,
    draw_colour,
    draw_geometry,
    generator,
)
from co2s_fast.data.transforms import crop_image, crop_label, padding_map, strong_view

NATIVE, REFERENCE = Recipe(48, "native"), Recipe(48, (256, 64))


def picture(height=70, width=90, seed=0):
    """Smooth colours with some noise: what resizing and colour jitter see in practice."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    noisy = smooth + rng.normal(0, 6, smooth.shape)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def geometries(recipe, count=40, height=70, width=90):
    return [draw_geometry(generator(0, i, 0, UNLABELED), height, width, recipe)
            for i in range(count)]


def whole_then_crop(resized, geometry, value):
    """Pad, crop and flip an image [H, W, ...] that was resized as a whole."""
    pad = [(0, max(geometry.crop - n, 0)) for n in resized.shape[:2]]
    pad += [(0, 0)] * (resized.ndim - 2)
    padded = np.pad(resized, pad, constant_values=value)
    top, left, crop = geometry.top, geometry.left, geometry.crop
    out = padded[top : top + crop, left : left + crop]
    return out[:, ::-1] if geometry.flip else out


def test_native_crop_is_the_crop_of_the_whole_resized_by_pillow():
    image = picture()
    for g in geometries(NATIVE):
        whole = np.asarray(image.resize((g.width, g.height), Image.Resampling.BILINEAR))
        expected = whole_then_crop(whole, g, 0).astype(int)
        found = crop_image(image, g, antialias=True).transpose(1, 2, 0).astype(int)
        # Pillow keeps the window in float32 and rounds between its two passes.
        assert np.abs(found - expected).max() <= 2
        assert (found != expected).mean() < 0.1


def test_reference_crop_is_plain_bilinear():
    image = picture()
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].double()
    for g in geometries(REFERENCE):
        whole = interpolate(pixels, (g.height, g.width), mode="bilinear", align_corners=False)
        expected = whole_then_crop(whole[0].permute(1, 2, 0).numpy(), g, 0)
        found = crop_image(image, g, antialias=False).transpose(1, 2, 0).astype(float)
        # Rounded once or twice, or cut off, to whole levels.
        assert np.abs(found - expected).max() <= 1.01


@pytest.mark.parametrize("recipe", [NATIVE, REFERENCE])
def test_label_crop_takes_the_nearest_pixel_centre(recipe):
    label = np.random.default_rng(0).integers(0, 9, (70, 90), dtype=np.uint8)
    for g in geometries(recipe):
        rows, columns = ([math.floor(Fraction(2 * i + 1, 2) * source / target)
                          for i in range(target)]
                         for source, target in ((70, g.height), (90, g.width)))
        whole = label[rows][:, columns]
        np.testing.assert_array_equal(crop_label(label, g), whole_then_crop(whole, g, 255))


@pytest.mark.parametrize("recipe", [NATIVE, REFERENCE])
@pytest.mark.parametrize("axis", [0, 1])
def test_image_and_label_show_the_same_place(recipe, axis):
    """A ramp along one axis, in the image and as the label: they may differ by half a pixel."""
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8), (200, 200))
    ramp = np.ascontiguousarray(ramp if axis else ramp.T)
    image = Image.fromarray(np.repeat(ramp[..., None], 3, 2))
    for g in geometries(recipe, height=200, width=200):
        found = crop_image(image, g, recipe.scale == "native")[0].astype(int)
        label = crop_label(ramp, g).astype(int)
        inside = padding_map(g) == 0
        # Nearest is at most half a source pixel away, rounding half a level more; at the image's
        # border bilinear sees a clamped ramp.
        assert np.abs(found - label)[inside].max() <= 1
        assert ((label == 255) == ~inside).all() and (found[~inside] == 0).all()
        assert inside.sum() == g.valid_height * g.valid_width


def test_padding_is_at_the_right_and_bottom_and_flips_with_the_image():
    g = Geometry(20, 30, 0, 0, 48, flip=False)
    expected = np.full((48, 48), 255, np.uint8)
    expected[:20, :30] = 0
    np.testing.assert_array_equal(padding_map(g), expected)
    flipped = Geometry(20, 30, 0, 0, 48, flip=True)
    np.testing.assert_array_equal(padding_map(flipped), expected[:, ::-1])


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_quarter_turns_come_last_for_image_label_and_padding(turns, antialias):
    image, label = picture(), np.random.default_rng(0).integers(0, 9, (70, 90)).astype(np.uint8)
    for g in geometries(NATIVE, count=10):
        turned = replace(g, turns=turns)
        pairs = (
            (crop_image(image, turned, antialias), crop_image(image, g, antialias)),
            (crop_label(label, turned), crop_label(label, g)),
            (padding_map(turned), padding_map(g)),
        )
        for found, expected in pairs:
            for _ in range(turns):  # to the left: what was the top is at the left, upside down
                expected = expected.swapaxes(-2, -1)[..., ::-1, :]
            np.testing.assert_array_equal(found, expected)


def channels_first(image):
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def torchvision_recolour(pixels, colour):
    """The same choices through torchvision's functions, in float64: [C, H, W] in 0..255."""
    image = torch.from_numpy(pixels).double() / 255
    for part in colour.order:
        image = (lambda i: tv.adjust_brightness(i, colour.brightness),
                 lambda i: tv.adjust_contrast(i, colour.contrast),
                 lambda i: tv.adjust_saturation(i, colour.saturation),
                 lambda i: tv.adjust_hue(i, colour.hue))[part](image)
    if colour.gray:
        image = tv.rgb_to_grayscale(image, 3)
    return image.numpy() * 255


@pytest.mark.parametrize("colour", [
    Colour((0, 1, 2, 3), brightness=1.4),
    Colour((0, 1, 2, 3), contrast=0.6),
    Colour((0, 1, 2, 3), saturation=1.45),
    Colour((0, 1, 2, 3), hue=0.2),
    Colour((0, 1, 2, 3), hue=-0.13),
    Colour((3, 2, 1, 0), 0.7, 1.3, 0.6, -0.2),
    Colour((1, 3, 0, 2), 1.45, 0.55, 1.4, 0.24),
    Colour(gray=True),
    Colour((2, 0, 3, 1), 1.2, 0.9, 1.3, 0.1, True),
])
def test_recolouring_means_what_torchvision_means(colour):
    pixels = channels_first(picture())
    found = recolour(pixels, colour).astype(float)
    # Half a level of rounding; contrast's pivot is estimated on a seventeenth of the pixels, and
    # moves colours by half its error at most.
    assert np.abs(found - torchvision_recolour(pixels, colour)).max() <= 1.5


def test_random_recolouring_of_a_larger_image():
    pixels = channels_first(picture(300, 200))
    for step in range(25):
        colour = draw_colour(generator(3, step, 0, UNLABELED))
        difference = recolour(pixels, colour) - torchvision_recolour(pixels, colour)
        assert np.abs(difference).max() <= 1.5


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.7, 1.0, 1.7, 2.0])
def test_blur_is_gaussian(sigma):
    pixels = channels_first(picture())
    expected = gaussian_filter(pixels.astype(float), (0, sigma, sigma), mode="nearest")
    # Weights are rounded to 1/256 and the result twice: two levels at most.
    assert np.abs(blur(pixels, sigma) - expected).max() <= 2
    flat = np.full((3, 20, 20), 255, np.uint8)
    np.testing.assert_array_equal(blur(flat, sigma), flat)


def test_blur_is_what_the_peers_use():
    """Pillow approximates the Gaussian by three box filters; so close that no one would see."""
    image = picture()
    for sigma in (0.3, 1.0, 2.0):
        expected = channels_first(image.filter(ImageFilter.GaussianBlur(sigma))).astype(float)
        assert np.abs(blur(channels_first(image), sigma) - expected).mean() < 1


def test_other_numbers_of_bands():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 30, 40), dtype=np.uint8)
    colour = Colour((3, 1, 2, 0), 1.2, 0.8, 1.3, 0.2, gray=True, sigma=1.0)
    found = strong_view(pixels, colour)
    assert found.shape == pixels.shape and found.dtype == np.uint8
    mean = pixels.astype(float).mean()
    plain = np.clip(((pixels - mean) * 0.8 + mean) * 1.2, 0, 255)
    assert np.abs(recolour(pixels, colour) - plain).max() < 4


def test_no_choice_leaves_the_image():
    pixels = channels_first(picture())
    np.testing.assert_array_equal(strong_view(pixels, Colour()), pixels)


@pytest.mark.parametrize("period", [2, 4, 8, 16])
@pytest.mark.parametrize("axis", [0, 1])
def test_contrast_of_a_regular_texture(period, axis):
    """Rows of crops or of solar panels: the estimate of the mean must not keep time with them."""
    stripes = np.where(np.arange(512) % period < period // 2, 40, 220).astype(np.uint8)
    image = np.broadcast_to(stripes if axis else stripes[:, None], (512, 512))
    pixels = np.stack([image] * 3)
    found = recolour(pixels, Colour((1,), contrast=0.5))
    expected = tv.adjust_contrast(torch.from_numpy(pixels), 0.5).numpy()
    assert np.abs(found.astype(int) - expected).max() <= 2
