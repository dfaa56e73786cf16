"""Run by the distributed tests under torchrun or alone: one step's gradients, or a whole run.

Usage: ddp_worker.py gradients CONFIG.yaml OUT.safetensors | ddp_worker.py train CONFIG.yaml
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

from co2s_fast.engine import distributed
from co2s_fast.engine.config import RunConfig
from co2s_fast.engine.trainer import Trainer, train


def gradients(config: RunConfig, out: str) -> None:
    """Write every gradient of step 3, and the losses summed over ranks."""
    torch.set_default_dtype(torch.float64)
    trainer = Trainer(config, progress=False)
    trainer.set_up(resume=False, dry_run=True)
    trainer.method.train()
    trainer.step = 3
    batch = next(trainer._batches())
    outputs = trainer.step_module(batch, 3, 6)
    outputs["loss"].backward()
    outputs.pop("loss")
    trainer.meter.add(outputs)
    losses = trainer.meter.fetch()
    if trainer.ranks.is_main:
        tensors = {n: p.grad for n, p in trainer.method.named_parameters() if p.grad is not None}
        save_file(tensors, out, metadata={key: repr(value) for key, value in losses.items()})
    trainer.close()
    distributed.finish()


def thread_names() -> list[str]:
    """Of the threads of this process; none where there is no /proc."""
    return [file.read_text() for file in Path("/proc/self/task").glob("*/comm")]


if __name__ == "__main__":
    content = RunConfig.model_validate(yaml.safe_load(open(sys.argv[2])))
    if sys.argv[1] == "gradients":
        gradients(content, sys.argv[3])
    else:
        train(content, progress=False)
        left = [name for name in thread_names() if "gloo" in name]
        assert not left, f"{left} may abort the process while the interpreter shuts down"
