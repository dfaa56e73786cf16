"""Accuracy and coverage of pseudo-labels at the run's threshold and at others."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from co2s_fast.engine.config import RunConfig
from co2s_fast.engine.evaluation import THRESHOLDS, pseudo_label_quality
from co2s_fast.engine.inference import EvalConfig
from co2s_fast.engine.log import read_metrics
from co2s_fast.engine.trainer import train
from co2s_fast.report import write_report

CONFIDENCES = [0.55, 0.92, 0.96, 0.999]
LABELS = [0, 1, 0, 255]  # class 0 is predicted everywhere


class Sure(torch.nn.Module):
    """Says class 0 of two, as surely as the image is bright."""

    num_classes, patch_size, pads_to = 2, 1, 1

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.stack([(images[:, 0] / (1 - images[:, 0])).log(), 0 * images[:, 0]], 1)


def quality(threshold: float = 0.95):
    image = torch.tensor(CONFIDENCES).view(1, 1, 4).expand(3, 1, 4)
    label = torch.tensor(LABELS, dtype=torch.uint8).view(1, 4)
    spec = SimpleNamespace(num_classes=2, crop=None)
    return pseudo_label_quality(
        {"clip": Sure()}, [(image, label, "a")], spec, EvalConfig(mode="whole"), "cpu",
        threshold=threshold, progress=False,
    )["clip"]  # fmt: skip


def test_counts_by_hand() -> None:
    found = quality()
    assert (found["accuracy"], found["coverage"], found["pixels"]) == (1.0, pytest.approx(1 / 3), 3)
    levels = {threshold: each for threshold, *each in found["thresholds"]}
    assert tuple(levels) == THRESHOLDS
    assert levels[0.0] == [pytest.approx(2 / 3), 1.0] == levels[0.5]
    assert levels[0.6] == [0.5, pytest.approx(2 / 3)] == levels[0.9]
    assert levels[0.95] == [found["accuracy"], found["coverage"]]
    assert levels[0.98] == [None, 0.0]


def test_the_threshold_itself_counts() -> None:
    assert quality(float(torch.tensor(0.92)))["coverage"] == pytest.approx(2 / 3)


def test_a_report_shows_them(run_content) -> None:
    content = run_content()
    content["method"]["threshold"] = 0.9
    folder = train(RunConfig.model_validate(content), progress=False)
    last = [r for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "eval"][-1]
    assert len(last["pseudo"]["ssm"]["thresholds"]) == len(THRESHOLDS)
    page = write_report(folder).read_text()
    assert "Pseudo-labels at step 6 with other thresholds" in page
    assert '<tr class="chosen"><td>0.9</td>' in page
    assert "thresholds" not in (folder / "metrics.csv").read_text()
