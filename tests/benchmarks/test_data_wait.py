"""The waiting share is read from the log in seconds a step, after the first windows."""

from __future__ import annotations

import json

import pytest

from benchmarks import data_wait


def test_rows_are_seconds_a_step() -> None:
    windows = [
        {"images_per_s": 16.0, "data_wait_s": 0.2},
        {"images_per_s": 8.0, "data_wait_s": 0.4},
    ]
    step, wait = data_wait.rows_of(windows, images_a_step=16)
    assert (step["median"], wait["median"], step["n"]) == (1.5, 0.03, 2)


def test_the_first_windows_are_left_out(tmp_path, monkeypatch) -> None:
    def train(command, **_):
        (tmp_path / "run").mkdir()
        records = [{"kind": "train", "step": 10 * i} for i in range(1, 5)] + [{"kind": "eval"}]
        text = "\n".join(map(json.dumps, records))
        (tmp_path / "run" / "metrics.jsonl").write_text(text)
        return data_wait.subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(data_wait.subprocess, "run", train)
    assert [w["step"] for w in data_wait.run(40, tmp_path)] == [30, 40]


def test_a_failed_run_is_an_error(tmp_path, monkeypatch) -> None:
    def train(command, **_):
        return data_wait.subprocess.CompletedProcess(command, 1, stderr="no room left")

    monkeypatch.setattr(data_wait.subprocess, "run", train)
    with pytest.raises(data_wait.click.ClickException, match="no room left"):
        data_wait.run(40, tmp_path)
