"""`train.nonfinite: skip`: what is not finite changes nothing, is told, and does not go on."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from test_trainer import start, weights

from co2s_fast.engine import trainer as trainers
from co2s_fast.engine.config import RunConfig
from co2s_fast.engine.log import read_metrics
from co2s_fast.engine.meter import NonFiniteLossError
from co2s_fast.engine.skips import IN_A_ROW


@pytest.fixture
def poison(monkeypatch) -> Callable[..., None]:
    """Let the loss (or only its gradients) be NaN at some steps, counted from 0."""
    method = trainers.get_method("co2s")
    forward = method.forward

    def begin(*steps: int, gradients_only: bool = False) -> None:
        def poisoned(self, batch, step, total_steps):
            out = forward(self, batch, step, total_steps)
            if step not in steps:
                return out
            if gradients_only:
                out["loss"].register_hook(lambda grad: grad * float("nan"))
                return out
            bad = out["loss"] * float("nan")
            return {**out, "loss": bad, "ssm/s1": bad.detach(), "ssm/total": bad.detach()}

        monkeypatch.setattr(method, "forward", poisoned)

    return begin


def warnings_of(folder) -> list[str]:
    records = read_metrics(folder / "metrics.jsonl")
    return [f"{r['step']}: {r['text']}" for r in records if r.get("kind") == "warning"]


@pytest.mark.parametrize("gradients_only", [False, True])
def test_a_step_is_left_out(run_content, poison, monkeypatch, capsys, gradients_only) -> None:
    seen = []
    make_step = trainers.Trainer._make_step

    def watch(self, batch) -> None:
        make_step(self, batch)
        seen.append([p.detach().clone() for p in self.method.parameters()])

    monkeypatch.setattr(trainers.Trainer, "_make_step", watch)
    poison(2, 4, gradients_only=gradients_only)
    folder = start(run_content(steps=6, eval_every=6, log_every=2, nonfinite="skip"))
    for step in range(1, 6):
        same = all(torch.equal(a, b) for a, b in zip(seen[step - 1], seen[step], strict=True))
        assert same == (step in (2, 4))
    assert all(torch.isfinite(w).all() for w in weights(folder).values())
    said = warnings_of(folder)
    reason = "a gradient is not finite" if gradients_only else "loss term ssm/s1 is not finite"
    assert [text.partition(" at step")[0] for text in said] == [f"3: skipped: {reason}",
                                                               f"5: skipped: {reason}"]
    assert gradients_only or "the images of that batch: 0" in said[0]
    assert "warning: step skipped, no weight changed" in capsys.readouterr().err
    state = json.loads((folder / "checkpoints/last/state.json").read_text())
    assert state["skips"] == {"total": 2, "in_a_row": 0}
    train = [r for r in read_metrics(folder / "metrics.jsonl") if r.get("kind") == "train"]
    assert [r["step"] for r in train] == [2, 4, 6]
    assert all(r["loss/ssm/s1"] is not None for r in train)


def test_ten_in_a_row_stop_the_run(run_content, poison) -> None:
    poison(*range(3, 3 + IN_A_ROW))
    content = run_content(steps=20, eval_every=3, nonfinite="skip")
    with pytest.raises(NonFiniteLossError, match=r"at step 13; .*So were the 9 steps before"):
        start(content)
    folder = RunConfig.model_validate(content).folder
    state = json.loads((folder / "checkpoints/last/state.json").read_text())
    assert state["step"] == 12 and state["skips"] == {"total": 9, "in_a_row": 9}
    # they are still in a row after a restart
    with pytest.raises(NonFiniteLossError, match="at step 13"):
        start(content, resume=True)


def test_a_run_that_stopped_goes_on_without_the_step(run_content, poison) -> None:
    poison(4)
    content = run_content(steps=6, eval_every=3)
    with pytest.raises(NonFiniteLossError, match=r"--resume --set train\.nonfinite=skip"):
        start(content)
    content["train"]["nonfinite"] = "skip"
    folder = start(content, resume=True)
    assert json.loads((folder / "checkpoints/last/state.json").read_text())["step"] == 6
    assert len(warnings_of(folder)) == 1


def test_nothing_is_skipped_where_all_is_finite(run_content, tmp_path) -> None:
    stopping = start(run_content(steps=4, eval_every=4))
    content = run_content(steps=4, eval_every=4, nonfinite="skip") | {"out": str(tmp_path / "two")}
    skipping = start(content)
    for name, value in weights(stopping).items():
        assert torch.equal(value, weights(skipping)[name]), name
