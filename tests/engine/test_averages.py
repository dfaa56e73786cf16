"""`train.ema`: averages of the weights are evaluated, kept, and may label the unlabelled pixels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from co2s_fast.data.splits import open_split
from co2s_fast.data.validation import val_dataset
from co2s_fast.engine import checkpoint
from co2s_fast.engine.averages import Averages
from co2s_fast.engine.config import RunConfig, load_config
from co2s_fast.engine.evaluation import evaluate
from co2s_fast.engine.log import read_metrics
from co2s_fast.engine.runs import checkpoint_folder, load_run
from co2s_fast.engine.trainer import train
from co2s_fast.errors import UsageError


class Parts(nn.Module):
    """Something trained, something frozen and a buffer."""

    provenance = "drawn"

    def __init__(self) -> None:
        super().__init__()
        self.trained = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))


def test_an_average_is_the_mean_of_the_first_steps_and_forgets_them_later() -> None:
    student = Parts()
    averages = Averages({"one": student}, decay=0.75)
    kept = averages.students["one"]
    values, expected = [0.0], None
    for step in range(1, 8):
        with torch.no_grad():
            student.trained.fill_(step**2)
            student.seen.fill_(step)
        averages.update(step)
        values.append(float(step**2))
        # n / (n + 1) is 0.75 after the third step.
        expected = sum(values) / len(values) if step <= 3 else 0.75 * expected + 0.25 * step**2
        torch.testing.assert_close(kept.trained, torch.full((2,), expected, dtype=torch.float64))
        assert kept.seen == step and not kept.training
    assert not any(p.requires_grad for p in kept.parameters())
    assert student.trained.requires_grad and student.trained[0] == 49


def test_a_checkpoint_before_the_first_step_has_no_averages_but_the_students() -> None:
    student = Parts()
    averages = Averages({"one": student}, 0.9)
    with torch.no_grad():
        student.trained.fill_(5)
    student.provenance = "imported"
    averages.restore(Path("nowhere"), {"step": 0, "files": {}})
    kept = averages.students["one"]
    assert torch.equal(kept.trained, student.trained) and kept.provenance == "imported"


def config_of(content: dict, **method) -> RunConfig:
    content["method"] |= method
    return RunConfig.model_validate(content)


def arrays(folder, which: str, stem: str) -> dict[str, torch.Tensor]:
    source = checkpoint_folder(folder, which)
    return checkpoint.read_arrays(source, checkpoint.read_state(source), stem)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_a_run_is_evaluated_and_opened_by_its_averages(run_content, capsys) -> None:
    config = config_of(run_content(ema=0.9, eval_every=6))
    folder = train(config, progress=False)
    assert "averages of the weights (train.ema 0.9)" in capsys.readouterr().err
    record = next(r for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "eval")
    for name in ("clip", "ssm"):
        live, average = arrays(folder, "last", name), arrays(folder, "last", f"{name}-average")
        assert live.keys() == average.keys() and not equal(live, average)
        assert equal(arrays(folder, "best", name), average)
    for which in ("last", "best"):
        config, spec, students = load_run(folder, which)
        assert equal(students["ssm"].state_dict(), arrays(folder, "last", "ssm-average"))
        val = val_dataset(open_split(config.data, spec, "train").val, spec, config.data)
        options = config.eval.model_copy(update={"student": "all"})
        scores = evaluate(students, val, spec, options, torch.device("cpu"), progress=False)
        assert {n: m.miou for n, m in scores.items()} == {
            n: s["miou"] for n, s in record["students"].items()}  # fmt: skip


def test_averages_change_what_is_evaluated_and_not_what_is_trained(run_content, tmp_path) -> None:
    with_averages = train(config_of(run_content(ema=0.9)), progress=False)
    without = train(config_of(run_content() | {"out": str(tmp_path / "plain")}), progress=False)
    assert equal(arrays(with_averages, "last", "clip"), arrays(without, "last", "clip"))
    losses, plain = ([{k: v for k, v in r.items() if k.startswith("loss/")}
                      for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "train"]
                     for folder in (with_averages, without))  # fmt: skip
    assert losses == plain
    assert "clip-average" not in checkpoint.read_state(checkpoint_folder(without, "last"))["files"]


def test_a_run_taught_by_averages_is_resumed_exactly(run_content, stop_after, tmp_path) -> None:
    content = run_content(ema=0.9)
    whole = train(config_of(content, teacher="average"), progress=False)
    own = config_of(content | {"out": str(tmp_path / "own")}, teacher="student")
    assert not equal(arrays(whole, "last", "clip"),
                     arrays(train(own, progress=False), "last", "clip"))  # fmt: skip

    cut = config_of(content | {"out": str(tmp_path / "cut")}, teacher="average")
    stop_after(2, cut)
    train(cut, resume=True, progress=False)
    for stem in ("clip", "ssm", "clip-average", "ssm-average", "optimizer"):
        assert equal(arrays(tmp_path / "cut", "last", stem), arrays(whole, "last", stem)), stem
    assert equal(arrays(tmp_path / "cut", "best", "ssm"), arrays(whole, "best", "ssm"))


def test_a_teacher_needs_averages(run_content) -> None:
    with pytest.raises(ValueError, match=r"method.teacher: 'average' needs train.ema > 0"):
        config_of(run_content(), teacher="average")
    with pytest.raises(UsageError, match=r"method.teacher: 'average' needs train.ema > 0"):
        load_config("demo", ["method.teacher=average"])
    with pytest.raises(UsageError, match=r"train.ema: .* less than 1, found 1"):
        load_config("demo", ["train.ema=1"])


def test_the_released_training_has_none(tmp_path) -> None:
    recipe = tmp_path / "taught.yaml"
    recipe.write_text("base: tiny\nmethod: {teacher: average}\ntrain: {ema: 0.99}\n")
    for compat in (None, "official"):
        config = load_config(recipe, ["data.labels=13"], compat=compat)
        expected = (0.0, "student") if compat else (0.99, "average")
        assert (config.train.ema, config.method.teacher) == expected
