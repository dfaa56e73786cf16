"""The run folder before anything is trained: what is in it, and who may write to it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from co2s_fast.cli import main
from co2s_fast.engine import folder as folders
from co2s_fast.engine import trainer as trainers
from co2s_fast.engine.config import RunConfig
from co2s_fast.engine.folder import RUN_LOCK, check_run_folder, holds_run, locked
from co2s_fast.engine.trainer import train
from co2s_fast.errors import UsageError

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
HOLD = """
import sys
from pathlib import Path
from co2s_fast.engine.folder import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def call(content: dict, path: Path, *options: str) -> Result:
    path.write_text(yaml.safe_dump(content))
    return CliRunner().invoke(main, ["train", "--recipe", str(path), *options])


def failed(result: Result, text: str) -> None:
    assert result.exit_code == 2, (result.output, result.exception)
    error = [line for line in result.output.splitlines() if line.startswith("error:")]
    assert len(error) == 1 and text in error[0], result.output


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def held():
    """Has another process hold the lock of a folder."""
    processes = []

    def hold(folder: Path) -> subprocess.Popen:
        process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], text=True,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   env=ENVIRONMENT)  # fmt: skip
        processes.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in processes:
        process.communicate("")


@pytest.mark.parametrize("kept", ["last", "best", "log"])
def test_a_run_that_lost_its_configuration_is_not_written_over(
    run_content, stop_after, tmp_path, kept
) -> None:
    content = run_content()
    stop_after(4, RunConfig.model_validate(content))
    run = tmp_path / "run"
    (run / "config.yaml").unlink()
    for which in {"last", "best"} - {kept}:
        shutil.rmtree(run / "checkpoints" / which)
    before = files(run)
    left = "metrics.jsonl" if kept == "log" else "checkpoints"
    said = f"{run} holds {left} but no config.yaml; restore it, or give another --out"
    for options in ((), ("--resume",), ("--resume-if-exists",), ("--dry-run",)):
        failed(call(content, tmp_path / "recipe.yaml", *options), said)
    for resume in (True, False):
        with pytest.raises(UsageError, match="but no config"):
            train(RunConfig.model_validate(content), resume=resume, progress=False)
    assert files(run) == before


def test_what_is_no_run(tmp_path) -> None:
    assert not holds_run(tmp_path / "nowhere")
    with locked(tmp_path):
        assert (tmp_path / RUN_LOCK).is_file()
    assert not holds_run(tmp_path)
    (tmp_path / "config.yaml").write_text("")
    assert holds_run(tmp_path)


@pytest.mark.parametrize("option", ["--resume", "--resume-if-exists"])
def test_two_processes_do_not_train_in_one_folder(
    run_content, stop_after, tmp_path, held, option
) -> None:
    content = run_content()
    stop_after(3, RunConfig.model_validate(content))
    run = tmp_path / "run"
    other = held(run)
    before = files(run)
    said = f"another process trains in {run}"
    failed(call(content, tmp_path / "recipe.yaml", option), said)
    assert files(run) == before
    train(RunConfig.model_validate(content), dry_run=True, progress=False)  # writes nothing
    copy = shutil.copytree(run, tmp_path / "copy")
    train(RunConfig.model_validate({**content, "out": str(copy)}), resume=True, progress=False)
    other.kill()
    other.wait()
    train(RunConfig.model_validate(content), resume=True, progress=False)


def test_a_run_that_another_process_has_begun_meanwhile(
    run_content, tmp_path, held, monkeypatch
) -> None:
    content = run_content()
    run = tmp_path / "run"

    def begun_meanwhile(*args, **kwargs):
        run.mkdir()
        (run / "config.yaml").write_text("seed: 3\n")
        if hold:
            held(run)
        return build(*args, **kwargs)

    build = trainers.build_optimizer
    monkeypatch.setattr(trainers, "build_optimizer", begun_meanwhile)
    for hold, said in ((True, "another process trains"), (False, "another process has begun")):
        with pytest.raises(UsageError, match=said):
            train(RunConfig.model_validate(content), progress=False)
        assert (run / "config.yaml").read_text() == "seed: 3\n"
        if hold:
            run = tmp_path / "second"
            content["out"] = str(run)


def test_the_lock_is_held_as_long_as_the_run_and_no_longer(run_content, monkeypatch) -> None:
    config = RunConfig.model_validate(run_content(steps=1))
    run = trainers.Trainer.run

    def look_then_run(self) -> None:
        with pytest.raises(UsageError, match="another process trains"), locked(self.folder):
            pass
        run(self)

    monkeypatch.setattr(trainers.Trainer, "run", look_then_run)
    folder = train(config, progress=False)
    with locked(folder):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_loader_worker_that_outlives_a_killed_run_holds_no_lock(tmp_path) -> None:
    """A worker notices some seconds later that the run is gone; a restart may be quicker."""
    code = HOLD.replace('print("held", flush=True)\n    sys.stdin.read()', """import multiprocessing
    import time
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    worker.start()
    print(worker.pid, flush=True)
    time.sleep(60)""")
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], text=True,
                               stdout=subprocess.PIPE, env=ENVIRONMENT)  # fmt: skip
    worker = int(process.stdout.readline())
    process.kill()
    process.wait()
    try:
        with locked(tmp_path):
            os.kill(worker, 0)  # it is still there
    finally:
        os.kill(worker, signal.SIGKILL)
        process.stdout.close()


def test_a_file_system_without_locks_is_said_and_trained_on(tmp_path, monkeypatch, capsys) -> None:
    def refuse(self) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(folders.FileLock, "acquire", refuse)
    with locked(tmp_path):
        pass
    said = f"warning: {tmp_path} cannot be locked (No locks available): let no other process train"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("out", ["file", "file/run", "file/deep/run"])
@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_a_folder_that_cannot_be_made_is_said_before_the_data_is_opened(
    run_content, tmp_path, monkeypatch, out, options
) -> None:
    (tmp_path / "file").write_text("")
    content = run_content() | {"out": str(tmp_path / out)}
    monkeypatch.setattr(trainers, "open_dataset", None)  # nothing calls it
    result = call(content, tmp_path / "recipe.yaml", *options)
    failed(result, f"run folder {tmp_path / out}: {tmp_path / 'file'} is a file, expected a folder")


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch) -> None:
    check_run_folder(tmp_path / "deep/run")
    check_run_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []

    def refuse(dir: Path) -> None:
        assert dir == tmp_path
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(folders.tempfile, "TemporaryFile", refuse)
    with pytest.raises(UsageError, match=r"^run folder .*deep/run: Permission denied$"):
        check_run_folder(tmp_path / "deep/run")


def test_a_dry_run_leaves_nothing_beside_the_folder(run_content, tmp_path) -> None:
    train(RunConfig.model_validate(run_content()), dry_run=True, progress=False)
    assert list(tmp_path.iterdir()) == []
