"""Runs of dwl: resumed exactly, and the same in two processes as in one."""

from __future__ import annotations

import pytest
import torch
from test_distributed import assert_same_gradients
from trained import arrays, assert_resumed_exactly

from co2s_fast.engine.config import RunConfig
from co2s_fast.engine.log import read_metrics
from co2s_fast.engine.trainer import train

METHOD = {"name": "dwl", "warmup_steps": 1}


@pytest.mark.parametrize("steps", [3, 4])  # within an epoch of two, and before heads are coupled
def test_a_run_is_resumed_exactly(run_content, stop_after, tmp_path, steps) -> None:
    content = run_content(log_every=1) | {"method": METHOD}
    whole, _ = assert_resumed_exactly(content, stop_after, tmp_path / "cut", steps, "clip", "ssm",
                                      "method", "optimizer")  # fmt: skip
    records = [r for r in read_metrics(whole / "metrics.jsonl") if r["kind"] == "train"]
    assert records[0]["loss/clip/total"] == pytest.approx(records[0]["loss/clip/x"])
    assert all(r["loss/ssm/s1"] > 0 for r in records)
    assert "lr/clip/pseudo_head" in records[0]
    content["method"] = METHOD | {"coupling": 0.0}
    content["out"] = str(tmp_path / "apart")
    apart = arrays(train(RunConfig.model_validate(content), progress=False), "clip")
    coupled = arrays(whole, "clip")
    assert not torch.equal(apart["decoder.head.weight"], coupled["decoder.head.weight"])


def test_two_processes_have_the_gradients_of_one(run_content, tmp_path) -> None:
    """Both rank their pixels among those of both."""
    method = {"name": "dwl", "warmup_steps": 0}
    gradients, losses = assert_same_gradients(run_content() | {"method": method}, tmp_path)
    assert losses["clip/s1"] > 0 and losses["ssm/s1"] > 0
    assert any(name.startswith("pseudo_head.") for name in gradients)
