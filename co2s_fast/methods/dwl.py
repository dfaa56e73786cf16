"""DWL (Huang et al. 2024): pseudo-labels teach a head of their own, weighted by class rank."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from co2s_fast.data.catalogue import IGNORE
from co2s_fast.losses import masked_cross_entropy
from co2s_fast.methods.base import MethodConfig
from co2s_fast.methods.class_ranks import ClassRanks
from co2s_fast.methods.pseudo_labels import CountsPseudoLabels, pseudo_labels_of

if TYPE_CHECKING:
    from co2s_fast.data import Batch
    from co2s_fast.models import Student


class DWLConfig(MethodConfig):
    """Options of dwl.

    Attributes:
        supervised_weight: factor of L_sup.
        s1_weight: factor of the strong view's term in the loss.
        coupling: α, the pseudo head's share in the main head at the end of each epoch; 0: the main
            head learns from labels alone. The release has 1 for its default network, SegFormer, and
            0.5 for its others.
        warmup_steps: of a run, in which the strong view's term has no part in the loss.
    """

    name: Literal["dwl"] = "dwl"
    supervised_weight: float = Field(default=1.0, gt=0)
    s1_weight: float = Field(default=1.0, ge=0)
    coupling: float = Field(default=0.5, ge=0, le=1)
    warmup_steps: int = Field(default=51, ge=0)


class DWL(CountsPseudoLabels):
    """L = L_sup + L_u for each student by itself, with two heads on one trunk.

    The main head, the student's own, learns labels, makes the pseudo-labels and is evaluated. The
    pseudo head, a copy of the decoder's last block, learns the pseudo-labels of the strong view,
    each with the weight that `rank_weight` gives to its confidence's rank within its class
    (`ClassRanks`). At the end of an epoch the main head takes over a share of the pseudo head.

    Huang et al., "Decouple and weight semi-supervised semantic segmentation of remote sensing
    images" (ISPRS Journal of Photogrammetry and Remote Sensing 2024). Ours: the last block of this
    decoder for a head, padding that is neither learnt nor counted, a step's own pixels among those
    that they are ranked with, and sums over all processes. Of the release, its optimiser,
    augmentations and an ignored class among the outputs are left out.
    """

    config: DWLConfig
    name: ClassVar[str] = "dwl"
    Config: ClassVar[type[MethodConfig]] = DWLConfig
    views: ClassVar[frozenset[str]] = frozenset({"x", "w", "s1"})

    def __init__(
        self, students: Mapping[str, Student], config: DWLConfig, *, seed: int = 0
    ) -> None:
        super().__init__(students, config, seed=seed)
        self.pseudo_head = nn.ModuleDict()
        self.ranks = nn.ModuleDict()
        for name, student in students.items():
            self.pseudo_head[name] = nn.ModuleList(copy.deepcopy(student.decoder.last_block()))
            self.ranks[name] = ClassRanks(student.num_classes)

    @torch.no_grad()
    def before_step(self, step: int, steps_per_epoch: int) -> None:
        """See `Method.before_step`. Couples the heads at the end of an epoch."""
        for main, pseudo in self.heads():
            if step == 0:  # the students may have been given other weights since they were built
                pseudo.copy_(main)
            elif step % steps_per_epoch == 0:
                main.lerp_(pseudo, self.config.coupling)

    def heads(self) -> list[tuple[Tensor, Tensor]]:
        """Pairs of a parameter of a main head and its like in the pseudo head."""
        pairs = []
        for name, student in self.students.items():
            main = nn.ModuleList(student.decoder.last_block())
            pairs += zip(main.parameters(), self.pseudo_head[name].parameters(), strict=True)
        return pairs

    def forward(self, batch: Batch, step: int, total_steps: int) -> dict[str, Tensor]:
        """Losses of one step; see `Method.forward`."""
        terms, counts = self.loss_terms(), {}
        waits = step < self.config.warmup_steps
        real = torch.ones_like(batch.w[:, 0], dtype=torch.bool)
        if batch.ignore is not None:
            real = batch.ignore != IGNORE
        for name, student in self.students.items():
            labeled, strong = self.logits_of_heads(name, batch)
            # After the pass that learns: autocast may keep weights that were cast without gradient.
            with torch.no_grad():
                weak = student.decode(student.features(batch.w))
            confidence, label = pseudo_labels_of(weak, batch.w)
            rank = self.ranks[name](confidence, label, batch.ignore, step, batch.part)
            weight = rank_weight(rank, step / total_steps)
            self.add_supervised(terms, name, labeled, batch.y)
            losses = weight * masked_cross_entropy(
                strong, label, ignore_mask=batch.ignore, reduction="none"
            )
            self.add_pixels(terms, f"{name}/s1", 0.0 if waits else self.config.s1_weight, losses,
                            real)  # fmt: skip
            counts.update(self.count_pseudo_labels(name, weight > 0, label, batch))
        return {**terms.finish(), **counts}

    def logits_of_heads(self, name: str, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits of the labelled view by the main head, and of the strong one by the pseudo head.

        One pass of both through everything before the heads.
        """
        student = self.students[name]
        features = student.features(torch.cat([batch.x, batch.s1]))
        x, skip = student.decoder.trunk(features, student.queries)
        images, classes = [len(batch.x), len(batch.s1)], student.num_classes
        maps = x.split([each * classes for each in images])
        skips = (None, None) if skip is None else skip.split(images)
        blocks = (None, self.pseudo_head[name])
        labeled, strong = (
            student.decoder.finish(*inputs, classes, block)
            for *inputs, block in zip(maps, skips, blocks, strict=True)
        )
        return labeled, strong


def rank_weight(rank: Tensor, progress: float) -> Tensor:
    """2 / (1 + exp(-κ rank)) - 1 with κ = 2 + 20 · progress: late, all but the lowest ranks count.

    Args:
        rank: in [0, 1], any shape.
        progress: share of the run that is done.

    Returns:
        In [0, 1], of the same shape.
    """
    return (rank * (1 + 10 * progress)).tanh()
