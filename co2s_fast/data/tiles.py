"""Which images a prepared folder holds, and which group each belongs to."""

from __future__ import annotations

import csv
import re
from pathlib import Path

from co2s_fast.data.files import DESCRIPTION, Item
from co2s_fast.errors import DataError

TILES = "tiles.csv"
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")


def list_images(root: Path) -> list[Item]:
    """All images of a prepared folder by name, with their labels where there are any."""
    labels = {p.stem: p for p in _pictures(root / "labels")}
    raw = not (root / DESCRIPTION).is_file()
    return [Item(p.stem, p, labels.get(p.stem), raw) for p in _pictures(root / "images")]


def _pictures(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*") if p.suffix.lower() in SUFFIXES
                  and not p.name.startswith("."))


def read_groups(root: Path) -> dict[str, str]:
    """Group of each tile by file name, from `tiles.csv`; empty where there is none."""
    path = root / TILES
    if not path.is_file():
        return {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return {row["tile"]: row["group"] for row in csv.DictReader(file)}
    except (KeyError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: damaged, expected columns tile and group") from error


def group_from_name(name: str) -> str:
    """The group by name alone: the stem without the `_<y>_<x>` that cutting appends."""
    return re.sub(r"_\d+_\d+$", "", name)
