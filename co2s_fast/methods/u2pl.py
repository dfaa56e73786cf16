"""U2PL (Wang et al., CVPR 2022): unreliable pseudo-labels are not learnt, but contrasted with."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from co2s_fast.data.catalogue import IGNORE
from co2s_fast.errors import UsageError
from co2s_fast.losses import CutMix
from co2s_fast.methods.base import (
    MethodConfig,
    channel_keep_masks,
    seeded_init,
    step_generator,
)
from co2s_fast.methods.boxes import half_area_boxes
from co2s_fast.methods.contrast import ContrastConfig, PixelContrast
from co2s_fast.methods.pseudo_labels import CountsPseudoLabels, pseudo_labels_of
from co2s_fast.methods.quantiles import entropy, pooled_quantile
from co2s_fast.methods.reduce import LossTerms, rank_and_world
from co2s_fast.models.layers import GroupNorm

if TYPE_CHECKING:
    from co2s_fast.data import Batch
    from co2s_fast.models import Student

HEADS, BOXES, DROPOUT, DRAWS = 401, 402, 403, 404  # streams of random numbers


class U2PLConfig(ContrastConfig):
    """Options of u2pl; `ContrastConfig` has those of the contrastive term.

    Attributes:
        unsupervised_weight: η, factor of L_u beside the inverse of the share of pixels it keeps.
        supervised_share: share of the run in which L_sup alone is learnt (one of 80 epochs);
            students from random weights want a good part of it.
        dropped_share: share of the unlabelled pixels, the most uncertain ones, whose pseudo-label
            is not learnt at the first step; it falls to 0 over the run.
        contrasted_share: share of the unlabelled pixels at either end, by uncertainty, that are
            reliable and unreliable to L_c at the first step; it falls to 0 over the run.
        cutmix_rate: share of the steps whose unlabelled images are mixed.
        embedding: channels of a pixel's representation.
        head_dropout: share of the channels dropped after either convolution of the head.
    """

    name: Literal["u2pl"] = "u2pl"
    supervised_weight: float = Field(default=1.0, gt=0)
    unsupervised_weight: float = Field(default=1.0, ge=0)
    supervised_share: float = Field(default=0.0125, ge=0, le=1)
    dropped_share: float = Field(default=0.2, ge=0, le=1)
    contrasted_share: float = Field(default=0.2, ge=0, le=0.5)
    cutmix_rate: float = Field(default=0.5, ge=0, le=1)
    embedding: int = Field(default=256, ge=8, multiple_of=8)
    head_dropout: float = Field(default=0.1, ge=0, lt=1)


class RepresentationHead(nn.Module):
    """What a pixel is contrasted by: two 3x3 convolutions and a 1x1 one over two feature maps.

    Args:
        widths: channels of the student's maps, shallow to deep; the middle one of those before the
            last, and the last, are taken.
        channels: D, of the result and of what is between.
    """

    def __init__(self, widths: Sequence[int], channels: int) -> None:
        super().__init__()
        last = len(widths) - 1
        self.levels = sorted({last // 2, last})
        ins = (sum(widths[level] for level in self.levels), channels)
        self.convs = nn.ModuleList(nn.Conv2d(n, channels, 3, padding=1, bias=False) for n in ins)
        self.norms = nn.ModuleList(GroupNorm(channels // 8, channels) for _ in ins)
        self.project = nn.Conv2d(channels, channels, 1)

    def forward(
        self, features: Sequence[Tensor], size: tuple[int, int], keep: Sequence[Tensor] = (),
        rate: float = 0.0,
    ) -> Tensor:
        """[B, D, h, w] of maps of any grids.

        Args:
            features: of the student.
            size: (h, w), the decoder's grid.
            keep: two masks [B, D], True where a channel stays; none: all do.
            rate: share of the channels that such masks drop.
        """
        x = torch.cat([F.interpolate(features[level], size, mode="bilinear", align_corners=False)
                       for level in self.levels], 1)  # fmt: skip
        for place, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = F.relu(norm(conv(x)))
            if keep:
                x = x * (keep[place][..., None, None].to(x.dtype) / (1 - rate))
        return self.project(x)


class U2PL(CountsPseudoLabels):
    """L = L_sup + η L_u + λ_c L_c for each student, taught by the average of its own weights.

    The teacher labels the weak views; with `cutmix_rate` these, their labels and their padding are
    pasted into each other, half an image each. H is the teacher's entropy on what results. L_u is
    the mean cross entropy over the pixels whose H is below a quantile of it, which rises from 1 -
    `dropped_share` to 1, over the share of the pixels that those are. L_c, see `PixelContrast`, is
    taken on the decoder's grid: reliable are labelled pixels and those of the least H, unreliable
    those of the greatest. Padding is left out of all of it.

    Ours: group norms in the head, whose average has decay 0.99 whatever `train.ema` is; averages
    from the first step on; one kind of pass of the teacher, for lack of batch norms. Of the release
    `contrast_weight` 1 and `bank_rule` "released" are options. It also takes one class for another
    in L_c once a class is absent, and copies the student into the teacher throughout the first
    epoch; both are left out. That it weighs L_u by GPU is `mean_shards`.
    """

    name: ClassVar[str] = "u2pl"
    Config: ClassVar[type[MethodConfig]] = U2PLConfig
    views: ClassVar[frozenset[str]] = frozenset({"x", "w"})
    teacher_decay: ClassVar[float] = 0.99
    config: U2PLConfig

    def __init__(
        self, students: Mapping[str, Student], config: U2PLConfig, *, seed: int = 0
    ) -> None:
        super().__init__(students, config, seed=seed)
        self.heads = nn.ModuleDict()
        for index, (name, student) in enumerate(students.items()):
            with seeded_init(seed, index, HEADS):
                self.heads[name] = RepresentationHead(student.backbone.widths, config.embedding)
        self.teacher_heads = copy.deepcopy(self.heads).requires_grad_(False)
        self.contrasts = nn.ModuleDict({
            name: PixelContrast(student.num_classes, config.embedding, config)
            for name, student in students.items()
        })  # fmt: skip

    def before_step(self, step: int, steps_per_epoch: int) -> None:
        """Take the heads into their averages, as `Averages` does the students after each step."""
        keep = min(self.teacher_decay, step / (step + 1))
        for name, head in self.heads.items():
            averaged = list(self.teacher_heads[name].parameters())
            get_ema_multi_avg_fn(keep)(averaged, list(head.parameters()), None)

    def forward(self, batch: Batch, step: int, total_steps: int) -> dict[str, Tensor]:
        """Losses of one step; see `Method.forward`."""
        cutmix, mixed = self.mix_weak_views(batch, step)
        size, images = batch.w.shape[-2:], torch.cat([batch.x, mixed.w])
        valid = torch.ones_like(mixed.w[:, 0], dtype=torch.bool)
        if mixed.ignore is not None:
            valid = mixed.ignore != IGNORE
        config, left = self.config, 1 - step / total_steps
        on = float(step >= config.supervised_share * total_steps)
        dropped, ends = config.dropped_share * left, config.contrasted_share * left
        shares = torch.tensor([1 - dropped, ends, 1 - ends], dtype=torch.float64)
        shares = shares.to(batch.w.device, non_blocking=True)
        terms, counts = self.loss_terms(), {}
        for index, (name, student) in enumerate(self.students.items()):
            label, taught, wanted = self.ask_teacher(name, batch, images, cutmix)
            features = student.features(images)
            logits = student.decode(features)
            of_x, of_w = logits.split([len(batch.x), len(batch.w)])
            self.add_supervised(terms, name, of_x, batch.y)

            unsure = entropy(taught[len(batch.x) :], size)
            drop_from, low, high = pooled_quantile(unsure, valid, shares)
            kept = valid & (unsure < drop_from)
            weight = on * config.unsupervised_weight
            self.add_kept(terms, f"{name}/u", weight, of_w, label, kept, mixed.ignore)

            grid = logits.shape[-2:]
            classes = torch.cat([batch.y.long(), torch.where(valid, label, IGNORE).long()])
            classes = coarse(classes, grid).long()
            classes = torch.where(classes == IGNORE, -1, classes)
            unsure = coarse(unsure, grid)
            both = torch.ones_like(classes[: len(batch.x)], dtype=torch.bool)
            reliable, unreliable = (torch.cat([both, part]) & (classes >= 0)
                                    for part in (unsure <= low, unsure >= high))  # fmt: skip
            seen = self.represent(index, name, features, grid, batch, step)
            place = rank_and_world()[0] * self.parts + batch.part
            contrast = self.contrasts[name](
                seen, wanted, taught, classes, reliable, unreliable, len(batch.x),
                step_generator(self.seed, step, DRAWS, index, place), self.parts,
            )  # fmt: skip
            self.add_value(terms, f"{name}/c", on * config.contrast_weight, contrast)
            counts.update(self.count_pseudo_labels(name, kept, label, mixed))
        return {**terms.finish(), **counts}

    def mix_weak_views(self, batch: Batch, step: int) -> tuple[CutMix, Batch]:
        """Boxes of the step, all empty where it has none, and a copy of the batch mixed by them."""
        generator = step_generator(self.seed, step, BOXES)
        boxes = half_area_boxes(len(batch.w), batch.w.shape[-2:], generator, batch.part, self.parts)
        draw = torch.rand(1, generator=generator, dtype=torch.float64)
        boxes = boxes * (draw < self.config.cutmix_rate)
        partner = torch.arange(len(batch.w), device=batch.w.device).roll(-1)
        cutmix = CutMix(boxes.to(batch.w.device, non_blocking=True), partner)
        maps = {name: None if (value := getattr(batch, name)) is None else cutmix.mix_maps(value)
                for name in ("ignore", "truth")}  # fmt: skip
        return cutmix, replace(batch, w=cutmix.mix_(batch.w.clone()), **maps)

    @torch.no_grad()
    def ask_teacher(
        self, name: str, batch: Batch, images: Tensor, cutmix: CutMix
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mixed labels of the weak views; logits and representations of what the student sees."""
        teacher = (self.averages or self.students)[name]
        _, label = pseudo_labels_of(teacher.decode(teacher.features(batch.w)), batch.w)
        features = teacher.features(images)
        logits = teacher.decode(features)
        return (cutmix.mix_maps(label), logits,
                self.teacher_heads[name](features, logits.shape[-2:]))  # fmt: skip

    def represent(
        self, index: int, name: str, features: Sequence[Tensor], grid: tuple[int, int],
        batch: Batch, step: int,
    ) -> Tensor:  # fmt: skip
        """The student's representations, some channels of each image dropped inside the head."""
        rate, keep = self.config.head_dropout, []
        if rate > 0:
            generator = step_generator(self.seed, step, DROPOUT, index)
            like = torch.empty(len(batch.x), self.config.embedding, device=batch.x.device)
            halves = [channel_keep_masks((like, like), rate, generator, batch.part, self.parts)
                      for _ in ("x", "w")]  # fmt: skip
            keep = [torch.cat(pair) for pair in zip(*halves, strict=True)]
        return self.heads[name](features, grid, keep, rate)

    def add_kept(
        self, terms: LossTerms, key: str, weight: float, logits: Tensor, label: Tensor,
        kept: Tensor, ignore: Tensor | None,
    ) -> None:  # fmt: skip
        """Mean cross entropy over the kept pixels, over the share of the valid ones that they are.

        Both numbers are of the whole batch, as the mean is; with `mean_shards`, of each shard.
        """
        total, valid = self.cross_entropy(logits, label, kept.float(), ignore, threshold=0.5)
        several = self.config.mean_shards > 1
        number = kept.view(self.local_shards(), -1).sum(1) if several else kept.sum()
        counts = torch.stack([valid, number])
        if rank_and_world()[1] > 1 and not several:
            dist.all_reduce(counts)
        terms.add(key, weight, total * (counts[0] / counts[1].clamp(min=1)), number)

    def check_batch(self, batch_size: int, world: int) -> list[str]:
        """See `Method.check_batch`."""
        warnings = super().check_batch(batch_size, world)
        shares = world * self.parts
        if not self.config.rows_of_a_part(shares):
            raise UsageError(
                f"method.bank_rows: {self.config.bank_rows} rows, "
                f"{self.config.bank_rows_per_step} a step (method.bank_rows_per_step), are fewer "
                f"than one for each of {self.shares_of(world)}"
            )
        if batch_size == shares and self.config.cutmix_rate > 0:
            warnings.append(
                "CutMix does nothing: a part of the batch holds one image, which has no partner; "
                f"raise data.batch_size ({batch_size}) or lower train.accumulate"
            )
        return warnings


def coarse(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Maps [B, H, W] at the nearest pixels of a smaller grid, floating [B, h, w]."""
    maps = maps if maps.is_floating_point() else maps.float()
    return F.interpolate(maps[:, None], grid, mode="nearest")[:, 0]
