"""`train --compile`: the option reaches the students, and a compiled run trains as a plain one."""

from __future__ import annotations

import functools

import pytest
import torch

from co2s_fast.engine.config import RunConfig, load_config
from co2s_fast.engine.launch import nested_options
from co2s_fast.engine.log import read_metrics
from co2s_fast.engine.trainer import train


def test_the_option_sets_the_configuration():
    assert not load_config("tiny", (), nested_options({})).train.compile
    options = {"compile": True, "dataset": "demo"}
    assert load_config("tiny", (), nested_options(options)).train.compile


@pytest.mark.slow
def test_a_compiled_run_has_the_losses_of_a_plain_one(run_content, tmp_path, monkeypatch):
    captured = []

    def backend(graph, inputs):
        captured.append(graph)
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(graph, inputs)  # inductor would compile C++ for minutes

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    losses = {}
    for compiled in (False, True):
        content = {**run_content(steps=2, eval_every=2, log_every=1, compile=compiled),
                   "out": str(tmp_path / str(compiled))}  # fmt: skip
        folder = train(RunConfig.model_validate(content), progress=False)
        records = read_metrics(folder / "metrics.jsonl")
        losses[compiled] = [
            {k: v for k, v in r.items() if k.startswith("loss/")}
            for r in records if r["kind"] == "train"
        ]  # fmt: skip
        assert bool(captured) == compiled
    for plain, ours in zip(*losses.values(), strict=True):
        assert ours == {key: pytest.approx(value, rel=1e-4) for key, value in plain.items()}
