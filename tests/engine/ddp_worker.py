"""Run by the distributed tests under torchrun or alone: one step's gradients, or a whole run.

Usage: ddp_worker.py gradients CONFIG.yaml OUT.safetensors | ddp_worker.py train CONFIG.yaml
       ddp_worker.py leave FOLDER
"""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

from co2s_fast.engine import distributed
from co2s_fast.engine.config import RunConfig
from co2s_fast.engine.trainer import Trainer, train


def gradients(config: RunConfig, out: str) -> None:
    """Write every gradient of step 3, and the losses summed over ranks, in double precision."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        _gradients(config, out)
    finally:
        torch.set_default_dtype(usual)


def _gradients(config: RunConfig, out: str) -> None:
    trainer = Trainer(config, progress=False)
    trainer.set_up(resume=False, dry_run=True)
    trainer.method.train()
    trainer.step = 3
    batch = next(trainer._batches())
    trainer.total_steps = 6
    trainer.meter.add(trainer._add_gradients(batch))
    losses = trainer.meter.fetch()
    if trainer.ranks.is_main:
        tensors = {n: p.grad for n, p in trainer.method.named_parameters() if p.grad is not None}
        save_file(tensors, out, metadata={key: repr(value) for key, value in losses.items()})
    trainer.close()
    distributed.finish()


def leave(folder: str) -> None:
    """Use the process group in every way there is, and write its threads before and after."""
    ranks = distributed.start("cpu")
    module = DistributedDataParallel(torch.nn.Linear(2, 2))
    module(torch.ones(1, 2)).sum().backward()
    assert distributed.any_rank(ranks.rank == 1)
    assert distributed.gather_objects(ranks.rank) == [0, 1]
    among_peers = gloo_threads()
    del module
    distributed.finish()
    Path(folder, f"{ranks.rank}.txt").write_text(f"{among_peers} {gloo_threads_left()}")


def gloo_threads() -> int:
    """How many of this process's threads belong to gloo; none where there is no /proc."""
    found = 0
    for file in Path("/proc/self/task").glob("*/comm"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended since
            found += "gloo" in file.read_text()
    return found


def gloo_threads_left() -> int:
    """The same, when those that are ending have had the time to."""
    deadline = time.monotonic() + 10
    while gloo_threads() and time.monotonic() < deadline:
        time.sleep(0.05)
    return gloo_threads()


if __name__ == "__main__":
    if sys.argv[1] == "leave":
        leave(sys.argv[2])
        sys.exit()
    content = RunConfig.model_validate(yaml.safe_load(open(sys.argv[2])))
    if sys.argv[1] == "gradients":
        gradients(content, sys.argv[3])
    else:
        train(content, progress=False)
        assert not gloo_threads_left(), "they may abort the process as the interpreter shuts down"
