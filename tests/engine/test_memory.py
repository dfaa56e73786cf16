"""Less memory for the same run: batches in parts, and what a run says that has too little."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from co2s_fast.engine import window
from co2s_fast.engine.config import RunConfig
from co2s_fast.engine.log import read_metrics
from co2s_fast.engine.memory import advice, peak_gib
from co2s_fast.engine.runs import checkpoint_folder
from co2s_fast.engine.trainer import Trainer, train
from co2s_fast.errors import UsageError


def config_of(content: dict, **train_options) -> RunConfig:
    content["train"] |= train_options
    return RunConfig.model_validate(content)


def weights(folder):
    files = sorted(checkpoint_folder(folder, "last").glob("*.safetensors"))
    return [path.read_bytes() for path in files]


def test_a_run_in_parts_is_logged_and_resumed_like_any_other(
    run_content, stop_after, tmp_path
) -> None:
    content = run_content(accumulate=2)
    content["method"] |= {"distribution_alignment": 1.0, "class_thresholds": 1.0}
    folder = train(config_of(content), progress=False)
    records = read_metrics(folder / "metrics.jsonl")
    content["train"]["accumulate"] = 1
    whole = train(config_of(content | {"out": str(tmp_path / "whole")}), progress=False)
    for one, other in zip(records, read_metrics(whole / "metrics.jsonl"), strict=True):
        assert one.keys() == other.keys()
    first, first_whole = (read_metrics(f / "metrics.jsonl")[1] for f in (folder, whole))
    assert first["loss/clip/x"] == pytest.approx(first_whole["loss/clip/x"], rel=0.05)
    assert first["coverage/clip"] == pytest.approx(first_whole["coverage/clip"], rel=0.2)
    assert weights(folder) != weights(whole)

    content["train"]["accumulate"] = 2
    cut = config_of(content | {"out": str(tmp_path / "cut")})
    stop_after(2, cut)
    train(cut, resume=True, progress=False)
    assert weights(tmp_path / "cut") == weights(folder)


def test_parts_that_cannot_be_are_refused_before_training(run_content) -> None:
    with pytest.raises(UsageError, match=r"train\.accumulate: 4 images"):
        train(config_of(run_content(accumulate=3)), dry_run=True, progress=False)


def test_a_gpu_without_memory_says_what_takes_less(run_content, monkeypatch) -> None:
    config = config_of(run_content())
    about = SimpleNamespace(total_memory=24 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "RTX 3090")

    def full(self, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Trainer, "_add_gradients", full)
    with pytest.raises(UsageError, match=r"RTX 3090, 24\.0 GiB\) after step 0; .*accumulate=2"):
        train(config, progress=False)
    monkeypatch.undo()
    # Nothing has been learnt: the folder can be used again, with other settings.
    train(config_of(run_content(), accumulate=2), resume=True, progress=False)


def test_advice_follows_what_is_in_use_already(run_content) -> None:
    content = run_content()
    content["data"]["batch_size"] = 6
    content["students"] = {
        "clip": {**content["students"]["clip"], "gradient_checkpointing": True},
        "ssm": {**content["students"]["ssm"], "trainable": "attention"},
    }
    found = advice(config_of(content), 1)
    assert found[:4] == ["--set students.clip.decoder.gradient_checkpointing=true",
                         "--set students.ssm.gradient_checkpointing=true",
                         "--set students.ssm.decoder.gradient_checkpointing=true",
                         "--set train.accumulate=2 (the same batch in 2 parts)"]
    assert "--set students.clip.trainable=lora" in found
    assert not any("ssm.trainable" in each for each in found)
    assert "accumulate=3" in " ".join(advice(config_of(content, accumulate=2), 1))
    assert "accumulate=3" in " ".join(advice(config_of(content, accumulate=1), 2))
    assert "accumulate" not in " ".join(advice(config_of(content, accumulate=3), 2))


def test_the_peak_is_in_the_log_of_a_gpu(run_content, monkeypatch) -> None:
    assert peak_gib(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 << 29)
    assert peak_gib(torch.device("cuda")) == 1.5
    monkeypatch.setattr(window, "peak_gib", lambda device: 1.5)
    folder = train(config_of(run_content(steps=2, eval_every=2)), progress=False)
    (record,) = [r for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "train"]
    assert record["gpu_memory_gib"] == 1.5
