"""Runs of U2PL: resumed, and by two processes, which keep the same banks. Also their worker."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_distributed import assert_same_gradients, launch, write_config
from trained import arrays, assert_resumed_exactly

from co2s_fast.engine import distributed
from co2s_fast.engine.config import RunConfig
from co2s_fast.methods.contrast import RowBank

REPOSITORY = Path(__file__).parents[2]
SMALL = {"name": "u2pl", "embedding": 16, "bank_rows": 60, "bank_rows_per_step": 32, "anchors": 20,
         "negatives": 7, "supervised_share": 0.2}  # fmt: skip


def test_a_run_is_resumed_exactly(run_content, stop_after, tmp_path) -> None:
    content = run_content() | {"method": SMALL}
    assert RunConfig.model_validate(content).train.ema == 0.99
    whole, half = assert_resumed_exactly(content, stop_after, tmp_path / "cut", 2, "clip", "ssm",
                                         "clip-average", "method", "optimizer")  # fmt: skip
    own = arrays(whole, "method")
    for part in ("contrasts.clip.bank.rows", "contrasts.ssm.bank.seen",
                 "heads.clip.project.weight", "teacher_heads.clip.project.weight"):  # fmt: skip
        assert not torch.equal(half[part], own[part]), part
    assert own["contrasts.ssm.bank.seen"].min() > 60


def test_two_processes_keep_the_same_banks(tmp_path) -> None:
    """Rows of both enter, rank by rank, as one process would push them one after another."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                   "PYTHONPATH": str(REPOSITORY)}  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node=2", __file__, str(tmp_path)]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    alone = RowBank(3, 16, 8)
    for step in range(5):
        for rank in range(2):
            alone.push(*rows_of(rank, step))
    for key, value in alone.state_dict().items():
        assert torch.equal(first[key], value) and torch.equal(second[key], value), key


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(run_content, tmp_path) -> None:
    """Of L_sup and L_u, whose quantile and weight are of the whole batch; L_c is by process."""
    content = run_content()
    content["method"] = SMALL | {"cutmix_rate": 0.0, "contrast_weight": 0.0}
    _, losses = assert_same_gradients(content, tmp_path, apart=("clip/c", "ssm/c"))
    assert losses["clip/u"] > 0.1 and losses["ssm/c"] > 0.1


@pytest.mark.slow
def test_two_processes_train(run_content, tmp_path) -> None:
    content = run_content(steps=4, eval_every=4) | {"method": SMALL}
    launch(2, "train", write_config(tmp_path / "config.yaml", content))
    assert arrays(tmp_path / "run", "method")["contrasts.clip.bank.seen"].max() == 4 * 32


def rows_of(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a process has to push at a step: rows, and how many of each class are there."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    counts = torch.randint(0, 5, (3,), generator=generator)
    return torch.randn(3, 4, 8, generator=generator), counts


if __name__ == "__main__":
    ranks = distributed.start("cpu")
    bank = RowBank(3, 16, 8)
    for step in range(5):
        bank.push(*rows_of(ranks.rank, step))
    save_file(bank.state_dict(), Path(sys.argv[1]) / f"{ranks.rank}.safetensors")
    distributed.finish()
