"""The report of one run: gathers what there is, says what there is not, renders one HTML file."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from co2s_fast.data.writing import write_text
from co2s_fast.engine.metrics import RULES, Metrics, percent
from co2s_fast.engine.panels import DISAGREEMENT, UNLABELLED_COLOR, Panel
from co2s_fast.report.figures import figures
from co2s_fast.report.plots import color_of, data_uri
from co2s_fast.report.run import SHORT_NAMES, STUDENT_NAMES, Run, read_run
from co2s_fast.report.table import write_table
from co2s_fast.version import __version__

REPORT_FILE = "report.html"
PICTURE_SIDE = 384


def write_report(run_folder: str | Path) -> Path:
    """Write RUN/report.html: one file, no outside resources, images inside; and RUN/metrics.csv.

    Works on a run at any stage; what is missing is named on the page.

    Args:
        run_folder: the run folder.

    Returns:
        The report's path.

    Raises:
        UsageError: not a run folder. DataError: one of its files is damaged.
    """
    run = read_run(run_folder)
    path = run.folder / REPORT_FILE
    write_text(path, render("report.html.j2", **page(run)))
    write_table(run)
    return path


def render(template: str, **values: Any) -> str:
    """Fill in a template of this package."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("co2s_fast.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    environment.filters["rgb"] = lambda color: "rgb({}, {}, {})".format(*color)
    return environment.get_template(template).render(version=__version__, **values)


def page(run: Run) -> dict[str, Any]:
    """Everything the template shows."""
    metrics = run.metrics
    names = prediction_names(run)
    return {
        "run": run,
        "title": f"{run.method} on {run.dataset}",
        "facts": header_facts(run),
        "notes": notes(run),
        "students": [
            {"name": n, "label": STUDENT_NAMES.get(n, n), "short": SHORT_NAMES.get(n, n),
             "color": color_of(n, i)}
            for i, n in enumerate(names)
        ],
        "headline": headline(run, names),
        "about": about(run),
        "weights": weights(run),
        "config_text": yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
        if run.config else "",
        "figures": figures(run, names),
        "table": class_table(run, metrics),
        "confusions": [
            confusion(n, metrics[n]) for n in sorted(metrics, key=lambda n: n != "both")
        ],
        "panels": panel_rows(run),
        "disagreement": [
            (text.format(*(SHORT_NAMES.get(n, n) for n in names if n != "both")), color)
            for text, color in DISAGREEMENT[:-1]
        ] if any("disagreement" in p.parts for p in run.panels) else [],
        "unlabelled": UNLABELLED_COLOR,
    }  # fmt: skip


def prediction_names(run: Run) -> list[str]:
    """Students and "both", in the order they were scored or configured."""
    found: dict[str, None] = {}
    for students in (
        (run.evaluation or {}).get("students", {}),
        *(record.get("students", {}) for record in run.evals[-1:]),
        run.start.get("students", {}),
        run.config.get("students") or {},
    ):
        found |= dict.fromkeys(students)
    return sorted(found, key=lambda name: name == "both")


def header_facts(run: Run) -> list[str]:
    """The line below the title."""
    images = run.start.get("images", {})
    facts = [
        f"{images[kind]:,} {word}"
        for kind, word in (
            ("labeled", "labelled"),
            ("unlabeled", "unlabelled"),
            ("val", "validation"),
        )
        if kind in images
    ]
    facts = [", ".join(facts) + " images"] if facts else []
    if run.step is not None:
        total = run.start.get("steps")
        facts.append(f"{run.step:,} of {total:,} steps" if total else f"{run.step:,} steps")
    if run.seed is not None:
        facts.append(f"seed {run.seed}")
    return facts


def notes(run: Run) -> list[str]:
    """What is missing or deserves a warning, in sentences."""
    said = [str(warning) for warning in run.start.get("warnings", [])]
    said += [f"Step {event['step']:,}: {event['text']}" for event in run.events
             if event["kind"] == "warning"]
    damaged = [str(event["reason"]) for event in run.events if event["kind"] == "damaged"]
    if damaged:
        more = f"; and {len(damaged) - 5} more, see metrics.jsonl" if len(damaged) > 5 else ""
        said.append(f"Damaged files that training skipped: {'; '.join(damaged[:5])}{more}.")
    total, step = run.start.get("steps"), run.step
    if not run.config:
        said.append("There is no config.yaml, so the settings of this run are not known.")
    if not run.train and not run.evals:
        said.append("Nothing has been logged yet: there are no curves.")
    elif total and step is not None and step < total:
        said.append(f"The run stopped at step {step:,} of {total:,}; --resume continues it.")
    if run.evaluation is None:
        last = (
            " Scores shown are those of the last evaluation during training." if run.evals else ""
        )
        said.append(
            "No full evaluation yet, so there is no confusion matrix and there are no pictures: "
            f"run co2s-fast eval {run.folder}.{last}"
        )
    elif not run.panels:
        said.append("The evaluation drew no pictures (eval.panels is 0).")
    if run.train and not any(key.startswith("coverage/") for key in run.train[-1]):
        said.append(f"{run.method} uses no pseudo-labels while it trains.")
    return said


def headline(run: Run, names: list[str]) -> list[dict[str, Any]]:
    """The mIoU and the other means of each prediction, the fused one first."""
    metrics = run.metrics
    if metrics:
        values = {name: m.to_dict(confusion=False) for name, m in metrics.items()}
    else:
        values = run.evals[-1].get("students", {}) if run.evals else {}
    cards = []
    for name in sorted(values, key=lambda n: (n != "both", names.index(n))):
        one = values[name]
        cards.append({
            "label": STUDENT_NAMES.get(name, name),
            "color": color_of(name, names.index(name)),
            "miou": one.get("miou"),
            "others": [("mean F1", _with_sign(one.get("mean_f1"))),
                       ("overall accuracy", _with_sign(one.get("overall_accuracy"))),
                       ("kappa", "n/a" if one.get("kappa") is None else f"{one['kappa']:.3f}")],
        })  # fmt: skip
    return cards


def about(run: Run) -> list[tuple[str, str]]:
    """Label and value of what was run."""
    start, evaluation, ema = run.start, run.evaluation or {}, run.setting("train.ema")
    rows = [
        ("run folder", str(run.folder)),
        (
            "run again",
            f"co2s-fast train --recipe {run.folder / 'config.yaml'} --out NEW_FOLDER"
            if run.config
            else "",
        ),
        ("method", run.method if run.config or start else ""),
        ("dataset", run.dataset),
        ("labelled share", _split(run)),
        ("seed", "" if run.seed is None else str(run.seed)),
        ("device", _joined(start.get("device"), start.get("backend"), " · losses by ")),
        ("processes", str(start["world"]) if start.get("world", 1) > 1 else ""),
        ("versions", ", ".join(f"{k} {v}" for k, v in start.get("versions", {}).items())),
        (
            "scored checkpoint",
            _joined(evaluation.get("checkpoint"), evaluation.get("step"), ", step "),
        ),
        ("best during training", f"step {run.best_record['step']:,}" if run.best_record else ""),
        (
            "scored weights",
            f"moving averages of the students' weights (train.ema {ema:g})" if ema else "",
        ),
        *(("note", str(note)) for note in start.get("notes", [])),
    ]
    return [(label, text) for label, text in rows if text]


def weights(run: Run) -> list[dict[str, str]]:
    """Where each student's weights came from."""
    rows = []
    for name, student in run.start.get("students", {}).items():
        trained = student.get("trained_parameters")
        rows.append({
            "label": STUDENT_NAMES.get(name, name),
            "model": str(student.get("model", "")),
            "source": str(student.get("source", "")),
            "sha256": str(student.get("sha256", ""))[:12],
            "queries": str(student.get("queries", "")),
            "trained": "" if trained is None else f"{trained / 1e6:.2f} M",
        })  # fmt: skip
    return rows


def class_table(run: Run, metrics: dict[str, Metrics]) -> dict[str, Any] | None:
    """Per-class IoU and F1 of each prediction; from the last log record without eval.json."""
    if metrics:
        values = {name: m.to_dict() for name, m in metrics.items()}
        first = next(iter(metrics.values()))
        counts = [int(n) for n in first.confusion.sum(1)]
        rule = first.rule
    elif run.evals and run.classes:
        values, counts = run.evals[-1].get("students", {}), None
        rule = RULES["zero" if run.setting("eval.absent") == "zero" else "skip"]
    else:
        return None
    values = {n: v for n, v in values.items() if len(v.get("iou", [])) == len(run.classes)}
    if not values:
        return None
    rows, absent = [], []
    for index, one in enumerate(run.classes):
        iou = {name: v["iou"][index] for name, v in values.items()}
        f1 = {name: v.get("f1", [None] * len(run.classes))[index] for name, v in values.items()}
        best = max((v for v in iou.values() if v is not None), default=None)
        share = counts[index] / max(sum(counts), 1) if counts else None
        if counts and not counts[index]:
            absent.append(one["name"])
        rows.append({"name": one["name"], "color": one["color"], "share": share, "iou": iou,
                     "f1": f1, "best": best})  # fmt: skip
    means = {n: (v.get("miou"), v.get("mean_f1")) for n, v in values.items()}
    return {
        "names": list(values),
        "rows": rows,
        "means": means,
        "absent": absent,
        "rule": rule,
        "short": {n: SHORT_NAMES.get(n, n) for n in values},
        "shares": counts is not None,
    }


def confusion(name: str, metrics: Metrics) -> dict[str, Any]:
    """Row-normalised confusion matrix as cells with a shade and a text."""
    rows, names = [], metrics.class_names
    for index, counts in enumerate(metrics.confusion):
        total = int(counts.sum())
        shares = [int(n) / total for n in counts] if total else []
        cells = [
            {
                "text": f"{100 * share:.0f}" if share >= 0.005 else "·",
                "shade": round(share, 3),
                "hit": column == index,
                "title": f"{names[index]} predicted as {names[column]}: "
                f"{100 * share:.2f} % ({int(counts[column]):,} pixels)",
            }
            for column, share in enumerate(shares)
        ]
        rows.append({"name": names[index], "cells": cells, "pixels": total})
    return {"label": STUDENT_NAMES.get(name, name), "rows": rows, "names": names}


def panel_rows(run: Run) -> dict[str, Any]:
    """Column titles and rows of embedded pictures."""
    order = [
        "image",
        "truth",
        *[n for n in ("clip", "clip2", "ssm", "ssm2") if any(n in p.parts for p in run.panels)],
    ]
    others = dict.fromkeys(part for panel in run.panels for part in panel.parts)
    order += [p for p in others if p not in (*order, "both", "disagreement")]
    order += [p for p in ("both", "disagreement") if p in others]
    titles = {p: STUDENT_NAMES.get(p, p.capitalize()) for p in order}
    rows = [
        {
            "name": panel.name,
            "cells": [(titles[p], embedded(panel, p)) for p in order if p in panel.parts],
        }
        for panel in run.panels
    ]
    return {"titles": list(titles.values()), "rows": rows}


def embedded(panel: Panel, part: str) -> str:
    """One picture as a data URI: photographs as JPEG, maps as small palette PNGs."""
    content = io.BytesIO()
    with Image.open(panel.parts[part]) as picture:
        scale = min(1.0, PICTURE_SIDE / max(picture.size))
        size = tuple(max(round(side * scale), 1) for side in picture.size)
        if part == "image":
            small = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
            small.save(content, format="JPEG", quality=88)
            return data_uri(content.getvalue(), "image/jpeg")
        picture.resize(size, Image.Resampling.NEAREST).save(content, format="PNG", optimize=True)
    return data_uri(content.getvalue(), "image/png")


def _with_sign(value: float | None) -> str:
    return "n/a" if value is None else f"{percent(value, 1)} %"


def _split(run: Run) -> str:
    data = run.config.get("data") or {}
    if data.get("split"):
        return f"split folder {data['split']}"
    if data.get("ratio"):
        return f"{data['ratio']} of the training images (split seed {data.get('split_seed', 0)})"
    if data.get("labels"):
        return f"{data['labels']} images (split seed {data.get('split_seed', 0)})"
    return ""


def _joined(first: Any, second: Any, between: str) -> str:
    if first is None or second is None:
        return str(first if first is not None else "")
    return f"{first}{between}{second}"
