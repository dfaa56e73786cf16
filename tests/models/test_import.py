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
from co2s_fast.engine.runs import load_run
from co2s_fast.models import build_student
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


def save_released(path, backbone: str, classes) -> dict[str, torch.Tensor]:
    """A checkpoint with the released names and shapes, and the state it has to come back as."""
    student = build_student(released_config(backbone), classes, seed=3)
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
