"""How long a training step waits for data, from the log of a run of the tiny students.

    python benchmarks/data_wait.py        into results/data-wait-<device>.json

The run is `co2s-fast train --dataset demo --recipe tiny` as users have it, with its worker process.
The goal is a wait of under 2 % of the step once the first windows are over.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # last: the installed package goes first

from benchmarks import results, tables  # noqa: E402 - needs the path above

SECTION, CASE = "data_wait", "tiny"
EVERY = 10  # steps a log window
WARM_UP = 2  # windows
GOAL = 0.02


def run(steps: int, work: Path) -> list[dict[str, Any]]:
    """Train and return the windows of the log."""
    command = [sys.executable, "-m", "co2s_fast", "train", "--dataset", "demo", "--labels", "16",
               "--recipe", "tiny", "--out", str(work / "run"), "--data-root", str(work / "demo")]
    for option in (f"train.steps={steps}", f"train.log_every={EVERY}", f"train.eval_every={steps}",
                   "train.device=cpu", "eval.panels=0"):  # fmt: skip
        command += ["--set", option]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"training ended with exit code {done.returncode}: "
                                   + done.stderr[-2000:])  # fmt: skip
    lines = (work / "run" / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r.get("kind") == "train"][WARM_UP:]


def rows_of(windows: list[dict[str, Any]], images_a_step: int) -> list[results.Row]:
    """Seconds a step, and seconds of it spent waiting, one sample a window."""
    steps = [images_a_step / w["images_per_s"] for w in windows]
    waits = [w["data_wait_s"] / EVERY for w in windows]
    return [
        results.row((SECTION, CASE, "step"), "step", "time", "s", steps),
        results.row((SECTION, CASE, "wait for data"), "step", "time", "s", waits),
    ]


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, help=__doc__)
@click.option("--steps", type=click.IntRange(min=EVERY * (WARM_UP + 7)), default=150,
              show_default=True)  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False))
def main(steps: int, out: Path | None) -> None:
    begin = time.perf_counter()
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory(prefix="co2s-bench-") as folder:
        header = results.make_header(device, repeats=steps // EVERY - WARM_UP, quick=False)
        windows = run(steps, Path(folder))
        recorded = (Path(folder) / "run" / "config.yaml").read_text()
    import yaml

    images = 2 * yaml.safe_load(recorded)["data"]["batch_size"]
    header["load_after"] = [round(x, 2) for x in os.getloadavg()]
    header["seconds"] = round(time.perf_counter() - begin, 1)
    content = {"schema_version": results.SCHEMA_VERSION, "header": header,
               "rows": rows_of(windows, images), "not_measured": [], "wrong": []}  # fmt: skip
    step, wait = (row["median"] for row in content["rows"])
    click.echo(tables.plain(*tables.section_lines(content, SECTION)))
    click.echo(f"waiting for data: {100 * wait / step:.2f} % of a step, "
               f"goal under {100 * GOAL:g} %")  # fmt: skip
    out = out or results.FOLDER / f"data-wait-{results.slug(device, header['threads'])}.json"
    results.save(out, content)
    click.echo(f"wrote {out}")


if __name__ == "__main__":
    main()
