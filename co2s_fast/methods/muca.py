"""MUCA (Wang et al., IEEE TGRS 2025): consistency of features, and attention to a teacher's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from co2s_fast.data.catalogue import IGNORE
from co2s_fast.methods.base import (
    MethodConfig,
    channel_keep_masks,
    own_rows,
    seeded_init,
    step_generator,
)
from co2s_fast.methods.boxes import box_masks
from co2s_fast.methods.cross_attention import HEADS, CrossAttention
from co2s_fast.methods.muca_views import TURNS, noise, strong_boxes, turn
from co2s_fast.methods.pseudo_labels import CountsPseudoLabels, pseudo_labels_of

if TYPE_CHECKING:
    from co2s_fast.data import Batch
    from co2s_fast.methods.reduce import LossTerms
    from co2s_fast.models import Student

EPOCHS = 300  # of the release, which a run of any length is mapped onto
ERASED = 127  # of 255, the grey of an erased square
INIT, VIEWS, PASSES, DROPOUT = range(7401, 7405)  # streams of random numbers


class MUCAConfig(MethodConfig):
    """Options of muca.

    Attributes:
        supervised_weight: factor of L_sup.
        consistency_weight: of the consistency terms at the end of the run; it rises to it all the
            way, ω(e) = weight · R(⌊e / 2⌋, 150), see `rise`. Small students with few labels
            drift towards one class with the paper's 3, with a tenth of it more slowly.
        feature_weight: factor of each level's term beside that of the outputs.
        attention_weight: factor of L_att.
        entropy_threshold: features are learnt from where the entropy of the teacher's, as a share
            of the largest there is, is below a threshold that rises from this one to 1 over the
            first third of the run. Normal values in 768 channels have 0.78: most of a deep map
            comes in after a fifth of the run.
        mc_passes: T, passes of the teacher that the entropy is of.
        mc_dropout: share of the channels that each of them loses.
        noise: standard deviation of the noise on the teacher's images, whose values are in [0, 1];
            cut off at twice as much.
        attention_dropout: share of the channels that the attention's values and its result lose.
    """

    name: Literal["muca"] = "muca"
    supervised_weight: float = Field(default=1.0, gt=0)
    consistency_weight: float = Field(default=3.0, ge=0)
    feature_weight: float = Field(default=0.5, ge=0)
    attention_weight: float = Field(default=0.25, ge=0)
    entropy_threshold: float = Field(default=0.5, ge=0, le=1)
    mc_passes: int = Field(default=4, ge=1, le=64)
    mc_dropout: float = Field(default=0.5, ge=0, lt=1)
    noise: float = Field(default=0.1, ge=0, le=1)
    attention_dropout: float = Field(default=0.1, ge=0, lt=1)


class MUCA(CountsPseudoLabels):
    """L = L_sup + ω(e) (C_out + ½ Σ C_l) + ¼ L_att, for each student and its teacher by itself.

    The teacher, the average of the student's weights, sees an unlabelled crop mirrored or turned by
    90 degrees, with noise; its outputs are turned back. The student sees the crop with a box of a
    labelled image pasted in, or a square erased, half of the steps each.

    - C_out: Huber distance of the two's logits, on the decoder's grid.
    - C_l: Huber distance of their features of level l, over the positions where the teacher is
      certain: where the entropy of softmaxes over channels, averaged over passes that lose channels
      and see noise, is below a share of ln C.
    - L_att: cross entropy of what the student's decoder makes of its deepest features after
      `CrossAttention` to the teacher's, to the student's own prediction for the unchanged crop.

    What was pasted or erased, and padding, counts in none of them; on a grid, neither does a cell
    that any of it lies in.

    Ours: features are compared with mean 0 and variance 1 over the channels of a position, and
    enter the entropy and the attention so. Their scale is an accident of the backbone (a CLIP
    tower's last map has length 1, so that the Huber distance would vanish beside that of other
    maps; a block's raw output has channels in the tens), and so would be the entropy's.

    The release does otherwise, and none of that is offered: attention weights drawn anew at every
    step and never trained; an average whose decay counts epochs; Huber distances that are means
    before the mask is applied; thresholds of ln 2 under entropies of hundreds of channels, so that
    no feature is compared; teacher's images moved out of view and never back; pasted boxes learnt
    as what they cover; one noisy pass in place of several; epochs of the labelled images. Its
    optimiser, its augmentation of labelled images and its frozen start give way to the engine's.
    """

    name: ClassVar[str] = "muca"
    Config: ClassVar[type[MethodConfig]] = MUCAConfig
    views: ClassVar[frozenset[str]] = frozenset({"x", "w"})
    teacher_decay: ClassVar[float] = 0.99
    config: MUCAConfig

    def __init__(
        self, students: Mapping[str, Student], config: MUCAConfig, *, seed: int = 0
    ) -> None:
        super().__init__(students, config, seed=seed)
        self.attention = nn.ModuleDict()
        for index, (name, student) in enumerate(students.items()):
            with seeded_init(seed, index, INIT):
                self.attention[name] = CrossAttention(student.backbone.widths[-1])

    def forward(self, batch: Batch, step: int, total_steps: int) -> dict[str, Tensor]:
        """Losses of one step; see `Method.forward`.

        Raises:
            UsageError: the images are not square.
        """
        strong, hidden, turns, keys = self.draw(batch, step)
        counted = hidden != IGNORE
        epoch = EPOCHS * step / total_steps
        weight = self.config.consistency_weight * rise(math.floor(epoch / 2), 150)
        low = self.config.entropy_threshold
        certain = low + (1 - low) * rise(epoch, 100)
        terms, counts = self.loss_terms(), {}
        for index, (name, student) in enumerate(self.students.items()):
            teacher = self.averages.get(name, student)
            images = padded(batch.w, teacher)
            taught, taught_logits = self.teach(teacher, images, turns, keys[0])
            entropies = self.entropies(teacher, images, keys[1:], index, batch, step)
            features = student.features(torch.cat([batch.x, strong]))
            own = [level[len(batch.x) :] for level in features]
            attended = self.attend(name, index, own[-1], taught[-1], batch, step)
            both = [*zip(features[:-1], own[:-1], strict=True), (features[-1], attended)]
            logits = student.decode(tuple(torch.cat([a, b.to(a.dtype)]) for a, b in both))
            sizes = [len(batch.x), len(strong), len(strong)]
            labeled, changed, attentive = logits.split(sizes)
            # After the pass that learns: autocast may keep weights that were cast without gradient.
            with torch.no_grad():
                label = pseudo_labels_of(student(batch.w), batch.w)[1]
            self.add_supervised(terms, name, labeled, batch.y)
            real = cells(counted, changed.shape[-2:], student)
            self.add_huber(terms, f"{name}/out", weight, wide(changed), taught_logits, real)
            for level, (mine, theirs, entropy) in enumerate(
                zip(own, taught, entropies, strict=True), start=1
            ):
                chosen = cells(counted, mine.shape[-2:], student) & (entropy < certain)
                self.add_huber(terms, f"{name}/level{level}", self.config.feature_weight * weight,
                               standard(mine), theirs, chosen)  # fmt: skip
            total, valid = self.cross_entropy(attentive, label, ignore_mask=hidden)
            terms.add(f"{name}/attention", self.config.attention_weight, total, valid)
            counts.update(self.count_pseudo_labels(name, counted, label, batch))
        return {**terms.finish(), **counts}

    def draw(self, batch: Batch, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A step's strong views and what the teacher's are made with, for all students.

        Returns:
            The strong views [B, C, H, W]; uint8 [B, H, W], 255 where they count in no loss; turns
            int64 [B]; keys of the noise, int64 [1 + T, B].
        """
        device, size = batch.w.device, batch.w.shape[-2:]
        generator = step_generator(self.seed, step, VIEWS)
        common = torch.rand(4, generator=generator, dtype=torch.float64)
        own = own_rows(len(batch.w), 5 + self.config.mc_passes, generator, batch.part, self.parts)
        boxes, pastes = strong_boxes(size[1], common, own[:, :3])
        turns, keys = (own[:, 3] * TURNS).long(), (own[:, 4:] * 2**32).long()
        boxes, pastes, turns, keys = (
            each.to(device, non_blocking=True) for each in (boxes, pastes, turns, keys.T)
        )
        inside = box_masks(boxes, size)
        grey = ERASED if batch.w.dtype == torch.uint8 else ERASED / 255
        strong = torch.where(inside[:, None], torch.where(pastes, batch.x, grey), batch.w)
        if batch.ignore is not None:
            inside = inside | (batch.ignore == IGNORE)
        return strong, inside.to(torch.uint8) * IGNORE, turns, keys

    def noisy(self, images: Tensor, keys: Tensor) -> Tensor:
        """Images with the noise of their keys [B]."""
        most = 2 * self.config.noise
        return images + (self.config.noise * noise(keys, images.shape[1:])).clamp(-most, most)

    @torch.no_grad()
    def teach(
        self, teacher: Student, images: Tensor, turns: Tensor, keys: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """The teacher's features (see `standard`) and logits of turned images, turned back."""
        features = teacher.features(self.noisy(turn(images, turns), keys))
        logits = wide(teacher.decode(features))
        back = [turn(standard(level), turns, back=True) for level in features]
        return back, turn(logits, turns, back=True)

    @torch.no_grad()
    def entropies(
        self, teacher: Student, images: Tensor, keys: Tensor, index: int, batch: Batch, step: int
    ) -> list[Tensor]:
        """How uncertain the teacher's features are, as a share of the most: [B, h, w] a level.

        Args:
            teacher: of student number `index`.
            images: unlabelled, not turned, [B, C, H, W].
            keys: of each pass's noise, [T, B].
            index: of the student.
            batch: the step's.
            step: step index.
        """
        generator = step_generator(self.seed, step, index, PASSES)
        rate, sums = self.config.mc_dropout, []
        for key in keys.unbind(0):
            levels = teacher.features(self.noisy(images, key))
            keep = channel_keep_masks(levels, rate, generator, batch.part, self.parts)
            shares = [
                (standard(level) * (mask[..., None, None] / (1 - rate))).softmax(1)
                for level, mask in zip(levels, keep, strict=True)
            ]
            sums = [a + b for a, b in zip(sums, shares, strict=True)] if sums else shares
        means = (each / len(keys) for each in sums)
        return [-torch.special.xlogy(p, p).sum(1) / math.log(p.shape[1]) for p in means]

    def attend(
        self, name: str, index: int, own: Tensor, taught: Tensor, batch: Batch, step: int
    ) -> Tensor:
        """Deepest features of the strong views after attention to the teacher's, [B, C, h, w]."""
        channels, rate = own.shape[1], self.config.attention_dropout
        generator = step_generator(self.seed, step, index, DROPOUT)
        rows = own_rows(len(own), (HEADS + 1) * channels, generator, batch.part, self.parts)
        scale = ((rows >= rate).float() / (1 - rate)).to(own.device, non_blocking=True)
        # In the modules' type, which is not that of the features where autocast is on.
        kind = self.attention[name].merge.weight.dtype
        return self.attention[name](
            standard(own).to(kind), taught.to(kind),
            *scale.split([HEADS * channels, channels], 1),
        )  # fmt: skip

    def add_huber(
        self, terms: LossTerms, key: str, weight: float, mine: Tensor, theirs: Tensor,
        chosen: Tensor,
    ) -> None:  # fmt: skip
        """Add the mean over the chosen cells, bool [B, h, w], of the Huber distance's mean."""
        distance = F.huber_loss(mine, theirs, reduction="none").mean(1)
        losses = torch.where(chosen, distance, 0)
        self.add_pixels(terms, key, weight, losses.contiguous(), chosen)


def rise(now: float, length: float) -> float:
    """R(a, b) = exp(-5 (1 - min(a, b) / b)²), from almost 0 to 1 (Laine & Aila, ICLR 2017)."""
    return math.exp(-5.0 * (1.0 - min(now, length) / length) ** 2)


def wide(values: Tensor) -> Tensor:
    """The values in a type to compute losses in."""
    return values if values.dtype == torch.float64 else values.float()


def standard(features: Tensor) -> Tensor:
    """Features [B, C, h, w] with mean 0 and variance 1 over the channels of each position."""
    features = wide(features).movedim(1, -1)
    return F.layer_norm(features, features.shape[-1:]).movedim(-1, 1)


def padded(images: Tensor, student: Student) -> Tensor:
    """Images as floats in [0, 1], at the size that the student's maps cover.

    The student would pad with its mean colour itself, but behind a turn on the wrong sides.
    """
    images = images / 255 if images.dtype == torch.uint8 else images
    bottom, right = (-side % student.pads_to for side in images.shape[-2:])
    if not (bottom or right):
        return images
    return F.pad(images - student.mean, (0, right, 0, bottom)) + student.mean


def cells(counted: Tensor, size: Sequence[int], student: Student) -> Tensor:
    """Cells of one of the student's grids whose pixels all count.

    Args:
        counted: bool [B, H, W].
        size: (h, w) of the grid.
        student: whose it is.

    Returns:
        bool [B, h, w].
    """
    bottom, right = (-side % student.pads_to for side in counted.shape[-2:])
    share = F.pad(counted[:, None].float(), (0, right, 0, bottom))
    return F.interpolate(share, tuple(size), mode="area")[:, 0] > 0.999
