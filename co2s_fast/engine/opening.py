"""What a run settles before it builds anything: its device, and the checkpoint to go on from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from co2s_fast import ops
from co2s_fast.data.catalogue import DatasetSpec
from co2s_fast.data.splits import Split, find_val_list
from co2s_fast.engine import checkpoint, distributed
from co2s_fast.engine.config import (
    RunConfig,
    TrainConfig,
    differences,
    read_run_config,
)
from co2s_fast.engine.folder import EVALUATION_FILE, holds_run
from co2s_fast.engine.log import METRICS_FILE, read_metrics, say
from co2s_fast.engine.runs import check_classes, checkpoint_folder, read_spec
from co2s_fast.errors import DataError, UsageError

RESUMED = {"best", "window", "collapse", "optimizer", "rng"}
"""Keys of the state of a checkpoint that steps have been made before, beside those of each."""


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
    there = holds_run(config.folder)
    if not resume:
        if there and not dry_run:
            raise UsageError(f"{config.folder} already holds a run; give --resume to continue it, "
                             "or another --out")
        return None
    if not can_resume(config.folder):
        if there:
            _check_that_none_is_lost(config.folder)
            say(f"{config.folder}: no checkpoint to go on from yet, beginning at step 0")
        return None
    last = checkpoint_folder(config.folder, "last")
    state = checkpoint.read_state(last)
    check_classes(state, spec, last)
    check_progress(state, last)
    before = read_run_config(config.folder)
    changed = differences(_where_data_is_now(before, config, spec, state), config)
    if changed and state["step"] > 0:  # of an imported checkpoint, nothing has been computed yet
        raise UsageError(f"--resume: cannot continue {config.folder}: {'; '.join(changed)}")
    return state


def _check_that_none_is_lost(folder: Path) -> None:
    """To begin anew would remove what a run has come to.

    Of one evaluation there may be no checkpoint: the disk was full.

    Raises:
        UsageError: the run was evaluated more often, so a checkpoint was there, or it is finished.
    """
    log = folder / METRICS_FILE
    records = read_metrics(log) if log.is_file() else []
    steps = [record["step"] for record in records if record.get("kind") == "eval"]
    if len(steps) > 1 or (steps and (folder / EVALUATION_FILE).is_file()):
        last = checkpoint_folder(folder, "last")
        raise UsageError(f"--resume: {folder} was trained to step {steps[-1]}, but {last} has no "
                         f"{checkpoint.STATE_FILE}; put it back, or begin anew in another --out")


def _where_data_is_now(before: RunConfig, now: RunConfig, spec: DatasetSpec,
                       state: dict[str, Any]) -> RunConfig:
    """`before` with the paths that `now` has, where they lead to the same dataset and lists.

    Whether the lists are the same is seen from their digests; see `check_lists`.
    """
    paths: dict[str, Any] = {}
    if before.data.dataset != now.data.dataset and read_spec(now.folder, before) == spec:
        paths["dataset"] = now.data.dataset
    if None not in (before.data.split, now.data.split) and "lists" in state:
        paths["split"] = now.data.split
    return before.model_copy(update={"data": before.data.model_copy(update=paths)})


def check_progress(state: dict[str, Any], folder: Path) -> None:
    """A checkpoint must say how far it has come, and have all that the next step needs.

    Raises:
        DataError: it does not.
    """
    step = state["step"]
    if type(step) is not int or step < 0:  # a bool is an int, too
        raise DataError(f"checkpoint {folder} is damaged: step: expected a whole number of at "
                        f"least 0, found {step!r:.40}")
    if step > 0 and (lacking := RESUMED - state.keys()):
        raise DataError(f"checkpoint {folder} is damaged: without {', '.join(sorted(lacking))}")


def list_digests(split: Split, root: Path) -> dict[str, dict[str, Any]]:
    """Length and SHA-256 of each list of a split: of its images' names below `root`, in order.

    Whether an image has a label is left out: a file that breaks while a run goes on is no other
    list.
    """
    digests = {}
    for name in ("labeled", "unlabeled", "val"):
        names = [item.image.relative_to(root).as_posix() for item in getattr(split, name)]
        digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
        digests[name] = {"images": len(names), "sha256": digest}
    return digests


def check_lists(state: dict[str, Any], now: dict[str, dict[str, Any]], split: Path | None,
                folder: Path) -> None:
    """A run goes on with the lists that it was begun with.

    Args:
        state: of the checkpoint to go on from.
        now: the lists' `list_digests` as they are now.
        split: the split folder.
        folder: of the checkpoint.

    Raises:
        DataError: a list is another one.
    """
    then = state.get("lists")
    if then is None:  # of a version that wrote no digests: what is known is how many were counted
        counted = len(checkpoint.read_arrays(folder, state, "split")["pixels"])
        if counted == now["labeled"]["images"]:
            return
        then = {**now, "labeled": {"images": counted}}
    for name, found in now.items():
        if then[name] == found:
            continue
        where = split or Path()
        path = find_val_list(where) if name == "val" else where / f"{name}.txt"
        count, others = found["images"], ""
        if then[name]["images"] == count:
            others = ", but others or in another order"
        raise DataError(f"{path}: not the list that checkpoint {folder} was trained with: "
                        f"{then[name]['images']} images then, {count} now{others}; restore it, or "
                        "begin another run (--out)")
