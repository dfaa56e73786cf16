"""Checkpoints that cannot be written, and weights that do not belong to a module."""

from __future__ import annotations

import errno

import pytest
import torch
from torch import nn

from co2s_fast.engine import checkpoint
from co2s_fast.engine.export_formats import write_pt2
from co2s_fast.errors import DataError
from co2s_fast.models.weights.files import save_tensors


def test_a_failed_write_of_the_same_step_leaves_its_files(tmp_path, monkeypatch) -> None:
    arrays = {"clip": {"w": torch.ones(3)}}
    checkpoint.save_checkpoint(tmp_path, "step-1", arrays, {"step": 1})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    sync = checkpoint.sync_to_disk

    def full(path) -> None:
        if path.name.startswith(checkpoint.STATE_FILE):
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(path)

    monkeypatch.setattr(checkpoint, "sync_to_disk", full)
    with pytest.raises(DataError, match="no space left on the disk; the former checkpoint"):
        checkpoint.save_checkpoint(tmp_path, "step-1", arrays, {"step": 1})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_full_disk_in_the_words_of_safetensors(tmp_path) -> None:
    error = RuntimeError("I/O error: No space left on device (os error 28)")
    said = checkpoint.write_problem(tmp_path, error)
    assert said.endswith("no space left on the disk; none is there")


def test_writing_weights_where_there_is_no_room_is_an_error_of_the_file_system(
    tmp_path, no_room
) -> None:
    with no_room(1000), pytest.raises(OSError, match="File too large") as raised:
        save_tensors(tmp_path / "w.safetensors", {"w": torch.ones(1000)})
    assert raised.value.errno == errno.EFBIG


def test_an_exported_program_where_there_is_no_room(tmp_path, no_room) -> None:
    program = torch.export.export(nn.Linear(20, 20).eval(), (torch.ones(1, 20),))
    path = tmp_path / "a.pt2"
    with no_room(1000), pytest.raises(OSError, match="File too large") as raised:
        write_pt2(program, path, {"tile": 1})
    assert raised.value.filename == str(path)
    write_pt2(program, path, {"tile": 1})
    assert torch.export.load(path).module()(torch.ones(1, 20)).shape == (1, 20)


def test_weights_that_no_layer_has() -> None:
    weights = {**nn.Linear(2, 2).state_dict(), "extra": torch.ones(1)}
    with pytest.raises(DataError, match="extra is unknown"):
        checkpoint.load_weights(nn.Linear(2, 2), weights, "file")
