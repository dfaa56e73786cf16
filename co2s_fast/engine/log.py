"""What a run writes down while it goes: metrics.jsonl always, TensorBoard events beside it."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from co2s_fast.errors import DataError

METRICS_FILE = "metrics.jsonl"
CURVES = {"train", "eval"}
"""Kinds of records whose numbers are curves; the others tell what happened once."""


def say(text: str) -> None:
    """Print one line to stderr without tearing a progress bar."""
    tqdm.write(text, file=sys.stderr)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a metrics.jsonl; a last line cut short by a kill is left out.

    Raises:
        DataError: another line is no record.
    """
    records = []
    for number, line in enumerate(lines := path.read_bytes().splitlines(), start=1):
        try:
            record = json.loads(line)
        except ValueError as error:  # no JSON, or no text at all
            if number == len(lines):
                break
            raise DataError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(record, dict):
            raise DataError(f"{path}, line {number}: expected a record, found {record!r:.40}")
        if type(step := record.get("step", 0)) is not int:  # a bool is an int, too
            raise DataError(f"{path}, line {number}: step: expected a whole number, found "
                            f"{step!r:.40}")
        students = record.get("students", {})
        if not isinstance(students, dict) or not all(
            isinstance(values, dict) for values in students.values()
        ):
            raise DataError(f"{path}, line {number}: students: expected values by student, found "
                            f"{students!r:.40}")
        records.append(record)
    return records


class RunLog:
    """Appends records to metrics.jsonl and their numbers to TensorBoard.

    Args:
        folder: the run folder.
        resume_step: the checkpoint's step count when a run goes on: records past it belong to
            steps that will be made again, and are dropped. None starts a new file.
        tensorboard: whether to write event files too.
    """

    def __init__(self, folder: Path, resume_step: int | None, *, tensorboard: bool = True) -> None:
        self.path = folder / METRICS_FILE
        if resume_step is None:
            self.path.write_text("")
        elif self.path.is_file():
            drop_records_after(self.path, resume_step)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # What was written at this step and later is hidden.
            again = 0 if resume_step is None else resume_step + 1
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=again)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record, with "kind" and, except at the start, "step"."""
        self._file.write(json.dumps(finite_or_null(record), allow_nan=False) + "\n")
        self._file.flush()
        if self._board is not None and record.get("kind") in CURVES:
            for name, value in scalars(record):
                self._board.add_scalar(name, value, record["step"])

    def tell(self, record: Mapping[str, Any], text: str) -> None:
        """Append a record of something that happened once, and print it."""
        self.write(record)
        say(text)

    def close(self) -> None:
        """Flush everything to disk."""
        os.fsync(self._file.fileno())
        self._file.close()
        if self._board is not None:
            self._board.close()


def drop_records_after(path: Path, step: int) -> None:
    """Rewrite the file without records of later steps, through a temporary file."""
    kept = [record for record in read_metrics(path) if record.get("step", 0) <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
    temporary.replace(path)


def finite_or_null(value: Any) -> Any:
    """The same structure with NaN and infinity as None, which JSON can hold."""
    if isinstance(value, Mapping):
        return {str(key): finite_or_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def scalars(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Numbers of a nested record with their paths; lists (per-class values) stay in the file."""
    for key, value in record.items():
        if key in {"kind", "step"} or isinstance(value, bool):
            continue
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            yield f"{prefix}{key}", value
