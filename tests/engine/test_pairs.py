"""Runs whose students start from files of weights, in any pair, without a network."""

from __future__ import annotations

import json
import socket

import pytest
import timm
import torch
from click.testing import CliRunner

from co2s_fast.cli import main
from co2s_fast.engine.config import read_run_config
from co2s_fast.engine.runs import load_run

DECODER = ("{channels: 16, text_channels: 16, skip_channels: [8, 8], up_channels: [16, 16],"
           " pool: [2, 2], layers: 1, group_channels: 8, rates: [1, 3]}")  # fmt: skip


def call(*arguments: object):
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


@pytest.fixture
def no_network(monkeypatch):
    """Any attempt to make a socket fails the test."""

    class Refused:
        def __init__(self, *args, **kwargs):
            raise AssertionError(f"a socket was opened: {args} {kwargs}")

    monkeypatch.setattr(socket, "socket", Refused)
    monkeypatch.setattr(socket, "create_connection", Refused)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # --offline sets it; this takes it away again


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """Small files in the layouts of the releases: clip, mae, beit (per block), dinov2."""
    import open_clip

    folder = tmp_path_factory.mktemp("weights")
    vision = {"image_size": 64, "layers": 3, "width": 64, "head_width": 64, "patch_size": 16}
    text = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    small = {"embed_dim": 64, "depth": 3, "num_heads": 1, "num_classes": 0}
    models = {
        "clip": open_clip.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text),
        "mae": timm.create_model("vit_base_patch16_224", img_size=64, **small),
        "beit": timm.create_model("beitv2_base_patch16_224", use_fc_norm=False, img_size=64,
                                  **small),
        "dinov2": timm.create_model("vit_base_patch14_dinov2", img_size=70, **small),
    }  # fmt: skip
    found = {}
    for name, model in models.items():
        found[name] = str(folder / f"{name}.pth")
        torch.save({"model": model.state_dict()}, found[name])
    return found


def run_of(stripes, out, options: list[str], students: list[str], *more: str):
    decoders = [f"students.{name}.decoder={DECODER}" for name in students]
    settings = ["train.steps=1", "data.batch_size=2", "data.workers=0", "train.tensorboard=false",
                "eval.panels=1", *decoders]  # fmt: skip
    return call(
        "train", "--dataset", stripes / "stripes.yaml", "--data-root", stripes, "--split",
        stripes / "split", "--recipe", "tiny", "--out", out, "--offline", *options,
        *[part for each in settings for part in ("--set", each)], *more,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_two_clip_students(stripes, files, tmp_path, no_network):
    run = tmp_path / "run"
    run_of(stripes, run, ["--clip", files["clip"], "--clip", files["clip"]], ["clip", "clip2"])
    config = read_run_config(run)
    assert list(config.students) == ["clip", "clip2"]
    assert {each.normalization for each in config.students.values()} == {"clip"}
    assert {each.text.weights for each in config.students.values()} == {files["clip"]}
    _, _, students = load_run(run)
    first, second = students["clip"], students["clip2"]
    assert first.provenance["sha256"] == second.provenance["sha256"]
    assert not torch.equal(first.decoder.head.weight, second.decoder.head.weight)
    assert "clip2" in call("eval", run, "--student", "clip2", "--offline")
    scores = json.loads((run / "eval.json").read_text())["students"]
    assert list(scores) == ["clip", "clip2", "both"]
    picture = stripes / "images" / "00.png"
    for student in ("clip2", "both"):
        out = tmp_path / student
        call("predict", run, picture, "-o", out, "--student", student, "--offline")
        assert list(out.glob("*.png"))
    call("export", run, "--format", "pt2", "--student", "clip2")
    assert (run / "export" / "clip2.pt2").is_file()
    assert "second CLIP student" in (run / "report.html").read_text()
    wrong = CliRunner().invoke(main, ["eval", str(run), "--student", "ssm"])
    assert wrong.exit_code == 2
    assert "this run's students are clip, clip2" in wrong.output


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_two_ssm_students_of_different_patches(stripes, files, tmp_path, no_network):
    """MAE and DINOv2, whose grids differ: 32 pixels are 2 x 2 tokens of one, 3 x 3 of the other."""
    run = tmp_path / "run"
    run_of(stripes, run, ["--ssm", files["mae"], "--ssm", files["dinov2"]], ["ssm", "ssm2"])
    _, _, students = load_run(run)
    assert [each.pads_to for each in students.values()] == [16, 1]
    images = torch.rand(1, 3, 32, 32)
    assert [each(images).shape[-1] for each in students.values()] == [8, 12]
    call("export", run, "--format", "pt2")
    assert (run / "export" / "both.pt2").is_file()
    resumed = run_of(stripes, run, ["--ssm", files["mae"], "--ssm", files["dinov2"]],
                     ["ssm", "ssm2"], "--resume", "--dry-run")  # fmt: skip
    assert "Traceback" not in resumed


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_one_option_exchanges_one_student(stripes, files, tmp_path, no_network):
    """The recipe's CLIP student stays; BEiT's relative positions train on another grid."""
    run = tmp_path / "run"
    run_of(stripes, run, ["--ssm", files["beit"]], ["ssm"])
    config = read_run_config(run)
    assert [each.model for each in config.students.values()] == [
        "tiny-clip", "beitv2_base_patch16_224"]  # fmt: skip
    _, _, students = load_run(run)
    call("export", run, "--format", "pt2", "--student", "ssm")
    start = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert start["students"]["ssm"]["source"] == files["beit"]
    assert len(start["students"]["ssm"]["sha256"]) == 64
    assert students["ssm"].provenance == {
        k: v for k, v in start["students"]["ssm"].items() if k != "trained_parameters"}  # fmt: skip


def test_three_students_are_too_many(files):
    clip = ["--clip", files["clip"]]
    result = CliRunner().invoke(main, ["train", "--dataset", "demo", *clip, *clip, "--ssm", "mae"])
    assert result.exit_code == 2
    assert "at most two students, got 3" in result.output
