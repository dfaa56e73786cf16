"""What every method has: students, a configuration, the views it asks for, one `forward`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from co2s_fast.errors import UsageError
from co2s_fast.losses import CutMix, masked_cross_entropy_terms
from co2s_fast.methods.reduce import LossTerms, by_shard, rank_and_world

if TYPE_CHECKING:
    from co2s_fast.data import Batch
    from co2s_fast.models import Student


class MethodConfig(BaseModel):
    """Options every method has. A method's own class narrows `name` to its name.

    Attributes:
        supervised_weight: factor of L_sup.
        mean_shards: 1: each loss is one mean over the pixels of the whole batch. More: the mean of
            the means of so many equal shards of it, as a release does whose GPUs each divide by
            their own counts.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: str
    supervised_weight: float = Field(default=0.5, ge=0)
    mean_shards: int = Field(default=1, ge=1)


class Method(nn.Module, ABC):
    """Students and the losses they are trained with.

    Args:
        students: name -> student, e.g. "clip" and "ssm".
        config: the method's own configuration.
        seed: fixes what the method draws itself; every draw is a function of (seed, step).
    """

    class_weight: Tensor | None
    name: ClassVar[str]
    Config: ClassVar[type[MethodConfig]]
    views: ClassVar[frozenset[str]]
    """Which of "x", "w", "s1", "s2" the input pipeline has to make."""
    teacher_decay: ClassVar[float] = 0.0
    """Of the averages that teach, where `train.ema` asks for none; 0: it can do without."""
    parts: int = 1
    """How many parts a step's batch comes in, one call of `forward` each; see `take_parts`."""

    def __init__(
        self, students: Mapping[str, Student], config: MethodConfig, *, seed: int = 0
    ) -> None:
        super().__init__()
        self.students = nn.ModuleDict(dict(students))
        self.config = config
        self.seed = seed
        self.averages: dict[str, Student] = {}
        # Not in the state: a resumed run computes it again from the same counts.
        self.register_buffer("class_weight", None, persistent=False)

    def weigh_classes(self, weights: Sequence[float] | None) -> None:
        """Weigh the classes in L_sup, and there only; pseudo-labels keep weight 1.

        Args:
            weights: one a class, mean 1 over the labelled pixels; None: all 1.
        """
        device = next(self.parameters()).device
        self.class_weight = (
            None if weights is None
            else torch.tensor(list(weights), dtype=torch.float32, device=device)
        )  # fmt: skip

    def take_parts(self, parts: int) -> None:
        """From now on, expect a step's batch in so many equal parts (`Batch.parts`).

        A part has means of its own, as a process with `mean_shards` has, and its CutMix partners
        are its own images. Losses, counts and gradients of all parts add up to the step's.
        """
        self.parts = parts

    def take_averages(self, averages: Mapping[str, Student]) -> None:
        """Be told the averages of the students' weights, for a method whose teachers they are.

        They are not part of the method: neither its parameters nor its state, and already in
        evaluation mode. Without `train.ema` they are the students themselves.
        """
        self.averages = dict(averages)

    def before_step(self, step: int, steps_per_epoch: int) -> None:
        """Be told, outside of autograd, that step `step` (from 0) is next; once a step.

        For what a method changes between updates: averages of its own modules, say, or a head that
        another one replaces at the end of an epoch. It comes after the evaluation and the
        checkpoint of the steps before, so a resumed run is told the same.

        Args:
            step: updates made so far.
            steps_per_epoch: updates in a pass over the unlabelled images.
        """

    def own_parameters(self) -> dict[str, list[nn.Parameter]]:
        """What learns beside the students, as "<student>/<module>" -> parameters.

        Modules of a method stand in an `nn.ModuleDict` of it, by name of student; they learn at the
        decoder's rate.
        """
        found = {}
        for name, modules in self.named_children():
            if name == "students" or not isinstance(modules, nn.ModuleDict):
                continue
            for student, module in modules.items():
                learns = [p for p in module.parameters() if p.requires_grad]
                if learns:
                    found[f"{student}/{name}"] = learns
        return found

    @abstractmethod
    def forward(self, batch: Batch, step: int, total_steps: int) -> dict[str, Tensor]:
        """Losses of one step, all scalars on the device, none of them fetched.

        Returns:
            "loss", to be backpropagated; "<student>/<term>" and "<student>/total", detached, this
            rank's share of the global value; counts named in `ratios`, `class_counts` and
            `class_means`.
        """

    def losses(self, batch: Batch, step: int, total_steps: int) -> dict[str, Tensor]:
        """Same as calling the method."""
        return self(batch, step, total_steps)

    def own_state(self) -> dict[str, Tensor]:
        """Tensors that the method keeps beside its students' and that a resumed run needs."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("students.")}

    def ratios(self) -> dict[str, tuple[str, str]]:
        """Logged ratios of counts: name -> (key of the numerator, key of the denominator)."""
        return {}

    def class_counts(self) -> dict[str, list[str]]:
        """Keys of the counts of pseudo-labelled pixels, one a class, by student."""
        return {}

    def class_means(self) -> dict[str, list[tuple[str, str]]]:
        """Keys of the sum and the count behind a mean confidence, one pair a class, by student."""
        return {}

    def check_batch(self, batch_size: int, world: int) -> list[str]:
        """Look at the global batch before the run.

        Returns:
            Warnings to print.

        Raises:
            UsageError: the method cannot run with this batch.
        """
        if self.parts > 1 and batch_size % (world * self.parts):
            raise UsageError(
                f"train.accumulate: {batch_size} images (data.batch_size) on {world} processes "
                f"cannot be passed in {self.parts} equal parts; change one of them"
            )
        shards = self.config.mean_shards
        if shards > 1 and (batch_size % shards or shards % (world * self.parts)):
            raise UsageError(
                f"method.mean_shards: {batch_size} images (data.batch_size) on "
                f"{self.shares_of(world)} cannot be divided into {shards} shards; change one of "
                "them"
            )
        return []

    def shares_of(self, world: int) -> str:
        """What a batch is shared among, for messages."""
        among = f"{world} processes"
        return among if self.parts == 1 else f"{among} in {self.parts} parts (train.accumulate)"

    def add_value(self, terms: LossTerms, key: str, weight: float, value: Tensor) -> None:
        """Add a term that is no mean over pixels; the step's is the mean over processes and parts.

        Args:
            terms: the collection.
            key: "<student>/<term>".
            weight: its factor in the loss.
            value: differentiable scalar of this process's part.
        """
        if self.config.mean_shards > 1:
            value = value.expand(self.local_shards())
        terms.add(key, weight, value, torch.ones_like(value, dtype=torch.int64))

    def add_pixels(
        self, terms: LossTerms, key: str, weight: float, losses: Tensor, counted: Tensor
    ) -> None:
        """Add the sum of a map of losses over the number of the pixels that count.

        Args:
            terms: the collection.
            key: "<student>/<term>".
            weight: its factor in the loss.
            losses: differentiable, [B, H, W]; 0 where a pixel contributes nothing.
            counted: bool [B, H, W], the pixels of the divisor.
        """
        if self.config.mean_shards == 1:
            terms.add(key, weight, losses.sum(), counted.sum())
            return
        shards = self.local_shards()
        terms.add(key, weight, losses.view(shards, -1).sum(1), counted.view(shards, -1).sum(1))

    def loss_terms(self) -> LossTerms:
        """An empty collection of terms with this method's denominators."""
        return LossTerms(self.config.mean_shards, self.parts)

    def cross_entropy(
        self,
        logits: Tensor,
        target: Tensor,
        confidence: Tensor | None = None,
        ignore_mask: Tensor | None = None,
        *,
        cutmix: CutMix | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """Sum and count of `masked_cross_entropy_terms`, for `LossTerms.add`."""
        if self.config.mean_shards == 1:
            return masked_cross_entropy_terms(
                logits, target, confidence, ignore_mask=ignore_mask, cutmix=cutmix, **options
            )[:2]
        maps = [target, confidence, ignore_mask]
        if cutmix is not None:  # partners may be in another shard
            maps = [None if each is None else cutmix.mix_maps(each) for each in maps]

        def sums(z: Tensor, y: Tensor, c: Tensor | None, m: Tensor | None) -> tuple[Tensor, ...]:
            return masked_cross_entropy_terms(z, y, c, ignore_mask=m, **options)[:2]

        return by_shard(sums, self.local_shards(), logits, *maps)

    def local_shards(self) -> int:
        """How many of the shards are in this process's part."""
        return max(self.config.mean_shards // (rank_and_world()[1] * self.parts), 1)

    def add_supervised(self, terms: LossTerms, name: str, logits: Tensor, target: Tensor) -> None:
        """L_sup, the mean cross entropy over the labelled pixels, into `terms`.

        Class weights multiply the sum; the divisor stays the count of labelled pixels.
        """
        total, valid = self.cross_entropy(logits, target, class_weight=self.class_weight)
        terms.add(f"{name}/x", self.config.supervised_weight, total, valid)


def step_generator(*parts: int) -> torch.Generator:
    """A CPU generator whose stream is a pure function of the given numbers."""
    seed = np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]
    # torch takes seeds as signed 64-bit numbers.
    return torch.Generator().manual_seed(int(seed) >> 1)


@contextmanager
def seeded_init(*parts: int) -> Iterator[None]:
    """Within the block, initial weights are a function of the given numbers alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(step_generator(*parts).initial_seed())
        yield


def own_rows(
    images: int, columns: int, generator: torch.Generator, part: int = 0, parts: int = 1
) -> Tensor:
    """Uniform numbers for each image, drawn for the global batch, this rank's share of them.

    Args:
        images: of this rank's part of the batch.
        columns: numbers an image.
        generator: a CPU generator in the same state on every rank.
        part: which of the equal parts of this rank's share the images are.
        parts: how many there are.

    Returns:
        float64 [images, columns] on the CPU, in [0, 1).
    """
    rank, world = rank_and_world()
    rows = torch.rand(images * parts * world, columns, generator=generator, dtype=torch.float64)
    return rows[(rank * parts + part) * images :][:images]


def channel_keep_masks(
    features: tuple[Tensor, ...], rate: float, generator: torch.Generator, part: int = 0,
    parts: int = 1,
) -> list[Tensor]:
    """Which channels of each image survive, drawn for the global batch, this rank's share of it.

    Drawn on the CPU, so that the masks do not depend on the device or on the number of processes.

    Args:
        features: this rank's feature maps, [B, C_l, h_l, w_l] each.
        rate: probability of dropping a channel, in [0, 1).
        generator: a CPU generator in the same state on every rank.
        part: which of the equal parts of this rank's share the maps are of.
        parts: how many there are.

    Returns:
        One bool [B, C_l] tensor for each map, on the maps' device.
    """
    rank, world = rank_and_world()
    masks = []
    for level in features:
        local, channels = level.shape[:2]
        keep = torch.rand(local * parts * world, channels, generator=generator) >= rate
        share = keep[(rank * parts + part) * local :][:local]
        masks.append(share.to(level.device, non_blocking=True))
    return masks
