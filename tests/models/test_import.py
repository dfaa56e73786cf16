"""Released checkpoints, of the right keys and shapes at full size, become runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image
from test_weights import released_names

from co2s_fast.cli import main
from co2s_fast.engine import imported
from co2s_fast.engine.config import read_run_config
from co2s_fast.engine.log import read_metrics
from co2s_fast.engine.runs import load_run
from co2s_fast.models import StudentConfig, build_student, released
from co2s_fast.models.released import released_config

CLASSES = [{"name": n, "color": [i, 9, 9]} for i, n in enumerate(("field", "road", "water"))]


def call(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture
def dataset(tmp_path):
    """Sixteen tiles of three classes, prepared."""
    root = tmp_path / "data" / "toy"
    rng = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    for number in range(16):
        label = rng.integers(0, 3, (4, 4)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
        Image.fromarray(np.stack([label * 80] * 3, -1)).save(root / f"images/{number}.png")
        Image.fromarray(label).save(root / f"labels/{number}.png")
    spec = {"name": "toy", "classes": CLASSES, "crop": 32, "val": 0.4}
    (root / "dataset.yaml").write_text(yaml.safe_dump(spec))
    return root


def save_released(
    path, backbone: str, classes, settings=released_config
) -> dict[str, torch.Tensor]:
    """A checkpoint with the released names and shapes, and the state it has to come back as."""
    student = build_student(settings(backbone), classes, seed=3)
    if backbone == "clip":  # its class vectors are the file's
        student.queries = torch.randn(student.queries.shape, generator=torch.Generator())
    torch.save({"model": released_names(student, backbone), "epoch": 3}, path)
    return {name: value.clone() for name, value in student.state_dict().items()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::co2s_fast.models.student.RandomBackboneWarning")
def test_a_released_pair_becomes_a_run(dataset, tmp_path):
    from co2s_fast.data import load_dataset

    classes = load_dataset(dataset / "dataset.yaml").classes
    saved = {
        name: save_released(tmp_path / f"best_{name}.pth", backbone, classes)
        for name, backbone in (("clip", "clip"), ("ssm", "timm"))
    }
    run = tmp_path / "run"
    result = call("import-checkpoint", tmp_path / "best_ssm.pth", tmp_path / "best_clip.pth",
                  "--dataset", dataset / "dataset.yaml", "--data-root", dataset,
                  "--ratio", "1/2", "-o", run)  # fmt: skip
    assert result.exit_code == 0, (result.output, result.exception)
    assert "student clip" in result.output and "co2s-fast eval" in result.output
    config, _, students = load_run(run)
    assert list(students) == ["clip", "ssm"] and config.method.name == "co2s"
    assert config.students["clip"].activation == "gelu"
    for name, student in students.items():
        for key, value in student.state_dict().items():
            torch.testing.assert_close(value, saved[name][key], rtol=0, atol=0)
    del students
    result = call("eval", run, "--student", "clip")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "field" in result.output
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["train"] |= {"steps": 1, "epochs": None, "tensorboard": False, "probe_images": 0}
    config["data"] |= {"batch_size": 2, "workers": 0}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    result = call("train", "--recipe", run / "config.yaml", "--out", run, "--resume")
    assert result.exit_code == 0, (result.output, result.exception)
    assert (run / "report.html").is_file()
    again = call("import-checkpoint", tmp_path / "best_clip.pth", "--dataset",
                 dataset / "dataset.yaml", "-o", run)  # fmt: skip
    assert again.exit_code == 2 and "already holds a run" in again.output


def test_what_is_no_released_checkpoint_leaves_nothing(dataset, tmp_path):
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "other.pth")
    run = tmp_path / "run"
    result = call("import-checkpoint", tmp_path / "other.pth", "--dataset",
                  dataset / "dataset.yaml", "-o", run)  # fmt: skip
    assert result.exit_code == 1 and "other.pth: neither a released CLIP" in result.output
    result = call("import-checkpoint", tmp_path / "no.pth", "--dataset", "potsdam", "-o", run)
    assert result.exit_code == 1 and "no such file" in result.output
    assert not run.exists()


ORIGINAL = released.released_config
SMALL = {  # of the released students, in width and depth
    "clip": {"overrides": {"embed_dim": 32, "text_cfg": {"width": 32, "heads": 1, "layers": 1},
                           "vision_cfg": {"layers": 4, "width": 64, "head_width": 16}},
             "levels": (0, 2, 4)},
    "timm": {"overrides": {"embed_dim": 64, "depth": 3, "num_heads": 4}, "levels": (0, 1, 2)},
}  # fmt: skip


def succeed(*arguments):
    result = call(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def small_released_config(backbone: str) -> StudentConfig:
    content = ORIGINAL(backbone).model_dump(mode="json", exclude={"overrides", "levels"})
    return StudentConfig(**content, **SMALL[backbone])


@pytest.mark.filterwarnings("ignore::co2s_fast.models.student.RandomBackboneWarning")
@pytest.mark.parametrize(
    ("profile", "trainable"), [("official-infer", "attention"), ("official", "lora")]
)
def test_imported_checkpoints_train_on_as_released(
    dataset, tmp_path, monkeypatch, profile, trainable
) -> None:
    from co2s_fast.data import load_dataset

    for module in (released, imported):
        monkeypatch.setattr(module, "released_config", small_released_config)
    monkeypatch.setattr("co2s_fast.report.write_report", lambda run: run)
    classes = load_dataset(dataset / "dataset.yaml").classes
    files = [tmp_path / f"{backbone}.pth" for backbone in ("clip", "timm")]
    for file in files:
        save_released(file, file.stem, classes, small_released_config)
    run = tmp_path / "run"
    result = succeed("import-checkpoint", *files, "--dataset", dataset / "dataset.yaml",
                  "--data-root", dataset, "--ratio", "1/2", "--compat", profile,
                  "-o", run)  # fmt: skip
    assert f"compat {profile}" in result.output and "trains on" in result.output
    config = read_run_config(run)
    assert config.eval.absent == "zero"
    assert config.method.stability_gradient == ("none" if profile == "official" else "learner")
    before = load_run(run)[2]["ssm"].state_dict()
    small = [part for text in ("train.steps=1", "train.tensorboard=false", "train.probe_images=0",
                               "data.workers=0", "train.lr=0.002", "train.backbone_multiplier=1")
             for part in ("--set", text)]  # fmt: skip
    result = succeed("train", "--recipe", run / "config.yaml", "--out", run, "--resume", "--compat",
         "official-train", "--trainable", trainable, *small)  # fmt: skip
    assert "starts from random weights" not in result.output
    config = read_run_config(run)
    assert config.compat == "official-train" and config.method.cutmix_partner == "same-image"
    record = next(r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "train")
    part = "adapters" if trainable == "lora" else "backbone"
    assert record[f"lr/ssm/{part}"] == pytest.approx(0.002)  # not the rate of the import
    after = load_run(run, "last")[2]["ssm"].state_dict()
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert any(".attn." in name for name in moved) and not any(".mlp." in name for name in moved)
