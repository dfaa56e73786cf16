"""Which images validate: whole groups, or a block of tiles where one scene alone has labels."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from co2s_fast.data.catalogue import DatasetSpec
from co2s_fast.data.files import Item
from co2s_fast.data.tiles import TILES, Corner, composed, guess_groups, read_corners, read_groups
from co2s_fast.errors import DataError

_SEED = 0


@dataclass
class HeldOut:
    """Files (by name) that validate, those that are left out of everything, and what to say."""

    val: set[str]
    apart: set[str]
    notes: list[str] = field(default_factory=list)


def hold_out(root: Path, items: Sequence[Item], spec: DatasetSpec) -> HeldOut:
    """Choose the validation images by the dataset's rule, `spec.val`.

    Whole groups that have a label; their unlabelled images are left out. Where one group alone has
    labels and was cut into tiles, the tiles at its lower or right end. Without `tiles.csv` names
    tell the groups; where they tell of one alone, each image is one.

    Raises:
        DataError: no labelled group matches the patterns, or there is nothing to divide.
    """
    known, guessed, notes = read_groups(root), guess_groups([i.name for i in items]), []
    groups = {i.image.name: known.get(i.image.name) or guessed[i.name] for i in items}
    if not known and len(set(groups.values())) == 1 < len(items):
        notes.append(f"by their names all images are tiles of one scene, {guessed[items[0].name]}: "
                     f"without {TILES} each validates or trains by itself, and scores on a part of "
                     "the same scene promise more than another scene holds")
        groups = {i.image.name: i.name for i in items}
    names = list(dict.fromkeys(groups[i.image.name] for i in items if i.label is not None))
    if isinstance(spec.val, list):
        held = {g for g in names if any(fnmatchcase(composed(g), composed(pattern))
                                        for pattern in spec.val)}
        if not held:
            raise DataError(f"{root}: no labelled group matches the validation patterns "
                            f"{', '.join(spec.val)}; groups are {', '.join(names[:4])}, ...")
    elif len(names) == 1:
        inside = [i for i in items if groups[i.image.name] == names[0]]
        return _part_of_scene(root, names[0], inside, spec)
    elif not names:
        raise DataError(f"{root}: no image has a label, so none can validate")
    else:
        order = np.random.default_rng(_SEED).permutation(len(names))
        held = {names[i] for i in order[: max(round(len(names) * spec.val), 1)]}
    inside = [i for i in items if groups[i.image.name] in held]
    val = {i.image.name for i in inside if i.label is not None}
    return HeldOut(val, {i.image.name for i in inside} - val, notes)


def apart_from(root: Path, items: Sequence[Item], listed: Collection[str],
               spec: DatasetSpec) -> set[str]:
    """Names of images that must not be trained on, beside those a given list validates on.

    All of a group that `tiles.csv` names, of which one is listed. Groups guessed from names do not
    overrule a list that came from elsewhere. Where that takes every labelled image, and some of
    them are not listed, one scene is shared: only tiles that overlap a listed one.
    """
    known = read_groups(root)
    held = {known[name] for name in listed if name in known}
    inside = [i for i in items if known.get(i.image.name) in held and i.image.name not in listed]
    labelled = [i for i in items if i.label is not None and i.image.name not in listed]
    shared = labelled and all(known.get(i.image.name) in held for i in labelled)
    if not shared or (side := _side(spec)) is None:
        return {i.image.name for i in inside}
    corners = read_corners(root)
    fixed = [corners[name] for name in listed if name in corners]
    return {i.image.name for i in inside
            if i.image.name not in corners or _overlaps(corners[i.image.name], fixed, side)}


def _part_of_scene(root: Path, name: str, items: Sequence[Item], spec: DatasetSpec) -> HeldOut:
    """A block at the end of the only scene that has labels, and what overlaps it."""
    side, corners = _side(spec), read_corners(root)
    places = [(i, corners[i.image.name]) for i in items if i.image.name in corners]
    labelled = [(i, corner) for i, corner in places if i.label is not None]
    if side is None or len(labelled) < 2:
        guess = "" if len(items) == 1 or (root / TILES).is_file() else (
            f"; the group is a guess by {len(items)} names, which a {TILES} with columns tile and "
            "group overrules")
        raise DataError(f"{root}: one group of images alone has labels, {name}, and it is not cut "
                        "into tiles; validation needs a second one: label another image, or cut "
                        f"this one (`tile: {{size: ...}}`){guess}")
    wanted = max(round(len(labelled) * float(spec.val)), 1)
    axes = ("y", "x") if _count(labelled, "y") >= _count(labelled, "x") else ("x", "y")
    for axis in axes:
        starts = sorted((getattr(corner, axis) for _, corner in labelled), reverse=True)
        first = starts[wanted - 1]  # the block begins here
        block = {i.image.name: corner for i, corner in labelled if getattr(corner, axis) >= first}
        fixed = list(block.values())
        free = {i.image.name for i, corner in places
                if i.image.name not in block and not _overlaps(corner, fixed, side)}
        if any(i.image.name in free for i, _ in labelled):
            end = "lower" if axis == "y" else "right"
            apart = {i.image.name for i in items} - block.keys() - free
            return HeldOut(set(block), apart, [
                f"{labelled[0][1].group} alone has labels: the {len(block)} tiles at its {end} end "
                f"validate, {len(apart)} that overlap them are left out; scores on a part of the "
                "same scene promise more than another scene holds"])
    raise DataError(f"{root}: one scene alone has labels, and its {len(labelled)} labelled tiles "
                    "overlap so that none would be left to train on; label another image, or cut "
                    "smaller tiles")


def _count(places: Sequence[tuple[Item, Corner]], axis: str) -> int:
    return len({getattr(corner, axis) for _, corner in places})


def _side(spec: DatasetSpec) -> int | None:
    """Of the largest tiles, in pixels; None where images stay whole."""
    tiles = [spec.tile, *(files.tile for files in spec.layouts if files.tile is not None)]
    return max((tile.size for tile in tiles if tile.size is not None), default=None)


def _overlaps(corner: Corner, others: Sequence[Corner], side: int) -> bool:
    return any(corner.group == other.group and abs(corner.y - other.y) < side
               and abs(corner.x - other.x) < side for other in others)
