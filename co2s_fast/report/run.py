"""What a run folder holds, complete or not, as plain values."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from co2s_fast.engine import panels
from co2s_fast.engine.log import read_metrics
from co2s_fast.engine.metrics import Metrics
from co2s_fast.errors import DataError, UsageError

STUDENT_NAMES = {"clip": "CLIP student", "clip2": "second CLIP student", "ssm": "SSM student",
                 "ssm2": "second SSM student", "both": "Both students"}  # fmt: skip
SHORT_NAMES = {"clip": "CLIP", "clip2": "CLIP 2", "ssm": "SSM", "ssm2": "SSM 2", "both": "both"}


@dataclass(frozen=True)
class Run:
    """A run folder's content; what is not there yet is empty or None.

    Attributes:
        folder: the run folder.
        config: config.yaml as nested dictionaries.
        start: the record that opened metrics.jsonl.
        train: training records, in order of steps.
        evals: evaluation records, in order of steps.
        events: records of what happened once: kinds "damaged" and "warning".
        evaluation: eval.json.
        classes: {"name", "color"} of each class.
        panels: pictures of validation images.
    """

    folder: Path
    config: dict[str, Any]
    start: dict[str, Any]
    train: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    events: list[dict[str, Any]]
    evaluation: dict[str, Any] | None
    classes: list[dict[str, Any]]
    panels: list[panels.Panel]

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def method(self) -> str:
        return str(self.setting("method.name") or self.start.get("method") or "run")

    @property
    def dataset(self) -> str:
        named = (self.start.get("dataset") or (self.evaluation or {}).get("dataset")
                 or _yaml(self.folder / "dataset.yaml").get("name"))
        return str(named or self.setting("data.dataset") or "unknown data")

    @property
    def seed(self) -> int | None:
        return self.start.get("seed", self.config.get("seed"))

    @property
    def step(self) -> int | None:
        """Last step that was logged."""
        steps = [record["step"] for record in (*self.train, *self.evals) if "step" in record]
        return max(steps, default=None)

    @property
    def metrics(self) -> dict[str, Metrics]:
        """Scores of eval.json by prediction; empty without it."""
        students = (self.evaluation or {}).get("students", {})
        try:
            return {name: Metrics.from_dict(values) for name, values in students.items()}
        except (ValueError, AttributeError) as error:
            raise DataError(f"{self.folder}/eval.json: not an evaluation ({error})") from None

    @property
    def best_record(self) -> dict[str, Any] | None:
        """The evaluation of the highest score (mean mIoU over predictions)."""
        scored = [record for record in self.evals if mean_miou(record) is not None]
        return max(scored, key=mean_miou, default=None)

    def setting(self, key: str) -> Any:
        """A configuration value by its dotted name, None where there is none."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value


def mean_miou(record: dict[str, Any]) -> float | None:
    """Mean over predictions of an evaluation record's mIoU, None if none has one."""
    found = [v.get("miou") for v in record.get("students", {}).values()]
    known = [value for value in found if value is not None]
    return sum(known) / len(known) if known else None


def read_run(folder: str | Path) -> Run:
    """Read a run folder, whatever of it exists.

    Raises:
        UsageError: the folder is missing or has neither config.yaml, metrics.jsonl nor eval.json.
        DataError: one of its files is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"{folder}: expected a run folder, found none")
    paths = {n: folder / n for n in ("config.yaml", "metrics.jsonl", "eval.json")}
    if not any(path.is_file() for path in paths.values()):
        raise UsageError(
            f"{folder}: expected a run folder ({', '.join(paths)}), found none of them"
        )
    config = _yaml(paths["config.yaml"])
    metrics = paths["metrics.jsonl"]
    records = read_metrics(metrics) if metrics.is_file() else []
    evaluation = _json(paths["eval.json"])
    return Run(
        folder=folder,
        config=config,
        start=next((r for r in records if r.get("kind") == "start"), {}),
        train=_by_step(records, "train"),
        evals=_by_step(records, "eval"),
        events=[r for r in records if r.get("kind") in ("damaged", "warning")],
        evaluation=evaluation,
        classes=(evaluation or {}).get("classes")
        or _yaml(folder / "dataset.yaml").get("classes", []),
        panels=panels.read(folder / "panels"),
    )


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested dictionaries as ("a.b.c", value) pairs."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _by_step(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Records of one kind; the last one wins where a step was logged twice."""
    chosen = {r["step"]: r for r in records if r.get("kind") == kind and "step" in r}
    return [chosen[step] for step in sorted(chosen)]


def _yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected keys and values, found {type(content).__name__}")
    return content


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or "students" not in content:
        raise DataError(f"{path}: expected an evaluation with the key students, found none")
    return content
