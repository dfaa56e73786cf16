"""Which images a prepared folder holds, and which group each belongs to."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path

from co2s_fast.data.catalogue import MaskSpec, load_dataset
from co2s_fast.data.files import DESCRIPTION, Item
from co2s_fast.errors import DataError

TILES = "tiles.csv"
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")


def list_images(root: Path) -> list[Item]:
    """All images of a prepared folder by name, with their labels where there are any."""
    labels = {p.stem: p for p in _pictures(root / "labels")}
    raw = not is_uniform(root)
    return [Item(p.stem, p, labels.get(p.stem), raw) for p in _pictures(root / "images")]


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
