"""The command line as a person meets it: help, one-line errors, exit codes, whole runs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result
from PIL import Image

from co2s_fast.cli import main

CLASSES = [{"name": "grass", "color": [0, 200, 0]}, {"name": "sand", "color": [220, 200, 100]}]
SHORT = ("--recipe", "tiny", "--set", "train.steps=2", "--set", "data.batch_size=2",
         "--set", "data.workers=0", "--set", "train.tensorboard=false",
         "--set", "eval.panels=2")  # fmt: skip


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def failed(result: Result, code: int, *words: str) -> None:
    """The command ended with `code` and one line that has all the words."""
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    error = [line for line in result.output.splitlines() if line.startswith("error:")]
    assert len(error) == 1, result.output
    for word in words:
        assert word in error[0]


def test_ctrl_c_has_its_own_exit_code(monkeypatch, tmp_path):
    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("co2s_fast.data.check_dataset", stop)
    result = call("data", "check", tmp_path)
    assert result.exit_code == 130 and "stopped" in result.output


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A prepared dataset of ten tiles of two classes, half and half."""
    root = tmp_path / "mine"
    rng = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    for number in range(10):
        label = np.zeros((64, 64), np.uint8)
        label[:, rng.integers(16, 48) :] = 1
        colors = np.array([[60, 140, 50], [200, 180, 120]])[label]
        image = np.clip(colors + rng.normal(0, 12, (64, 64, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(image).save(root / "images" / f"t{number}.png")
        mask = Image.fromarray(label)
        mask.putpalette([0, 200, 0, 220, 200, 100])
        mask.save(root / "labels" / f"t{number}.png")
    spec = {"name": "mine", "classes": CLASSES, "crop": 64, "val": 0.2}
    (root / "dataset.yaml").write_text(yaml.safe_dump(spec))
    return root


def train(root: Path, out: Path, *more: object) -> Result:
    where = ("--dataset", root / "dataset.yaml", "--data-root", root, "--labels", 3, "--out", out)
    return call("train", *where, *SHORT, *more)


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from co2s_fast.cli import main;"
        "assert CliRunner().invoke(main, ['--help']).exit_code == 0;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_rooms_are_there_after_a_plain_import() -> None:
    code = ("import sys, co2s_fast; assert 'torch' not in sys.modules; "
            "print(co2s_fast.ops.backend('cpu'), co2s_fast.losses.stability_loss.__name__); "
            "assert 'losses' in dir(co2s_fast) and not hasattr(co2s_fast, 'nothing')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "stability_loss" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "command", [(), ("train",), ("eval",), ("predict",), ("report",), ("compare",), ("doctor",),
                ("data",), ("data", "prepare"), ("data", "split"), ("data", "check"),
                ("weights", "list"), ("weights", "fetch"), ("weights", "import"),
                ("weights", "verify")]
)  # fmt: skip
def test_every_command_explains_itself(command: tuple[str, ...]) -> None:
    result = call(*command, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.output
    assert "\\b" not in result.output


def test_doctor_names_every_backend() -> None:
    result = call("doctor")
    assert result.exit_code == 0, result.output
    for word in ("torch", "reference", "cpp", "triton", "cuda"):
        assert word in result.output


def test_data_list_names_every_dataset() -> None:
    result = call("data", "list")
    assert result.exit_code == 0, result.output
    for word in ("whdld", "loveda", "potsdam", "gid15", "mer", "msl", "demo"):
        assert word in result.output


def test_a_whole_run(prepared: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = train(prepared, out)
    assert result.exit_code == 0, (result.output, result.exception)
    assert result.stdout.splitlines()[-1] == str(out / "report.html")
    for name in ("config.yaml", "metrics.jsonl", "eval.json", "report.html"):
        assert (out / name).is_file()
    scores = json.loads((out / "eval.json").read_text())["students"]
    assert set(scores) == {"clip", "ssm", "both"}

    failed(train(prepared, out), 2, str(out), "--resume")
    assert train(prepared, out, "--resume").exit_code == 0

    result = call("eval", out, "--student", "ssm")
    assert result.exit_code == 0
    assert "grass" in result.output
    north = tmp_path / "north"
    north.mkdir()
    (north / "val.txt").write_text("images/t0.png labels/t0.png\n")  # no list to train by
    before = (out / "eval.json").read_bytes()
    result = call("eval", out, "--split", north)
    assert result.exit_code == 0, (result.output, result.exception)
    assert json.loads((out / "eval-north.json").read_text())["images"] == 1
    assert (out / "eval.json").read_bytes() == before
    failed(call("eval", out, "--split", tmp_path / "south"), 1, "south: missing")
    (north / "val.txt").write_text("")
    failed(call("eval", out, "--split", north), 1, "val.txt: empty")
    region = tmp_path / "region"
    shutil.copytree(prepared, region)
    panels = sorted((path, path.read_bytes()) for path in (out / "panels").iterdir())
    assert call("eval", out, "--data-root", region).exit_code == 0
    about = json.loads((out / "eval-region.json").read_text())
    assert about["root"] == str(region) and about["split"] is None
    assert (out / "eval.json").read_bytes() == before
    assert sorted((path, path.read_bytes()) for path in (out / "panels").iterdir()) == panels
    assert call("eval", out, "--data-root", prepared).exit_code == 0  # its own
    assert json.loads((out / "eval.json").read_text())["root"] == str(prepared)
    maps = tmp_path / "maps"
    result = call("predict", out, prepared / "images" / "t0.png", "-o", maps, "--confidence",
                  "--precision", "float32")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert set(np.unique(np.asarray(Image.open(maps / "t0.png")))) <= {0, 1}
    assert (maps / "t0.confidence.png").is_file()
    rough = tmp_path / "rough"
    result = call("predict", out, prepared / "images" / "t0.png", "-o", rough, "--confidence",
                  "--precision", "bfloat16")  # fmt: skip
    assert result.exit_code == 0, result.output
    sure, about = (np.asarray(Image.open(folder / "t0.confidence.png")).astype(int)
                   for folder in (maps, rough))  # fmt: skip
    assert 0 < abs(sure - about).max() < 0.1 * 255, "another rounding, the same prediction"
    assert call("eval", out, "--student", "ssm", "--precision", "bfloat16").exit_code == 0
    assert call("predict", out, "--val", 1, "-o", maps).exit_code == 0
    assert call("report", out).exit_code == 0
    again = tmp_path / "again"
    assert train(prepared, again, "--seed", 1).exit_code == 0
    result = call("compare", out, again, "-o", tmp_path / "comparison.html")
    assert result.exit_code == 0, (result.output, result.exception)
    assert (tmp_path / "comparison.html").is_file()
    assert result.stdout.splitlines()[-1] == str(tmp_path / "comparison.html")
    assert "±" in result.stdout.splitlines()[-2]  # two runs that differ by their seed


def test_another_folder_is_not_scored_for_one_that_has_moved(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, moved = tmp_path / "run", tmp_path / "moved"
    where = ("--dataset", prepared / "dataset.yaml", "--labels", 3, "--out", out)
    assert call("train", *where, *SHORT).exit_code == 0
    before = (out / "eval.json").read_bytes()
    shutil.copytree(prepared, tmp_path / "data/mine", ignore=shutil.ignore_patterns("splits"))
    prepared.rename(moved)
    monkeypatch.chdir(tmp_path)
    failed(call("eval", out), 1, f"{prepared}/images: missing", "--data-root")
    failed(call("eval", out, "--data-root", "data/mine"), 1, "splits/labels_3: missing")
    assert (out / "eval.json").read_bytes() == before
    assert not (tmp_path / "data/mine/splits").exists()
    result = call("eval", out, "--data-root", "moved")
    assert result.exit_code == 0 and "2 images of moved" in result.output, result.output
    assert json.loads((out / "eval.json").read_text())["root"] == "moved"
    failed(call("train", "--data-root", "moved", "--labels", 3, "--out", tmp_path / "no"), 1,
           "holds dataset 'mine', not 'demo'; give --dataset moved/dataset.yaml")  # fmt: skip


def test_several_seeds(prepared: Path, tmp_path: Path) -> None:
    out = tmp_path / "many"
    result = train(prepared, out, "--seeds", "0, 3")
    assert result.exit_code == 0, (result.output, result.exception)
    page, row, head = result.stdout.splitlines()[:-4:-1]
    assert page == str(out / "comparison.html") and row.split()[:2] == ["co2s", "2"]
    assert head.endswith("both best") and "clip last" in head
    assert row.count("±") == 6
    for seed in (0, 3):
        assert f"seed: {seed}\n" in (out / f"seed-{seed}/config.yaml").read_text()
        assert (out / f"seed-{seed}/report.html").is_file()
    failed(train(prepared, tmp_path / "none", "--seeds", "0,3", "--resume"), 2, "holds no run")
    shutil.rmtree(out / "seed-3")  # as if stopped before it began
    assert train(prepared, out, "--seeds", "0,3", "--resume").exit_code == 0
    assert (out / "seed-3/report.html").is_file()
    failed(train(prepared, out, "--seeds", "0,x"), 2, "--seeds '0,x'")
    failed(train(prepared, out, "--seeds", "1,1"), 2, "different whole numbers")
    failed(train(prepared, out, "--seeds", "0,1", "--seed", 3), 2, "without --seed")


def test_a_dry_run_writes_nothing(prepared: Path, tmp_path: Path) -> None:
    result = train(prepared, tmp_path / "run", "--dry-run")
    assert result.exit_code == 0
    for said in ("co2s on ", "student ssm: ", "dry run: configuration and data are in order"):
        assert said in result.output
    assert not (tmp_path / "run").exists()


def test_random_backbones_are_warned_of_in_the_runs_own_words(prepared: Path, tmp_path: Path):
    """In a process, whose stderr shows Python's warnings as they come."""
    arguments = ["train", "--dataset", prepared / "dataset.yaml", "--data-root", prepared,
                 "--labels", 3, *SHORT, "--trainable", "lora"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "co2s_fast", *map(str, arguments), "--dry-run",
         "--out", str(tmp_path / "run")],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in ("clip", "ssm"):
        said = f"warning: student {name}: backbone 'tiny-{name}' starts from random weights, yet "
        assert any(line.startswith(said) for line in done.stderr.splitlines()), done.stderr
    assert ".py:" not in done.stderr


def test_usage_errors(prepared: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    failed(train(prepared, out, "--set", "train.stepz=1", "--set", "eval.cropp=3"), 2,
           "train.stepz", "eval.cropp")  # fmt: skip
    failed(train(prepared, out, "--method", "magic"), 2, "magic", "co2s")
    failed(train(prepared, out, "--set", "data.ratio=1/2"), 2, "ratio", "labels")
    failed(call("train", "--dataset", "atlantis", "--out", out), 2, "atlantis")
    failed(train(prepared, out, "--resume"), 2, "--resume", str(out))
    failed(call("predict", tmp_path, "x.png", "-o", out), 2, str(tmp_path), "run folder")
    failed(call("eval", tmp_path), 2, "config.yaml")
    blocked = tmp_path / "file"
    blocked.write_text("")
    failed(train(prepared, blocked / "run"), 2, str(blocked))
    assert not out.exists()


def test_data_errors(prepared: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    failed(train(prepared, out, "--labels", 9), 1, "9")
    (prepared / "images" / "t3.png").write_bytes(b"not an image")
    failed(train(prepared, out), 1, "t3.png")
    result = call("data", "check", prepared)
    assert result.exit_code == 1
    assert "t3.png" in result.output
    failed(call("train", "--dataset", "potsdam", "--ratio", "1/32", "--data-root", tmp_path / "no",
                "--out", out), 1, str(tmp_path / "no"))  # fmt: skip
    assert not out.exists()


def test_rare_classes(prepared: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights.yaml"
    weights.write_text("grass: 1\nsand: 3\n")
    out = tmp_path / "run"
    result = train(prepared, out, "--class-weight", weights, "--sampling", "class-aware")
    assert result.exit_code == 0, (result.output, result.exception)
    start = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    assert start["class_weight"]["weights"]["sand"] > start["class_weight"]["weights"]["grass"]
    assert start["sampling"]["rule"] == "class-aware"
    weights.write_text("grass: 1\nsnow: 3\n")
    failed(train(prepared, tmp_path / "no", "--class-weight", weights), 2, "sand", "snow")
    failed(train(prepared, tmp_path / "no", "--class-weight", "heavy"), 2, "heavy", "balanced")


def test_a_deep_check_writes_a_report(prepared: Path, tmp_path: Path) -> None:
    result = call("data", "check", prepared, "--deep", "--workers", 1)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "grass" in result.output and "deep check" in result.output
    assert json.loads((prepared / "check.json").read_text())["problems"] == []
    (prepared / "images" / "t3.png").write_bytes(b"not an image")
    for more in ([], ["--json", tmp_path / "found.json"]):
        result = call("data", "check", prepared, "--deep", "--workers", 1, *more)
        assert result.exit_code == 1
        assert "t3.png" in result.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert [each["kind"] for each in found["findings"]] == ["unreadable"]
    result = call("data", "check", prepared, "--json")
    assert result.exit_code == 1 and json.loads(result.stdout)["level"] == "quick"


@pytest.mark.slow
def test_your_own_imagery(shared_dir: Path, tmp_path: Path) -> None:
    """The README's walk-through on real imagery, with two steps of training."""
    raw = shared_dir / "data" / "dubai-raw"
    if not raw.is_dir():
        pytest.skip(f"no imagery at {raw}")
    description = Path(__file__).parents[1] / "examples" / "datasets" / "dubai.yaml"
    root, out = tmp_path / "dubai", tmp_path / "run"
    assert call("data", "prepare", description, "--raw", raw, "--out", root).exit_code == 0
    result = call("data", "split", root, "--ratio", "1/16", "--seed", 0)
    assert result.exit_code == 0, result.output
    split = root / "splits" / "1_16"
    assert {f.name for f in split.iterdir()} >= {"labeled.txt", "unlabeled.txt"}
    result = call("data", "check", root, "--split", split)
    assert result.exit_code == 0, result.output
    assert "vegetation" in result.output
    where = ("--dataset", root / "dataset.yaml", "--data-root", root, "--ratio", "1/16")
    result = call("train", *where, "--out", out, *SHORT)
    assert result.exit_code == 0, (result.output, result.exception)
    scene = raw / "tile8" / "images" / "image_part_003.jpg"
    result = call("predict", out, scene, "-o", tmp_path / "maps")
    assert result.exit_code == 0, (result.output, result.exception)
    with Image.open(scene) as image, Image.open(tmp_path / "maps" / "image_part_003.png") as labels:
        assert labels.size == image.size


def test_what_a_file_system_refuses_is_one_line(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    failed(call("data", "prepare", "demo", "--out", tmp_path / "file/x"), 1, str(tmp_path / "file"))
    for name in ("a", "b"):
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        (run / "config.yaml").write_text("seed: 1\n")
    (tmp_path / "folder.html").mkdir()
    failed(call("compare", tmp_path / "runs/a", tmp_path / "runs/b", "-o",
                tmp_path / "folder.html"), 2, "folder.html", "is a folder")


@pytest.mark.parametrize(("option", "value"), [("--scale", "0"), ("--scale", "-2"), ("--val", "0")])
def test_numbers_that_cannot_be(tmp_path: Path, option: str, value: str) -> None:
    result = call("predict", tmp_path, "-o", tmp_path / "out", option, value)
    assert result.exit_code == 2 and f"Invalid value for '{option}'" in result.output


def test_where_a_run_is_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was to stay on the CPU is evaluated there, too, beside a GPU that is full."""
    import torch

    from co2s_fast.engine.config import dump_config, load_config
    from co2s_fast.engine.launch import device_of

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device, expected in (("auto", "cuda"), ("cuda", "cuda"), ("cpu", "cpu")):
        config = load_config("tiny", [f"train.device={device}"])
        (tmp_path / "config.yaml").write_text(dump_config(config))
        assert device_of(tmp_path) == torch.device(expected)
