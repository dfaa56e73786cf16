"""Contrast of pixels with what their class is not: banks of rows, sampling, InfoNCE (U2PL).

Wang et al., "Semi-Supervised Semantic Segmentation Using Unreliable Pseudo-Labels", CVPR 2022,
section 3.3. A pixel whose pseudo-label is not to be trusted still says which classes it is not.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from co2s_fast.methods.base import MethodConfig
from co2s_fast.methods.reduce import rank_and_world


class ContrastConfig(MethodConfig):
    """Options of the contrastive term.

    Attributes:
        contrast_weight: λ_c, its factor in the loss; 1 is what the release's code takes.
        temperature: τ, that the cosines are divided by.
        anchors: pixels drawn of each class, with replacement.
        negatives: rows of its class's bank drawn for each anchor, with replacement.
        anchor_confidence: an anchor's class is likelier than this to the teacher.
        low_rank: r_l. A labelled pixel is a negative of another class that is among the teacher's
            r_l likeliest; an unreliable one, of classes from there on. At most K - 1, and 1 where
            K <= 3.
        high_rank: r_h, at which the classes of which an unreliable pixel is a negative end; at
            most K.
        bank_rows: rows kept of each class, of `embedding` half precision numbers each.
        bank_rows_per_step: at most so many pixels enter a class's bank in a step, of all processes
            and parts together; they are spread evenly over those that qualify.
        bank_rule: "paper": as above; "released": only those of the rule whose own label is the
            class of the bank, as the release's code has it: no labelled pixel, and unlabelled ones
            only where the teacher's two passes disagree.
    """

    contrast_weight: float = Field(default=0.1, ge=0)
    temperature: float = Field(default=0.5, gt=0)
    anchors: int = Field(default=256, ge=1)
    negatives: int = Field(default=50, ge=1)
    anchor_confidence: float = Field(default=0.3, ge=0, le=1)
    low_rank: int = Field(default=3, ge=1)
    high_rank: int = Field(default=20, ge=2)
    bank_rows: int = Field(default=30_000, ge=1)
    bank_rows_per_step: int = Field(default=1024, ge=1)
    bank_rule: Literal["paper", "released"] = "paper"

    @model_validator(mode="after")
    def _ranks_rise(self) -> ContrastConfig:
        if self.low_rank >= self.high_rank:
            raise ValueError(f"low_rank must be less than high_rank ({self.high_rank}), "
                             f"found {self.low_rank}")
        return self

    def rows_of_a_part(self, shares: int) -> int:
        """How many rows each of `shares` shares of a batch may put into a bank."""
        return min(self.bank_rows_per_step, self.bank_rows) // shares


class RowBank(nn.Module):
    """The last rows of each class, first in, first out; the same on every process.

    Args:
        num_classes: K.
        size: rows kept of a class.
        channels: D, of a row.
    """

    rows: Tensor
    """[K, size, D], of unit length, half precision."""
    seen: Tensor
    """int64 [K], rows that ever came in."""

    def __init__(self, num_classes: int, size: int, channels: int) -> None:
        super().__init__()
        rows = torch.zeros(num_classes, size, channels, dtype=torch.float16)
        self.register_buffer("rows", rows)
        self.register_buffer("seen", torch.zeros(num_classes, dtype=torch.int64))

    @torch.no_grad()
    def push(self, rows: Tensor, counts: Tensor) -> None:
        """Take rows in, those of all processes.

        Args:
            rows: [K, n, D], of which the first so many are there; n times the number of processes
                is at most the bank's size.
            counts: int64 [K], so many.
        """
        rows, counts = (from_all(each) for each in (rows.to(self.rows.dtype), counts))
        place = torch.arange(rows.shape[0] * rows.shape[2], device=rows.device)
        there = (place[: rows.shape[2]] < counts[..., None]).transpose(0, 1).flatten(1)
        rows = rows.transpose(0, 1).flatten(1, 2)
        classes = torch.arange(len(rows), device=rows.device)[:, None]
        total = there.sum(1)
        # All rows of every process have a slot, and no two the same: what is not there writes back
        # what the slot holds.
        fresh = rows[classes, nth_true(there.cumsum(1), place.expand(len(rows), -1))]
        slots = (self.seen[:, None] + place) % self.rows.shape[1]
        enters = (place < total[:, None])[..., None]
        self.rows[classes, slots] = torch.where(enters, fresh, self.rows[classes, slots])
        self.seen += total

    def draw(self, draws: Tensor) -> Tensor:
        """Rows of each class, with replacement.

        Args:
            draws: [K, ...], uniform in [0, 1).

        Returns:
            [K, ..., D]; zeros of a class without rows.
        """
        classes = torch.arange(len(draws), device=draws.device)
        classes, seen = (each.view(-1, *[1] * (draws.dim() - 1)) for each in (classes, self.seen))
        return self.rows[classes, uniform_below(seen.clamp(max=self.rows.shape[1]), draws)]


class PixelContrast(nn.Module):
    """The contrastive term of one student, and the banks of negatives that it takes.

    Args:
        num_classes: K.
        channels: D, of a pixel's representation.
        config: options.
    """

    def __init__(self, num_classes: int, channels: int, config: ContrastConfig) -> None:
        super().__init__()
        self.config = config
        self.low = min(config.low_rank, 1 if num_classes <= 3 else num_classes - 1)
        self.high = min(config.high_rank, num_classes)
        self.bank = RowBank(num_classes, config.bank_rows, channels)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        logits: Tensor,
        label: Tensor,
        reliable: Tensor,
        unreliable: Tensor,
        labeled: int,
        generator: torch.Generator,
        parts: int = 1,
    ) -> Tensor:
        """Take a step's negatives into the banks, then contrast the student's pixels with them.

        For each class c of which there is a reliable pixel: anchors are the student's
        representations a of reliable pixels of label c that the teacher gives c with
        `anchor_confidence`, the positive p is the mean of the teacher's over all reliable pixels
        of label c, negatives n_m come from the bank of c, and the loss is the mean over anchors of
        -log softmax([cos(a, p), cos(a, n_1), ...] / τ)_0. Centres and draws are of this process's
        part alone, as in the release; the bank is of all.

        Args:
            student: representations, floating [N, D, h, w].
            teacher: the same of the teacher, without gradient.
            logits: of the teacher, [N, K, h, w].
            label: int64 [N, h, w], -1 where there is none.
            reliable: bool [N, h, w], True only where there is a label.
            unreliable: bool [N, h, w]; all labelled pixels are both.
            labeled: how many of the images, the first ones, have labels of their own.
            generator: a CPU generator, of this process's own.
            parts: how many parts a process passes a step's batch in.

        Returns:
            The mean over the classes of which there is a reliable pixel; 0 with fewer than two. One
            without anchors, or with an empty bank, counts as 0.
        """
        with full_precision(student.device):
            return self._losses(student, teacher, logits, label, reliable, unreliable, labeled,
                                generator, parts)  # fmt: skip

    def _losses(
        self, student: Tensor, teacher: Tensor, logits: Tensor, label: Tensor, reliable: Tensor,
        unreliable: Tensor, labeled: int, generator: torch.Generator, parts: int,
    ) -> Tensor:  # fmt: skip
        classes, config = logits.shape[1], self.config
        wide = torch.float64 if student.dtype == torch.float64 else torch.float32
        sizes = (classes, classes * config.anchors,
                 classes * config.anchors * config.negatives)  # fmt: skip
        draws = torch.rand(sum(sizes), generator=generator, dtype=torch.float32)
        draws = draws.to(student.device, non_blocking=True).split(sizes)
        of_class = label[:, None] == torch.arange(classes, device=label.device).view(-1, 1, 1)
        self._take_in(teacher, logits, of_class, unreliable, labeled, draws[0], parts)

        members = of_class & reliable[:, None]
        sure = members & (logits.to(wide).softmax(1) > config.anchor_confidence)
        running = by_class(sure).cumsum(1)
        found = running[:, -1]
        picked = uniform_below(found[:, None], draws[1].view(classes, -1))
        anchors = F.normalize(rows_at(student, nth_true(running, picked)).to(wide), dim=-1)
        sums = torch.einsum("bkp,bdp->kd", members.flatten(2).to(wide), teacher.flatten(2).to(wide))
        present = members.any(3).any(2).any(0)
        positive = F.normalize(sums, dim=-1)  # of the sum as of the mean
        negatives = self.bank.draw(draws[2].view(classes, config.anchors, -1)).to(wide)
        cosines = [anchors @ positive[..., None], negatives @ anchors[..., None]]
        cosines[0] = cosines[0][..., None]
        scores = torch.cat(cosines, 2).squeeze(-1) / config.temperature
        losses = (scores.logsumexp(-1) - scores[..., 0]).mean(1)
        losses = torch.where((found > 0) & (self.bank.seen > 0), losses, 0)
        count = present.sum()
        return torch.where(count > 1, losses.sum() / count.clamp(min=1), 0)

    @torch.no_grad()
    def _take_in(
        self, teacher: Tensor, logits: Tensor, of_class: Tensor, unreliable: Tensor, labeled: int,
        offset: Tensor, parts: int,
    ) -> None:  # fmt: skip
        """Pixels that are surely not of a class, by the teacher's ranks, into its bank."""
        rank = logits.argsort(dim=1, descending=True, stable=True).argsort(1)
        known = ~of_class[:labeled] & (rank[:labeled] < self.low)
        guessed = (rank[labeled:] >= self.low) & (rank[labeled:] < self.high)
        # A row that is not finite would stay for long, and every loss be as it is.
        finite = teacher.isfinite().all(1, keepdim=True) & logits.isfinite().all(1, keepdim=True)
        wanted = torch.cat([known, guessed]) & unreliable[:, None] & finite
        if self.config.bank_rule == "released":
            wanted = wanted & of_class
        running = by_class(wanted).cumsum(1)
        most = self.config.rows_of_a_part(rank_and_world()[1] * parts)
        chosen = nth_true(running, spread(running[:, -1], most, offset))
        rows = F.normalize(rows_at(teacher, chosen).to(offset.dtype), dim=-1)
        self.bank.push(rows, running[:, -1].clamp(max=most))


def by_class(maps: Tensor) -> Tensor:
    """[N, K, h, w] as [K, N h w]."""
    return maps.transpose(0, 1).flatten(1)


def rows_at(maps: Tensor, index: Tensor) -> Tensor:
    """The pixels of [N, D, h, w] at places in [0, N h w): [..., D]."""
    pixels = maps.shape[2] * maps.shape[3]
    return maps.flatten(2)[index // pixels, :, index % pixels]


def nth_true(running: Tensor, order: Tensor) -> Tensor:
    """Where the n-th True of each row is, n from 0; any place in the row where there is none.

    Args:
        running: cumulative counts of the rows, int64 [K, P].
        order: n, int64 [K, ...] of two dimensions.
    """
    return torch.searchsorted(running, (order + 1).contiguous()).clamp(max=running.shape[1] - 1)


def uniform_below(counts: Tensor, draws: Tensor) -> Tensor:
    """Whole numbers in [0, count), uniform as the draws in [0, 1) are; 0 where the count is 0."""
    return torch.minimum((draws * counts).long(), counts - 1).clamp(min=0)


def spread(counts: Tensor, most: int, offset: Tensor) -> Tensor:
    """A systematic sample of numbers in [0, count): distinct, each of them equally likely.

    Args:
        counts: int64 [K].
        most: size of the sample.
        offset: uniform in [0, 1), [K].

    Returns:
        int64 [K, most], rising; of a count below `most` the first so many are the sample, all of
        them.
    """
    place = torch.arange(most, device=counts.device) + offset.double()[:, None]
    return (place * (counts.double() / most).clamp(min=1)[:, None]).long()


def from_all(tensor: Tensor) -> Tensor:
    """The same tensor of every process, [processes, ...]."""
    world = rank_and_world()[1]
    if world == 1:
        return tensor[None]
    everyone = tensor.new_empty(world * tensor.numel())
    dist.all_gather_into_tensor(everyone, tensor.flatten())
    return everyone.view(world, *tensor.shape)


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """A block in which nothing is cast to half types."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
