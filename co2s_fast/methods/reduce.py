"""Shared sums: this process's place among its peers, and losses over global denominators."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class LossTerms:
    """Collects `weight · sum / count` terms and divides all of them by global counts at once.

    A mean over a global batch is not the mean of the ranks' means when their valid pixels differ.
    So every rank divides its own sum by the count over all ranks (one all-reduce for all terms);
    the values it reports are its share, and add up to the global mean.
    """

    def __init__(self) -> None:
        self._keys: list[str] = []
        self._weights: list[float] = []
        self._sums: list[Tensor] = []
        self._counts: list[Tensor] = []

    def add(self, key: str, weight: float, total: Tensor, count: Tensor) -> None:
        """Add one term.

        Args:
            key: "<student>/<term>".
            weight: its factor in the loss.
            total: scalar sum over this rank's pixels, differentiable.
            count: scalar int64 number of pixels this rank contributes to the mean.
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
        if world > 1:
            dist.all_reduce(counts)
        values = torch.stack(self._sums) / counts.clamp(min=1)
        totals: dict[str, Tensor] = {}
        for index, key in enumerate(self._keys):
            name = f"{key.rsplit('/', 1)[0]}/total"
            weighted = self._weights[index] * values[index]
            totals[name] = totals[name] + weighted if name in totals else weighted
        result = {key: values[i].detach() for i, key in enumerate(self._keys)}
        result.update({name: total.detach() for name, total in totals.items()})
        result["loss"] = torch.stack(list(totals.values())).sum() * world
        return result
