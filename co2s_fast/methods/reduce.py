"""Shared sums: this process's place among its peers, and losses over their denominators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.distributed as dist
from torch import Tensor

_ALONE: ContextVar[bool] = ContextVar("alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Within the block this process has no peers: what it computes is for itself."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized() and not _ALONE.get():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def by_shard(
    op: Callable[..., tuple[Tensor, ...]], shards: int, *tensors: Tensor | None
) -> tuple[Tensor, ...]:
    """`op` on each of `shards` equal parts of the tensors, its scalar results stacked.

    Args:
        op: takes as many tensors as are given here.
        shards: parts; the first dimension of every tensor is divided by it.
        *tensors: [B, ...]; None is passed on as it is.
    """
    parts = [[None] * shards if each is None else each.chunk(shards) for each in tensors]
    results = [op(*part) for part in zip(*parts, strict=True)]
    return tuple(torch.stack(result) for result in zip(*results, strict=True))


class LossTerms:
    """Collects `weight · sum / count` terms and divides all of them by their counts at once.

    A mean over a global batch is not the mean of its shards' means when their valid pixels differ.
    Without shards, every rank divides its own sum by the count over all ranks (one all-reduce for
    all terms); with shards, each shard's sum is divided by its own count, and the mean of those
    means is taken. The values a rank reports are its share, and add up to the whole.

    Args:
        shards: parts of the global batch that have a mean of their own; 1: none.
        parts: how many such collections, made one after another, are a step; the values of all of
            them add up to the step's. Without shards each has means of its own.
    """

    def __init__(self, shards: int = 1, parts: int = 1) -> None:
        self._shards, self._parts = shards, parts
        self._keys: list[str] = []
        self._weights: list[float] = []
        self._sums: list[Tensor] = []
        self._counts: list[Tensor] = []

    def add(self, key: str, weight: float, total: Tensor, count: Tensor) -> None:
        """Add one term.

        Args:
            key: "<student>/<term>".
            weight: its factor in the loss.
            total: scalar sum over this rank's pixels, differentiable; with shards, a vector of the
                sums of this rank's shards.
            count: int64 number of pixels in the mean, of the same shape.
        """
        self._keys.append(key)
        self._weights.append(weight)
        self._sums.append(total)
        self._counts.append(count)

    def finish(self) -> dict[str, Tensor]:
        """The terms by key, "<student>/total" for each student, and the "loss" to backpropagate.

        An empty mean is 0 with gradient 0. "loss" is multiplied by the number of processes, since
        DistributedDataParallel averages gradients over them.
        """
        counts = torch.stack(self._counts).to(torch.int64)
        _, world = rank_and_world()
        if world > 1 and self._shards == 1:
            dist.all_reduce(counts)
        values = torch.stack(self._sums) / counts.clamp(min=1)
        if self._shards > 1:
            values = values.sum(1) / self._shards
        elif self._parts > 1:
            values = values / self._parts
        totals: dict[str, Tensor] = {}
        for index, key in enumerate(self._keys):
            name = f"{key.rsplit('/', 1)[0]}/total"
            weighted = self._weights[index] * values[index]
            totals[name] = totals[name] + weighted if name in totals else weighted
        result = {key: values[i].detach() for i, key in enumerate(self._keys)}
        result.update({name: total.detach() for name, total in totals.items()})
        result["loss"] = torch.stack(list(totals.values())).sum() * world
        return result
