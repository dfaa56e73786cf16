"""The label-efficiency experiment: which runs it asks for, what it skips, what it makes of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from jsonschema import Draft202012Validator

from benchmarks import accuracy, results, tables
from co2s_fast.cli import main
from co2s_fast.data import DataConfig, generate_demo, load_dataset, open_split
from co2s_fast.data.files import load_label
from co2s_fast.engine.config import load_config


class FakeTraining:
    """Stands for `co2s-fast train`: writes the metrics of a run and counts the calls."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.code = 0

    def __call__(self, command: list[str]) -> int:
        self.calls.append(command)

        def value(option: str) -> str:
            return command[command.index(option) + 1]

        folder, seed = Path(value("--out")), int(value("--seed"))
        folder.mkdir(parents=True, exist_ok=True)
        base = (0.5 if value("--method") == "co2s" else 0.4) + 0.02 * seed
        records = [{"kind": "start"}, {"kind": "train", "step": 5}]
        for step, gain in ((10, 0.1), (20, 0.05)):
            students = {s: {"miou": base + gain} for s in ("clip", "ssm", "both")}
            pseudo = {"clip": {"accuracy": 0.9, "coverage": None if seed else 0.5}}
            records.append({"kind": "eval", "step": step, "students": students, "pseudo": pseudo})
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / "metrics.jsonl").write_text(lines)
        quality = {"accuracy": 0.8 + 0.1 * seed, "coverage": 0.5, "pixels": 64}
        (folder / "pseudo_all.json").write_text(json.dumps({"clip": quality}))
        return self.code


@pytest.fixture
def training(monkeypatch) -> FakeTraining:
    fake = FakeTraining()
    monkeypatch.setattr(accuracy, "run_command", fake)
    return fake


@pytest.fixture
def run(tmp_path, training):
    def invoke(*extra: str):
        arguments = ["--labels", "6", "--seeds", "2", "--work", str(tmp_path / "work")]
        arguments += ["--out", str(tmp_path / "accuracy_demo.json"), *extra]
        return CliRunner().invoke(accuracy.main, arguments)

    return invoke


def test_summary_schema_and_table(run, tmp_path, accuracy_schema):
    result = run()
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "accuracy_demo.json").read_text())
    Draft202012Validator(accuracy_schema).validate(content)
    by_method = {group["method"]: group for group in content["summary"]}
    assert by_method["co2s"]["n"] == 2
    assert by_method["co2s"]["final"]["clip"]["mean"] == pytest.approx(0.56)
    assert by_method["co2s"]["best"]["clip"]["mean"] == pytest.approx(0.61)
    assert by_method["co2s"]["final"]["clip"]["std"] == pytest.approx(0.02 / 2**0.5)
    assert by_method["co2s"]["pseudo"]["clip"][0] == {
        "step": 10, "accuracy": pytest.approx(0.9), "coverage": 0.5,
    }  # fmt: skip
    assert by_method["co2s"]["pseudo_all"] == {
        "clip": {"accuracy": pytest.approx(0.85), "coverage": 0.5},
    }  # fmt: skip
    text = "<!-- benchmark:accuracy_demo -->\n<!-- /benchmark -->\n"
    assert "| 6 | co2s | 2 | 56.0 ± 1.4 |" in tables.render(text, tmp_path)


def test_pseudo_labels_of_all_unlabelled_images(tmp_path):
    spec = load_dataset("demo").model_copy(update={"val": ["scene03"]})
    root = generate_demo(tmp_path / "demo", spec, scenes=4, progress=False)
    folder = tmp_path / "run"
    options = ["train.steps=1", "train.eval_every=1", "train.tensorboard=false", "eval.panels=0",
               "method.threshold=0.2", "data.workers=0", "data.batch_size=4"]  # fmt: skip
    arguments = [part for option in options for part in ("--set", option)]
    done = CliRunner().invoke(main, [
        "train", "--dataset", str(root / "dataset.yaml"), "--recipe", "demo", "--labels", "4",
        "--out", str(folder), *arguments,
    ])  # fmt: skip
    assert done.exit_code == 0, done.output
    found = accuracy.all_pseudo_labels(folder)
    assert list(found) == ["clip", "ssm"]
    split = open_split(DataConfig(root=root, labels=4), spec)
    labelled = sum(int((load_label(item, spec) != 255).sum()) for item in split.unlabeled)
    assert all(each["pixels"] == labelled and each["coverage"] > 0 for each in found.values())
    (folder / "config.yaml").unlink()
    assert accuracy.all_pseudo_labels(folder) == found, "measured once"


def test_commands_differ_in_method_and_seed_only(run, training):
    run("--set", "train.steps=20", "--data-root", "data/demo")
    seen = set()
    for command in training.calls:
        assert command[1:4] == ["-m", "co2s_fast", "train"]
        assert "--resume-if-exists" in command and "train.steps=20" in command
        seed = command[command.index("--seed") + 1]
        assert f"data.split_seed={seed}" in command
        seen.add((command[command.index("--method") + 1], seed))
    assert seen == {(m, s) for m in ("onlysup", "co2s") for s in "01"}


def test_seeds_that_nothing_was_chosen_on(run, training):
    assert run("--first-seed", "3").exit_code == 0
    assert [c[c.index("--seed") + 1] for c in training.calls] == ["3", "3", "4", "4"]


def test_finished_runs_are_skipped(run, training):
    run()
    assert len(training.calls) == 4
    assert run("--seeds", "3").exit_code == 0
    assert len(training.calls) == 6


def test_a_failed_run_stops_and_is_tried_again(run, training):
    training.code = 1
    result = run()
    assert result.exit_code == 1 and "exit code 1" in result.output
    training.code = 0
    assert run().exit_code == 0
    assert len(training.calls) == 1 + 4


def test_other_options_on_old_runs_are_refused(run):
    run()
    result = run("--set", "train.steps=99")
    assert result.exit_code == 2 and "was trained with other options" in result.output


def test_one_seed_has_no_spread():
    assert accuracy.mean_and_std([0.5]) == {"mean": 0.5, "std": None}


def test_a_run_without_evaluation_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "start"}\n')
    with pytest.raises(Exception, match="holds no evaluation"):
        accuracy.read_evaluations(tmp_path)


MEASURED = [(path.stem, entry["method"]) for path in sorted(results.FOLDER.glob("accuracy_*.json"))
            for entry in json.loads(path.read_text())["summary"]]  # fmt: skip


@pytest.mark.parametrize(("name", "method"), dict.fromkeys(MEASURED))
def test_options_of_results_serve_all_their_methods(name, method) -> None:
    """The recipe and the values that a committed result was measured with still load."""
    given = json.loads((results.FOLDER / f"{name}.json").read_text())["options"]
    values = dict.fromkeys(("--recipe", "--set"), ())
    for option, value in zip(given[::2], given[1::2], strict=True):
        values[option] += (value,)
    config = load_config(*values["--recipe"], values["--set"], {"method": {"name": method}})
    assert config.method.name == method and config.train.steps > 0


def test_a_run_may_be_stopped_at_an_evaluation(tmp_path) -> None:
    """By SIGTERM, on which a run saves itself."""
    folder = tmp_path / "run"
    code = ("import json, sys, time\n"
            f"log = open({str(folder / 'metrics.jsonl')!r}, 'w')\n"
            "for step in range(1000):\n"
            "    log.write(json.dumps({'kind': 'eval', 'step': step}) + '\\n'); log.flush()\n"
            "    time.sleep(0.1)\n")  # fmt: skip
    folder.mkdir()
    assert accuracy.run_until([sys.executable, "-c", code], folder, 5) == 0
    steps = [record["step"] for record in accuracy.evaluations_in(folder / "metrics.jsonl")]
    assert 5 <= steps[-1] < 100
    assert accuracy.run_until([sys.executable, "-c", "raise SystemExit(3)"], tmp_path, 5) == 3


def test_training_runs_where_the_user_is(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").touch()
    code = "import benchmarks, co2s_fast, pathlib; assert pathlib.Path('mine.yaml').is_file()"
    assert accuracy.run_command([sys.executable, "-c", code]) == 0
    assert accuracy.run_command([sys.executable, "-c", "raise SystemExit(2)"]) == 2


def test_stopped_runs_say_so(run, tmp_path, training, monkeypatch, accuracy_schema) -> None:
    monkeypatch.setattr(accuracy, "run_until", lambda command, folder, step: training(command))
    assert run("--until", "10").exit_code == 0
    content = json.loads((tmp_path / "accuracy_demo.json").read_text())
    Draft202012Validator(accuracy_schema).validate(content)
    assert content["until"] == 10 and content["runs"][0]["steps"] == [10]
    assert content["runs"][0]["pseudo_all"] == {}
    assert "--until" not in training.calls[0]
    assert run().exit_code != 0  # other options


def test_the_surest_pixels() -> None:
    found = {"accuracy": 0.9, "coverage": 0.5, "pixels": 10,
             "thresholds": [[0.0, 0.7, 1.0], [0.9, 0.9, 0.5], [0.95, 1.0, 0.3], [0.99, None, 0.0]]}
    kept = accuracy.quality(found)
    assert "thresholds" not in kept
    assert kept["surest"] == pytest.approx((0.3 + 0.1 * (0.45 - 0.3) / 0.2) / 0.4)
    assert accuracy.quality({"accuracy": 0.9}) == {"accuracy": 0.9}
