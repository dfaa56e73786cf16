from __future__ import annotations

import errno
import json
import random

import numpy as np
import pytest
import torch
from torch import nn

from co2s_fast.engine import checkpoint
from co2s_fast.errors import DataError
from co2s_fast.models.weights import files


def test_round_trip_and_replacement(tmp_path) -> None:
    folder = tmp_path / "last"
    for step in (1, 2):
        arrays = {"clip": {"w": torch.full((3,), float(step))}}
        checkpoint.save_checkpoint(folder, f"step-{step}", arrays, {"step": step})
    state = checkpoint.read_state(folder)
    assert state["step"] == 2
    assert checkpoint.read_arrays(folder, state, "clip")["w"].tolist() == [2.0, 2.0, 2.0]
    written = sorted(folder.iterdir())
    assert [p.name for p in written] == ["clip.step-2.safetensors", "state.json"]
    assert written[0].stat().st_mode == written[1].stat().st_mode  # for colleagues to read


@pytest.mark.parametrize("fail_at", [1, 2])
def test_a_full_disk_leaves_the_former_checkpoint(tmp_path, monkeypatch, fail_at) -> None:
    folder = tmp_path / "last"
    arrays = {"clip": {"w": torch.ones(3)}, "ssm": {"w": torch.ones(3)}}
    checkpoint.save_checkpoint(folder, "step-1", arrays, {"step": 1})
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    calls = []

    def full(tensors, path, metadata) -> None:
        calls.append(path)
        path.write_bytes(b"half of it")
        if len(calls) == fail_at:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(DataError, match="no space left on the disk; the former checkpoint"):
        checkpoint.save_checkpoint(folder, "step-2", arrays, {"step": 2})
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_stop_between_any_two_writes_leaves_a_whole_checkpoint(tmp_path, monkeypatch) -> None:
    """Kill the writer at every call that changes the disk: what is left can always be read."""
    arrays = {"clip": {"w": torch.zeros(3)}, "ssm": {"w": torch.zeros(3)}}

    class Killed(BaseException):
        pass

    for moment in range(30):
        folder = tmp_path / f"run-{moment}"
        checkpoint.save_checkpoint(folder, "step-1", arrays, {"step": 1})
        calls_left = iter(range(moment))

        def tick(function, calls_left=calls_left):
            def call(*args, **kwargs):
                if next(calls_left, None) is None:
                    raise Killed
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in ("replace", "unlink", "write_text", "touch", "chmod"):
                patch.setattr(type(folder), name, tick(getattr(type(folder), name)))
            patch.setattr(files, "save_file", tick(files.save_file))
            new = {"clip": {"w": torch.ones(3)}, "ssm": {"w": torch.ones(3)}}
            try:
                checkpoint.save_checkpoint(folder, "step-2", new, {"step": 2})
                finished = True
            except Killed:
                finished = False
        state = checkpoint.read_state(folder)
        for stem in arrays:
            w = checkpoint.read_arrays(folder, state, stem)["w"]
            assert w.tolist() == [state["step"] - 1.0] * 3
        if finished:
            break
    assert finished and moment > 8


def test_damage_is_one_line(tmp_path) -> None:
    with pytest.raises(DataError, match="no checkpoint at"):
        checkpoint.read_state(tmp_path)
    checkpoint.save_checkpoint(tmp_path, "a", {"clip": {"w": torch.ones(100)}}, {})
    state = checkpoint.read_state(tmp_path)
    with pytest.raises(DataError, match=r"has no ssm; it has \['clip'\]"):
        checkpoint.read_arrays(tmp_path, state, "ssm")
    (tmp_path / "clip.a.safetensors").write_bytes(b"\x10" * 40)
    with pytest.raises(DataError, match="cannot be read") as caught:
        checkpoint.read_arrays(tmp_path, state, "clip")
    assert "\n" not in str(caught.value)
    for content, said in ((b"{", ""), (b"\xff{}", ""), (b"[1]", r"expected keys, found \[1\]"),
                          (b'{"format": 1}', "it names no files")):
        (tmp_path / "state.json").write_bytes(content)
        with pytest.raises(DataError, match=f"state.json is damaged: {said}"):
            checkpoint.read_state(tmp_path)
    (tmp_path / "state.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(DataError, match="has format 99; this version reads 1"):
        checkpoint.read_state(tmp_path)


def test_weights_that_do_not_fit() -> None:
    with pytest.raises(DataError, match=r"weight is \(3, 2\), expected \(2, 2\); bias is missing"):
        checkpoint.load_weights(nn.Linear(2, 2), {"weight": torch.ones(3, 2)}, "file")


def test_optimizer_goes_on_exactly(tmp_path) -> None:
    def build():
        torch.manual_seed(0)
        model = nn.Linear(4, 2)
        groups = [{"params": [p], "lr": 0.1, "name": n} for n, p in model.named_parameters()]
        return model, torch.optim.AdamW(groups, betas=(0.8, 0.99))

    def step(model, optimizer) -> None:
        optimizer.zero_grad()
        model(torch.arange(4.0)).square().sum().backward()
        optimizer.step()

    model, optimizer = build()
    step(model, optimizer)
    tensors, structure = checkpoint.pack_optimizer(optimizer)
    checkpoint.save_checkpoint(tmp_path, "a", {"optimizer": tensors}, {"optimizer": structure})
    other, restored = build()
    other.load_state_dict(model.state_dict())
    state = checkpoint.read_state(tmp_path)
    arrays = checkpoint.read_arrays(tmp_path, state, "optimizer")
    checkpoint.unpack_optimizer(restored, arrays, state["optimizer"])
    step(model, optimizer)
    step(other, restored)
    assert torch.equal(model.weight, other.weight)
    assert restored.param_groups[0]["betas"] == (0.8, 0.99)
    few = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])
    with pytest.raises(DataError, match="other parameter groups"):
        checkpoint.unpack_optimizer(few, arrays, state["optimizer"])


def test_random_generators_go_on_exactly(tmp_path) -> None:
    tensors, rest = checkpoint.pack_rng()
    rest = json.loads(json.dumps(rest))
    expected = torch.rand(3), np.random.rand(3), random.random()
    checkpoint.unpack_rng(tensors, rest)
    assert torch.equal(torch.rand(3), expected[0])
    assert (np.random.rand(3) == expected[1]).all()
    assert random.random() == expected[2]
