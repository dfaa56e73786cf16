"""Pretraining: what it learns, what it writes, that training starts from it, what it refuses."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from co2s_fast.data import Batch
from co2s_fast.engine.config import RunConfig
from co2s_fast.engine.log import read_metrics
from co2s_fast.engine.pretrain import masked_image_loss, pretrain
from co2s_fast.engine.trainer import train
from co2s_fast.errors import DataError, UsageError
from co2s_fast.models import build_student
from co2s_fast.models.loading import checksum
from co2s_fast.models.weights.convert import verify


def config_of(content, **changes) -> RunConfig:
    return RunConfig.model_validate({**content, "pretrain": {"steps": 40, "batch_size": 8,
                                                             "warmup_steps": 4, **changes}})


def test_a_run_starts_from_pretrained_backbones(run_content, tmp_path) -> None:
    content = run_content(steps=2, eval_every=2)
    config = config_of(content)
    paths = pretrain(config, tmp_path / "weights", progress=False)
    assert [p.name for p in paths] == ["clip.safetensors", "ssm.safetensors"]
    written = tmp_path / "weights/pretrain.json"
    assert {p.stat().st_mode for p in paths} == {written.stat().st_mode}  # for colleagues to read
    record = json.loads(written.read_text())
    for student in record["students"].values():
        assert student["loss"][-1] < student["loss"][0]
    again = pretrain(config, tmp_path / "again", progress=False)
    assert [p.read_bytes() for p in paths] == [p.read_bytes() for p in again]
    with pytest.raises(UsageError, match="weights already holds pretrained weights"):
        pretrain(config, tmp_path / "weights", progress=False)
    written.rename(tmp_path / "pretrain.json")
    with pytest.raises(UsageError, match="weights already holds pretrained weights"):
        pretrain(config, tmp_path / "weights", progress=False)  # of whatever origin
    (tmp_path / "pretrain.json").rename(written)
    assert verify(paths[0]).endswith("as written")
    (tmp_path / "weights/ssm.safetensors").rename(tmp_path / "kept.safetensors")
    (tmp_path / "weights/ssm.safetensors").write_bytes(paths[0].read_bytes())
    with pytest.raises(DataError, match="written were"):
        verify(tmp_path / "weights/ssm.safetensors")
    (tmp_path / "kept.safetensors").replace(tmp_path / "weights/ssm.safetensors")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be written to"):
        pretrain(config, tmp_path / "file/weights", progress=False)
    other = pretrain(config.model_copy(update={"seed": 1}), tmp_path / "other", progress=False)
    assert paths[0].read_bytes() != other[0].read_bytes()
    for name, path in zip(("clip", "ssm"), paths, strict=True):
        content["students"] = {**content["students"],
                               name: {**content["students"][name], "weights": str(path)}}
    folder = train(RunConfig.model_validate(content), progress=False)
    started = read_metrics(folder / "metrics.jsonl")[0]["students"]
    for name, path in zip(("clip", "ssm"), paths, strict=True):
        assert started[name]["source"] == str(path)
        assert started[name]["sha256"] == record["students"][name]["sha256"]
    with pytest.raises(UsageError, match="student clip starts from weights"):
        pretrain(RunConfig.model_validate(content), tmp_path / "twice", progress=False)
    assert not (tmp_path / "twice").exists()


def test_fewer_labels_than_a_training_batch(run_content, tmp_path) -> None:
    content = run_content()
    content["data"]["batch_size"] = 100
    pretrain(config_of(content, steps=2), tmp_path, progress=False)
    assert json.loads((tmp_path / "pretrain.json").read_text())["images"] < 100


def test_nothing_to_pretrain_on(run_content, stripes, tmp_path) -> None:
    content = run_content()
    split = tmp_path / "split"
    shutil.copytree(stripes / "split", split)
    (split / "unlabeled.txt").write_text("")
    content["data"]["split"] = str(split)
    with pytest.raises(DataError, match=r"unlabeled\.txt: empty, and pretraining learns from"):
        pretrain(config_of(content), tmp_path / "weights", progress=False)
    assert not (tmp_path / "weights").exists()


def test_weights_that_are_not_of_pretraining(run_content, tmp_path) -> None:
    content = run_content()
    file = tmp_path / "clip.safetensors"
    for state, said in ((None, "no such file"), ({"a": torch.zeros(1)}, "expected a file of")):
        if state is not None:
            save_file(state, file)
        content["students"]["clip"] = {**content["students"]["clip"], "weights": str(file)}
        with pytest.raises(DataError, match=said):
            train(RunConfig.model_validate(content), progress=False)
    content["students"]["clip"] = {**content["students"]["clip"], "weights": None}


def test_padding_and_visible_patches_count_for_nothing(run_content) -> None:
    config = RunConfig.model_validate(run_content())
    student = build_student(config.students["ssm"], [*map(_named, "ab")], seed=0)
    patch = student.patch_size
    head = torch.nn.Conv2d(student.backbone.widths[-1], 3 * patch * patch, 1)
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    ignore = torch.full((2, 64, 64), 255, dtype=torch.uint8)

    def loss(ignore: torch.Tensor | None) -> torch.Tensor:
        batch = Batch(x=pixels, y=ignore, w=pixels, ignore=ignore)
        return masked_image_loss(student, head, batch, 0.5, torch.Generator().manual_seed(0))

    before = checksum(student.backbone)
    assert loss(ignore) == 0
    assert 0.3 < loss(None) < 2
    ignore[:, :32] = 0
    assert loss(ignore) > 0
    assert checksum(student.backbone) == before


@pytest.mark.parametrize("channels", [1, 5])
def test_patches_of_other_channels(run_content, channels) -> None:
    config = RunConfig.model_validate(run_content()).students["clip"]
    student = build_student(config.model_copy(update={"channels": channels}),
                            [*map(_named, "ab")], seed=0)  # fmt: skip
    patch = student.patch_size
    head = torch.nn.Conv2d(student.backbone.widths[-1], channels * patch * patch, 1)
    pixels = torch.randint(0, 256, (2, channels, 64, 64), dtype=torch.uint8)
    losses = [
        masked_image_loss(student, head, Batch(x=w, y=None, w=w), 0.5,
                          torch.Generator().manual_seed(0)).item()
        for w in (pixels, pixels / 255)
    ]  # fmt: skip
    assert 0.3 < losses[0] < 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def _named(name: str):
    from types import SimpleNamespace

    return SimpleNamespace(name=name, concepts=[name])
