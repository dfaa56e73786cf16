"""Two processes under torchrun do what one process does on the same global batch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import ddp_worker
import pytest
import torch
import yaml
from safetensors import safe_open

from co2s_fast.engine import distributed
from co2s_fast.engine.config import RunConfig
from co2s_fast.engine.log import read_metrics

WORKER = Path(__file__).with_name("ddp_worker.py")
REPOSITORY = Path(__file__).parents[2]
Gradients = tuple[dict[str, torch.Tensor], dict[str, float]]


def launch(processes: int, *arguments: str) -> None:
    """Run the worker under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                   "PYTHONPATH": str(REPOSITORY)}  # fmt: skip
    done = subprocess.run(
        [sys.executable, *launcher, str(WORKER), *arguments],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def gradients(content: dict, out: Path, processes: int) -> Gradients:
    """One step's gradients and losses, made by torchrun's processes or by this one."""
    if processes == 1:
        ddp_worker.gradients(RunConfig.model_validate(content), str(out))
    else:
        config = write_config(out.with_suffix(".yaml"), content)
        launch(processes, "gradients", config, str(out))
    with safe_open(out, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        return tensors, {key: float(value) for key, value in file.metadata().items()}


def write_config(path: Path, content: dict) -> str:
    path.write_text(yaml.safe_dump(content))
    return str(path)


def assert_same_gradients(content: dict, folder: Path, apart: Collection[str] = ()) -> Gradients:
    """One step's losses, but for some, and gradients of one process are those of two; those."""
    (one, losses), (two, losses_two) = (
        gradients(content, folder / f"{n}.safetensors", processes=n) for n in (1, 2))
    assert losses_two.keys() == losses.keys()
    for key in losses.keys() - set(apart):
        assert losses_two[key] == pytest.approx(losses[key], rel=1e-9, abs=1e-12), key
    assert one.keys() == two.keys() and len(one) > 50
    for name, gradient in one.items():
        torch.testing.assert_close(two[name], gradient, rtol=1e-6, atol=1e-12, msg=name)
    return one, losses


def test_two_processes_have_the_gradients_of_one(run_content, tmp_path) -> None:
    content = run_content()
    # so low that untrained students have pseudo-labels, and in different numbers per rank
    content["method"] |= {"threshold": 0.36, "distribution_alignment": 1.0}
    content["train"]["class_weight"] = "balanced"
    content["data"]["sampling"] = "class-aware"
    _, losses = assert_same_gradients(content, tmp_path)
    assert losses["clip/s1"] > 0 and losses["ssm/fp"] > 0
    assert losses["clip/stability"] + losses["ssm/stability"] > 0


@pytest.mark.slow
def test_two_processes_make_the_released_step_of_one(run_content, tmp_path) -> None:
    """Partners of the same image, a mean for each half of the batch: each process has one half."""
    content = run_content()
    content["method"] |= {"threshold": 0.36, "cutmix_partner": "same-image", "mean_shards": 2}
    _, losses = assert_same_gradients(content, tmp_path)
    assert losses["clip/s1"] > 0 and losses["ssm/s2"] > 0


@pytest.mark.slow
def test_two_processes_add_up_the_parts_of_their_shares(run_content, tmp_path) -> None:
    """Four parts of one process's batch are the two parts of each of two processes' shares."""
    content = run_content()
    content["method"] |= {"threshold": 0.36, "mean_shards": 4, "cutmix_shards": 4}
    found = {}
    for processes, parts in ((1, 1), (1, 4), (2, 2)):
        content["train"]["accumulate"] = parts
        out = tmp_path / f"{processes}-{parts}.safetensors"
        found[processes, parts] = gradients(content, out, processes)
    whole, losses = found.pop((1, 1))
    assert losses["clip/s1"] > 0 and losses["ssm/stability"] + losses["clip/stability"] > 0
    for case, (in_parts, values) in found.items():
        assert values == pytest.approx(losses, rel=1e-9, abs=1e-12), case
        for name, gradient in whole.items():
            torch.testing.assert_close(in_parts[name], gradient, rtol=1e-6, atol=1e-12, msg=name)


@pytest.mark.slow
def test_two_processes_train_and_write_one_run(run_content, tmp_path) -> None:
    config = write_config(tmp_path / "config.yaml", run_content(steps=4, eval_every=2))
    launch(2, "train", config)
    records = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [r["kind"] for r in records] == ["start", "train", "eval", "train", "eval"]
    assert records[0]["world"] == 2
    assert (tmp_path / "run/checkpoints/last/state.json").is_file()


def test_without_a_launcher_there_is_one_process(monkeypatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks = distributed.start("cpu")
    assert (ranks.rank, ranks.world, ranks.is_main) == (0, 1, True)
    assert distributed.any_rank(True) and not distributed.any_rank(False)
    assert distributed.gather_objects("a") == ["a"]
    distributed.finish()


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="no /proc to count threads in")
def test_no_thread_outlives_the_process_group(tmp_path) -> None:
    """One that is late while the interpreter shuts down would abort the process."""
    launch(2, "leave", str(tmp_path))
    for rank in range(2):
        among_peers, after = map(int, (tmp_path / f"{rank}.txt").read_text().split())
        assert among_peers > 0 and after == 0
