"""Whole runs of a few steps: what they write, that they repeat, go on, stop and refuse."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
import yaml

from co2s_fast import ops
from co2s_fast.engine import trainer as trainers
from co2s_fast.engine.config import RunConfig
from co2s_fast.engine.interrupt import Interrupted
from co2s_fast.engine.log import read_metrics
from co2s_fast.engine.meter import NonFiniteLossError
from co2s_fast.engine.runs import load_run
from co2s_fast.engine.trainer import Trainer, train
from co2s_fast.errors import DataError, UsageError
from co2s_fast.methods import METHODS

TIMING = {"images_per_s", "data_wait_s", "seconds"}


def numbers(folder) -> list[dict]:
    """Train and evaluation records without what a clock decides."""
    records = read_metrics(folder / "metrics.jsonl")
    return [
        {key: value for key, value in record.items() if key not in TIMING}
        for record in records
        if record["kind"] in {"train", "eval"}
    ]


def weights(folder, which="last") -> dict[str, torch.Tensor]:
    _, _, students = load_run(folder, which)
    return {f"{s}.{n}": t for s, m in students.items() for n, t in m.state_dict().items()}


def assert_same_weights(one, other) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def start(content, **options):
    return train(RunConfig.model_validate(content), progress=False, **options)


def test_a_run_writes_what_the_design_lists(run_content) -> None:
    folder = start(run_content(tensorboard=True))
    records = read_metrics(folder / "metrics.jsonl")
    assert [(r["kind"], r.get("step")) for r in records] == [
        ("start", None), ("train", 2), ("eval", 3), ("train", 4), ("train", 6), ("eval", 6),
    ]  # fmt: skip
    first, second = records[0], records[1]
    assert first["images"] == {"labeled": 4, "unlabeled": 8, "val": 4}
    assert first["students"]["clip"]["source"] == "random"
    assert len(first["students"]["ssm"]["sha256"]) == 64
    assert first["students"]["ssm"]["trained_parameters"] > 10_000
    assert sum(first["labeled_pixels"].values()) == 4 * (32 * 32 - 4)
    for student in ("clip", "ssm"):
        terms = ("x", "fp", "s1", "s2", "stability", "total")
        assert all(second[f"loss/{student}/{term}"] >= 0 for term in terms)
        assert 0 <= second[f"coverage/{student}"] <= 1
        assert second[f"lr/{student}/decoder"] == pytest.approx(1e-3)
    assert second["images_per_s"] > 0 and second["data_wait_s"] >= 0
    evaluation = records[-1]
    assert evaluation["students"].keys() == {"clip", "ssm", "both"}
    assert len(evaluation["students"]["both"]["iou"]) == 3
    assert 0 < evaluation["pseudo"]["clip"]["coverage"] <= 1
    assert evaluation["epoch"] == 3.0
    for name in ("config.yaml", "dataset.yaml", "checkpoints/last/state.json",
                 "checkpoints/best/state.json"):  # fmt: skip
        assert (folder / name).is_file()
    assert list((folder / "tensorboard").glob("events*"))
    assert not list(folder.rglob("*.tmp"))
    assert not [p for p in folder.rglob("*") if p.suffix in {".pt", ".pth", ".pkl"}]


def test_the_same_seed_gives_the_same_numbers(run_content, tmp_path) -> None:
    one = start(run_content())
    other = start({**run_content(), "out": str(tmp_path / "again")})
    third = start({**run_content(), "out": str(tmp_path / "third"), "seed": 1})
    assert numbers(one) == numbers(other)
    assert_same_weights(one, other)
    assert numbers(one) != numbers(third)


@pytest.mark.parametrize(("stop_at", "alignment", "layout"),
                         [(3, 0.0, False), (5, 1.0, False), (3, 0.0, True)])
def test_stopping_and_resuming_changes_nothing(
    run_content, tmp_path, monkeypatch, stop_at, alignment, layout
) -> None:
    """SIGTERM between two log records (3 and 5 are odd), then --resume."""
    content = run_content(channels_last=layout)
    content["method"] |= {"distribution_alignment": alignment, "alignment_prior": alignment / 2,
                          "consistency_ramp": alignment}  # fmt: skip
    whole = start(content)
    broken = {**content, "out": str(tmp_path / "broken")}
    make_step = Trainer._make_step

    def stop_then(self, batch) -> None:
        make_step(self, batch)
        if self.step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_make_step", stop_then)
        with pytest.raises(Interrupted) as stopped:
            start(broken)
    assert stopped.value.code == 143
    folder = start(broken, resume=True)
    assert numbers(folder) == numbers(whole)
    assert_same_weights(folder, whole)
    kinds = [record["kind"] for record in read_metrics(folder / "metrics.jsonl")]
    assert kinds.count("resume") == 1


def test_a_crash_between_checkpoints_repeats_the_lost_steps(
    run_content, tmp_path, monkeypatch
) -> None:
    """As after SIGKILL: nothing is saved on the way out, and step 4 is already in the log."""
    whole = start(run_content())
    broken = {**run_content(), "out": str(tmp_path / "broken")}
    make_step = Trainer._make_step

    def crash_at_five(self, batch) -> None:
        if self.step == 5:
            raise KeyboardInterrupt
        make_step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_make_step", crash_at_five)
        with pytest.raises(KeyboardInterrupt):
            start(broken)
    metrics = tmp_path / "broken/metrics.jsonl"
    assert read_metrics(metrics)[-1]["step"] == 4
    with metrics.open("a") as file:
        file.write('{"kind": "train", "st')  # a line cut short by the kill
    folder = start(broken, resume=True)
    assert numbers(folder) == numbers(whole)
    assert_same_weights(folder, whole)


def test_a_run_of_before_licences_goes_on(run_content, stop_after) -> None:
    content = run_content()
    stop_after(3, RunConfig.model_validate(content))
    state = RunConfig.model_validate(content).folder / "checkpoints/last/state.json"
    saved = json.loads(state.read_text())
    for provenance in saved["provenance"].values():
        assert provenance.pop("licence") == "none: random weights"
    state.write_text(json.dumps(saved))
    assert numbers(start(content, resume=True))[-1]["step"] == 6


def test_resuming_a_finished_run_and_an_empty_folder(run_content) -> None:
    folder = start(run_content(), resume=True)  # nothing there: from the beginning
    before = numbers(folder)
    assert start(run_content(), resume=True) == folder
    assert numbers(folder) == before


def test_what_does_not_fit_the_run_in_the_folder(run_content, tmp_path) -> None:
    folder = start(run_content(steps=2))
    with pytest.raises(UsageError, match="already holds a run; give --resume"):
        start(run_content(steps=2))
    with pytest.raises(UsageError, match=r"train\.lr: 0\.001 in the run, now 0\.5"):
        start(run_content(steps=2, lr=0.5), resume=True)
    state = folder / "checkpoints/last/state.json"
    content = json.loads(state.read_text())
    content["classes"] = ["cat", "dog"]
    state.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"is for 2 classes \(cat, dog\), dataset 'stripes' has 3"):
        start(run_content(steps=2), resume=True)
    with pytest.raises(DataError, match="is for 2 classes"):
        load_run(folder, "last")


def test_a_loss_that_is_not_finite_stops_the_run(run_content, monkeypatch) -> None:
    method = trainers.get_method("co2s")
    forward = method.forward

    def poisoned(self, batch, step, total_steps):
        out = forward(self, batch, step, total_steps)
        if step == 4:
            bad = out["loss"] * float("nan")
            return {**out, "loss": bad, "ssm/s1": bad.detach(), "ssm/total": bad.detach()}
        return out

    monkeypatch.setattr(method, "forward", poisoned)
    with pytest.raises(NonFiniteLossError) as caught:
        start(run_content())
    text = str(caught.value)
    assert "loss term ssm/s1 is not finite at step 5" in text
    files = text.split("that batch: ")[1].split(". ")[0].split(", ")
    assert sorted(files[:4]) == ["00", "01", "02", "03"] and len(files) == 8
    folder = RunConfig.model_validate(run_content()).folder
    assert all(torch.isfinite(w).all() for w in weights(folder).values())
    assert json.loads((folder / "checkpoints/last/state.json").read_text())["step"] == 3


def test_a_weight_that_is_not_finite_never_reaches_a_checkpoint(run_content, monkeypatch) -> None:
    make_step = Trainer._make_step

    def break_a_weight(self, batch) -> None:
        make_step(self, batch)
        if self.step == 6:
            next(iter(self.students["ssm"].decoder.parameters())).data.fill_(float("nan"))

    monkeypatch.setattr(Trainer, "_make_step", break_a_weight)
    with pytest.raises(NonFiniteLossError, match="not finite after step 6"):
        start(run_content())
    folder = RunConfig.model_validate(run_content()).folder
    assert all(torch.isfinite(w).all() for w in weights(folder).values())


def test_a_run_can_be_opened_again(run_content) -> None:
    folder = start(run_content(steps=3))
    config, spec, students = load_run(folder)
    assert config.train.steps == 3
    assert spec.class_names == ["field", "road", "water"]
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    assert students["clip"](image).shape[:2] == (1, 3)
    assert not students["clip"].training
    with pytest.raises(UsageError, match="is not a run folder"):
        load_run(folder.parent)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(run_content, method) -> None:
    folder = start({**run_content(steps=2, eval_every=2), "method": {"name": method}})
    record = read_metrics(folder / "metrics.jsonl")[1]
    assert record["loss/clip/x"] > 0 and record["loss/ssm/total"] > 0
    assert ("coverage/clip" in record) == (method != "onlysup")
    # pseudo-labels are measured for every method alike
    assert "clip" in read_metrics(folder / "metrics.jsonl")[-1]["pseudo"]


def test_a_dry_run_writes_nothing(run_content) -> None:
    folder = start(run_content(), dry_run=True)
    assert not folder.exists()


def test_a_class_never_seen_is_said(run_content, stripes, tmp_path, capsys) -> None:
    spec = yaml.safe_load((stripes / "stripes.yaml").read_text())
    spec["classes"].append({"name": "snow", "color": [255, 255, 255]})
    path = tmp_path / "more.yaml"
    path.write_text(yaml.safe_dump(spec))
    content = run_content(steps=1)
    content["data"] |= {"dataset": str(path), "missing_classes": "warn"}
    folder = start(content)
    warnings = read_metrics(folder / "metrics.jsonl")[0]["warnings"]
    assert "no labelled pixel of class snow" in warnings[0]
    assert "no labelled pixel of class snow" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(run_content, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"run folder .*file/run: "):
        start({**run_content(), "out": str(tmp_path / "file/run")})


def test_loader_workers_change_no_number(run_content, tmp_path) -> None:
    one = start(run_content())
    content = {**run_content(), "out": str(tmp_path / "workers")}
    content["data"] = {**content["data"], "workers": 1}
    other = start(content)
    assert numbers(one) == numbers(other)


def test_the_losses_run_on_the_backend_that_is_named(run_content, tmp_path) -> None:
    content = run_content(steps=2, eval_every=2, backend="reference")
    folder = start(content)
    assert read_metrics(folder / "metrics.jsonl")[0]["backend"] == "reference"
    assert ops.backend("cpu") == ops.backend(torch.empty(0)) != "triton"  # for the run alone
    content["train"]["backend"] = "cuda"
    with pytest.raises(UsageError, match=r"train\.backend: .*'cuda'"):
        start(content | {"out": str(tmp_path / "other")})
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match=r"train\.backend"):
        RunConfig.model_validate(content | {"train": content["train"] | {"backend": "numpy"}})
    content["train"] |= {"backend": "auto", "steps": 2}
    start(content, resume=True)  # another backend computes the same


def test_tensorboard_keeps_the_point_that_a_run_is_resumed_from(
    run_content, tmp_path, stop_after
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    content = run_content(tensorboard=True)
    stop_after(3, RunConfig.model_validate(content))  # step 3 has an evaluation
    folder = start(content, resume=True)
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("score")] == [3, 6]
    assert [event.step for event in board.Scalars("loss/clip/total")] == [2, 4, 6]


def test_a_dry_run_finds_what_the_run_would(run_content, stripes, tmp_path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("labeled", "val"):
        (alone / f"{name}.txt").write_text((stripes / f"split/{name}.txt").read_text())
    content = run_content()
    content["data"] |= {"split": str(alone)}
    for dry_run in (True, False):
        with pytest.raises(DataError, match=r"unlabeled\.txt: 0 unlabelled images, fewer than "):
            start(content, dry_run=dry_run)
    assert not (tmp_path / "run").exists()  # so the corrected command finds no run in its way


def test_speed_after_a_restart_counts_the_steps_since(run_content, stop_after) -> None:
    content = run_content(log_every=6)
    stop_after(5, RunConfig.model_validate(content))
    seen = []
    made = trainers.train_record

    def look(trainer):
        seen.append((trainer.meter.steps, trainer.meter.steps_before))
        return made(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainers, "train_record", look)
        start(content, resume=True)
    assert seen == [(6, 5)]
