"""Which images a prepared folder holds, and which group each belongs to."""

from __future__ import annotations

import csv
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from co2s_fast.data.catalogue import DESCRIPTION, MaskSpec, load_dataset
from co2s_fast.data.files import Item
from co2s_fast.errors import DataError

TILES = "tiles.csv"
RECORD = "prepared.json"
"""Marks a folder that `data prepare` made."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
_CORNER = re.compile(r"(.+)_(\d{1,6})_(\d{1,6})")
_LEAST_STEP = 16  # pixels, as of `TileSpec.size`


def composed(name: str) -> str:
    """A name with one character for each accented letter, which looks the same and is.

    Files from a Mac may have two: the letter and its accent.
    """
    return unicodedata.normalize("NFC", name)


def list_images(root: Path) -> list[Item]:
    """All images of a prepared folder by name, with their labels where there are any."""
    labels = {composed(p.stem): p for p in _pictures(root / "labels")}
    raw = not is_uniform(root)
    return [Item(p.stem, p, labels.get(composed(p.stem)), raw) for p in _pictures(root / "images")]


def shared_names(root: Path) -> list[tuple[Path, ...]]:
    """Labels of one name, and labelled images of one name: nothing says which goes with which."""
    labels = _same_names(root / "labels")
    images = _same_names(root / "images")
    return [tuple(found) for found in labels.values() if len(found) > 1] + [
        tuple(found) for name, found in images.items() if len(found) > 1 and name in labels]


def shared_text(paths: Sequence[Path]) -> str:
    """What to say of files that `shared_names` found."""
    return (f"{' and '.join(map(str, paths))}: have one name, by which images and labels pair up; "
            "rename or remove all but one")


def _same_names(folder: Path) -> dict[str, list[Path]]:
    def stem(path: Path) -> str:
        return composed(path.stem)

    return {name: list(found) for name, found in groupby(sorted(_pictures(folder), key=stem), stem)}


def is_uniform(root: Path) -> bool:
    """Whether labels below root hold class ids (prepared here), not raw values (by others).

    A description that was written by hand beside raw files maps raw values or colours.
    """
    path = root / DESCRIPTION
    if not path.is_file():
        return False
    spec = load_dataset(path)
    return spec.mask == MaskSpec() and not any(each.values for each in spec.classes)


def _pictures(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*") if p.suffix.lower() in SUFFIXES
                  and not p.name.startswith("."))


def read_groups(root: Path) -> dict[str, str]:
    """Group of each tile by file name, from `tiles.csv`; empty where there is none."""
    return {row["tile"]: row["group"] for row in _rows(root)}


def _rows(root: Path) -> list[dict[str, str]]:
    """The lines of `tiles.csv`; none where there is none."""
    path = root / TILES
    if not path.is_file():
        return []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [{key: value or "" for key, value in row.items()}
                    for row in csv.DictReader(file)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: damaged, expected columns tile and group") from error
    if any(not {"tile", "group"} <= row.keys() for row in rows):
        raise DataError(f"{path}: damaged, expected columns tile and group")
    return rows


@dataclass(frozen=True)
class Corner:
    """Where a tile begins in its scaled raw image, in pixels, and the group of that image."""

    group: str
    y: int
    x: int


def read_corners(root: Path) -> dict[str, Corner]:
    """Corner of each tile by file name, from `tiles.csv`; empty where that does not say."""
    return {row["tile"]: Corner(row["group"], int(row["y"]), int(row["x"]))
            for row in _rows(root) if row.get("y", "").isdigit() and row.get("x", "").isdigit()}


def group_from_name(name: str) -> str:
    """The group by name alone: the stem without the `_<y>_<x>` that cutting appends."""
    return re.sub(r"_\d+_\d+$", "", name)


def guess_groups(names: Sequence[str]) -> dict[str, str]:
    """Group of each image of a folder by the stems alone; its own name where they tell nothing.

    Names of cameras, `DJI_20230101_0001`, end in two numbers as well. They are places of tiles
    where tiles begin at 0, or lie at multiples of a step, or count rows and columns from 1.
    """
    groups = {name: name for name in names}
    tiles = [match for name in names if (match := _CORNER.fullmatch(name))]
    if tiles and _are_places({int(each[2]) for each in tiles}, {int(each[3]) for each in tiles}):
        groups |= {each[0]: group_from_name(each[0]) for each in tiles}
    return groups


def _are_places(ys: set[int], xs: set[int]) -> bool:
    counted = min(ys) <= 1 and min(xs) <= 1 and len(ys) > 1 and len(xs) > 1
    return min(ys) == min(xs) == 0 or math.gcd(*ys, *xs) >= _LEAST_STEP or counted
