"""Real processes, really stopped: by a signal to their whole group, by SIGKILL, by a full disk."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from test_trainer import assert_same_weights, numbers, start

REPOSITORY = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def launch(content: dict, path: Path, *options: str, **popen) -> subprocess.Popen:
    path.write_text(yaml.safe_dump(content))
    command = [sys.executable, "-m", "co2s_fast", "train", "--recipe", str(path), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True,
                            start_new_session=True, **popen)  # fmt: skip


def wait_for(path: Path, text: str, process: subprocess.Popen) -> None:
    for _ in range(3000):
        if path.is_file() and text in path.read_text():
            return
        assert process.poll() is None, process.stderr.read()[-2000:]
        time.sleep(0.1)
    raise AssertionError(f"{text} never came into {path}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_and_resumed_is_as_if_never_killed(run_content, tmp_path, number) -> None:
    content = run_content(steps=40, eval_every=10, save_every=3)
    content["data"]["workers"] = 1
    broken = {**content, "out": str(tmp_path / "broken")}
    process = launch(broken, tmp_path / "config.yaml")
    wait_for(tmp_path / "broken/metrics.jsonl", '"step": 8', process)
    os.killpg(process.pid, number)  # loader workers are in the group, too
    _, said = process.communicate(timeout=120)
    if number == signal.SIGTERM:
        assert process.returncode == 143, said[-2000:]
        assert "--resume continues from there" in said
    again = launch(broken, tmp_path / "config.yaml", "--resume")
    _, said = again.communicate(timeout=300)
    assert again.returncode == 0, said[-2000:]
    # The same command again: bits depend on the number of threads, which this process does not
    # share.
    whole = launch(content, tmp_path / "whole.yaml")
    _, said = whole.communicate(timeout=300)
    assert whole.returncode == 0, said[-2000:]
    assert numbers(tmp_path / "broken") == numbers(tmp_path / "run")
    assert_same_weights(tmp_path / "broken", tmp_path / "run")


def test_a_file_that_cannot_grow_leaves_the_former_checkpoint(run_content, tmp_path) -> None:
    content = run_content(steps=4, eval_every=4)
    start(content)
    longer = {**content, "out": str(tmp_path / "full")}

    def limit() -> None:  # the kernel then refuses to write past 300 kB, as a full disk would
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    process = launch(longer, tmp_path / "config.yaml", preexec_fn=limit)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 1
    last = said.strip().splitlines()[-1]
    assert "error: cannot write checkpoint" in last and "none is there" in last
    assert not list((tmp_path / "full/checkpoints").rglob("*.tmp"))
