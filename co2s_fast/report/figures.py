"""The curves of one run, in groups, each with the pictures that its records allow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from co2s_fast.engine.evaluation import THRESHOLD
from co2s_fast.report.plots import Line, color_of, curve, series
from co2s_fast.report.run import SHORT_NAMES, Run

Paths = Mapping[str, tuple[str, ...]]
Figure = tuple[str, str]

TERMS = {
    "total": "Total loss",
    "x": "Supervised loss (labelled view)",
    "fp": "Consistency, feature-perturbed view",
    "s1": "Consistency, strong view 1",
    "s2": "Consistency, strong view 2",
    "s": "Consistency, mixed strong views",
    "u": "Pseudo-labels of the mixed images",
    "c": "Contrast of pixels with other classes",
    "out": "Consistency of outputs with the teacher",
    "level1": "Consistency of shallow features",
    "level2": "Consistency of middle features",
    "level3": "Consistency of deep features",
    "attention": "Features attending to the teacher's",
    "stability": "Stability loss (between students)",
}


def figures(run: Run, names: list[str]) -> list[dict[str, Any]]:
    """Groups with a title, a text and (caption, picture) pairs; groups without one are left out.

    Args:
        run: the run.
        names: its predictions, "both" last.
    """
    students = [name for name in names if name != "both"]
    pseudo = pseudo_label_figures(run, students)
    groups = [
        ("Validation and pseudo-labels", pseudo_text(run) if pseudo else "",
         validation_figures(run, names) + pseudo,
         threshold_table(run, students), pseudo_class_table(run, students)),
        ("Loss terms", "", loss_figures(run, students), None, None),
        ("Schedule and throughput", "", throughput_figures(run, students), None, None),
    ]  # fmt: skip
    return [{"title": title, "text": text, "figures": found, "table": table, "classes": classes}
            for title, text, found, table, classes in groups if found]  # fmt: skip


def threshold_table(run: Run, students: list[str]) -> dict[str, Any] | None:
    """Accuracy and coverage of the last evaluation's pseudo-labels at each threshold."""
    pseudo = run.evals[-1].get("pseudo", {}) if run.evals else {}
    names = [name for name in students if pseudo.get(name, {}).get("thresholds")]
    if not names:
        return None
    columns = [pseudo[name]["thresholds"] for name in names]
    rows = [{"threshold": entries[0][0], "values": [v for entry in entries for v in entry[1:]]}
            for entries in zip(*columns, strict=True)]
    return {"names": [SHORT_NAMES.get(name, name) for name in names], "rows": rows,
            "step": run.evals[-1]["step"], "own": run.setting("method.threshold")}


def validation_figures(run: Run, names: list[str]) -> list[Figure]:
    """Validation mIoU of every prediction."""
    paths = {name: ("students", name, "miou") for name in names}
    return _figure("Validation mIoU, %", paths, run.evals, scale=100)


def pseudo_label_figures(run: Run, students: list[str]) -> list[Figure]:
    """Accuracy and coverage: of the evaluations' own probe, else of the training batches."""
    probed = was_probed(run)
    found = []
    for key, flat_key in (("accuracy", "pseudo_accuracy"), ("coverage", "coverage")):
        caption = f"Pseudo-label {key}, %"
        zero = key == "coverage"
        if probed:
            paths = {name: ("pseudo", name, key) for name in students}
            found += _figure(caption, paths, run.evals, scale=100, y_from_zero=zero)
        else:
            paths = {name: (f"{flat_key}/{name}",) for name in students}
            found += _figure(caption, paths, run.train, scale=100, smooth=True, y_from_zero=zero)
    x, y = series(run.train, "agreement", scale=100)
    if x:
        found.append(("Pixels the students agree on, %",
                      curve([Line(x, y, "#5b6270", smooth=True)])))
    return found


def pseudo_class_table(run: Run, students: list[str]) -> dict[str, Any] | None:
    """Share among a student's pseudo-labels and mean confidence by class, of the last record."""
    last = run.train[-1] if run.train else {}
    names = [name for name in students if last.get(f"confidence/{name}")]
    if not names:
        return None
    keys = [f"{kind}/{name}" for name in names for kind in ("pseudo_share", "confidence")]
    classes = last[keys[0]]
    rows = [{"class": label, "values": [last[key].get(label) for key in keys]} for label in classes]
    return {"names": [SHORT_NAMES.get(name, name) for name in names], "rows": rows,
            "step": last["step"]}


def was_probed(run: Run) -> bool:
    """Whether an evaluation measured pseudo-labels of its own (`train.probe_images`)."""
    return any(record.get("pseudo") for record in run.evals)


def pseudo_text(run: Run) -> str:
    """What accuracy and coverage mean (Co2S, Eq. 12)."""
    if not was_probed(run):
        return (
            "Coverage: share of the training batches' pixels that were taken; accuracy: share of "
            "those that are right, where labels are known."
        )
    more = ""
    if run.setting("method.class_thresholds"):
        more = (
            " Training takes more: there each class has a threshold of its own "
            "(method.class_thresholds)."
        )
    threshold = run.setting("method.threshold")
    level = f"confidence {THRESHOLD if threshold is None else threshold}"
    return (
        f"Coverage: share of pixels at or above {level}; accuracy: share of those that are right, "
        f"on unlabelled images whose labels are known.{more}"
    )


def loss_figures(run: Run, students: list[str]) -> list[Figure]:
    """Every loss term that was logged, all students in one picture."""
    keys = dict.fromkeys(key for record in run.train for key in record if key.startswith("loss/"))
    terms = dict.fromkeys(key.split("/", 2)[2] for key in keys if key.count("/") >= 2)
    known = [term for term in TERMS if term in terms]
    found = []
    for term in known + [term for term in terms if term not in TERMS]:
        paths = {name: (f"loss/{name}/{term}",) for name in students}
        caption = TERMS.get(term, term.replace("_", " "))
        found += _figure(caption, paths, run.train, smooth=True, y_from_zero=True)
    return found


def throughput_figures(run: Run, students: list[str]) -> list[Figure]:
    """Learning rate, images per second, and the time that training waited for data."""
    rates = {name: (f"lr/{name}/decoder",) for name in students}
    found = _figure("Learning rate of the decoders", rates, run.train, y_from_zero=True)
    for key, caption in (
        ("images_per_s", "Images per second"),
        ("data_wait_s", "Waiting for data, s"),
    ):
        x, y = series(run.train, key)
        if x:
            line = Line(x, y, "#5b6270", smooth=True)
            found.append((caption, curve([line], y_from_zero=True)))
    return found


def _figure(
    caption: str,
    paths: Paths,
    records: list[dict[str, Any]],
    *,
    scale: float = 1.0,
    smooth: bool = False,
    y_from_zero: bool = False,
) -> list[Figure]:
    """One picture with a line for each student that has values; none without any."""
    lines = []
    for index, (name, path) in enumerate(paths.items()):
        x, y = series(records, *path, scale=scale)
        if x:
            lines.append(Line(x, y, color_of(name, index), smooth))
    return [(caption, curve(lines, y_from_zero=y_from_zero))] if lines else []
