"""How much of a GPU a training step takes, found without a GPU, and what makes it fit.

A step is made by stand-ins for the students: tensors with a shape and no content (torch's
`FakeTensorMode`), whose storages are counted as they come and go. So it needs seconds and no
memory, and follows whatever the method, the students and their options do.
"""

from __future__ import annotations

import copy
import re
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from co2s_fast.data import Batch
from co2s_fast.data.plan import PARTNER
from co2s_fast.errors import UsageError
from co2s_fast.methods.reduce import alone

if TYPE_CHECKING:
    from co2s_fast.engine.config import RunConfig
    from co2s_fast.methods.base import Method
    from co2s_fast.models import Student

M = TypeVar("M", bound=nn.Module)
GIB = 2**30
BLOCK = 512  # torch's allocator hands out multiples of this many bytes
RESERVE = 0.1  # share of a GPU left to CUDA itself, its libraries' workspaces and fragments
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]*)?) ?(?:([gm])(?:i?b)?)?", re.IGNORECASE)


@dataclass(frozen=True)
class Footprint:
    """Bytes of a GPU that tensors take at a step's peak.

    Attributes:
        weights: parameters and buffers of the students, and of their averages.
        optimizer: AdamW's moments.
        step: images, activations, losses and gradients.
    """

    weights: int
    optimizer: int
    step: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.optimizer + self.step

    @property
    def needs(self) -> float:
        """Bytes that a GPU should have free for it; see `RESERVE`."""
        return self.total / (1 - RESERVE)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {getattr(self, name) / GIB:.1f}"
                          for name in ("weights", "optimizer", "step"))  # fmt: skip
        return f"about {self.total / GIB:.1f} GiB ({parts})"


def parse_gib(text: str) -> float:
    """GiB of a size like "24G", "24 GiB", "8000M" or "24".

    Raises:
        ValueError: it is none, or nothing.
    """
    match = _SIZE.fullmatch(text.strip())
    gib = 0.0 if match is None else float(match[1]) / (1024 if match[2] in ("m", "M") else 1)
    if gib <= 0:
        raise ValueError(f"expected a size like 24G or 8000M, or auto, found {text!r}")
    return gib


def footprint(method: Method, config: RunConfig, crop: int, world: int = 1) -> Footprint:
    """What a step of a run takes of each GPU, by counting; the first steps take as much as later.

    Without `train.compile` and `train.channels_last`, which take a little less, and in the
    precision that the run has on a GPU.

    Args:
        method: with its students, on any device; it is left as it is.
        config: of the run.
        crop: side of an image in pixels.
        world: processes that share the batch.

    Raises:
        UsageError: the batch cannot be passed in `train.accumulate` parts.
    """
    fakes = FakeTensorMode(allow_non_fake_inputs=True)  # tables that students keep
    stand_in = _without_content(method, fakes)
    set_checkpointing(stand_in.students, config)
    stand_in.take_parts(config.train.accumulate)
    stand_in.check_batch(config.data.batch_size, world)
    held: list[nn.Module] = [stand_in]
    stand_in.take_averages(dict(stand_in.students.items()))
    if config.train.ema:
        averages = {
            name: _without_content(student, fakes).eval().requires_grad_(False)
            for name, student in stand_in.students.items()
        }
        stand_in.take_averages(averages)
        held += averages.values()
    return Footprint(
        weights=sum(map(_bytes, chain.from_iterable(map(_tensors, held)))),
        optimizer=2 * sum(_bytes(p) for p in stand_in.parameters() if p.requires_grad),
        step=_peak(stand_in, fakes, config.data.batch_size // world, crop,
                   half=config.train.precision != "float32", parts=config.train.accumulate),
    )


def step_peak(method: Method, images: int, crop: int, *, half: bool) -> int:
    """Bytes at the peak of a step, beside weights and optimizer.

    Args:
        method: with its students, on any device; it is left as it is.
        images: labelled ones, and as many unlabelled.
        crop: side of an image in pixels.
        half: bfloat16 autocast.
    """
    fakes = FakeTensorMode(allow_non_fake_inputs=True)  # tables that students keep
    return _peak(_without_content(method, fakes), fakes, images, crop, half=half, parts=1)


def fitting(
    method: Method, config: RunConfig, crop: int, gib: float, world: int = 1
) -> tuple[RunConfig, Footprint]:
    """The configuration with as few changes as make a step fit, and what it takes then.

    What is computed again costs time and changes no result, so it comes first; then a step's batch
    goes through in parts, of two images or more (`train.accumulate`).

    Args:
        method: see `footprint`, as for the others.
        config: what to change.
        crop: side of an image in pixels.
        gib: free memory of each GPU.
        world: processes that share the batch.

    Raises:
        UsageError: nothing of that makes it fit.
    """
    least = None
    for candidate in _candidates(config, world):
        try:
            found = footprint(method, candidate, crop, world)
        except UsageError:  # not in so many parts, then
            if candidate.train.accumulate == config.train.accumulate:
                raise
            continue
        if found.needs <= gib * GIB:
            return candidate, found
        if least is None or found.total < least.total:
            least = found
    raise UsageError(
        f"train.gpu_memory: a step takes {least} at the least, beside which "
        f"{100 * RESERVE:.0f} % stay free, and {gib:.1f} GiB are there; take a smaller data.crop "
        "or data.batch_size, or --trainable lora"
    )


def set_checkpointing(students: Mapping[str, Student], config: RunConfig) -> None:
    """Let students compute again what `config` says they should, whatever they were built with."""
    for name, student in students.items():
        own = config.students[name]
        student.checkpoint_gradients(own.gradient_checkpointing,
                                     own.decoder.gradient_checkpointing)


def changes(before: RunConfig, now: RunConfig) -> list[str]:
    """What `fitting` changed, as `key=value`."""
    found = []
    for name, student in now.students.items():
        old = before.students[name]
        parts = {"": (old, student), "decoder.": (old.decoder, student.decoder)}
        found += [f"students.{name}.{part}gradient_checkpointing=true"
                  for part, (was, own) in parts.items()
                  if own.gradient_checkpointing and not was.gradient_checkpointing]  # fmt: skip
    if now.train.accumulate != before.train.accumulate:
        found.append(f"train.accumulate={now.train.accumulate}")
    return found


def with_settings_of(source: RunConfig, config: RunConfig) -> RunConfig:
    """`config` with what `fitting` may change as `source` has it: a resumed run keeps its own."""
    students = {}
    for name, student in config.students.items():
        own = source.students.get(name, student)
        students[name] = _checkpointed(student, own.gradient_checkpointing,
                                       own.decoder.gradient_checkpointing)
    train = config.train.model_copy(update={"accumulate": source.train.accumulate})
    return config.model_copy(update={"students": students, "train": train})


def _candidates(config: RunConfig, world: int) -> Iterator[RunConfig]:
    yield config
    for backbone in (False, True):
        students = {
            name: _checkpointed(student, student.gradient_checkpointing or backbone, True)
            for name, student in config.students.items()
        }
        config = config.model_copy(update={"students": students})
        yield config
    images, now = config.data.batch_size // world, config.train.accumulate
    for parts in range(now + 1, images // 2 + 1):
        if images % parts == 0:
            train = config.train.model_copy(update={"accumulate": parts})
            yield config.model_copy(update={"train": train})


def _checkpointed(student: Any, backbone: bool, decoder: bool) -> Any:
    parts = student.decoder.model_copy(update={"gradient_checkpointing": decoder})
    return student.model_copy(update={"gradient_checkpointing": backbone, "decoder": parts})


def _peak(
    stand_in: Method, fakes: FakeTensorMode, images: int, crop: int, *, half: bool, parts: int
) -> int:
    """Bytes at the peak of forward and backward passes; of more than two parts the first two."""
    stand_in.train()
    channels = next(iter(stand_in.students.values())).channels
    counter = _StorageCounter()
    with alone(), fakes, counter:
        batch = _batch(stand_in.views, images, channels, crop)
        for part in batch.parts(parts)[:2]:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
                losses = stand_in(part, 1, 2)
            losses.pop("loss").backward()
    return counter.peak


def _batch(views: Iterable[str], images: int, channels: int, crop: int) -> Batch:
    unlabeled = 2 * images if PARTNER in views else images
    sizes = {view: images if view == "x" else unlabeled for view in ("x", "w", "s1", "s2")
             if view in views}  # fmt: skip
    tensors: dict[str, Any] = {
        view: torch.empty(size, channels, crop, crop, dtype=torch.uint8)
        for view, size in sizes.items()
    }
    for view, boxes in (("s1", "boxes1"), ("s2", "boxes2")):
        if view in sizes:
            tensors[boxes] = torch.empty(unlabeled, 4, dtype=torch.int32)
    if "w" in sizes:
        for name in ("ignore", "truth"):
            tensors[name] = torch.empty(unlabeled, crop, crop, dtype=torch.uint8)
    return Batch(y=torch.empty(images, crop, crop, dtype=torch.uint8), **tensors)


def _without_content(module: M, fakes: FakeTensorMode) -> M:
    """A copy of a module whose tensors are fakes on the CPU."""
    memo: dict[int, Any] = {}
    for tensor in _tensors(module):
        with fakes:
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        if isinstance(tensor, nn.Parameter):
            fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = fake
    return copy.deepcopy(module, memo)


def _tensors(module: nn.Module) -> Sequence[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _bytes(tensor: Tensor) -> int:
    return -(-tensor.untyped_storage().nbytes() // BLOCK) * BLOCK


class _StorageCounter(TorchDispatchMode):
    """Counts the bytes of storages that operators return, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._meet(leaf)
        return result

    def _meet(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self.seen:
            return
        size = self.seen[storage] = _bytes(tensor)
        weakref.finalize(storage, self._forget, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _forget(self, size: int) -> None:
        self.now -= size
