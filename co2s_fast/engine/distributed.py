"""One process or several: the same calls work without a launcher and under torchrun."""

from __future__ import annotations

import datetime
import gc
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

# Other ranks wait here while rank 0 evaluates or writes a checkpoint.
TIMEOUT = datetime.timedelta(hours=2)


@dataclass(frozen=True)
class Ranks:
    """This process among its peers."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and draws the progress bar."""
        return self.rank == 0


def start(device_type: str) -> Ranks:
    """Join the process group that torchrun describes in the environment, if it does.

    Args:
        device_type: "cuda" communicates through NCCL, "cpu" through gloo. With NCCL a gloo group
            is added for flags that live on the host.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Ranks()
    ranks = Ranks(int(os.environ["RANK"]), world, int(os.environ.get("LOCAL_RANK", "0")))
    if device_type == "cuda":
        torch.cuda.set_device(ranks.local_rank)
    if not dist.is_initialized():
        # Before there is a group: its functions would hold one as their default, see `finish`.
        from torch.distributed import nn  # noqa: F401

        backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)
    return ranks


def finish() -> None:
    """Leave the process group, if there is one, and wait for its threads.

    Gloo's threads let go of a collective's tensors a little after it is done, and need the
    interpreter for it: one that is late while the interpreter shuts down aborts the process
    (pytorch/pytorch#190489). They end with the last reference to the group, so whoever calls this
    has let go of its DistributedDataParallel before.
    """
    if dist.is_initialized():
        gc.collect()  # DistributedDataParallel refers to itself
        dist.destroy_process_group()


def any_rank(flag: bool) -> bool:
    """Whether the flag is set in any process; waits for all of them, not for the accelerator."""
    if not dist.is_initialized():
        return flag
    votes = torch.tensor([int(flag)])
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return bool(votes.item())


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Add the tensors of all processes, in place; the tensor itself with a single process."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather_objects(value: object) -> list:
    """Small Python values of all processes, in the order of their ranks."""
    if not dist.is_initialized():
        return [value]
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def wait_for_all() -> None:
    """Wait until every process is here, through the host."""
    any_rank(False)
