"""`--compat`: what each profile sets, that explicit values win, and whole runs under it."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from click.testing import CliRunner
from test_trainer import start

from co2s_fast.cli import PROFILES as CHOICES
from co2s_fast.cli import main
from co2s_fast.engine import compat
from co2s_fast.engine.compat import DEVIATIONS, PROFILES, compat_settings, describe_compat
from co2s_fast.engine.config import dump_config, load_config, read_run_config
from co2s_fast.engine.log import read_metrics
from co2s_fast.engine.runs import load_run
from co2s_fast.errors import UsageError
from co2s_fast.methods import METHODS
from co2s_fast.models import released

INFER = {
    "students.clip.decoder.resize_to": (224, 224),
    "students.ssm.decoder.resize_to": (256, 256),
    "students.clip.activation": "gelu",
    "students.clip.eps": 1e-6,
    "students.ssm.eps": 1e-6,
    "students.ssm.rope": "bf16",
    "students.clip.normalization": "imagenet",
    "students.ssm.normalization": "imagenet",
}
SCORES = {"eval.precision": "float32", "eval.mode": "auto", "eval.stride": 5 / 6,
          "eval.absent": "zero"}  # fmt: skip
TRAIN = {
    "method.stability_gradient": "none",
    "method.stability_padding": "include",
    "method.supervised_weight": 0.5,
    "method.fp_weight": 0.25,
    "method.s1_weight": 0.125,
    "method.s2_weight": 0.125,
    "method.stability_weight": 0.5,
    "method.stability_ramp": 0.2,
    "method.cutmix_partner": "same-image",
    "method.distribution_alignment": 0.0,
    "method.class_thresholds": 0.0,
    "method.consistency_ramp": 0.0,
    "method.mean_shards": 4,
    "students.clip.feature_dropout": 0.5,
    "students.ssm.feature_dropout": 0.5,
    "train.precision": "float32",
    "train.ema": 0.0,
    "method.teacher": "student",
    "data.loader": "torch",
    "data.epoch_shards": 4,
}
WANTED = {
    "official-infer": INFER | SCORES,
    "official-train": INFER | TRAIN,
    "official": INFER | SCORES | TRAIN,
}


def call(*arguments):
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def value(config, key: str):
    for part in key.split("."):
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    return config


def test_every_difference_is_set_or_has_a_reason() -> None:
    names = [deviation.name for deviation in DEVIATIONS]
    assert names == [*(f"D{i}" for i in range(1, 18)), "means", "passes", "precision", "averages",
                     "weights", "scores"]  # fmt: skip
    config = load_config("potsdam")
    for deviation in DEVIATIONS:
        assert bool(deviation.settings(config)) == bool(deviation.profiles), deviation.name
        assert bool(deviation.reason) != bool(deviation.profiles), deviation.name
    reasons = {d.name for d in DEVIATIONS if d.reason}
    assert reasons == {"D2", "D5", "D10", "D11", "D13", "D15", "D16", "D17"}
    assert list(PROFILES) == CHOICES
    for name in ("D2", "D15", "D16", "D17"):
        assert name in compat.__doc__


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_sets_these_keys_and_no_others(profile) -> None:
    # a recipe that differs wherever a profile sets something
    changed = ["students.clip.normalization=clip", "students.ssm.feature_dropout=0.1"]
    plain = load_config("demo", changed)
    config = load_config("demo", compat=profile)
    expected = WANTED[profile]
    assert set(compat_settings(config, profile)) == set(expected)
    for key, wanted in expected.items():
        assert value(config, key) == wanted, key
    differing = {k for k in WANTED["official"] if value(plain, k) != value(config, k)}
    assert {"students.clip.activation", "students.ssm.rope"} <= differing
    assert config.compat == profile and plain.compat is None


def test_the_networks_are_those_of_the_imported_checkpoints() -> None:
    config = load_config("potsdam", compat="official-infer")
    for name, backbone in (("clip", "clip"), ("ssm", "timm")):
        ours, theirs = config.students[name], released.released_config(backbone)
        same = {"weights": None, "text": ours.text}  # these come from the file there
        assert ours.model_copy(update=same) == theirs.model_copy(update=same)


def test_what_is_asked_for_wins_and_is_kept(tmp_path) -> None:
    asked = ["method.stability_gradient=learner", "students.ssm.rope=fp32"]
    config = load_config("demo", asked, {"train": {"steps": 7}}, "official-train")
    assert config.method.stability_gradient == "learner" and config.train.steps == 7
    assert config.students["ssm"].rope == "fp32" and config.students["ssm"].eps == 1e-6
    lines = {line.split(":")[0].strip(): line for line in describe_compat(config, config.compat)}
    assert "=learner (asked for, not none)" in lines["D1"]
    assert "students.ssm.rope=fp32 (asked for, not bf16)" in lines["D9"]
    assert lines["D6"].endswith("method.cutmix_partner=same-image, "
                                "method.distribution_alignment=0.0, method.class_thresholds=0.0, "
                                "method.consistency_ramp=0.0, data.loader=torch")
    assert "not set: an accident" in lines["D2"] and "- always so" in lines["D10"]
    assert "scores" not in lines and len(lines) == 1 + len(DEVIATIONS) - 1
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config.model_copy(update={"out": None})
    again = load_config(path, compat="official-train")
    assert again.method.stability_gradient == "none"


def test_a_recipe_may_name_a_profile(tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"base": "tiny", "compat": "official-train",
                                    "method": {"stability_padding": "mask"}}))  # fmt: skip
    config = load_config(path)
    assert config.method.stability_gradient == "none"
    assert config.method.stability_padding == "mask"
    assert config.method.class_thresholds == 0.0  # which its base asks for
    assert config.method.supervised_weight == 0.5  # doubled in its base
    content = yaml.safe_load(path.read_text())
    content |= {"data": {"ratio": "1/8"}, "train": {"epochs": 2, "steps": None}}
    path.write_text(yaml.safe_dump(content))
    other = load_config(path, ["data.labels=7", "train.steps=5", "method.name=fixmatch"])
    assert (other.data.ratio, other.data.labels, other.train.steps) == (None, 7, 5)
    assert other.method.cutmix_partner == "same-image"
    with pytest.raises(UsageError, match=r"compat: .*'official', 'official-infer'"):
        load_config("tiny", ["compat=official-trian"])


@pytest.mark.parametrize("method", [name for name in METHODS if name != "co2s"])
def test_other_methods_take_what_they_have(method) -> None:
    config = load_config("demo", options={"method": {"name": method}}, compat="official")
    assert config.method.mean_shards == 4
    lines = describe_compat(config, "official")
    assert any(line.endswith("trains nothing - does not apply here") for line in lines)
    pastes = method in ("fixmatch", "unimatch")
    assert (getattr(config.method, "cutmix_partner", None) == "same-image") == pastes
    assert config.data.loader == ("torch" if pastes else "auto")
    assert config.train.ema == (0.99 if method in ("u2pl", "muca") else 0)  # their own teachers


def test_other_students_take_what_they_have() -> None:
    mae = {"students": {"ssm": {"backbone": "timm", "model": "vit_base_patch16_224",
                                "weights": "mae"}}}  # fmt: skip
    config = load_config("own", options=mae, compat="official-infer")
    assert config.students["ssm"].rope == "fp32"
    assert config.students["ssm"].decoder.resize_to == (256, 256)


def test_a_run_is_trained_resumed_and_scored(run_content, tmp_path, monkeypatch) -> None:
    recipe = tmp_path / "mine.yaml"
    content = run_content(steps=2, eval_every=2, probe_images=0)
    recipe.write_text(yaml.safe_dump(content))
    monkeypatch.setattr("co2s_fast.report.write_report", lambda run: run)
    result = call("train", "--recipe", recipe, "--compat", "official-train", "--set",
                  "method.threshold=0.35")  # fmt: skip
    assert "D1: the stability term is a number in the log" in result.output
    folder = tmp_path / "run"
    config = read_run_config(folder)
    assert config.compat == "official-train" and config.method.mean_shards == 4
    record = read_metrics(folder / "metrics.jsonl")
    assert record[0]["config"]["method"]["cutmix_partner"] == "same-image"
    assert all(record[1][f"loss/{s}/stability"] > 0 for s in ("clip", "ssm"))
    again = call("train", "--recipe", folder / "config.yaml", "--out", folder, "--resume")
    assert "co2s on stripes" in again.output
    with pytest.raises(UsageError, match=r"method\.mean_shards: 2 images"):
        start({**config.model_dump(mode="json"), "out": str(tmp_path / "b"),
               "data": {**content["data"], "batch_size": 2}})  # fmt: skip


def test_scoring_as_the_release_does(run_content, tmp_path) -> None:
    folder = start(run_content(steps=1, eval_every=1, probe_images=0))
    plain, found = (load_run(folder, compat=each)[2] for each in (None, "official-infer"))
    images = torch.rand(1, 3, 32, 32)
    for name, side in (("clip", 224), ("ssm", 256)):
        assert found[name](images).shape[-2:] == (side, side) != plain[name](images).shape[-2:]
        for key, tensor in plain[name].state_dict().items():
            assert torch.equal(found[name].state_dict()[key], tensor), key
    gelu = found["clip"].backbone.visual.transformer.resblocks[0]
    assert isinstance(gelu.mlp.gelu, torch.nn.GELU) and gelu.ln_1.eps == 1e-6
    result = call("eval", folder, "--compat", "official-infer")
    assert "D4: logits go through 224 x 224" in result.output
    saved = json.loads((folder / "eval.json").read_text())
    assert saved["compat"] == "official-infer" and saved["config"]["absent"] == "zero"
    assert read_run_config(folder).compat is None
    assert "D4" not in call("eval", folder).output


def test_a_run_that_has_begun_keeps_its_settings(run_content) -> None:
    folder = start(run_content(steps=1, eval_every=1, probe_images=0))
    result = CliRunner().invoke(main, ["train", "--recipe", str(folder / "config.yaml"), "--out",
                                       str(folder), "--resume", "--compat", "official-train"])
    assert result.exit_code == 2 and "cannot continue" in result.output
    assert "method.stability_gradient: 'learner' in the run, now 'none'" in result.output
