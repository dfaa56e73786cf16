"""The one entry to the input pipelines: the same batches, whichever of them makes them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Protocol

import torch

from co2s_fast.data.batch import Batch
from co2s_fast.data.catalogue import DatasetSpec
from co2s_fast.data.config import DataConfig
from co2s_fast.data.plan import VIEWS, Plan
from co2s_fast.data.splits import Split
from co2s_fast.errors import UsageError


class Loader(Protocol):
    """Iterates over the batches of consecutive steps. Iterating again starts anew."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...


def build_loader(
    config: DataConfig,
    spec: DatasetSpec,
    split: Split,
    *,
    views: Collection[str],
    seed: int,
    start_step: int,
    total_steps: int,
    rank: int = 0,
    world: int = 1,
) -> Loader:
    """The batches of steps start_step .. total_steps - 1 of one rank.

    Args:
        config: batch size, crop, workers, loader.
        spec: the dataset.
        split: from `open_split`.
        views: subset of {"x", "w", "s1", "s2"}; {"x"} loads no unlabelled image.
        seed: of the run; with the step it determines a batch completely.
        start_step: first step; resuming is starting here.
        total_steps: end, exclusive.
        rank: gets positions [rank B / world, (rank + 1) B / world) of each batch.
        world: number of ranks.

    Raises:
        UsageError: unknown views, a batch that ranks cannot share, no unlabelled image to view.
    """
    unknown = set(views) - set(VIEWS)
    if unknown or "x" not in views:
        raise UsageError(f"views {sorted(views)}: expected 'x' and any of 'w', 's1', 's2'")
    if config.batch_size % world:
        raise UsageError(f"batch_size {config.batch_size} is not divisible by {world} ranks")
    if set(views) - {"x"} and len(split.unlabeled) < config.batch_size:
        raise UsageError(f"{len(split.unlabeled)} unlabelled images, fewer than the batch size "
                         f"{config.batch_size}; the method needs unlabelled images")
    if config.loader == "dali":
        raise UsageError("loader 'dali' is not built into this version; use loader 'torch'")
    from co2s_fast.data.pipeline_torch import StepDataset, TorchLoader

    plan = Plan(config, spec, split, views, seed, rank, world)
    return TorchLoader(StepDataset(plan), start_step, total_steps, config.workers,
                       pin_memory=torch.cuda.is_available())
