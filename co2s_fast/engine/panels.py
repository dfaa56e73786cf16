"""Pictures of a fixed choice of validation images: image, truth, predictions, disagreement.

Files of one picture share a prefix: `panels/03-tile_7.image.png`, `.truth.png`, `.clip.png`, ...
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from co2s_fast.data.catalogue import IGNORE
from co2s_fast.data.stretching import as_bytes
from co2s_fast.data.writing import replacing

MAX_SIDE = 512
CANDIDATES = 64
UNLABELLED_COLOR = (236, 236, 236)

# Okabe and Ito's colours: they stay apart for readers with any form of colour blindness.
DISAGREEMENT = (
    ("agree, right", (255, 255, 255)),
    ("agree, wrong", (150, 150, 150)),
    ("only {0} right", (0, 114, 178)),
    ("only {1} right", (230, 159, 0)),
    ("differ, both wrong", (60, 20, 60)),
    ("no label", UNLABELLED_COLOR),
)

_NAME = re.compile(r"(?P<number>\d+)-(?P<name>.*)\.(?P<part>[a-z0-9_]+)\.png")


@dataclass(frozen=True)
class Panel:
    """The pictures of one image: part name ("image", "truth", a student, ...) -> file."""

    number: int
    name: str
    parts: dict[str, Path]


def choose(items: Any, count: int, num_classes: int) -> list[int]:
    """Positions of `count` images that together show as many classes as possible.

    A function of the data alone, so that every evaluation of a run draws the same images. Greedy
    over at most 64 candidates spread evenly: the next image is the one that adds the most to
    sum_k sqrt(share of class k).
    """
    if not (hasattr(items, "__len__") and hasattr(items, "__getitem__")):
        return list(range(count))
    total = len(items)
    spread = np.linspace(0, total - 1, min(total, CANDIDATES)).round().astype(int)
    candidates = sorted(set(spread.tolist()))
    if len(candidates) <= count:
        return candidates
    shares = np.zeros((len(candidates), num_classes))
    for row, position in enumerate(candidates):
        label = items[position][1]
        if label is not None:
            values = np.asarray(label)
            found = np.bincount(values[values != IGNORE].ravel(), minlength=num_classes)
            shares[row] = found[:num_classes] / max(values.size, 1)
    chosen: list[int] = []
    for _ in range(count):
        gain = np.sqrt(shares[chosen].sum(0) + shares).sum(1)
        gain[chosen] = -1
        chosen.append(int(gain.argmax()))
    return [candidates[row] for row in sorted(chosen)]


def disagreement(truth: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Where two students part, and which of them is right: codes into `DISAGREEMENT`."""
    right_first, right_second = first == truth, second == truth
    codes = np.full(truth.shape, 4, dtype=np.uint8)
    codes[first == second] = 1
    codes[right_first & right_second] = 0
    codes[right_first & ~right_second] = 2
    codes[~right_first & right_second] = 3
    codes[truth == IGNORE] = 5
    return codes


def save(
    folder: Path,
    number: int,
    name: str,
    image: np.ndarray,
    truth: np.ndarray,
    maps: Mapping[str, np.ndarray],
    palette: Sequence[tuple[int, int, int]],
) -> None:
    """Write the pictures of one image, all at the label's size (long side 512 at most).

    Args:
        folder: RUN/panels.
        number: place among the chosen images.
        name: of the image.
        image: uint8, or float in [0, 1], [H,W,C]; the first three channels are shown (one channel
            as grey).
        truth: uint8 [h,w], 255 where there is no label.
        maps: prediction name -> uint8 [h,w].
        palette: colour of each class.
    """
    for old in folder.glob(f"{number:02d}-*.png"):
        old.unlink()
    height, width = truth.shape
    scale = min(1.0, MAX_SIDE / max(height, width))
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    parts = {"truth": indexed(truth, palette)}
    parts |= {student: indexed(labels, palette) for student, labels in maps.items()}
    pair = list(maps)[:2]
    if len(pair) == 2:
        colors = [color for _, color in DISAGREEMENT]
        parts["disagreement"] = indexed(disagreement(truth, *(maps[n] for n in pair)), colors)
    shown = Image.fromarray(as_rgb(image)).resize(size, Image.Resampling.LANCZOS)
    files = {"image": shown}
    files |= {n: m.resize(size, Image.Resampling.NEAREST) for n, m in parts.items()}
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", name)
    for part, picture in files.items():
        with replacing(folder / f"{number:02d}-{stem}.{part}.png") as temporary:
            picture.save(temporary, format="PNG")


def read(folder: Path) -> list[Panel]:
    """The pictures in a run's panel folder, in order; empty if there are none."""
    found: dict[tuple[int, str], dict[str, Path]] = {}
    for path in sorted(folder.glob("*.png")):
        match = _NAME.fullmatch(path.name)
        if match:
            found.setdefault((int(match["number"]), match["name"]), {})[match["part"]] = path
    return [Panel(number, name, parts) for (number, name), parts in sorted(found.items())]


def remove_from(folder: Path, count: int) -> None:
    """Delete pictures numbered `count` and up: left over from an evaluation that drew more."""
    for panel in read(folder):
        if panel.number >= count:
            for path in panel.parts.values():
                path.unlink(missing_ok=True)


def indexed(
    labels: np.ndarray,
    palette: Sequence[tuple[int, int, int]],
    unlabelled: tuple[int, int, int] = UNLABELLED_COLOR,
) -> Image.Image:
    """A palette picture of class ids uint8 [H,W]; 255 is drawn in the colour `unlabelled`."""
    colors = [(0, 0, 0)] * 256
    colors[: len(palette)] = [tuple(color) for color in palette]
    colors[IGNORE] = unlabelled
    picture = Image.fromarray(np.ascontiguousarray(labels, dtype=np.uint8))
    picture.putpalette([channel for color in colors for channel in color])
    return picture


def as_rgb(image: np.ndarray, channels: Sequence[int] | None = None) -> np.ndarray:
    """Three channels of an image [H,W,C], uint8 or float in [0, 1], as uint8 [H,W,3].

    Args:
        image: the image.
        channels: which; None: the first three, or the first one three times.
    """
    if channels is None:
        channels = [0, 1, 2] if image.shape[2] >= 3 else [0, 0, 0]
    return np.ascontiguousarray(as_bytes(image[..., list(channels)]))
