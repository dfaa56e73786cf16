"""Memory of the GPU: how much a run took at most, and what to do where there is too little."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch

from co2s_fast.engine.inference import EvalConfig
from co2s_fast.engine.log import say
from co2s_fast.errors import UsageError

if TYPE_CHECKING:
    from co2s_fast.engine.config import RunConfig
    from co2s_fast.engine.trainer import Trainer

GIB = 2**30
T = TypeVar("T")


def peak_gib(device: torch.device) -> float | None:
    """The most that tensors took on a GPU so far, in GiB; None on a CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device) / GIB


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
        raise UsageError(
            f"out of GPU memory ({name}, {gib:.1f} GiB) after step {trainer.step}; what takes "
            f"less, in this order: {'; '.join(advice(trainer.config, trainer.ranks.world))}"
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
