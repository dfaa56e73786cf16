"""A run of muca: stopped and resumed it is the same run, attention and averages included."""

from __future__ import annotations

import torch
from trained import arrays, assert_resumed_exactly

from co2s_fast.engine.config import RunConfig
from co2s_fast.engine.log import read_metrics


def test_a_run_is_resumed_exactly(run_content, stop_after, tmp_path) -> None:
    content = run_content() | {"method": {"name": "muca"}}
    assert RunConfig.model_validate(content).train.ema == 0.99
    whole, early = assert_resumed_exactly(content, stop_after, tmp_path / "cut", 2, "clip",
                                          "ssm-average", "method", "optimizer")  # fmt: skip
    assert not any(torch.equal(early[key], value)
                   for key, value in arrays(whole, "method").items())  # fmt: skip
    records = [r for r in read_metrics(whole / "metrics.jsonl") if r["kind"] == "train"]
    assert all(records[-1][f"loss/clip/{term}"] > 0 for term in ("x", "out", "level3", "attention"))
