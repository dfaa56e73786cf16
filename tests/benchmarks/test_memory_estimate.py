"""The estimate of a step's memory beside a GPU's figures."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from benchmarks import memory_estimate, results


def test_measured_figures_are_those_of_the_same_step() -> None:
    found = memory_estimate.measured(results.FOLDER / "step-nvidia-h200-16-threads.json")
    assert found.keys() == {"ours", "ours_float32"}
    assert found["ours"] < found["ours_float32"]


def test_both_are_written_side_by_side(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(memory_estimate, "estimates", lambda: {"ours": 7 << 30})
    out = tmp_path / "memory.json"
    done = CliRunner().invoke(memory_estimate.main, ["--out", str(out)], catch_exceptions=False)
    assert "7.00 GiB" in done.output and "11.04 GiB" in done.output
    rows = json.loads(out.read_text())["rows"]
    assert [row["provider"] for row in rows] == ["estimate", "step-nvidia-h200-16-threads"]


@pytest.mark.slow
def test_the_stored_estimate_is_what_the_code_says() -> None:
    (path,) = results.FOLDER.glob("memory-estimate-*.json")
    rows = json.loads(path.read_text())["rows"]
    stored = {row["case"]: row["median"] for row in rows if row["provider"] == "estimate"}
    measured = memory_estimate.measured(results.FOLDER / "step-nvidia-h200-16-threads.json")
    for provider, size in memory_estimate.estimates().items():
        assert size == pytest.approx(stored[provider], rel=0.03)
        assert size == pytest.approx(measured[provider], rel=0.08)  # torch 2.11, on an H200
