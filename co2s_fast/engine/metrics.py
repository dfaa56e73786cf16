"""Segmentation metrics, all of them functions of one confusion matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

AbsentRule = Literal["skip", "zero"]

RULES = {
    "skip": "means run over the classes present in the ground truth; an absent class is n/a",
    "zero": "means run over all classes; IoU = I / (U + 1e-10), so an absent class counts as 0",
}


@dataclass(frozen=True, eq=False)
class Metrics:
    """Every number that a confusion matrix gives. All of them are fractions in [0, 1].

    With I = diagonal, T = row sums (truth) and P = column sums (prediction):
    IoU = I / (T + P - I), F1 = 2 I / (T + P), precision = I / P, recall = I / T,
    overall accuracy = sum I / sum T, and Cohen's kappa = (p_o - p_e) / (1 - p_e).

    Args:
        confusion: int64 [K, K], rows ground truth, columns prediction, counts of pixels.
        class_names: K names.
        absent: "skip" leaves classes without a ground-truth pixel out of every mean and gives
            None for them; "zero" is the rule of the UniMatch family's released evaluation.

    Raises:
        ValueError: the matrix is not square, is negative, or does not fit the names.
    """

    confusion: np.ndarray
    class_names: tuple[str, ...]
    absent: AbsentRule = "skip"

    def __post_init__(self) -> None:
        matrix = np.array(self.confusion, dtype=np.int64)
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"confusion: expected a square matrix, got shape {matrix.shape}")
        if matrix.size and matrix.min() < 0:
            raise ValueError(f"confusion: expected counts, found the value {matrix.min()}")
        if len(self.class_names) != len(matrix):
            raise ValueError(
                f"class_names: expected {len(matrix)} names, got {len(self.class_names)}"
            )
        if self.absent not in RULES:
            raise ValueError(f"absent: expected one of {sorted(RULES)}, got {self.absent!r}")
        matrix.setflags(write=False)
        object.__setattr__(self, "confusion", matrix)
        object.__setattr__(self, "class_names", tuple(self.class_names))

    @property
    def num_classes(self) -> int:
        return len(self.confusion)

    @property
    def pixels(self) -> int:
        """Pixels that were scored (those with a label)."""
        return int(self.confusion.sum())

    @property
    def present(self) -> list[bool]:
        """Whether each class has at least one pixel in the ground truth."""
        return [bool(count) for count in self.confusion.sum(1)]

    @property
    def rule(self) -> str:
        """The averaging rule in words, to be printed beside every mean."""
        return RULES[self.absent]

    @property
    def iou(self) -> list[float | None]:
        hit, truth, predicted = self._areas()
        if self.absent == "zero":
            return [float(value) for value in official_iou(hit, truth + predicted - hit)]
        return self._per_class(hit, truth + predicted - hit)

    @property
    def f1(self) -> list[float | None]:
        hit, truth, predicted = self._areas()
        return self._per_class(2 * hit, truth + predicted)

    @property
    def precision(self) -> list[float | None]:
        """Share of the pixels predicted as a class that are right; None if never predicted."""
        hit, _, predicted = self._areas()
        return self._per_class(hit, predicted)

    @property
    def recall(self) -> list[float | None]:
        hit, truth, _ = self._areas()
        return self._per_class(hit, truth)

    @property
    def miou(self) -> float | None:
        return self._mean(self.iou)

    @property
    def mean_f1(self) -> float | None:
        return self._mean(self.f1)

    @property
    def mean_accuracy(self) -> float | None:
        """Mean recall over classes."""
        return self._mean(self.recall)

    @property
    def overall_accuracy(self) -> float | None:
        return float(np.trace(self.confusion)) / self.pixels if self.pixels else None

    @property
    def kappa(self) -> float | None:
        """Cohen's kappa; None where chance agreement is already complete (one class only)."""
        if not self.pixels:
            return None
        _, truth, predicted = self._areas()
        # float64 shares: products of pixel counts of a large set overflow 64-bit integers
        by_chance = float((truth / self.pixels) @ (predicted / self.pixels))
        if math.isclose(by_chance, 1.0):
            return None
        return (float(np.trace(self.confusion)) / self.pixels - by_chance) / (1.0 - by_chance)

    def to_dict(self, confusion: bool = True) -> dict[str, Any]:
        """Plain numbers and lists, None where a number does not exist; JSON takes it as it is.

        Args:
            confusion: also the matrix itself, without which `from_dict` cannot work.
        """
        values = {
            "miou": self.miou,
            "mean_f1": self.mean_f1,
            "mean_accuracy": self.mean_accuracy,
            "overall_accuracy": self.overall_accuracy,
            "kappa": self.kappa,
            "iou": self.iou,
            "f1": self.f1,
            "precision": self.precision,
            "recall": self.recall,
            "classes": list(self.class_names),
            "absent": self.absent,
            "pixels": self.pixels,
        }
        if confusion:
            values["confusion"] = self.confusion.tolist()
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Metrics:
        """The inverse of `to_dict`; everything is worked out again from the confusion matrix."""
        missing = [key for key in ("confusion", "classes") if key not in values]
        if missing:
            raise ValueError(f"metrics: expected the keys {missing}, got {sorted(values)}")
        matrix = np.array(values["confusion"], dtype=np.int64)
        return cls(matrix, tuple(values["classes"]), values.get("absent", "skip"))

    def __str__(self) -> str:
        return format_table({"": self})

    def _areas(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return np.diag(self.confusion), self.confusion.sum(1), self.confusion.sum(0)

    def _per_class(self, above: np.ndarray, below: np.ndarray) -> list[float | None]:
        fill = 0.0 if self.absent == "zero" else None
        rows = zip(above, below, self.present, strict=True)
        return [float(a) / float(b) if b and here else fill for a, b, here in rows]

    def _mean(self, values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None


def official_iou(intersection: np.ndarray, union: np.ndarray) -> np.ndarray:
    """`I / (U + 1e-10)`, the released evaluation's rule: a class seen nowhere scores 0.

    Source: evaluation of the UniMatch family (`iou_class = intersection / (union + 1e-10)`).
    """
    return np.asarray(intersection) / (np.asarray(union) + 1e-10)


def label_areas(
    prediction: np.ndarray, target: np.ndarray, num_classes: int, ignore_index: int = 255
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Intersection, union and target area per class, counted as the released evaluation does.

    It counts with histograms whose last bin is closed, so a label equal to K falls into class
    K - 1. Our own evaluation refuses such a label; this function exists to reproduce published
    numbers.

    Args:
        prediction: integer [...], in [0, K).
        target: integer, same shape; `ignore_index` is left out.
        num_classes: K.
        ignore_index: label value that takes no part.

    Returns:
        Three int64 arrays [K].
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction: expected shape {target.shape}, got {prediction.shape}")
    valid = target != ignore_index
    predicted, truth = prediction[valid], target[valid]
    bins = np.arange(num_classes + 1)
    hit, _ = np.histogram(predicted[predicted == truth], bins=bins)
    area_predicted, _ = np.histogram(predicted, bins=bins)
    area_truth, _ = np.histogram(truth, bins=bins)
    return hit, area_predicted + area_truth - hit, area_truth


def percent(value: float | None, digits: int = 2) -> str:
    """A fraction as a percentage without the sign, or "n/a"."""
    return "n/a" if value is None else f"{100 * value:.{digits}f}"


def format_table(results: dict[str, Metrics]) -> str:
    """A plain-text table: IoU and F1 per class for each student, then the means and the rule."""
    if not results:
        raise ValueError("results: expected at least one student, got none")
    first = next(iter(results.values()))
    header = ["class", "pixels"]
    for name in results:
        header += [f"{name} IoU".strip(), f"{name} F1".strip()]
    rows = [header]
    for index, class_name in enumerate(first.class_names):
        row = [class_name, f"{int(first.confusion[index].sum()):,}"]
        for metrics in results.values():
            row += [percent(metrics.iou[index]), percent(metrics.f1[index])]
        rows.append(row)
    split = len(rows)
    mean = ["mean", f"{first.pixels:,}"]
    for metrics in results.values():
        mean += [percent(metrics.miou), percent(metrics.mean_f1)]
    rows.append(mean)
    accuracy = [percent(metrics.overall_accuracy) for metrics in results.values()]
    kappa = ["n/a" if m.kappa is None else f"{m.kappa:.4f}" for m in results.values()]
    for label, cells in (("overall accuracy", accuracy), ("kappa", kappa)):
        rows.append([label, ""] + [part for cell in cells for part in (cell, "")])

    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    rule = "-" * max(map(len, lines))
    lines.insert(split, rule)
    lines.insert(1, rule)
    absent = [n for n, here in zip(first.class_names, first.present, strict=True) if not here]
    note = f"({first.rule})"
    if absent:
        note = f"not in the ground truth: {', '.join(absent)} {note}"
    return "\n".join([*lines, note])
