"""Looking at the data before it is trained on: what is there, and what is wrong with it.

Levels: "quick" reads headers, file endings and labels; its cheap part runs at the start of every
training. "deep" decodes every file and looks for pictures that are in both training and validation.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from co2s_fast.data.catalogue import IGNORE, DatasetSpec
from co2s_fast.data.config import DataConfig
from co2s_fast.data.files import Item
from co2s_fast.data.imagery import BandStatistics
from co2s_fast.data.integrity import Finding, Look, Seen, inspect_all
from co2s_fast.data.leaks import duplicate_findings
from co2s_fast.data.splits import (
    Split,
    describe_root,
    find_root,
    find_val_list,
    overlaps,
    read_list,
    summary,
)
from co2s_fast.data.tiles import list_images, read_groups, shared_names, shared_text
from co2s_fast.data.writing import write_text
from co2s_fast.errors import DataError, UsageError

Level = Literal["quick", "deep"]
FORMAT = 1
_LOOKS = {"quick": Look(), "deep": Look(decode=True, prints=True)}


@dataclass
class Report:
    """What was found, as `to_json` writes it too.

    Args:
        dataset: its name.
        root: the folder that was looked at.
        level: how closely.
        images: number of images.
        labels: number of images with a label.
        sizes: images of each size, "W x H".
        pixels: labelled pixels of each class, and "ignored" ("(no class)" where a class has that
            name).
        lists: length of each list, by "split/list".
        labeled_pixels: the same as `pixels` over the labelled list of each split.
        findings: everything that is wrong, `Finding` each: kind, message, files, severity.
        statistics: of the bands, where images are not 8-bit colour or grey.
    """

    dataset: str
    root: str
    level: Level
    images: int = 0
    labels: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    pixels: dict[str, int] = field(default_factory=dict)
    lists: dict[str, int] = field(default_factory=dict)
    labeled_pixels: dict[str, dict[str, int]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    statistics: BandStatistics | None = None

    @property
    def problems(self) -> list[str]:
        """What makes training wrong or impossible, one line each."""
        return [each.message for each in self.findings if each.severity == "problem"]

    @property
    def warnings(self) -> list[str]:
        """What is worth knowing, one line each."""
        return [each.message for each in self.findings if each.severity == "warning"]

    def __str__(self) -> str:
        return "\n".join(_render(self))

    def to_json(self) -> str:
        """The report as JSON: the fields above, "format" 1, and "problems" and "warnings"."""
        content = {"format": FORMAT, **asdict(self), "problems": self.problems,
                   "warnings": self.warnings,
                   "statistics": self.statistics and self.statistics.model_dump()}
        return json.dumps(content, indent=1, ensure_ascii=False)

    def raise_problems(self) -> None:
        """Raise a DataError that names the first problems, if there are any."""
        if self.problems:
            raise DataError(summary(self.problems))


def check_dataset(root: Path, spec: DatasetSpec | None = None, *, split: Path | None = None,
                  batch_size: int = 1, level: Level = "quick", json_path: Path | None = None,
                  workers: int | None = None, progress: bool = True) -> Report:
    """Check a prepared folder, every split list below it, and one elsewhere.

    Args:
        root: the prepared folder.
        spec: the dataset; None: what the folder itself says it is.
        split: a split folder that is checked too.
        batch_size: labelled lists shorter than this are warned about.
        level: "quick" or "deep".
        json_path: where the report is written as JSON too.
        workers: processes (deep) or threads (quick); None: one a core.
        progress: show a bar where it takes long.

    Raises:
        DataError: the folder is not there. UsageError: `json_path` cannot be written. Everything
            else is in the report.
    """
    root = Path(root)
    spec = spec or describe_root(root)
    root = find_root(DataConfig(root=root), spec)
    items = list_images(root)
    report = Report(spec.name, str(root), level, statistics=spec.statistics)
    if not items:
        report.findings.append(Finding("list", f"{root / 'images'}: no images"))
    shared = shared_names(root)
    report.findings += [Finding("shared-label", shared_text(paths), tuple(map(str, paths)))
                        for paths in shared]
    known = {item.label for item in items} | {path for paths in shared for path in paths}
    report.findings += [
        Finding("label-without-image", f"{p}: label without an image", (str(p),))
        for p in sorted((root / "labels").glob("*"))
        if p not in known and not p.name.startswith(".")]
    found = inspect_all(items, spec, _LOOKS[level], title=f"checking {spec.name}",
                        progress=progress, workers=workers)
    _add(report, items, found, spec)
    report.findings += [Finding("empty-class", f"class {name}: no pixel in any label")
                        for name in spec.class_names if report.labels and not report.pixels[name]]
    folders = {p.parent for p in (root / "splits").glob("*/labeled.txt")}
    splits = [_check_folder(folder, root, batch_size, report)
              for folder in sorted(folders | ({Path(split)} if split else set()))]
    _count_classes(report, splits, items, found, spec)
    if level == "deep":
        report.findings += duplicate_findings(items, [seen.print for seen in found], splits)
    if json_path is not None:
        try:
            write_text(Path(json_path), report.to_json() + "\n")
        except OSError as error:
            raise UsageError(f"--json {json_path}: {error.strerror or error}") from error
    return report


def check_split(split: Split, spec: DatasetSpec, config: DataConfig, *, going_on: bool = False,
                progress: bool = True) -> Report:
    """Check the images of one split: what `open_split` runs before any training time is spent.

    Headers, endings and sizes of all images; the labels that training and validation need. Up to
    `config.max_damaged` unlabelled images that cannot be read are warnings: training skips them.

    Args:
        split: gets the pixel counts of its labelled images (`Split.pixels`).
        spec: the dataset.
        config: of the run.
        going_on: a run is resumed, which may have met damaged files: labelled images, too, are
            then only warned about.
        progress: show a bar where it takes long.
    """
    report = Report(spec.name, str(split.folder), "quick")
    looks = {"labeled": Look(), "val": Look(), "unlabeled": Look(labels=False)}
    damaged: list[Finding] = []
    for name, look in looks.items():
        items = getattr(split, name)
        found = inspect_all(items, spec, look, title=f"checking {name}", progress=progress)
        if name == "unlabeled":
            split.unlabeled, warned = _without_bad_truth(items, found)
            report.findings += warned
        if name == "val":
            report.findings += _without_classes(found, split.folder, spec)
        if name == "labeled":
            split.pixels = _class_counts(found, spec)
        if name == "unlabeled" or (going_on and name == "labeled"):
            damaged += [_take_unreadable(seen) for seen in found if _unreadable(seen)]
        _add(report, items, found, spec)
    few = len(damaged) <= config.max_damaged
    report.findings += [
        Finding(each.kind, f"{each.message}; training will skip it", each.files, "warning")
        if few else each for each in damaged]
    severity = "problem" if config.missing_classes == "error" and not going_on else "warning"
    report.findings += [
        Finding("empty-class", f"class {name}: no pixel in any of {len(split.labeled)} labelled "
                "images; label more, take another seed, or set data.missing_classes=warn",
                severity=severity)
        for name, count in zip(spec.class_names, split.pixels.sum(0), strict=True) if count == 0]
    return report


def _without_bad_truth(items: Sequence[Item], found: Sequence[Seen]
                       ) -> tuple[list[Item], list[Finding]]:
    """Unlabelled images, without masks that cannot be read: they only measure pseudo-labels.

    One warning about all such masks, whose findings are taken out of `found`. A mask of another
    size than its image stays a problem: one of the two is not what it should be.
    """
    kept, bad = [], []
    for item, seen in zip(items, found, strict=True):
        wrong = [f for f in seen.findings if item.label is not None
                 and f.kind != "size" and str(item.label) in f.files]
        seen.findings = [f for f in seen.findings if f not in wrong]
        bad += wrong
        kept.append(replace(item, label=None) if wrong else item)
    if not bad:
        return kept, []
    message = (f"{len(bad)} masks of unlabelled images cannot be used, so their pseudo-labels are "
               f"not measured: {bad[0].message}")
    return kept, [Finding(bad[0].kind, message, bad[0].files, "warning")]


def check_val(split: Split, spec: DatasetSpec, *, progress: bool = True) -> Report:
    """Check the validation images of a split: what evaluating a run needs."""
    report = Report(spec.name, str(split.folder), "quick")
    found = inspect_all(split.val, spec, Look(), title="checking val", progress=progress)
    report.findings += _without_classes(found, split.folder, spec)
    _add(report, split.val, found, spec)
    return report


def _without_classes(found: Sequence[Seen], where: Path | None, spec: DatasetSpec
                     ) -> list[Finding]:
    """A problem where validation images have been read and no pixel of them has a class."""
    if any(seen.findings for seen in found) or not found or _class_counts(found, spec).any():
        return []
    text = (f"{where}: no pixel of the {len(found)} validation images has a class, so there is "
            "nothing to score; label one of them, or choose others")
    return [Finding("empty-val", text, (str(where),))]


def _unreadable(seen: Seen) -> bool:
    return any(each.kind in ("missing", "unreadable") for each in seen.findings)


def _take_unreadable(seen: Seen) -> Finding:
    """The first finding that an image or label cannot be read; none is left in `seen`."""
    first = next(each for each in seen.findings if each.kind in ("missing", "unreadable"))
    seen.findings = [f for f in seen.findings if f.kind not in ("missing", "unreadable")]
    return first


def _add(report: Report, items: Sequence[Item], found: Sequence[Seen], spec: DatasetSpec) -> None:
    """Add what was found in some items to the report."""
    sizes = Counter(report.sizes)
    for item, seen in zip(items, found, strict=True):
        report.findings += seen.findings
        report.images += 1
        report.labels += item.label is not None
        if seen.size:
            sizes[f"{seen.size[0]} x {seen.size[1]}"] += 1
    report.sizes = dict(sizes.most_common())
    for name, count in _named(_value_counts(found), spec).items():
        report.pixels[name] = report.pixels.get(name, 0) + count


def _value_counts(found: Sequence[Seen]) -> NDArray[np.int64]:
    """Pixels of each label value over all images, [256]."""
    return sum((seen.counts for seen in found if seen.counts is not None), np.zeros(256, np.int64))


def _named(counts: NDArray[np.int64], spec: DatasetSpec) -> dict[str, int]:
    ignored = "ignored" if "ignored" not in spec.class_names else "(no class)"
    names = [*zip(spec.class_names, range(spec.num_classes), strict=True), (ignored, IGNORE)]
    return {name: int(counts[index]) for name, index in names}


def _class_counts(found: Sequence[Seen], spec: DatasetSpec) -> NDArray[np.int64]:
    """Pixels of each class in each image, [images, classes]; none where a label is unreadable."""
    counts = np.zeros((len(found), spec.num_classes), np.int64)
    for row, seen in zip(counts, found, strict=True):
        if seen.counts is not None:
            row[:] = seen.counts[: spec.num_classes]
    return counts


def _count_classes(report: Report, splits: Sequence[Split], items: Sequence[Item],
                   found: Sequence[Seen], spec: DatasetSpec) -> None:
    """Of each split: what is labelled, and whether there is anything to validate on."""
    by_image = {item.image: seen for item, seen in zip(items, found, strict=True)}
    for split in splits:
        seen = [by_image[item.image] for item in split.labeled if item.image in by_image]
        report.labeled_pixels[split.folder.name] = _named(_value_counts(seen), spec)
        seen = [by_image[item.image] for item in split.val if item.image in by_image]
        report.findings += _without_classes(seen, find_val_list(split.folder), spec)


def _check_folder(folder: Path, root: Path, batch_size: int, report: Report) -> Split:
    """Read one split folder's lists and add what is wrong with them."""
    problems: list[str] = []
    unlabeled_list = folder / "unlabeled.txt"
    split = Split(
        read_list(folder / "labeled.txt", root, problems, need_label=True),
        read_list(unlabeled_list, root, problems, need_label=False, may_be_empty=True)
        if unlabeled_list.is_file() else [],
        read_list(find_val_list(folder), root, problems, need_label=True), folder,
    )
    problems += [f"{folder}: {text}" for text in overlaps(split)]
    report.findings += [Finding("list", text, (str(folder),)) for text in problems]
    if 0 < len(split.labeled) < batch_size:
        text = (f"{folder}: {len(split.labeled)} labelled images, fewer than a batch of "
                f"{batch_size}")
        report.findings.append(Finding("small-batch", text, (str(folder),), "warning"))
    report.findings += [Finding("shared-group", text, (str(folder),), "warning")
                        for text in _shared_groups(split, read_groups(root), folder)]
    for name in ("labeled", "unlabeled", "val"):
        report.lists[f"{folder.name}/{name}"] = len(getattr(split, name))
    return split


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
    if report.statistics is not None:
        lines += ["", str(report.statistics)]
    lines += _pixel_table("class", report.pixels)
    for name, pixels in report.labeled_pixels.items():
        lines += _pixel_table(f"labelled by {name}", pixels)
    if report.lists:
        lines += ["", f"{'list':<24}{'images':>12}"]
        lines += [f"{name:<24}{n:>12}" for name, n in report.lists.items()]
    lines += [""] + [f"warning: {text}" for text in report.warnings]
    lines += [f"problem: {text}" for text in report.problems] or ["no problems"]
    return lines


def _pixel_table(title: str, pixels: dict[str, int]) -> list[str]:
    total = max(sum(pixels.values()), 1)
    return ["", f"{title:<24}{'pixels':>16}{'share':>9}",
            *(f"{name:<24}{n:>16}{n / total:>9.2%}" for name, n in pixels.items())]
