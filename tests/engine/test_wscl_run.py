"""Runs of wscl: resumed exactly, and the same in two processes as in one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_distributed import launch, read, write_config

from co2s_fast.engine import checkpoint
from co2s_fast.engine.config import RunConfig
from co2s_fast.engine.runs import checkpoint_folder
from co2s_fast.engine.trainer import train


def arrays(folder: Path, stem: str) -> dict[str, torch.Tensor]:
    source = checkpoint_folder(folder, "last")
    return checkpoint.read_arrays(source, checkpoint.read_state(source), stem)


def test_a_run_is_resumed_exactly(run_content, stop_after, tmp_path) -> None:
    content = run_content() | {"method": {"name": "wscl"}}
    whole = train(RunConfig.model_validate(content), progress=False)
    cut = RunConfig.model_validate(content | {"out": str(tmp_path / "cut")})
    stop_after(4, cut)
    train(cut, resume=True, progress=False)
    for stem in ("clip", "ssm", "optimizer"):
        found, wanted = arrays(tmp_path / "cut", stem), arrays(whole, stem)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[k], wanted[k]) for k in wanted), stem


@pytest.mark.parametrize("selection", [
    pytest.param("pixel", marks=pytest.mark.slow), "mean",
])  # fmt: skip
def test_two_processes_have_the_gradients_of_one(run_content, tmp_path, selection) -> None:
    """One quantile, one count and one share of both; partners would be other images."""
    method = {"name": "wscl", "mixing": "ds", "mixing_probability": 1.0, "selection": selection}
    config = write_config(tmp_path / "config.yaml", run_content() | {"method": method})
    found = {}
    for processes in (1, 2):
        out = tmp_path / f"{processes}.safetensors"
        launch(processes, "gradients", config, str(out))
        found[processes] = read(out)
    (one, losses), (two, losses_two) = found[1], found[2]
    assert losses_two == pytest.approx(losses, rel=1e-9, abs=1e-12)
    assert losses["clip/s"] > 0 and losses["ssm/s"] > 0
    assert one.keys() == two.keys() and len(one) > 50
    for name, gradient in one.items():
        torch.testing.assert_close(two[name], gradient, rtol=1e-6, atol=1e-12, msg=name)
