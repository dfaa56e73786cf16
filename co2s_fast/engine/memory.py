"""Memory of the GPU: how much a run takes, and what to do where there is too little."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from co2s_fast.engine import distributed
from co2s_fast.engine.footprint import GIB, RESERVE, Footprint, changes, fitting, footprint
from co2s_fast.engine.inference import EvalConfig
from co2s_fast.engine.log import say
from co2s_fast.errors import UsageError

if TYPE_CHECKING:
    from co2s_fast.engine.config import RunConfig
    from co2s_fast.engine.trainer import Trainer
    from co2s_fast.methods.base import Method

T = TypeVar("T")


def peak_gib(device: torch.device) -> float | None:
    """The most that tensors took on a GPU so far, in GiB; None on a CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device) / GIB


@dataclass
class Plan:
    """What a step will take of a GPU.

    Attributes:
        footprint: the estimate; None where none was made.
        changes: settings that make it fit, as `key=value`.
        warnings: what to tell beside it.
    """

    footprint: Footprint | None = None
    changes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"memory of a GPU: {self.footprint}"
        return f"{text}; to fit: {', '.join(self.changes)}" if self.changes else text

    def record(self) -> dict[str, Any]:
        """For the log."""
        gib = None if self.footprint is None else self.footprint.total / GIB
        return {"estimate_gib": gib, "changes": self.changes}


def plan(
    method: Method, config: RunConfig, crop: int, device: torch.device, world: int, *,
    may_change: bool, look: bool,
) -> tuple[RunConfig, Plan]:
    """Make a step fit where `train.gpu_memory` asks for that, and estimate what it takes.

    Args:
        method: with its students, not compiled.
        config: of the run.
        crop: side of an image in pixels.
        device: that it trains on. On a CPU a size is planned for as on a GPU.
        world: processes that share the batch.
        may_change: not so for a run that goes on: it keeps its settings.
        look: estimate even where nobody asked and no GPU is there.

    Returns:
        The configuration, and what there is to tell.

    Raises:
        UsageError: it cannot be made to fit, or "auto" was asked for without a GPU.
    """
    wanted = config.train.gpu_memory
    if wanted is not None and may_change:
        gib = free_gib(device) if wanted == "auto" else wanted
        fitted, found = fitting(method, config, crop, gib, world)
        train = fitted.train.model_copy(update={"gpu_memory": round(gib, 2)})
        return fitted.model_copy(update={"train": train}), Plan(found, changes(config, fitted))
    if device.type == "cpu" and not look:
        return config, Plan()
    try:
        found = footprint(method, config, crop, world)
    except (RuntimeError, AssertionError, TypeError) as error:  # of torch's, about a stand-in
        # Nobody has asked for it, so it is no reason not to train.
        reason = str(error).partition("\n")[0]
        return config, Plan(warnings=[f"no estimate of the GPU's memory: {reason}"])
    if device.type == "cuda" and found.needs > (free := free_gib(device)) * GIB:
        return config, Plan(found, warnings=[
            f"a step takes {found}, and {free:.1f} GiB of this GPU are free, of which "
            f"{100 * RESERVE:.0f} % should stay so; --gpu-mem auto makes it fit"])  # fmt: skip
    return config, Plan(found)


def free_gib(device: torch.device) -> float:
    """GiB that are free on this process's GPU, or on the fullest of all processes' GPUs.

    Raises:
        UsageError: there is none.
    """
    if device.type == "cpu":
        raise UsageError("train.gpu_memory: auto asks what is free on the GPU, and torch sees none "
                         "here; give a size, like 24G")
    return min(distributed.gather_objects(torch.cuda.mem_get_info(device)[0])) / GIB


@contextmanager
def explained(trainer: Trainer) -> Iterator[None]:
    """While the block runs, a GPU that is out of memory becomes one line of advice.

    Raises:
        UsageError: in place of torch's error.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        gib = torch.cuda.get_device_properties(trainer.device).total_memory / GIB
        name = torch.cuda.get_device_name(trainer.device)
        less = "; ".join(advice(trainer.config, trainer.ranks.world))
        raise UsageError(
            f"out of GPU memory ({name}, {gib:.1f} GiB) after step {trainer.step}; what takes "
            f"less, in this order: {less}; or let --gpu-mem auto choose, in a new run"
        ) from error


def with_fewer_windows(work: Callable[[EvalConfig], T], config: EvalConfig) -> tuple[T, EvalConfig]:
    """Do `work`; where a GPU runs out of memory, again with half as many windows at once.

    Returns:
        What it returned, and the settings under which it did.

    Raises:
        UsageError: there is too little for one window.
    """
    while True:
        try:
            return work(config), config
        except torch.OutOfMemoryError as error:
            failure = str(error)  # not the error itself, which holds on to tensors
        config = _halved(config, failure)


def _halved(config: EvalConfig, failure: str) -> EvalConfig:
    if config.batch_windows == 1:
        raise UsageError("out of GPU memory with one window at a time "
                         f"({failure.split('. ')[0]}); give --precision bfloat16, or a smaller "
                         "eval.crop in the run's config.yaml")
    half = config.batch_windows // 2
    say(f"out of GPU memory with {config.batch_windows} windows at once; going on with {half}")
    torch.cuda.empty_cache()
    return config.model_copy(update={"batch_windows": half})


def advice(config: RunConfig, world: int) -> list[str]:
    """Settings that take less memory than a run's own, the least intrusive first."""
    found = []
    for name, student in config.students.items():
        parts = {f"students.{name}": student, f"students.{name}.decoder": student.decoder}
        found += [f"--set {key}.gradient_checkpointing=true" for key, part in parts.items()
                  if not part.gradient_checkpointing]  # fmt: skip
    images, now = config.data.batch_size // world, config.train.accumulate
    more = next((n for n in range(now + 1, images + 1) if images % n == 0), None)
    if more is not None:
        found.append(f"--set train.accumulate={more} (the same batch in {more} parts)")
    found += [
        f"--set students.{name}.trainable=lora"
        for name, student in config.students.items() if student.trainable == "full"
    ]  # fmt: skip
    if config.eval.batch_windows > 1:
        found.append("--set eval.batch_windows=1, where it was an evaluation")
    return [*found, "a smaller data.crop or data.batch_size"]
