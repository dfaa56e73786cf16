"""Rare classes: weights for the supervised loss, and labelled crops that show them more often.

Everything here is a function of the pixels of each class in each labelled image, counted once
before training, and of (seed, step, position): the same on every rank and after resuming.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from co2s_fast.data.catalogue import DatasetSpec
from co2s_fast.data.draws import Generator, Geometry
from co2s_fast.data.files import load_label
from co2s_fast.data.splits import Split
from co2s_fast.data.transforms import nearest_pixels
from co2s_fast.errors import UsageError

RULES = ("none", "balanced", "median-frequency", "effective-number")
BALANCED = "median-frequency"
"""What "balanced" stands for."""

_CHOICE, _PLACE = 2, 3  # streams of draws, after LABELED and UNLABELED


def labeled_pixels(split: Split, spec: DatasetSpec) -> NDArray[np.int64]:
    """Pixels of each class in each labelled image, [images, classes]; counted where not known."""
    if split.pixels is None:
        split.pixels = np.array(
            [np.bincount(load_label(item, spec).ravel(), minlength=256)[: spec.num_classes]
             for item in split.labeled], np.int64)
    return split.pixels


def read_class_weight(value: Any) -> str | dict[str, float]:
    """A rule's name as it is; a YAML or JSON file, or its content, as weights by class name.

    Raises:
        ValueError: neither; every wrong weight is listed.
    """
    if isinstance(value, str | Path):
        if str(value) in RULES:
            return str(value)
        path, value = Path(value), _read(Path(value))
        origin = f"{path}: "
    else:
        origin = ""
    if not isinstance(value, Mapping) or not value:
        raise ValueError(f"{origin}expected a weight for each class name, found {value!r}")
    wrong = [f"{name} {weight!r}" for name, weight in value.items() if not _is_weight(weight)]
    if wrong:
        raise ValueError(f"{origin}expected numbers of at least 0, found {', '.join(wrong)}")
    return {str(name): float(weight) for name, weight in value.items()}


def _read(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"expected one of {', '.join(RULES)}, or a YAML or JSON file of weights; "
                         f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML or JSON: {' '.join(str(error).split())}") from error


def _is_weight(value: Any) -> bool:
    return (isinstance(value, int | float) and not isinstance(value, bool)
            and math.isfinite(value) and value >= 0)


def class_weights(rule: str | Mapping[str, float], pixels: NDArray[np.int64],
                  names: Sequence[str], beta: float | None = None) -> NDArray[np.float64] | None:
    """Weights of the classes in the supervised loss, [K], or None.

    - "median-frequency" (Eigen & Fergus, ICCV 2015; "balanced" is another name of it): the median
      of the frequencies over the class's own, a frequency being the class's pixels divided by the
      labelled pixels of the images that show it.
    - "effective-number" (Cui et al., CVPR 2019): (1 - β) / (1 - β^n), n the class's pixels. By
      default β = 1 - 1/N with N the labelled pixels of a mean image: what a class has beyond a few
      whole images no longer lowers its weight. (With the β of the paper, up to 0.9999, all classes
      weigh the same, as even rare ones have more than 10,000 pixels.)
    - a mapping: weights by class name, of which only the ratios count.

    Whatever the rule, weights are scaled so that their mean over the labelled pixels is 1: the loss
    divides by the count of pixels, so its size beside the other terms stays what it was. A class
    without a labelled pixel weighs 1, or what the mapping says: no pixel feels it.

    Args:
        rule: one of RULES, or weights by class name.
        pixels: int64 [images, K], see `Split.pixels`.
        names: of the classes.
        beta: of "effective-number", in [0, 1).

    Raises:
        UsageError: a mapping that lacks classes, has others, or gives every pixel weight 0.
    """
    if rule == "none":
        return None
    given = _by_name(rule, names) if isinstance(rule, Mapping) else None
    if not pixels.any():
        return np.ones(len(names))
    total = pixels.sum(0)
    seen = total > 0
    weights = np.ones(len(names))
    if given is not None:
        weights[:] = given
    elif rule in ("balanced", "median-frequency"):
        around = ((pixels > 0) * pixels.sum(1, keepdims=True)).sum(0)
        frequency = total[seen] / around[seen]
        weights[seen] = np.median(frequency) / frequency
    elif rule == "effective-number":
        n = total[seen].astype(np.float64)
        log_beta = math.log(beta) if beta else -math.inf
        if beta is None:
            log_beta = math.log1p(-1 / max(total.sum() / len(pixels), 2))
        weights[seen] = 1 / -np.expm1(n * log_beta)
    else:
        raise UsageError(f"class weight {rule!r}: expected one of {', '.join(RULES)}")
    mean = (weights * total).sum() / total.sum()
    if mean == 0:
        raise UsageError("train.class_weight: every class with a labelled pixel has weight 0")
    return weights / mean


def _by_name(rule: Mapping[str, float], names: Sequence[str]) -> list[float]:
    missing, unknown = [n for n in names if n not in rule], [n for n in rule if n not in names]
    if missing or unknown:
        parts = [f"no weight for {', '.join(missing)}"] * bool(missing)
        parts += [f"unknown class {', '.join(unknown)}"] * bool(unknown)
        raise UsageError(f"train.class_weight: {'; '.join(parts)}; the classes are "
                         f"{', '.join(names)}")
    return [rule[name] for name in names]


class ClassSampler:
    """Labelled images and crops by class: rare classes are asked for more often.

    Class c is drawn with probability proportional to exp((1 - f_c) / T), f_c being its share of the
    labelled pixels (Hoyer et al., DAFormer, CVPR 2022, section 3.3); then, uniformly, an image that
    shows it; then the crop is placed so that it shows a pixel of it.

    Args:
        pixels: int64 [images, K], see `Split.pixels`.
        temperature: T; small: the rarest class nearly always; large: all classes alike.
        seed: of the run.

    Raises:
        UsageError: no labelled pixel at all.
    """

    def __init__(self, pixels: NDArray[np.int64], temperature: float, seed: int) -> None:
        total = pixels.sum(0)
        if not total.any():
            raise UsageError("data.sampling: class-aware needs labelled pixels, found none")
        scores = np.where(total > 0, (1 - total / total.sum()) / temperature, -np.inf)
        odds = np.exp(scores - scores.max())
        self.probabilities = odds / odds.sum()
        self.seed = seed
        self._bounds = np.cumsum(self.probabilities)
        self._images = [np.flatnonzero(column).tolist() for column in pixels.T]

    def class_of(self, step: int, position: int) -> int:
        """The class that a place of the labelled batch is for."""
        return self._draw_class(Generator(self.seed, step, position, _CHOICE))

    def _draw_class(self, rng: Generator) -> int:
        drawn = int(np.searchsorted(self._bounds, rng.random() * self._bounds[-1], side="right"))
        return min(drawn, len(self._bounds) - 1)

    def images(self, step: int, position: int) -> Iterator[int]:
        """The images that show the place's class, in random order: the first one is taken."""
        rng = Generator(self.seed, step, position, _CHOICE)
        left = list(self._images[self._draw_class(rng)])
        while left:
            yield left.pop(rng.integer(0, len(left) - 1))

    def place(self, geometry: Geometry, label: NDArray[np.uint8], step: int,
              position: int) -> Geometry:
        """The crop moved so that it shows a pixel of the place's class, every such pixel alike.

        Args:
            geometry: a drawn crop; its scale and flip stay.
            label: of the whole image, [H, W].
            step: of the batch.
            position: in the global batch.

        Returns:
            The crop; the one given where no pixel of the class is left at its scale.
        """
        rows = nearest_pixels(label.shape[0], geometry.height, 0, geometry.height)
        columns = nearest_pixels(label.shape[1], geometry.width, 0, geometry.width)
        shown = (label == self.class_of(step, position))[rows][:, columns]
        hits = np.flatnonzero(shown)
        if not len(hits):
            return geometry
        rng = Generator(self.seed, step, position, _PLACE)
        y, x = divmod(int(hits[rng.integer(0, len(hits) - 1)]), geometry.width)
        return replace(geometry, top=_start(rng, y, geometry.height, geometry.crop),
                       left=_start(rng, x, geometry.width, geometry.crop))


def _start(rng: Generator, pixel: int, side: int, crop: int) -> int:
    """A first row (or column) of a crop that has the pixel, drawn uniformly."""
    last = max(side - crop, 0)
    return rng.integer(min(max(pixel - crop + 1, 0), last), min(pixel, last))
