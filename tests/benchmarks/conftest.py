"""The benchmarks are scripts beside the package, not part of it: put them on the path."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


@pytest.fixture
def schema() -> dict:
    return json.loads((ROOT / "benchmarks" / "schema.json").read_text())


@pytest.fixture
def accuracy_schema() -> dict:
    return json.loads((ROOT / "benchmarks" / "schema_accuracy.json").read_text())


def invented_row(**changes: object) -> dict:
    row = {
        "section": "loss_section", "case": "128to512", "provider": "eager", "mode": "both",
        "metric": "time", "unit": "s", "median": 0.9, "p20": 0.85, "p80": 1.0, "n": 7,
    }  # fmt: skip
    return row | changes


@pytest.fixture
def invented() -> dict:
    """A result file with one section, in which ours is 18 times faster and torch.compile loses."""
    times = {"eager": 0.9, "compile": 1.2, "cpp": 0.05}
    memory = {"eager": 400 << 20, "compile": 700 << 20, "cpp": 40 << 20}
    rows = [invented_row(provider=p, median=t, p20=0.9 * t, p80=1.1 * t) for p, t in times.items()]
    rows += [
        invented_row(provider=p, metric="peak_memory", unit="B", median=m, p20=m, p80=m, n=1)
        for p, m in memory.items()
    ]
    return {
        "schema_version": 1,
        "header": {
            "commit": "0" * 40, "dirty": False, "date": "2026-01-02T03:04:05Z",
            "versions": {"python": "3.11", "torch": "2.9", "co2s_fast": "0.1.0", "triton": None},
            "device": "Some CPU", "device_type": "cpu", "cpu": "Some CPU", "threads": 2,
            "cores": 2, "default_backend": "cpp", "repeats": 7, "quick": False,
            "load_before": [0.1, 0.1, 0.1], "load_after": [1.9, 0.5, 0.2], "seconds": 100.0,
        },
        "rows": rows,
        "not_measured": [
            {"section": "loss_section", "case": "128to512", "provider": "cuda",
             "reason": "torch sees no CUDA GPU"},
        ],
        "wrong": [],
    }  # fmt: skip
