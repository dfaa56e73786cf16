"""Every random choice of the augmentation, drawn as data before any pixel is touched.

A pipeline applies these numbers and draws none of its own, so the torch and the DALI pipelines
share them, image and label share their geometry, and tests compare distributions without images.
The generator of an image is seeded by (seed, step, position in the global batch): a batch is a
pure function of the seed and the step. Ranges and probabilities: UniMatch's protocol (Yang et al.,
CVPR 2023), with the reference-scale resize of SemiVL.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

JITTER_PROBABILITY = 0.8
GRAY_PROBABILITY = 0.2
BLUR_PROBABILITY = 0.5
BLUR_SIGMA = (0.1, 2.0)
BRIGHTNESS = CONTRAST = SATURATION = (0.5, 1.5)
HUE = (-0.25, 0.25)
BOX_PROBABILITY = 0.5
BOX_AREA = (0.02, 0.4)
BOX_ASPECT = (0.3, 1 / 0.3)

LABELED, UNLABELED = 0, 1


@dataclass(frozen=True)
class Geometry:
    """Where a crop lies: the image resized to (height, width), cropped, flipped, then turned.

    Args:
        height: rows of the whole image after resizing.
        width: columns of the whole image after resizing.
        top: first row of the crop in the resized image, padded right and bottom to the crop.
        left: first column of the crop.
        crop: side of the crop.
        flip: mirrored left to right.
        turns: quarter turns to the left after that, padding and all.
    """

    height: int
    width: int
    top: int
    left: int
    crop: int
    flip: bool
    turns: int = 0

    @property
    def valid_height(self) -> int:
        """Rows of the crop that are image before it is turned; the rest, below, is padding."""
        return min(self.crop, self.height - self.top)

    @property
    def valid_width(self) -> int:
        """Columns of the crop that are image before it is flipped and turned."""
        return min(self.crop, self.width - self.left)


@dataclass(frozen=True)
class Colour:
    """The photometric part of one strong view.

    Args:
        order: order of the jitter's parts: 0 brightness, 1 contrast, 2 saturation, 3 hue;
            empty: no jitter.
        brightness: factor, 1 leaves the image.
        contrast: factor.
        saturation: factor.
        hue: shift in turns, [-0.25, 0.25].
        gray: turned to grey.
        sigma: standard deviation of the Gaussian blur in pixels; 0: none.
    """

    order: tuple[int, ...] = ()
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0
    gray: bool = False
    sigma: float = 0.0


@dataclass(frozen=True)
class Draws:
    """All choices for one image: its crop, and for an unlabelled one two strong views."""

    geometry: Geometry
    colours: tuple[Colour, Colour] | None = None
    boxes: tuple[tuple[int, int, int, int], tuple[int, int, int, int]] | None = None


@dataclass(frozen=True)
class Recipe:
    """The dataset's and the run's share in the choices: crop, scale rule and range, turns."""

    crop: int
    scale: Literal["native"] | Sequence[int] = "native"
    scale_range: tuple[float, float] = (0.5, 2.0)
    rotate90: bool = False


class Generator:
    """A stream of uniform numbers: Python's Mersenne Twister, seeded by a key of integers.

    Several times quicker per scalar than NumPy's generators. Only `random()` is used, whose
    sequence does not change between Python versions.
    """

    def __init__(self, *key: int) -> None:
        digest = hashlib.blake2b(",".join(map(str, key)).encode(), digest_size=16).digest()
        self.random = random.Random(int.from_bytes(digest, "little")).random

    def uniform(self, low: float, high: float) -> float:
        """A number in [low, high)."""
        return low + (high - low) * self.random()

    def integer(self, low: int, high: int) -> int:
        """An integer in [low, high], both included."""
        return low + int(self.random() * (high - low + 1))

    def permutation(self, count: int) -> tuple[int, ...]:
        """The numbers 0 .. count - 1 in random order."""
        left = list(range(count))
        return tuple(left.pop(self.integer(0, len(left) - 1)) for _ in range(count))


def generator(seed: int, step: int, position: int, stream: int) -> Generator:
    """The generator of one image: stream is LABELED or UNLABELED, position counts globally."""
    return Generator(seed, step, position, stream)


def draw(rng: Generator, height: int, width: int, recipe: Recipe, strong: bool) -> Draws:
    """Draw everything for an image of that size."""
    geometry = draw_geometry(rng, height, width, recipe)
    if not strong:
        return Draws(geometry)
    colours = draw_colour(rng), draw_colour(rng)
    return Draws(geometry, colours, (draw_box(rng, recipe.crop), draw_box(rng, recipe.crop)))


def draw_geometry(rng: Generator, height: int, width: int, recipe: Recipe) -> Geometry:
    """Random rescale, crop and horizontal flip; quarter turns where the recipe has them."""
    new_height, new_width = draw_size(rng, height, width, recipe)
    top = rng.integer(0, max(new_height - recipe.crop, 0))
    left = rng.integer(0, max(new_width - recipe.crop, 0))
    flip = rng.random() < 0.5
    turns = rng.integer(0, 3) if recipe.rotate90 else 0  # not drawn: other numbers stay theirs
    return Geometry(new_height, new_width, top, left, recipe.crop, flip, turns)


def draw_size(rng: Generator, height: int, width: int, recipe: Recipe) -> tuple[int, int]:
    """Size of the whole image after the random rescale.

    native: the long side is a uniform integer in [floor(lo L), floor(hi L)], the other follows,
    rounded half up. Reference (long, short): r ~ U(lo, hi), the box (floor(long r), floor(short r))
    bounds the image, whose sides become floor(side * scale + 0.5).
    """
    low, high = recipe.scale_range
    if recipe.scale == "native":
        side = max(height, width)
        long = rng.integer(math.floor(low * side), math.floor(high * side))
        short = int(min(height, width) * long / side + 0.5)
        size = (long, short) if height >= width else (short, long)
    else:
        ratio = rng.uniform(low, high)
        size = fit(height, width, [math.floor(side * ratio) for side in recipe.scale])
    return max(size[0], 1), max(size[1], 1)


def fit(height: int, width: int, box: Sequence[int]) -> tuple[int, int]:
    """Largest size within box (any order of its sides) that keeps the ratio of the sides."""
    scale = min(max(box) / max(height, width), min(box) / min(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def draw_colour(rng: Generator) -> Colour:
    """Colour jitter, grey and blur of one strong view.

    Every number is drawn whether it is used or not, so that one choice does not shift the next.
    """
    jitter = rng.random() < JITTER_PROBABILITY
    gray = rng.random() < GRAY_PROBABILITY
    blur = rng.random() < BLUR_PROBABILITY
    order = rng.permutation(4)
    values = [rng.uniform(*bounds) for bounds in (BRIGHTNESS, CONTRAST, SATURATION, HUE)]
    sigma = rng.uniform(*BLUR_SIGMA)
    return Colour(*((order, *values) if jitter else ()), gray=gray, sigma=sigma if blur else 0.0)


def draw_box(rng: Generator, size: int) -> tuple[int, int, int, int]:
    """A CutMix box (x1, y1, x2, y2), half open, or zeros.

    The area is drawn once; aspect and corner are redrawn until the box fits.
    """
    present = rng.random() < BOX_PROBABILITY
    area = rng.uniform(*BOX_AREA) * size * size
    while True:
        aspect = rng.uniform(*BOX_ASPECT)  # height / width
        width, height = int(math.sqrt(area / aspect)), int(math.sqrt(area * aspect))
        x, y = rng.integer(0, size - 1), rng.integer(0, size - 1)
        if x + width <= size and y + height <= size:
            return (x, y, x + width, y + height) if present else (0, 0, 0, 0)
