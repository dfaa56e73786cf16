"""metrics.csv: the curves of a run as one table, for spreadsheets and plotting programs."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from co2s_fast.data.writing import write_text
from co2s_fast.engine.log import scalars
from co2s_fast.report.run import Run

TABLE_FILE = "metrics.csv"


def write_table(run: Run) -> Path:
    """Write RUN/metrics.csv: a row for each step that was logged or evaluated.

    Columns are named as in TensorBoard, those of evaluations "eval/" and the same; a cell is empty
    where there is no number.
    """
    rows: dict[int, dict[str, float]] = {}
    for prefix, records in (("", run.train), ("eval/", run.evals)):
        for record in records:
            row = rows.setdefault(record["step"], {"step": record["step"]})
            row["epoch"] = record.get("epoch", "")
            row |= {f"{prefix}{name}": value for name, value in scalars(record) if name != "epoch"}
    columns = dict.fromkeys(name for row in rows.values() for name in row)
    text = io.StringIO()
    table = csv.DictWriter(text, columns or ["step"], lineterminator="\n")
    table.writeheader()
    table.writerows(rows[step] for step in sorted(rows))
    path = run.folder / TABLE_FILE
    write_text(path, text.getvalue())
    return path
