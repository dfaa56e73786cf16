"""Several runs on one page: a table, curves over each other, means over seeds."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from co2s_fast.data.writing import write_text
from co2s_fast.engine.config import RESUMABLE
from co2s_fast.errors import UsageError
from co2s_fast.report.page import render
from co2s_fast.report.plots import COLORS, Line, curve, series
from co2s_fast.report.run import STUDENT_NAMES, Run, flat, read_run

# Two runs that differ in these alone are repetitions of one experiment.
SEED_KEYS = {"seed", "data.split_seed"}
PREDICTIONS = ("clip", "clip2", "ssm", "ssm2", "both")


@dataclass
class Group:
    """Runs that differ by seed alone."""

    label: str
    color: str
    runs: list[Run] = field(default_factory=list)


def write_comparison(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Write one self-contained HTML page about several runs.

    Runs whose configurations differ in the seed alone become one row with mean and sample
    standard deviation (n - 1 below the root). Scores are mIoU in per cent, at the last evaluation
    and at the best one (largest mean over predictions), from metrics.jsonl; a run that has only an
    eval.json shows that.

    Args:
        runs: run folders.
        out: the HTML file to write.

    Returns:
        `out`.

    Raises:
        UsageError: no run is given, one is no run folder, or `out` is a folder.
        DataError: a file is damaged.
    """
    if not runs:
        raise UsageError("compare: expected at least one run folder, got none")
    if Path(out).is_dir():
        raise UsageError(f"-o {out}: is a folder, expected the name of an HTML file")
    opened = [read_run(run) for run in dict.fromkeys(Path(run) for run in runs)]
    groups, differing = grouped(opened)
    names = _predictions(opened)
    settings = [dict(flat(group.runs[0].config)) for group in groups]
    path = Path(out)
    values = {
        "title": f"{len(opened)} runs side by side",
        "datasets": ", ".join(dict.fromkeys(run.dataset for run in opened)),
        "names": names,
        "student_names": STUDENT_NAMES,
        "rows": [_row(group, names) for group in groups],
        "singles": [_single(run, group, names) for group in groups for run in group.runs],
        "figures": _figures(groups, names),
        "differing": [(key, [_short(one.get(key)) for one in settings]) for key in differing],
        "labels": [(group.label, group.color) for group in groups],
        "notes": _notes(opened, groups),
    }  # fmt: skip
    write_text(path, render("comparison.html.j2", **values))
    return path


def comparison_table(runs: Sequence[str | Path]) -> str:
    """The means and spreads of `write_comparison` as plain text, mIoU in %, and its notes."""
    opened = [read_run(run) for run in dict.fromkeys(Path(run) for run in runs)]
    groups, _ = grouped(opened)
    names = _predictions(opened)
    lines = [["mIoU in %, mean ± deviation", "runs",
              *(f"{name} {which}" for which in ("last", "best") for name in names)]]
    for group in groups:
        row = _row(group, names)
        cells = [" ".join(row[which][name]).strip() for which in ("last", "best") for name in names]
        lines.append([row["label"], str(row["count"]), *cells])
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    table = ["  ".join([label.ljust(first), *map(str.rjust, cells, others)])
             for label, *cells in lines]  # fmt: skip
    return "\n".join([*table, *_notes(opened, groups)])


def grouped(runs: Sequence[Run]) -> tuple[list[Group], list[str]]:
    """Groups in the order of their first run, and the settings in which the groups differ."""
    found: dict[tuple, list[Run]] = {}
    for number, run in enumerate(runs):
        settings = {k: repr(v) for k, v in flat(run.config) if k not in SEED_KEYS | RESUMABLE}
        # Without a configuration nothing says that two runs are repetitions.
        key = tuple(sorted(settings.items())) or (number,)
        found.setdefault(key, []).append(run)
    first = [dict(flat(members[0].config)) for members in found.values()]
    keys = dict.fromkeys(key for settings in first for key in settings)
    differing = [
        key
        for key in keys
        if key not in SEED_KEYS | RESUMABLE
        and len({repr(settings.get(key, "—")) for settings in first}) > 1
    ]
    shared = [k for k in differing if all(k in settings for settings in first)]
    groups = [
        Group(_label(members[0], settings, shared), COLORS[index % len(COLORS)], members)
        for index, (members, settings) in enumerate(zip(found.values(), first, strict=True))
    ]
    return _distinct(groups), differing


def spread(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation of the numbers there are; None where undefined."""
    known = [value for value in values if value is not None]
    mean = statistics.fmean(known) if known else None
    return mean, statistics.stdev(known) if len(known) > 1 else None


def scores(run: Run, which: str) -> dict[str, float | None]:
    """Prediction -> mIoU at the "last" or the "best" evaluation."""
    if run.evals:
        record = run.evals[-1] if which == "last" else run.best_record or run.evals[-1]
    else:
        record = run.evaluation or {}
    return {name: values.get("miou") for name, values in record.get("students", {}).items()}


def _label(run: Run, settings: dict[str, Any], differing: list[str]) -> str:
    """Method and what else sets the group apart, as long as that is short."""
    parts = [run.method]
    others = [key for key in differing if key != "method.name"]
    if len(others) <= 3:
        parts += [f"{key.rsplit('.', 1)[-1]} {_short(settings[key])}" for key in others]
    return ", ".join(parts)


def _distinct(groups: list[Group]) -> list[Group]:
    """The groups, those of one label with their folders behind it."""
    for label in {group.label for group in groups}:
        same = [group for group in groups if group.label == label]
        if len(same) < 2:
            continue
        for named in (_parent, _names, _paths):
            names = [named(group) for group in same]
            if len(set(names)) == len(names):
                break
        for group, name in zip(same, names, strict=True):
            group.label = f"{label} ({name})"
    return groups


def _parent(group: Group) -> str:
    """The folder that holds a group's repetitions, where there is one; else as `_names`."""
    parents = {run.folder.resolve().parent for run in group.runs}
    several = len(group.runs) > 1 and len(parents) == 1
    return parents.pop().name if several else _names(group)


def _names(group: Group) -> str:
    return ", ".join(run.name for run in group.runs)


def _paths(group: Group) -> str:
    return ", ".join(str(run.folder) for run in group.runs)


def _predictions(runs: Sequence[Run]) -> list[str]:
    found: dict[str, None] = {}
    for run in runs:
        found |= dict.fromkeys(scores(run, "last"))
    return sorted(found, key=lambda n: PREDICTIONS.index(n) if n in PREDICTIONS else -1)


def _row(group: Group, names: list[str]) -> dict[str, Any]:
    row: dict[str, Any] = {"label": group.label, "color": group.color, "count": len(group.runs)}
    for which in ("last", "best"):
        each = [scores(run, which) for run in group.runs]
        row[which] = {name: _spread_text([s.get(name) for s in each]) for name in names}
    return row


def _single(run: Run, group: Group, names: list[str]) -> dict[str, Any]:
    return {
        "name": str(run.folder),
        "color": group.color,
        "seed": "" if run.seed is None else run.seed,
        "step": "" if run.step is None else f"{run.step:,}",
        "last": {n: _spread_text([scores(run, "last").get(n)]) for n in names},
        "best": {n: _spread_text([scores(run, "best").get(n)]) for n in names},
    }


def _spread_text(values: Sequence[float | None]) -> tuple[str, str]:
    """Mean and "± deviation", in per cent."""
    mean, deviation = spread(values)
    if mean is None:
        return "n/a", ""
    return f"{100 * mean:.2f}", "" if deviation is None else f"± {100 * deviation:.2f}"


def _figures(groups: list[Group], names: list[str]) -> list[tuple[str, str]]:
    found = []
    wanted = [
        (f"Validation mIoU, {STUDENT_NAMES.get(n, n)}, %", ("students", n, "miou")) for n in names
    ]
    for name in names:
        if name != "both":
            who = STUDENT_NAMES.get(name, name)
            wanted.append((f"Pseudo-label accuracy, {who}, %", ("pseudo", name, "accuracy")))
            wanted.append((f"Pseudo-label coverage, {who}, %", ("pseudo", name, "coverage")))
    for caption, path in wanted:
        lines = [line for group in groups for line in _group_lines(group, path)]
        if lines:
            found.append((caption, curve(lines)))
    return found


def _group_lines(group: Group, path: tuple[str, ...]) -> list[Line]:
    """One line a run; with several runs they are faint, under their mean and its band."""
    curves = [series(run.evals, *path, scale=100) for run in group.runs]
    curves = [(x, y) for x, y in curves if x]
    if len(curves) < 2:
        return [Line(x, y, group.color) for x, y in curves]
    steps = sorted(set.intersection(*(set(x) for x, _ in curves)))
    tables = [dict(zip(x, y, strict=True)) for x, y in curves]
    lines = [Line(x, y, group.color, width=0.8, alpha=0.35) for x, y in curves]
    if steps:
        pairs = [spread([table[step] for table in tables]) for step in steps]
        mean = [m for m, _ in pairs]
        low, high = [m - d for m, d in pairs], [m + d for m, d in pairs]
        lines.append(Line(steps, mean, group.color, low=low, high=high, width=2.2))
    return lines


def _notes(runs: Sequence[Run], groups: list[Group]) -> list[str]:
    said = []
    if len({run.dataset for run in runs}) > 1:
        said.append("These runs are on different datasets: their scores do not compare.")
    unscored = [run.name for run in runs if not scores(run, "last")]
    if unscored:
        said.append(f"Not evaluated yet: {', '.join(unscored)}.")
    unfinished = [run.name for run in runs if _last_step(run) < (run.start.get("steps") or 0)]
    if unfinished:
        said.append(f"Not finished: {', '.join(unfinished)}.")
    for group in groups:
        often = Counter(map(_seeds, group.runs))
        again = [run.name for run in group.runs if often[_seeds(run)] > 1]
        if again:
            said.append(f"One seed more than once: {', '.join(again)}. Their spread is not one of "
                        "seeds.")
    once = [group.label for group in groups if len(group.runs) == 1]
    if once and len(once) == len(groups) > 1:
        said.append("Each setting was run with one seed: differences may be chance.")
    elif once and len(groups) > 1:
        said.append(f"Run with one seed alone: {'; '.join(once)}. Differences may be chance.")
    return said


def _last_step(run: Run) -> int:
    """The last one that was evaluated, or trained where none was."""
    return (run.evals[-1]["step"] if run.evals else run.step) or 0


def _seeds(run: Run) -> tuple[Any, ...]:
    return run.seed, run.setting("data.split_seed")


def _short(value: Any) -> str:
    text = "—" if value is None else str(value)
    return text if len(text) <= 40 else text[:37] + "..."
