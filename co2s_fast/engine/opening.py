"""What a run settles before it builds anything: its device, and the checkpoint to go on from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from co2s_fast import ops
from co2s_fast.data.catalogue import DatasetSpec
from co2s_fast.engine import checkpoint, distributed
from co2s_fast.engine.config import (
    CONFIG_FILE,
    RunConfig,
    TrainConfig,
    differences,
    read_run_config,
)
from co2s_fast.engine.log import say
from co2s_fast.engine.runs import check_classes, checkpoint_folder
from co2s_fast.errors import UsageError


def open_device(train: TrainConfig) -> tuple[distributed.Ranks, torch.device, torch.autocast]:
    """Join the other processes, choose the device and its precision, set torch's switches.

    Raises:
        UsageError: CUDA was asked for and is not there.
    """
    kind = chosen_device(train).type
    if train.device == "cuda" and kind == "cpu":
        raise UsageError("train.device: cuda was asked for, but torch sees no CUDA GPU")
    ranks = distributed.start(kind)
    device = torch.device(kind, ranks.local_rank if kind == "cuda" else None)
    if kind == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = train.cudnn_benchmark and not train.deterministic
    if train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    return ranks, device, chosen_precision(train, device)


def chosen_device(train: TrainConfig) -> torch.device:
    """The GPU where there is one, unless `train.device` is "cpu"."""
    return torch.device("cuda" if torch.cuda.is_available() and train.device != "cpu" else "cpu")


def chosen_precision(train: TrainConfig, device: torch.device) -> torch.autocast:
    """The autocast that `train.precision` asks for on a device."""
    half = train.precision == "bfloat16" or (train.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=half)


@contextmanager
def chosen_backend(name: str, device: torch.device, may_lack: bool = False) -> Iterator[None]:
    """Within the block all operators run on the backend that `train.backend` names.

    Args:
        name: of the backend, or "auto".
        device: of the tensors.
        may_lack: where it cannot be used, say so and run on another one: a run that was trained on
            a GPU is evaluated anywhere.

    Raises:
        UsageError: it cannot be used here, or not on that device.
    """
    if name == "auto":
        yield
        return
    with ExitStack() as stack:
        try:
            stack.enter_context(ops.use_backend(name))
            ops.backend(device)
        except RuntimeError as error:
            if not may_lack:
                raise UsageError(f"train.backend: {error}") from None
            stack.close()
            say(f"evaluating without the run's backend {name}: {error}")
        yield


def can_resume(folder: Path) -> bool:
    """Whether a run folder holds a checkpoint to go on from."""
    return (checkpoint_folder(folder, "last") / checkpoint.STATE_FILE).is_file()


def state_to_resume(config: RunConfig, spec: DatasetSpec, *, resume: bool,
                    dry_run: bool) -> dict[str, Any] | None:
    """The state of the checkpoint to go on from; None: begin.

    Raises:
        UsageError: the folder holds a run that is not to be resumed, or another one.
        DataError: the checkpoint is damaged or of other classes.
    """
    if not resume:
        if (config.folder / CONFIG_FILE).exists() and not dry_run:
            raise UsageError(f"{config.folder} already holds a run; give --resume to continue it, "
                             "or another --out")
        return None
    if not can_resume(config.folder):
        return None
    last = checkpoint_folder(config.folder, "last")
    state = checkpoint.read_state(last)
    check_classes(state, spec, last)
    changed = differences(read_run_config(config.folder), config)
    if changed and state["step"] > 0:  # of an imported checkpoint, nothing has been computed yet
        raise UsageError(f"--resume: cannot continue {config.folder}: {'; '.join(changed)}")
    return state
