"""The weak-to-strong consistency step that FixMatch, UniMatch and Co2S share.

Every student makes one backbone pass over all its views and one decoder pass over all of them and
the perturbed one; losses are taken on the decoder's own grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from co2s_fast.data.catalogue import IGNORE
from co2s_fast.data.plan import PARTNER
from co2s_fast.errors import UsageError
from co2s_fast.losses import CutMix
from co2s_fast.methods.alignment import DistributionAlignment
from co2s_fast.methods.base import MethodConfig, channel_keep_masks, step_generator
from co2s_fast.methods.class_thresholds import ClassThresholds
from co2s_fast.methods.pseudo_labels import CountsPseudoLabels, pseudo_labels_of, real_pixels
from co2s_fast.methods.ramp import cosine_ramp
from co2s_fast.methods.reduce import LossTerms, rank_and_world

if TYPE_CHECKING:
    from co2s_fast.data import Batch
    from co2s_fast.models import Student

PERTURBED = "fp"


class ConsistencyConfig(MethodConfig):
    """Options of the consistency step.

    Attributes:
        threshold: τ, the least confidence of a pseudo-label that is learnt from.
        teacher: who labels a student's unlabelled pixels: "student", itself, as the paper has it;
            or "average", the average of its weights (`train.ema`), at the price of one more pass
            of the weak view: a mean teacher (Tarvainen & Valpola, NeurIPS 2017).
        s1_weight: factor of the first strong view's term in the loss; further views likewise.
        cutmix_shards: CutMix partners stay inside each of this many equal shards of the batch. With
            more processes than shards, they stay inside each process's share, and with
            `train.accumulate` inside each part of it.
        cutmix_partner: "batch", another image of the batch; "same-image", as the releases of
            UniMatch and Co2S have it: another augmentation of the image itself, whose pseudo-labels
            take one more pass of each student.
        distribution_alignment: strength of `DistributionAlignment` on the pseudo-labels; 0, as the
            paper has it, leaves them alone.
        alignment_prior: weight of what the students predict early, against the labelled classes'
            frequencies, in what `DistributionAlignment` aligns to. Early is while
            `consistency_ramp` rises.
        class_thresholds: strength of `ClassThresholds` on the confidences; 0, as the paper has it,
            leaves one threshold for all classes.
        consistency_ramp: share of the run over which the weights of the strong views' terms rise on
            a half cosine (Laine & Aila, ICLR 2017, ramp theirs up likewise), so that students
            without a prior learn from labels before they learn from each other's guesses; 0, as the
            paper has it: none.
    """

    threshold: float = Field(default=0.95, ge=0, le=1)
    teacher: Literal["student", "average"] = "student"
    s1_weight: float = Field(default=0.5, ge=0)
    cutmix_shards: int = Field(default=1, ge=1)
    cutmix_partner: Literal["batch", "same-image"] = "batch"
    distribution_alignment: float = Field(default=0.0, ge=0, le=2)
    alignment_prior: float = Field(default=0.0, ge=0, le=1)
    class_thresholds: float = Field(default=0.0, ge=0, le=2)
    consistency_ramp: float = Field(default=0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _aligns_one_batch(self) -> ConsistencyConfig:
        for option in ("distribution_alignment", "class_thresholds"):
            if self.cutmix_partner == "same-image" and getattr(self, option):
                raise ValueError(f"{option} needs cutmix_partner 'batch', found 'same-image'")
        if self.distribution_alignment and self.alignment_prior and not self.consistency_ramp:
            raise ValueError("alignment_prior needs consistency_ramp > 0, found 0: without a ramp "
                             "students never predict what labels alone taught them")
        return self


class ConsistencyMethod(CountsPseudoLabels):
    """L = ½ L_sup + Σ weight · H(view), with H as in design section 3, for each student."""

    config: ConsistencyConfig
    strong: ClassVar[tuple[str, ...]]
    """Strong views that are learnt from; "fp" is the feature-perturbed weak view."""

    def __init__(
        self, students: Mapping[str, Student], config: ConsistencyConfig, *, seed: int = 0
    ) -> None:
        super().__init__(students, config, seed=seed)
        self.alignment = nn.ModuleDict()
        if config.distribution_alignment > 0:
            for name, student in students.items():
                self.alignment[name] = DistributionAlignment(
                    student.num_classes, config.distribution_alignment,
                    prior=config.alignment_prior,
                )  # fmt: skip
        if config.cutmix_partner == "same-image":
            self.views = self.views | {PARTNER}
        self.thresholds = nn.ModuleDict()
        if config.class_thresholds > 0:
            for name, student in students.items():
                self.thresholds[name] = ClassThresholds(
                    student.num_classes, config.class_thresholds
                )

    def take_parts(self, parts: int) -> None:
        """See `Method.take_parts`. A step moves the running means as much, in however many."""
        for running in (*self.alignment.values(), *self.thresholds.values()):
            running.momentum **= self.parts / parts
        super().take_parts(parts)

    def forward(self, batch: Batch, step: int, total_steps: int) -> dict[str, Tensor]:
        """Losses of one step; see `Method.forward`. Mixes `batch.s1` and `batch.s2` in place."""
        cutmix = self.mix_strong_views(batch)
        batch, mates = self.without_mates(batch)
        logits = {
            name: self.student_logits(index, student, batch, step)
            for index, (name, student) in enumerate(self.students.items())
        }
        terms, counts, labels = self.loss_terms(), {}, []
        ramp = cosine_ramp(step, total_steps, 1.0, self.config.consistency_ramp)
        for name, views in logits.items():
            self.add_supervised(terms, name, views["x"], batch.y)
            own = self.config.teacher == "student"
            weak = views["w"] if own else self.teacher_logits(name, batch)
            confidence, label = self.label_weak_views(name, weak, batch, ramp)
            maps = [label, confidence, batch.ignore]
            of_mates = None if mates is None else self.pseudo_labels(name, mates)
            for view in self.strong:
                mixed, boxes = maps, cutmix.get(view)
                if of_mates is not None and boxes is not None:
                    mixed, boxes = mix_with_mates(maps, of_mates, boxes), None
                total, valid = self.cross_entropy(
                    views[view], *mixed, threshold=self.config.threshold, cutmix=boxes
                )
                weight = ramp * getattr(self.config, f"{view}_weight")
                terms.add(f"{name}/{view}", weight, total, valid)
            chosen = confidence >= self.config.threshold
            counts.update(self.count_pseudo_labels(name, chosen, label, batch))
            counts.update(self.sum_confidences(name, confidence, label, batch))
            labels.append(label)
        counts.update(self.count_agreement(labels, batch))
        self.add_joint_terms(terms, logits, batch, step, total_steps)
        return {**terms.finish(), **counts}

    def label_weak_views(
        self, name: str, weak: Tensor, batch: Batch, ramp: float
    ) -> tuple[Tensor, Tensor]:
        """Confidence and label of every unlabelled pixel, [B, H, W], for student `name`.

        `weak` are the logits of the weak views, its own or its teacher's.
        `ramp` is the share of their weight that the strong views have at this step.
        """
        if name in self.alignment:
            weak = self.alignment[name](weak, batch.y, batch.ignore, taught=ramp,
                                        students=self.alignment.values())
        confidence, label = pseudo_labels_of(weak, batch.w)
        if name in self.thresholds:
            confidence = self.thresholds[name](weak, confidence, label, batch.ignore)
        return confidence, label

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

    def without_mates(self, batch: Batch) -> tuple[Batch, Batch | None]:
        """The batch proper, and the second augmentation of its unlabelled images if it has one."""
        if PARTNER not in self.views:
            return batch, None
        size = len(batch.x)
        names = ("w", "s1", "s2", "ignore", "boxes1", "boxes2", "truth", "unlabeled_files")
        halves = [
            {name: value[part] for name in names if (value := getattr(batch, name)) is not None}
            for part in (slice(None, size), slice(size, None))
        ]
        return replace(batch, **halves[0]), replace(batch, **halves[1])

    @torch.no_grad()
    def pseudo_labels(self, name: str, batch: Batch) -> list[Tensor | None]:
        """Labels, confidences and padding of a batch's weak views, of which nothing is learnt.

        In training mode; that of evaluation, as released, differs only where dropout was asked for.
        """
        confidence, label = pseudo_labels_of(self.teacher_logits(name, batch), batch.w)
        return [label, confidence, batch.ignore]

    @torch.no_grad()
    def teacher_logits(self, name: str, batch: Batch) -> Tensor:
        """Logits of a batch's weak views by the teacher of student `name`."""
        among = self.students if self.config.teacher == "student" else self.averages
        teacher = among[name]
        return teacher.decode(teacher.features(batch.w))

    def partners(self, local: int, device: torch.device) -> Tensor:
        """The image each image's box is taken from: the next one in its shard, cyclically.

        With "same-image" it is the one half a batch further on, which is of the same image.
        """
        if PARTNER in self.views:
            return torch.arange(local, device=device).roll(-(local // 2))
        _, world = rank_and_world()
        shards = max(self.config.cutmix_shards // (world * self.parts), 1)
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
            keep = channel_keep_masks(weak, student.config.feature_dropout, generator,
                                      batch.part, self.parts)
            perturbed = student.perturb(weak, keep=keep)
            features = tuple(torch.cat(pair) for pair in zip(features, perturbed, strict=True))
            names.append(PERTURBED)
            sizes.append(len(batch.w))
        return dict(zip(names, student.decode(features).split(sizes), strict=True))

    @torch.no_grad()
    def sum_confidences(
        self, name: str, confidence: Tensor, label: Tensor, batch: Batch
    ) -> dict[str, Tensor]:
        """Sums of confidence, and counts of the pixels, by class; see `class_means`.

        Of every fourth pixel of every fourth row: a mean of that many is as good for a log.
        """
        few = np.s_[:, ::4, ::4]
        classes, confidence = real_pixels(label, batch)[few], confidence[few]
        keys, found = self.class_means()[name], {}
        for index, (total, count) in enumerate(keys):
            of_class = classes == index
            found[total] = torch.where(of_class, confidence, 0).sum(dtype=torch.float64)
            found[count] = of_class.sum()
        return found

    @torch.no_grad()
    def count_agreement(self, labels: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        """Pixels of the unlabelled images that all students give one class, sure or not."""
        if len(labels) < 2:
            return {}
        same = torch.stack([each == labels[0] for each in labels[1:]]).all(0)
        if batch.ignore is not None:
            same &= batch.ignore != IGNORE
        return {"pseudo_agree": same.sum()}

    def class_means(self) -> dict[str, list[tuple[str, str]]]:
        """See `Method.class_means`: the mean confidence of the pixels predicted as each class."""
        return {
            name: [(f"{name}/confidence_{k}", f"{name}/predicted_{k}")
                   for k in range(student.num_classes)]
            for name, student in self.students.items()
        }  # fmt: skip

    def ratios(self) -> dict[str, tuple[str, str]]:
        """Coverage and accuracy of each student's, and how often the students agree."""
        first, *others = self.students
        agreement = {"agreement": ("pseudo_agree", f"{first}/pseudo_valid")} if others else {}
        return super().ratios() | agreement

    def check_batch(self, batch_size: int, world: int) -> list[str]:
        """See `Method.check_batch`."""
        warnings = super().check_batch(batch_size, world)
        if PARTNER in self.views:
            return warnings
        shares = world * self.parts
        shards = max(self.config.cutmix_shards, shares)
        if shards % shares:
            raise UsageError(
                f"method.cutmix_shards: {shards} shards cannot be divided among "
                f"{self.shares_of(world)}"
            )
        if batch_size % shards:
            raise UsageError(
                f"data.batch_size: {batch_size} images cannot be divided into {shards} shards "
                "(method.cutmix_shards, or the number of processes times train.accumulate)"
            )
        if batch_size == shards:
            warnings.append(
                "CutMix does nothing: a shard of the batch holds one image, which has no partner; "
                f"raise data.batch_size ({batch_size}) or lower method.cutmix_shards or "
                "train.accumulate"
            )
        return warnings


def mix_with_mates(
    maps: list[Tensor | None], of_mates: list[Tensor | None], cutmix: CutMix
) -> list[Tensor | None]:
    """Maps [B, H, W] with the boxes of their mates' maps pasted in; None stays None.

    Args:
        maps: of the batch proper.
        of_mates: the same of its second augmentation.
        cutmix: of both together, 2 B boxes.
    """
    return [
        None if mine is None else cutmix.mix_maps(torch.cat([mine, theirs]))[: len(mine)]
        for mine, theirs in zip(maps, of_mates, strict=True)
    ]
