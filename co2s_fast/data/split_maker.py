"""Making a split: which images validate, and which of the others are labelled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pydantic import ValidationError
from tqdm import tqdm

from co2s_fast.data.catalogue import DESCRIPTION, DatasetSpec, explain, load_dataset
from co2s_fast.data.config import DataConfig, parse_ratio
from co2s_fast.data.files import Item, load_label
from co2s_fast.data.hold_out import apart_from, hold_out
from co2s_fast.data.splits import (
    SPLITS,
    describe_root,
    find_root,
    read_list,
    split_name,
    summary,
)
from co2s_fast.data.tiles import list_images, shared_names, shared_text
from co2s_fast.data.writing import write_text
from co2s_fast.errors import DataError, UsageError

_COVERED = 0.01  # share of an image that a class must fill for the image to count as covering it


@dataclass
class CreatedSplit:
    """Where a split was written, its sizes, and what there is to say about it."""

    folder: Path
    labeled: int
    unlabeled: int
    val: int
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join(self.notes)


def split_dataset(root: Path, spec: DatasetSpec | None = None, *, ratio: str | None = None,
                  labels: int | None = None, seed: int = 0, progress: bool = True) -> CreatedSplit:
    """Write `splits/<name>/labeled.txt`, `unlabeled.txt`, and `splits/val.txt` where it is missing.

    Validation takes whole groups by the dataset's rule (of a single labelled scene a block of its
    tiles), whatever the seed, so all splits of a dataset validate on the same images. Labelled
    images are the first of one order that depends on the seed only: smaller splits are nested in
    larger ones. That order starts with images that together show every class.

    Args:
        root: the prepared folder.
        spec: the dataset; None: what the folder itself says it is.
        ratio: share of the training images that are labelled, "1/16"; rounded down, at least one.
        labels: number of labelled images, instead of a ratio.
        seed: of the order.
        progress: show a bar where it takes long.

    Raises:
        UsageError: neither or both of ratio and labels.
        DataError: nothing to split, or more labels wanted than there are.
    """
    if (ratio is None) == (labels is None):
        raise UsageError("give either a ratio or a number of labels")
    try:
        config = DataConfig(root=root, ratio=ratio, labels=labels, split_seed=seed)
    except ValidationError as error:
        raise UsageError(explain(error)) from error
    spec = spec or describe_root(Path(root))
    root = find_root(config, spec)
    train, val, notes = _train_and_val(root, spec)
    wanted = labels if labels is not None else int(len(train) * parse_ratio(ratio or ""))
    candidates = [item for item in train if item.label is not None]
    shares = _class_shares(candidates, spec, progress)
    useful = np.flatnonzero(shares.sum(1))  # an image that is ignored all over teaches nothing
    candidates, shares = [candidates[i] for i in useful], shares[useful]
    if not max(wanted, 1) <= len(candidates):
        raise DataError(f"{root}: {wanted} labelled images wanted, {len(candidates)} of "
                        f"{len(train)} training images have a label")
    order = labeled_order(shares, seed)[: max(wanted, 1)]
    notes += _missing_classes(shares[order], spec)
    chosen = {candidates[i].image for i in order}
    folder = root / SPLITS / split_name(config)
    _write_list(folder / "val.txt", val, root)
    _write_list(folder / "unlabeled.txt", [t for t in train if t.image not in chosen], root)
    # Last: where it is, the split counts as made.
    _write_list(folder / "labeled.txt", [candidates[i] for i in order], root)
    created = CreatedSplit(folder, len(order), len(train) - len(order), len(val))
    created.notes = [f"made the split {folder}: {created.labeled} labelled, {created.unlabeled} "
                     f"unlabelled, {created.val} validation images, seed {seed}", *notes]
    return created


def _train_and_val(root: Path, spec: DatasetSpec) -> tuple[list[Item], list[Item], list[str]]:
    items = list_images(root)
    if not items:
        raise DataError(f"{root / 'images'}: no images")
    problems = [shared_text(paths) for paths in shared_names(root)]
    if problems:
        raise DataError(summary(problems))
    val_list, notes, prepared = root / SPLITS / "val.txt", [], _prepared(root, spec)
    if val_list.is_file():
        listed = {i.image.name for i in read_list(val_list, root, problems, need_label=True)}
        if problems:
            raise DataError(summary(problems))
        apart = apart_from(root, items, listed, prepared)
    else:
        held = hold_out(root, items, prepared)
        listed, apart = held.val, held.apart
        notes += [f"held {len(listed)} images out for validation ({val_list})", *held.notes]
        _write_list(val_list, [i for i in items if i.image.name in listed], root)
    train = [i for i in items if i.image.name not in listed | apart]
    if not train:
        raise DataError(f"{root}: all {len(items)} images are in groups held out for validation "
                        f"({val_list}), none are left to train on")
    return train, [i for i in items if i.image.name in listed], notes


def _prepared(root: Path, spec: DatasetSpec) -> DatasetSpec:
    """The description that came with the prepared folder, else the dataset's."""
    description = root / DESCRIPTION
    return load_dataset(description) if description.is_file() else spec


def training_images(root: Path, spec: DatasetSpec) -> tuple[list[Item], list[str]]:
    """The images that the dataset's own rule leaves to train on, and what there is to say.

    All images, where the rule cannot be applied (yet): with labels for one group only, or none.
    """
    items = list_images(root)
    try:
        held = hold_out(root, items, spec)
    except DataError as error:
        return items, [f"band statistics are of all images, validation included: {error}"]
    train = [i for i in items if i.image.name not in held.val | held.apart]
    if not train:
        return items, ["band statistics are of all images: every group is held out to validate"]
    return train, []


def _class_shares(items: Sequence[Item], spec: DatasetSpec, progress: bool) -> np.ndarray:
    """Share of each class in each image, [images, classes]."""
    shares = np.zeros((len(items), spec.num_classes))
    for row, item in enumerate(tqdm(items, desc="counting classes", unit="image", leave=False,
                                    disable=not progress or len(items) < 200)):
        label = load_label(item, spec)
        counts = np.bincount(label.ravel(), minlength=256)[: spec.num_classes]
        shares[row] = counts / max(label.size, 1)
    return shares


def labeled_order(shares: np.ndarray, seed: int) -> np.ndarray:
    """Order in which images are labelled: random, but the first ones together show every class.

    Among the images in random order, the one that shows most classes not yet shown comes next,
    until every class that occurs is shown; the rest follow in random order.

    Args:
        shares: share of each class in each image, [images, classes].
        seed: of the random order.
    """
    order = np.random.default_rng(seed).permutation(len(shares))
    floor = np.minimum(_COVERED, shares.max(0, initial=0))
    shows = (shares >= floor) & (shares > 0)
    left, first = (shares > 0).any(0), []
    while left.any():
        gains = (shows[order] & left).sum(1)
        gains[np.isin(order, first)] = 0
        best = int(order[gains.argmax()])
        first.append(best)
        left &= ~shows[best]
    return np.array([*first, *order[~np.isin(order, first)]], dtype=np.int64)


def _missing_classes(shares: np.ndarray, spec: DatasetSpec) -> list[str]:
    missing = [name for name, total in zip(spec.class_names, shares.sum(0), strict=True)
               if total == 0]
    return [f"warning: no labelled image shows {', '.join(missing)}"] if missing else []


def _write_list(path: Path, items: Sequence[Item], root: Path) -> None:
    lines = []
    for item in items:
        files = [item.image] if item.label is None else [item.image, item.label]
        names = [f.relative_to(root).as_posix() for f in files]
        spaced = any(" " in name for name in names)
        lines.append("\t".join([*names, ""][:2]) if spaced else " ".join(names))
    write_text(path, "".join(line + "\n" for line in lines))
