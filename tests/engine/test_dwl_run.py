"""Runs of dwl: resumed exactly, and the same in two processes as in one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_distributed import launch, read, write_config

from co2s_fast.engine import checkpoint
from co2s_fast.engine.config import RunConfig
from co2s_fast.engine.log import read_metrics
from co2s_fast.engine.runs import checkpoint_folder
from co2s_fast.engine.trainer import train

METHOD = {"name": "dwl", "warmup_steps": 1}


def arrays(folder: Path, stem: str) -> dict[str, torch.Tensor]:
    source = checkpoint_folder(folder, "last")
    return checkpoint.read_arrays(source, checkpoint.read_state(source), stem)


@pytest.mark.parametrize("steps", [3, 4])  # within an epoch of two, and before heads are coupled
def test_a_run_is_resumed_exactly(run_content, stop_after, tmp_path, steps) -> None:
    content = run_content(log_every=1) | {"method": METHOD}
    whole = train(RunConfig.model_validate(content), progress=False)
    cut = RunConfig.model_validate(content | {"out": str(tmp_path / "cut")})
    stop_after(steps, cut)
    train(cut, resume=True, progress=False)
    for stem in ("clip", "ssm", "method", "optimizer"):
        found, wanted = arrays(tmp_path / "cut", stem), arrays(whole, stem)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[k], wanted[k]) for k in wanted), stem
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
    config = write_config(tmp_path / "config.yaml", run_content() | {"method": method})
    found = {}
    for processes in (1, 2):
        out = tmp_path / f"{processes}.safetensors"
        launch(processes, "gradients", config, str(out))
        found[processes] = read(out)
    (one, losses), (two, losses_two) = found[1], found[2]
    assert losses_two == pytest.approx(losses, rel=1e-9, abs=1e-12)
    assert losses["clip/s1"] > 0 and losses["ssm/s1"] > 0
    assert one.keys() == two.keys() and len(one) > 50
    assert any(name.startswith("pseudo_head.") for name in one)
    for name, gradient in one.items():
        torch.testing.assert_close(two[name], gradient, rtol=1e-6, atol=1e-12, msg=name)
