"""Label efficiency: trains methods on few labels with several seeds and tabulates their mIoU.

\b
python benchmarks/accuracy.py --dataset demo --labels 4 --labels 16 --seeds 3 --work runs/accuracy
python benchmarks/accuracy.py --dataset dubai.yaml --data-root data/dubai --name dubai --labels 6

Runs go one after the other through the command line that users have. A seed fixes the weights, the
order, the augmentation and (unless --one-split) which images are labelled; the methods of one seed
see the same labelled images and train for the same number of steps. Finished runs are skipped and
interrupted ones resumed, so the command can be stopped and given again.

While a run trains, pseudo-labels are measured on `train.probe_images` of the unlabelled images
(`pseudo`); once it is finished, on all of them (`pseudo_all`). Accuracy and coverage are those at
the method's threshold; `surest` is the accuracy of the 40 % of the pixels that a student is surest
of, for methods whose students are not equally sure.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # last: the installed package goes first

from benchmarks import results, tables  # noqa: E402 - needs the path above

METHODS = ("onlysup", "co2s")
SUREST = 0.4  # share of the pixels
HEADER = ("commit", "dirty", "date", "versions", "device", "device_type", "cpu", "threads", "cores")


@dataclass(frozen=True)
class Plan:
    """One run: what `co2s-fast train` is asked for."""

    dataset: str
    labels: int
    method: str
    seed: int
    options: tuple[str, ...] = ()
    one_split: bool = False
    until: int | None = None

    @property
    def name(self) -> str:
        return f"{Path(self.dataset).stem}-{self.labels}-{self.method}-seed{self.seed}"

    def arguments(self) -> list[str]:
        """Arguments of the train command, without the folder."""
        given = ["--dataset", self.dataset, "--labels", str(self.labels), "--method", self.method]
        given += ["--seed", str(self.seed)]
        if not self.one_split:
            given += ["--set", f"data.split_seed={self.seed}"]
        return [*given, *self.options]


def run_command(command: list[str]) -> int:
    """Exit code of a command whose output goes to the terminal."""
    return subprocess.run(command, env=environment()).returncode


def environment() -> dict[str, str]:
    """For a command that finds the package where this file does, and files where the user does."""
    paths = [os.environ.get("PYTHONPATH"), str(ROOT)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def run_until(command: list[str], folder: Path, step: int) -> int:
    """As `run_command`, but the run is stopped (SIGTERM) once it was evaluated at a step."""
    with subprocess.Popen(command, env=environment()) as process:
        while process.poll() is None:
            time.sleep(1)
            log = folder / "metrics.jsonl"
            if log.is_file() and any(e["step"] >= step for e in evaluations_in(log)):
                process.terminate()
                process.wait()
                return 0
    return process.returncode


def train(plan: Plan, work: Path) -> Path:
    """Train unless that has been done, and return the run folder."""
    folder, marker = work / plan.name, work / f"{plan.name}.finished.json"
    arguments = plan.arguments() + ([] if plan.until is None else ["--until", str(plan.until)])
    if marker.is_file():
        kept = json.loads(marker.read_text())
        before = kept["arguments"] if isinstance(kept, dict) else kept  # of earlier versions
        if before != arguments:
            raise click.UsageError(
                f"{folder} was trained with other options ({' '.join(before)}): "
                "give another --work, or delete it"
            )
        click.echo(f"{plan.name}: finished before", err=True)
        return folder
    click.echo(f"{plan.name}: training", err=True)
    command = [sys.executable, "-m", "co2s_fast", "train", *plan.arguments(), "--out", str(folder),
               "--resume-if-exists"]  # fmt: skip
    code = (run_command(command) if plan.until is None
            else run_until(command, folder, plan.until))
    if code:
        error = click.ClickException(f"{plan.name}: training ended with exit code {code}")
        error.exit_code = code if code > 0 else 1
        raise error
    results.save(marker, {"arguments": arguments, **results.commit()})
    return folder


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """The evaluations of a run in the order of their steps; a resumed run's repeats count once."""
    path = folder / "metrics.jsonl"
    by_step = {record["step"]: record for record in evaluations_in(path)}
    if not by_step:
        raise click.ClickException(f"{path}: holds no evaluation")
    return [by_step[step] for step in sorted(by_step)]


def evaluations_in(log: Path) -> list[dict[str, Any]]:
    """Records of evaluations; a line that is being written is no record yet."""
    lines = log.read_text().split("\n")[:-1]
    return [record for line in lines if (record := json.loads(line)).get("kind") == "eval"]


def all_pseudo_labels(folder: Path) -> dict[str, dict[str, Any]]:
    """Quality of the last checkpoint's pseudo-labels on every unlabelled image; once a run.

    As in training, but on all images whose label is known; empty where none is. Kept in the run
    folder, because the command is given again to go on.
    """
    kept = folder / "pseudo_all.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    from co2s_fast.data import open_split, val_dataset
    from co2s_fast.engine.evaluation import pseudo_label_quality
    from co2s_fast.engine.runs import load_run

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config, spec, students = load_run(folder, "last", device=device)
    unlabeled = val_dataset(open_split(config.data, spec).unlabeled, spec, config.data)
    found = pseudo_label_quality(
        students, unlabeled, spec, config.eval, device,
        threshold=getattr(config.method, "threshold", 0.95),
    )  # fmt: skip
    found = {name: quality(each) for name, each in found.items()}
    results.save(kept, found)
    return found


def quality(found: dict[str, Any]) -> dict[str, Any]:
    """Accuracy and coverage of pseudo-labels, and `surest`: the accuracy of the `SUREST` pixels."""
    kept = {key: value for key, value in found.items() if key != "thresholds"}
    if "thresholds" not in found:  # of an earlier version
        return kept
    points = sorted((coverage, coverage * (accuracy or 0.0))
                    for _, accuracy, coverage in found["thresholds"])  # fmt: skip
    covered, right = zip((0.0, 0.0), *points, strict=True)
    return {**kept, "surest": float(np.interp(SUREST, covered, right)) / SUREST}


def collect(plan: Plan, folder: Path) -> dict[str, Any]:
    """Final and best mIoU of each student and of both, and the curves, of one run."""
    last = plan.until or math.inf
    evaluations = [e for e in read_evaluations(folder) if e["step"] <= last]
    students = list(evaluations[-1]["students"])
    curves = {s: [e["students"][s]["miou"] for e in evaluations] for s in students}
    for student, curve in curves.items():
        if None in curve:
            raise click.ClickException(f"{folder}: {student} has an evaluation without any mIoU")
    measured = {s for e in evaluations for s in e.get("pseudo", {})}
    pseudo = {
        s: [{"step": e["step"], **quality(e["pseudo"][s])}
            for e in evaluations if s in e.get("pseudo", {})]
        for s in sorted(measured)
    }  # fmt: skip
    keep = ("labels", "method", "seed")
    return {
        **{key: value for key, value in asdict(plan).items() if key in keep},
        "steps": [e["step"] for e in evaluations],
        "miou": curves,
        "final": {s: curve[-1] for s, curve in curves.items()},
        "best": {s: max(curve) for s, curve in curves.items()},
        "pseudo": pseudo,
        "pseudo_all": {} if plan.until else all_pseudo_labels(folder),
        **trained_by(folder),
    }


def trained_by(folder: Path) -> dict[str, Any]:
    """Commit of the code that trained a run, and whether that had local changes; where noted."""
    marker = folder.with_name(f"{folder.name}.finished.json")
    kept = json.loads(marker.read_text()) if marker.is_file() else None
    return {key: kept[key] for key in ("commit", "dirty")} if isinstance(kept, dict) else {}


def mean_and_std(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and sample standard deviation; no deviation from a single value."""
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": spread}


def means(found: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Mean accuracies and coverage over the runs that have them."""
    entry = {}
    for key in ("accuracy", "coverage", *(["surest"] if "surest" in found[0] else [])):
        values = [each[key] for each in found if each.get(key) is not None]
        entry[key] = statistics.fmean(values) if values else None
    return entry


def mean_curve(runs: list[dict[str, Any]], student: str) -> list[dict[str, float | None]]:
    """Pseudo-label accuracy and coverage against the step, means over the runs that have them."""
    points: dict[int, list[dict[str, Any]]] = {}
    for run in runs:
        for point in run["pseudo"].get(student, []):
            points.setdefault(point["step"], []).append(point)
    return [{"step": step, **means(found)} for step, found in sorted(points.items())]


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each number of labels and method: mean and spread over the seeds."""
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["labels"], run["method"]), []).append(run)
    summary = []
    for (labels, method), members in groups.items():
        students = members[0]["final"]
        entry: dict[str, Any] = {"labels": labels, "method": method, "n": len(members)}
        for when in ("final", "best"):
            entry[when] = {s: mean_and_std([m[when][s] for m in members]) for s in students}
        entry["pseudo"] = {s: mean_curve(members, s) for s in members[0]["pseudo"]}
        entry["pseudo_all"] = {s: means([m["pseudo_all"][s] for m in members])
                               for s in members[0]["pseudo_all"]}
        summary.append(entry)
    return summary


def content_of(name: str, plans: list[Plan], runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of the result file."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    header = results.make_header(device, repeats=1, quick=False)
    return {
        "schema_version": results.SCHEMA_VERSION,
        "header": {key: header[key] for key in HEADER},
        "dataset": name,
        "options": list(plans[0].options),
        "one_split": plans[0].one_split,
        **({} if plans[0].until is None else {"until": plans[0].until}),
        "students": list(runs[0]["final"]),
        "runs": runs,
        "summary": summarise(runs),
    }


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, help=__doc__)
@click.option("--dataset", default="demo", show_default=True, help="Name or YAML file.")
@click.option("--data-root", type=click.Path(path_type=Path), help="Prepared dataset folder.")
@click.option("--name", help="Name in the result file accuracy_NAME.json. Default: the dataset's.")
@click.option("--labels", type=int, multiple=True, required=True, help="Repeatable.")
@click.option("--method", "methods", multiple=True, default=METHODS, show_default=True)
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="How many.")
@click.option("--first-seed", type=click.IntRange(0), default=0, show_default=True,
              help="Seeds count from here: 3 leaves out those that a recipe was chosen on.")
@click.option("--recipe", help="A recipe of the package or a YAML file.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="As in train.")
@click.option("--one-split", is_flag=True, help="Every seed gets the same labelled images.")
@click.option("--until", type=click.IntRange(1), metavar="STEP",
              help="Stop every run after its evaluation at this step.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/accuracy"),
              show_default=True, help="Where the runs go.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), help="Default: results/accuracy_NAME.json.")
def main(
    dataset: str, data_root: Path | None, name: str | None, labels: tuple[int, ...],
    methods: tuple[str, ...], seeds: int, first_seed: int, recipe: str | None,
    overrides: tuple[str, ...], one_split: bool, until: int | None, work: Path,
    out: Path | None,
) -> None:  # fmt: skip
    options: list[str] = []
    if data_root is not None:
        options += ["--data-root", str(data_root.resolve())]
    if recipe is not None:
        options += ["--recipe", recipe]
    for override in overrides:
        options += ["--set", override]
    plans = [
        Plan(dataset, count, method, seed, tuple(options), one_split, until)
        for count in labels
        for seed in range(first_seed, first_seed + seeds)
        for method in methods
    ]
    name = name or Path(dataset).stem
    out = out or results.FOLDER / f"accuracy_{name}.json"
    work = work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    runs: list[dict[str, Any]] = []
    for plan in plans:
        runs.append(collect(plan, train(plan, work)))
        # After every run, so that a stopped experiment leaves what it has.
        results.save(out, content_of(name, plans, runs))
    click.echo(tables.plain(*tables.accuracy_table(json.loads(out.read_text()))))
    click.echo(f"wrote {out}")


if __name__ == "__main__":
    main()
