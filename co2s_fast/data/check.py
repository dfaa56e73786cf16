"""Looking at the data before it is trained on: what is there, and what is wrong with it.

Levels: "quick" reads headers, file endings and the labels that training and validation need, and
runs at the start of every training; "full" decodes every file.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

from co2s_fast.data.catalogue import IGNORE, DatasetSpec
from co2s_fast.data.config import DataConfig
from co2s_fast.data.files import Item, load_label, load_rgb, write_text
from co2s_fast.data.splits import Split, describe_root, find_root, overlaps, read_list, summary
from co2s_fast.data.tiles import list_images, read_groups
from co2s_fast.errors import DataError

Level = Literal["quick", "full"]
_TAILS = {"PNG": b"IEND", "JPEG": b"\xff\xd9"}


@dataclass
class Report:
    """What was found. `pixels` counts per class and "ignored"; `sizes` counts "W x H".

    Problems make training wrong or impossible; warnings are worth knowing.
    """

    dataset: str
    root: str
    level: Level
    images: int = 0
    labels: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    pixels: dict[str, int] = field(default_factory=dict)
    lists: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join(_render(self))

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)

    def raise_problems(self) -> None:
        """Raise a DataError that names the first problems, if there are any."""
        if self.problems:
            raise DataError(summary(self.problems))


@dataclass
class _Seen:
    """One file pair as it was found."""

    size: tuple[int, int] | None = None
    counts: np.ndarray | None = None
    problems: list[str] = field(default_factory=list)


def check_dataset(root: Path, spec: DatasetSpec | None = None, *, split: Path | None = None,
                  batch_size: int = 1, level: Level = "full", json_path: Path | None = None,
                  progress: bool = True) -> Report:
    """Check a prepared folder, every split list below it, and one elsewhere.

    Args:
        root: the prepared folder.
        spec: the dataset; None: what the folder itself says it is.
        split: a split folder that is checked too.
        batch_size: labelled lists shorter than this are warned about.
        level: "quick" or "full".
        json_path: where the report is written as JSON too.
        progress: show a bar where it takes long.

    Raises:
        DataError: the folder is not there. Everything else is in the report.
    """
    root = Path(root)
    spec = spec or describe_root(root)
    root = find_root(DataConfig(root=root), spec)
    items = list_images(root)
    report = Report(spec.name, str(root), level)
    if not items:
        report.problems.append(f"{root / 'images'}: no images")
    stems = {item.label for item in items}
    report.problems += [f"{p}: label without an image" for p in sorted((root / "labels").glob("*"))
                        if p not in stems and not p.name.startswith(".")]
    counts = _inspect(items, spec, report, level, progress)
    report.problems += [f"class {name}: no pixel in any label"
                        for name, n in zip(spec.class_names, counts, strict=False)
                        if report.labels and n == 0]
    folders = {p.parent for p in (root / "splits").glob("*/labeled.txt")}
    for folder in sorted(folders | ({Path(split)} if split else set())):
        _check_folder(folder, root, batch_size, report)
    if json_path is not None:
        write_text(Path(json_path), report.to_json() + "\n")
    return report


def check_split(split: Split, spec: DatasetSpec, config: DataConfig, *, level: Level = "quick",
                progress: bool = True) -> Report:
    """Check the images of one split: what `open_split` runs before any training time is spent."""
    report = Report(spec.name, str(split.folder), level)
    trained = _inspect(split.labeled, spec, report, level, progress)
    missing = [f"class {name}: no pixel in any of {len(split.labeled)} labelled images; label "
               "more, take another seed, or set data.missing_classes=warn"
               for name, n in zip(spec.class_names, trained, strict=False) if n == 0]
    (report.problems if config.missing_classes == "error" else report.warnings).extend(missing)
    _inspect(split.val, spec, report, level, progress)
    _inspect(split.unlabeled, spec, report, level, progress, labels=level != "quick")
    return report


def _inspect(items: Iterable[Item], spec: DatasetSpec, report: Report, level: Level,
             progress: bool, labels: bool = True) -> np.ndarray:
    """Look at every item, add what was found to the report, return pixel counts [256]."""
    items, counts = list(items), np.zeros(256, np.int64)
    sizes: Counter[str] = Counter(report.sizes)
    found = _parallel(lambda item: _look(item, spec, level, labels), items,
                      f"checking {spec.name}", progress)
    for item, seen in zip(items, found, strict=True):
        report.problems += seen.problems
        report.images += 1
        report.labels += item.label is not None
        if seen.size:
            sizes[f"{seen.size[0]} x {seen.size[1]}"] += 1
        if seen.counts is not None:
            counts += seen.counts
    report.sizes = dict(sizes.most_common())
    for name, index in [*zip(spec.class_names, range(256), strict=False), ("ignored", IGNORE)]:
        report.pixels[name] = report.pixels.get(name, 0) + int(counts[index])
    return counts


def _parallel(work: Callable[[Item], _Seen], items: list[Item], title: str,
              progress: bool) -> list[_Seen]:
    """Map over items in threads (decoding releases the interpreter lock), in order."""
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        return list(tqdm(pool.map(work, items), total=len(items), desc=title, unit="image",
                         leave=False, disable=not progress or len(items) < 200))


def _look(item: Item, spec: DatasetSpec, level: Level, labels: bool) -> _Seen:
    seen = _Seen()
    try:
        if level == "full" or not _looks_whole(item.image):
            seen.size = load_rgb(item.image).size
        else:
            seen.size = _header_size(item.image)
    except DataError as error:
        seen.problems.append(str(error))
    if item.label is None:
        return seen
    try:
        if labels or not _looks_whole(item.label):
            label = load_label(item, spec)
            seen.counts = np.bincount(label.ravel(), minlength=256)
            size = label.shape[::-1]
        else:
            size = _header_size(item.label)
        if seen.size and size != seen.size:
            seen.problems.append(f"{item.label}: {size[0]} x {size[1]} pixels, its image "
                                 f"{item.image} has {seen.size[0]} x {seen.size[1]}")
    except DataError as error:
        seen.problems.append(str(error))
    return seen


def _header_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def _looks_whole(path: Path) -> bool:
    """Whether header and ending are those of a complete file. False: decode it to be sure."""
    try:
        with Image.open(path) as image:
            tail = _TAILS.get(image.format or "")
        with path.open("rb") as file:
            file.seek(-min(64, path.stat().st_size), os.SEEK_END)
            return tail is not None and tail in file.read()
    except (OSError, SyntaxError, ValueError):
        return False


def _check_folder(folder: Path, root: Path, batch_size: int, report: Report) -> None:
    """Add what is wrong with one split folder's lists."""
    problems = report.problems
    val_list = folder / "val.txt" if (folder / "val.txt").is_file() else folder.parent / "val.txt"
    unlabeled_list = folder / "unlabeled.txt"
    split = Split(
        read_list(folder / "labeled.txt", root, problems, need_label=True),
        read_list(unlabeled_list, root, problems, need_label=False, may_be_empty=True)
        if unlabeled_list.is_file() else [],
        read_list(val_list, root, problems, need_label=True), folder,
    )
    problems += [f"{folder}: {text}" for text in overlaps(split)]
    if 0 < len(split.labeled) < batch_size:
        report.warnings.append(f"{folder}: {len(split.labeled)} labelled images, fewer than a "
                               f"batch of {batch_size}")
    report.warnings += _shared_groups(split, read_groups(root), folder)
    for name in ("labeled", "unlabeled", "val"):
        report.lists[f"{folder.name}/{name}"] = len(getattr(split, name))


def _shared_groups(split: Split, groups: dict[str, str], folder: Path) -> list[str]:
    trained = {groups.get(i.image.name) for i in [*split.labeled, *split.unlabeled]} - {None}
    both = trained & {groups.get(item.image.name) for item in split.val}
    if not both:
        return []
    return [f"{folder}: {len(both)} groups are in both training and validation, for example "
            f"{min(both)}"]


def _render(report: Report) -> list[str]:
    lines = [f"dataset {report.dataset} in {report.root}: {report.images} images, "
             f"{report.labels} with a label ({report.level} check)"]
    shown = list(report.sizes.items())
    lines += ["", f"{'size':<24}{'images':>12}"] + [f"{s:<24}{n:>12}" for s, n in shown[:8]]
    if len(shown) > 8:
        lines.append(f"{f'{len(shown) - 8} other sizes':<24}{sum(n for _, n in shown[8:]):>12}")
    total = max(sum(report.pixels.values()), 1)
    lines += ["", f"{'class':<24}{'pixels':>16}{'share':>9}"]
    lines += [f"{name:<24}{n:>16}{n / total:>9.2%}" for name, n in report.pixels.items()]
    if report.lists:
        lines += ["", f"{'list':<24}{'images':>12}"]
        lines += [f"{name:<24}{n:>12}" for name, n in report.lists.items()]
    lines += [""] + [f"warning: {text}" for text in report.warnings]
    lines += [f"problem: {text}" for text in report.problems] or ["no problems"]
    return lines
