"""What polygons hold, for the description that `data describe` proposes: the field of the class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from co2s_fast.data.burn import as_key, one_kind, reading_polygons, require_fiona
from co2s_fast.errors import DataError

_NAMES = ("class", "label", "category", "type", "code", "name")
"""Parts of an attribute's name that say class, the surest first."""
_OTHER = "\0"  # stands for what cannot be a class, as 0.5


@dataclass
class PolygonContent:
    """What polygons hold.

    Args:
        attribute: the field that tells their classes, as it seems.
        values: polygons of each of its values, as text.
        others: further fields that could.
        polygons: how many were looked at.
        masks: in how many files.
    """

    attribute: str
    values: Counter[str]
    others: list[str]
    polygons: int
    masks: int


def read_polygons(paths: Sequence[Path], most: int, progress: bool = True) -> PolygonContent:
    """The classes of polygons.

    Args:
        paths: of the files.
        most: different values of a field; more are no classes.
        progress: draw a bar.

    Raises:
        UsageError: fiona is not installed.
        DataError: a file is damaged, or no field that all files have could tell classes.
    """
    require_fiona()
    import fiona

    counts: dict[str, Counter[str]] | None = None
    polygons = 0
    for path in tqdm(paths, desc="reading polygons", unit="file", leave=False,
                     disable=not progress or len(paths) < 8):  # fmt: skip
        with reading_polygons(path), fiona.open(path) as layer, one_kind(path, layer):
            names = layer.schema["properties"]
            counts = {name: Counter() for name in names} if counts is None else {
                name: values for name, values in counts.items() if name in names}
            for feature in layer:
                polygons += 1
                for name, values in counts.items():
                    value = _value(feature.properties[name])
                    if value and len(values) <= most:
                        values[value] += 1
    counts = counts or {}
    usable = [name for name, values in counts.items()
              if 2 <= len(values) <= most and _OTHER not in values]
    if not usable:
        raise DataError(f"{paths[0]}: polygons, of which no attribute has 2 to {most} different "
                        f"values that could be classes, found {', '.join(counts) or 'none'}; "
                        "examples/datasets/multispectral.yaml describes polygons")
    # Of equals the first; a number of its own for each polygon is no class.
    best = min(usable, key=lambda name: (_rank(name), len(counts[name]) == polygons))
    others = [name for name in usable if name != best]
    return PolygonContent(best, counts[best], others, polygons, len(paths))


def _value(value: object) -> str:
    """A value as text, empty where there is none."""
    if value is None:
        return ""
    whole = isinstance(value, float) and value.is_integer()
    if isinstance(value, bool) or not (whole or isinstance(value, (str, int))):
        return _OTHER
    return as_key(value)


def _rank(name: str) -> int:
    """How little a field's name says class."""
    return next((i for i, word in enumerate(_NAMES) if word in name.lower()), len(_NAMES))
