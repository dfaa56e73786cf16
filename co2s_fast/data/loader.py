"""The one entry to the input pipelines: the same batches, whichever of them makes them."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from co2s_fast.data.ahead import Ahead
from co2s_fast.data.batch import Batch
from co2s_fast.data.catalogue import DatasetSpec
from co2s_fast.data.config import DataConfig
from co2s_fast.data.plan import PARTNER, VIEWS, Plan
from co2s_fast.data.splits import Split
from co2s_fast.errors import DataError, UsageError

INSTALL_DALI = "pip install 'co2s-fast[dali]'"


class Loader(Protocol):
    """Iterates over the batches of consecutive steps. Iterating again starts anew."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class LoaderChoice:
    """What a configuration comes to on a device."""

    loader: Literal["torch", "dali"]
    placement: Literal["gpu", "cpu"] = "cpu"
    strong_on_device: bool = False

    def __str__(self) -> str:
        if self.loader == "dali":
            return f"dali on the {self.placement}"
        return "torch" + (", strong views on the device" if self.strong_on_device else "")


def choose_loader(config: DataConfig, device: torch.device | str = "cpu",
                  spec: DatasetSpec | None = None) -> LoaderChoice:
    """Which pipeline serves a run on that device.

    Args:
        config: of the run.
        device: of the run.
        spec: the dataset: DALI takes 8-bit colour and grey only; None: such a one.

    Raises:
        UsageError: DALI was asked for and is not installed, or its GPU placement without a GPU, or
            it cannot read the dataset's rasters.
    """
    on_gpu = torch.device(device).type == "cuda"
    loader, rasters = config.loader, spec is not None and spec.statistics is not None
    if loader == "auto":
        loader = "dali" if on_gpu and dali_is_installed() and not rasters else "torch"
    if loader == "dali" and rasters:
        raise UsageError(f"loader 'dali' reads 8-bit colour images only; dataset {spec.name!r} has "
                         f"{spec.channels} bands of {spec.statistics.dtype}: use --loader torch")
    if loader == "torch":
        strong = on_gpu if config.strong_on_device is None else config.strong_on_device
        return LoaderChoice("torch", strong_on_device=strong)
    if not dali_is_installed():
        raise UsageError(f"loader 'dali': DALI is not installed; {INSTALL_DALI}, or use loader "
                         "'torch'")
    placement = config.dali_placement
    if placement == "auto":
        placement = "gpu" if on_gpu else "cpu"
    if placement == "gpu" and not on_gpu:
        raise UsageError("data.dali_placement: gpu was asked for, but this run is on the CPU")
    return LoaderChoice("dali", placement)


def dali_is_installed() -> bool:
    """Whether `nvidia.dali` can be found; it is not imported."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # no package of the name nvidia at all
        return False


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
    device: torch.device | str = "cpu",
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
        device: that the batches are for, and are on; only those of the torch pipeline without
            workers are still to be brought there, where their strong views are not made there.

    Raises:
        UsageError: unknown views, a batch that ranks cannot share, a pipeline that cannot run here.
        DataError: fewer unlabelled images than a batch has.
    """
    choice = choose_loader(config, device, spec)
    check_batches(config, split, views, world, choice)
    plan = Plan(config, spec, split, views, seed, rank, world)
    steps = range(start_step, total_steps)
    if choice.loader == "dali":
        return _dali_loader(plan, steps, config.workers, choice, torch.device(device))
    return _torch_loader(plan, steps, config.workers, choice, torch.device(device))


def check_batches(config: DataConfig, split: Split, views: Collection[str], world: int,
                  choice: LoaderChoice) -> None:
    """Raise the UsageError or DataError that `build_loader` would, before anything is read."""
    unknown = set(views) - {*VIEWS, PARTNER}
    if unknown or "x" not in views:
        raise UsageError(f"views {sorted(views)}: expected 'x' and any of 'w', 's1', 's2'")
    if config.batch_size % world:
        raise UsageError(f"batch_size {config.batch_size} is not divisible by {world} ranks")
    if set(views) - {"x"} and len(split.unlabeled) < config.batch_size:
        where = "the split" if split.folder is None else split.folder / "unlabeled.txt"
        raise DataError(f"{where}: {len(split.unlabeled)} unlabelled images, fewer than the batch "
                        f"size {config.batch_size}; the method needs unlabelled images")
    if choice.loader == "dali" and PARTNER in views:
        raise UsageError("data.loader: dali cannot make a second augmentation of an image "
                         "(method.cutmix_partner 'same-image'); use torch")


def _torch_loader(plan: Plan, steps: range, workers: int, choice: LoaderChoice,
                  device: torch.device) -> Loader:
    from co2s_fast.data.pipeline_torch import StepDataset, TorchLoader

    dataset = StepDataset(plan, strong=not choice.strong_on_device)
    loader: Loader = TorchLoader(dataset, steps, workers, pin_memory=torch.cuda.is_available())
    if workers:
        loader = Ahead(loader, torch.device("cpu") if choice.strong_on_device else device)
    if choice.strong_on_device:
        from co2s_fast.data.strong_on_device import StrongOnDevice

        loader = StrongOnDevice(loader, device)
    return loader


def _dali_loader(plan: Plan, steps: range, threads: int, choice: LoaderChoice,
                 device: torch.device) -> Loader:
    from co2s_fast.data.pipeline_dali import DaliLoader

    if choice.placement == "cpu":
        return Ahead(DaliLoader(plan, steps, threads, None), device,
                     pin=torch.cuda.is_available())
    # Not ahead: taking a batch makes the training stream wait for it.
    gpu = torch.cuda.current_device() if device.index is None else device.index
    return DaliLoader(plan, steps, threads, gpu)
