"""A run of muca: stopped and resumed it is the same run, attention and averages included."""

from __future__ import annotations

import torch

from co2s_fast.engine import checkpoint
from co2s_fast.engine.config import RunConfig
from co2s_fast.engine.log import read_metrics
from co2s_fast.engine.runs import checkpoint_folder
from co2s_fast.engine.trainer import train


def arrays(folder, stem: str) -> dict[str, torch.Tensor]:
    source = checkpoint_folder(folder, "last")
    return checkpoint.read_arrays(source, checkpoint.read_state(source), stem)


def test_a_run_is_resumed_exactly(run_content, stop_after, tmp_path) -> None:
    content = run_content() | {"method": {"name": "muca"}}
    config = RunConfig.model_validate(content)
    assert config.train.ema == 0.99
    whole = train(config, progress=False)
    cut = RunConfig.model_validate(content | {"out": str(tmp_path / "cut")})
    stop_after(2, cut)
    early = arrays(tmp_path / "cut", "method")
    train(cut, resume=True, progress=False)
    for stem in ("clip", "ssm-average", "method", "optimizer"):
        one, other = arrays(whole, stem), arrays(tmp_path / "cut", stem)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), stem
    assert not any(torch.equal(early[key], value)
                   for key, value in arrays(whole, "method").items())  # fmt: skip
    records = [r for r in read_metrics(whole / "metrics.jsonl") if r["kind"] == "train"]
    assert all(records[-1][f"loss/clip/{term}"] > 0 for term in ("x", "out", "level3", "attention"))
