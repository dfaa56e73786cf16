"""A run folder made of invented numbers in the formats that training and evaluation write."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import yaml

from co2s_fast.data.catalogue import load_dataset
from co2s_fast.engine import panels
from co2s_fast.engine.evaluation import EvalConfig, write_evaluation
from co2s_fast.engine.metrics import Metrics

STUDENTS = ("clip", "ssm")
ABSENT = 4


def scene(seed: int, side: int = 96, classes: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """An image and its labels: nearest of a few random points, each with a class."""
    rng = np.random.default_rng(seed)
    points, kinds = rng.uniform(0, side, (14, 2)), rng.integers(0, classes, 14)
    kinds[kinds == ABSENT] = 0
    y, x = np.mgrid[:side, :side]
    nearest = ((y[..., None] - points[:, 0]) ** 2 + (x[..., None] - points[:, 1]) ** 2).argmin(-1)
    label = kinds[nearest].astype(np.uint8)
    palette = np.array(load_dataset("demo").palette)
    image = palette[label] * 0.7 + rng.normal(35, 22, (side, side, 1))
    label[:6] = 255
    return image.clip(0, 255).astype(np.uint8), label


def blurred(label: np.ndarray, seed: int, wrong: float) -> np.ndarray:
    """A prediction: the label with shifted borders and some blocks of another class."""
    rng = np.random.default_rng(seed)
    predicted = np.roll(label, rng.integers(-3, 4, 2), (0, 1))
    block = 12
    side = label.shape[0] // block
    other = rng.integers(0, 6, (side, side)).repeat(block, 0).repeat(block, 1)
    hit = (rng.random((side, side)) < wrong).repeat(block, 0).repeat(block, 1)
    predicted = np.where(hit, other, predicted)
    return np.where(predicted == 255, 0, predicted).astype(np.uint8)


def scored(label: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    valid = label != 255
    matrix = np.zeros((6, 6), np.int64)
    np.add.at(matrix, (label[valid], predicted[valid]), 1)
    return matrix


def make_run(
    folder: Path,
    *,
    method: str = "co2s",
    seed: int = 0,
    labels: int = 8,
    gain: float = 0.0,
    evaluated: bool = True,
    steps: int = 300,
    planned: int = 300,
    students: tuple[str, ...] = STUDENTS,
) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    spec = load_dataset("demo")
    config = {
        "data": {"dataset": "demo", "labels": labels, "split_seed": 0},
        "students": {name: {"model": f"tiny-{name}"} for name in students},
        "method": {"name": method},
        "train": {"steps": planned, "lr": 5e-4},
        "seed": seed,
        "out": str(folder),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "dataset.yaml").write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    records = [start_record(method, seed, labels, planned, students)]
    for step in range(2, steps + 1, 2):
        records.append(train_record(rng, method, step, steps, students))
        if step % 50 == 0:
            records.append(eval_record(rng, step, steps, gain, students))
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(text)
    if evaluated:
        evaluate(folder, spec, students)
    return folder


def start_record(method, seed, labels, planned, students):
    return {
        "kind": "start",
        "versions": {"co2s-fast": "0.1.0", "torch": "2.8.0", "python": "3.11.2"},
        "device": "cpu (2 threads)", "world": 1, "backend": "cpp", "method": method,
        "dataset": "demo", "seed": seed, "steps": planned, "warnings": [],
        "images": {"labeled": labels, "unlabeled": 256 - labels, "val": 64},
        "students": {
            name: {"source": "random", "model": f"tiny-{name}", "sha256": "3f" * 32,
                   "queries": "hash" if name == "clip" else "learnable",
                   "trained_parameters": 1_234_567}
            for name in students
        },
    }  # fmt: skip


def train_record(rng, method, step, steps, students):
    record = {"kind": "train", "step": step, "epoch": step / 32}
    done = step / steps
    terms = {"x": 1.5, "fp": 0.5, "s1": 0.7, "s2": 0.7, "stability": 0.05}
    if method == "onlysup":
        terms = {"x": 1.5}
    for offset, name in enumerate(students):
        values = {
            term: level * (0.25 + math.exp(-3 * done)) * rng.uniform(0.8, 1.2) + 0.02 * offset
            for term, level in terms.items()
        }
        record |= {f"loss/{name}/{term}": value for term, value in values.items()}
        record[f"loss/{name}/total"] = sum(values.values())
        record[f"lr/{name}/decoder"] = 5e-4 * (1 - done) ** 0.9
        if method != "onlysup":
            record[f"coverage/{name}"] = 0.7 * (1 - math.exp(-4 * done))
            record[f"pseudo_accuracy/{name}"] = 0.8 + 0.1 * done
            record[f"pseudo_share/{name}"] = {"field": 0.75, "wood": 0.25, "road": 0.0}
            record[f"confidence/{name}"] = {"field": 0.625, "wood": 0.875 + 0.01 * offset,
                                            "road": None}
    if method != "onlysup" and len(students) > 1:
        record["agreement"] = 0.5 + 0.4 * done
    return record | {"images_per_s": rng.uniform(21, 24), "data_wait_s": rng.uniform(0, 0.2)}


def eval_record(rng, step, steps, gain, students):
    done = step / steps
    scores, pseudo = {}, {}
    names = (*students, "both") if len(students) > 1 else students
    for offset, name in enumerate(names):
        miou = 0.3 + gain + 0.25 * (1 - math.exp(-3 * done)) + 0.03 * offset + rng.normal(0, 0.01)
        iou = [miou] * 6
        iou[ABSENT] = None
        scores[name] = {"miou": miou, "iou": iou, "f1": iou, "overall_accuracy": miou + 0.2,
                        "mean_f1": miou + 0.1, "kappa": miou + 0.05}  # fmt: skip
    for name in students:
        pseudo[name] = {"accuracy": 0.8 + 0.12 * done, "coverage": 0.65 * done, "pixels": 9000}
    return {"kind": "eval", "step": step, "epoch": step / 32, "students": scores, "pseudo": pseudo}


def evaluate(folder, spec, students):
    totals = {name: np.zeros((6, 6), np.int64) for name in students}
    if len(students) > 1:
        totals["both"] = np.zeros((6, 6), np.int64)
    for number in range(4):
        image, label = scene(number)
        maps = {n: blurred(label, 10 * number + i, 0.25) for i, n in enumerate(students)}
        if len(students) > 1:
            maps["both"] = np.where(maps["clip"] == label, maps["clip"], maps["ssm"])
        for name, predicted in maps.items():
            totals[name] += scored(label, predicted)
        panels.save(folder / "panels", number, f"tile {number}", image, label, maps, spec.palette)
    results = {n: Metrics(m, tuple(spec.class_names)) for n, m in totals.items()}
    write_evaluation(folder / "eval.json", results, spec, EvalConfig(), checkpoint="best", step=250)
