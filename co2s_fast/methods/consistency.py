"""The weak-to-strong consistency step that FixMatch, UniMatch and Co2S share.

Every student makes one backbone pass over all its views and one decoder pass over all of them and
the perturbed one; losses are taken on the decoder's own grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from co2s_fast.errors import UsageError
from co2s_fast.losses import CutMix, masked_cross_entropy_terms, softmax_confidence
from co2s_fast.methods.alignment import DistributionAlignment
from co2s_fast.methods.base import Method, MethodConfig, channel_keep_masks, step_generator
from co2s_fast.methods.reduce import LossTerms, rank_and_world

if TYPE_CHECKING:
    from co2s_fast.data import Batch
    from co2s_fast.models import Student

IGNORE = 255
PERTURBED = "fp"


class ConsistencyConfig(MethodConfig):
    """Options of the consistency step.

    Attributes:
        threshold: τ, the least confidence of a pseudo-label that is learnt from.
        s1_weight: factor of the first strong view's term in the loss; further views likewise.
        cutmix_shards: CutMix partners stay inside each of this many equal shards of the batch. With
            more processes than shards, they stay inside each process's share.
        distribution_alignment: strength of `DistributionAlignment` on the pseudo-labels; 0, as the
            paper has it, leaves them alone.
    """

    threshold: float = Field(default=0.95, ge=0, le=1)
    s1_weight: float = Field(default=0.5, ge=0)
    cutmix_shards: int = Field(default=1, ge=1)
    distribution_alignment: float = Field(default=0.0, ge=0, le=2)


class ConsistencyMethod(Method):
    """L = ½ L_sup + Σ weight · H(view), with H as in design section 3, for each student."""

    config: ConsistencyConfig
    strong: ClassVar[tuple[str, ...]]
    """Strong views that are learnt from; "fp" is the feature-perturbed weak view."""

    def __init__(
        self, students: Mapping[str, Student], config: ConsistencyConfig, *, seed: int = 0
    ) -> None:
        super().__init__(students, config, seed=seed)
        strength = config.distribution_alignment
        self.alignment = nn.ModuleDict()
        if strength > 0:
            for name, student in students.items():
                self.alignment[name] = DistributionAlignment(student.num_classes, strength)

    def forward(self, batch: Batch, step: int, total_steps: int) -> dict[str, Tensor]:
        """Losses of one step; see `Method.forward`. Mixes `batch.s1` and `batch.s2` in place."""
        cutmix = self.mix_strong_views(batch)
        logits = {
            name: self.student_logits(index, student, batch, step)
            for index, (name, student) in enumerate(self.students.items())
        }
        terms, counts = LossTerms(), {}
        for name, views in logits.items():
            self.add_supervised(terms, name, views["x"], batch.y)
            weak = views["w"]
            if name in self.alignment:
                weak = self.alignment[name](weak, batch.y, batch.ignore)
            confidence, label = softmax_confidence(weak, size=batch.w.shape[-2:])
            for view in self.strong:
                total, valid, _ = masked_cross_entropy_terms(
                    views[view],
                    label,
                    confidence,
                    threshold=self.config.threshold,
                    ignore_mask=batch.ignore,
                    cutmix=cutmix.get(view),
                )
                terms.add(f"{name}/{view}", getattr(self.config, f"{view}_weight"), total, valid)
            counts.update(self.count_pseudo_labels(name, confidence, label, batch))
        self.add_joint_terms(terms, logits, batch, step, total_steps)
        return {**terms.finish(), **counts}

    def add_joint_terms(
        self,
        terms: LossTerms,
        logits: dict[str, dict[str, Tensor]],
        batch: Batch,
        step: int,
        total_steps: int,
    ) -> None:
        """Terms between students; none here."""

    def mix_strong_views(self, batch: Batch) -> dict[str, CutMix]:
        """Paste each strong view's boxes in place; the boxes for the losses to read through."""
        cutmix = {}
        for view in self.strong:
            boxes = getattr(batch, f"boxes{view[1:]}", None) if view != PERTURBED else None
            if boxes is None:
                continue
            images = getattr(batch, view)
            cutmix[view] = CutMix(boxes, self.partners(len(images), images.device))
            cutmix[view].mix_(images)
        return cutmix

    def partners(self, local: int, device: torch.device) -> Tensor:
        """The image each image's box is taken from: the next one in its shard, cyclically."""
        _, world = rank_and_world()
        shards = max(self.config.cutmix_shards // world, 1)
        return torch.arange(local, device=device).view(shards, -1).roll(-1, 1).flatten()

    def student_logits(
        self, index: int, student: Student, batch: Batch, step: int
    ) -> dict[str, Tensor]:
        """Logits of all views: one pass through the backbone, one through the decoder."""
        names = [view for view in ("x", "w", "s1", "s2") if view in self.views]
        images = [getattr(batch, view) for view in names]
        sizes = [len(view) for view in images]
        features = student.features(torch.cat(images))
        if PERTURBED in self.strong:
            start = sum(sizes[: names.index("w")])
            weak = tuple(level[start : start + len(batch.w)] for level in features)
            generator = step_generator(self.seed, step, index)
            keep = channel_keep_masks(weak, student.config.feature_dropout, generator)
            perturbed = student.perturb(weak, keep=keep)
            features = tuple(torch.cat(pair) for pair in zip(features, perturbed, strict=True))
            names.append(PERTURBED)
            sizes.append(len(batch.w))
        return dict(zip(names, student.decode(features).split(sizes), strict=True))

    @torch.no_grad()
    def count_pseudo_labels(
        self, name: str, confidence: Tensor, label: Tensor, batch: Batch
    ) -> dict[str, Tensor]:
        """Counts behind coverage, classes of pseudo-labels and, with labels, accuracy (Eq. 12)."""
        confident = confidence >= self.config.threshold
        valid = torch.ones_like(confident) if batch.ignore is None else batch.ignore != IGNORE
        confident = confident & valid
        counts = {f"{name}/pseudo_valid": valid.sum(), f"{name}/pseudo_confident": confident.sum()}
        if batch.truth is not None:
            known = confident & (batch.truth != IGNORE)
            counts[f"{name}/pseudo_known"] = known.sum()
            counts[f"{name}/pseudo_correct"] = (known & (label == batch.truth)).sum()
        # One pass a class over bytes: no synchronisation, and no atomics on a handful of addresses.
        chosen = torch.where(confident, label, IGNORE).to(torch.uint8)
        for index, key in enumerate(self.class_counts()[name]):
            counts[key] = (chosen == index).sum()
        return counts

    def class_counts(self) -> dict[str, list[str]]:
        """See `Method.class_counts`."""
        return {
            name: [f"{name}/pseudo_class_{k}" for k in range(student.num_classes)]
            for name, student in self.students.items()
        }

    def ratios(self) -> dict[str, tuple[str, str]]:
        """Coverage (share of valid pixels over τ) and pseudo-label accuracy of each student."""
        ratios = {}
        for name in self.students:
            confident = f"{name}/pseudo_confident"
            ratios[f"coverage/{name}"] = (confident, f"{name}/pseudo_valid")
            known = f"{name}/pseudo_known"
            ratios[f"pseudo_accuracy/{name}"] = (f"{name}/pseudo_correct", known)
        return ratios

    def check_batch(self, batch_size: int, world: int) -> list[str]:
        """See `Method.check_batch`."""
        shards = max(self.config.cutmix_shards, world)
        if shards % world:
            raise UsageError(
                f"method.cutmix_shards: {shards} shards cannot be divided among {world} processes"
            )
        if batch_size % shards:
            raise UsageError(
                f"data.batch_size: {batch_size} images cannot be divided into {shards} shards "
                "(method.cutmix_shards, or the number of processes)"
            )
        if batch_size == shards:
            return [
                "CutMix does nothing: a shard of the batch holds one image, which has no partner; "
                f"raise data.batch_size ({batch_size}) or lower method.cutmix_shards"
            ]
        return []
