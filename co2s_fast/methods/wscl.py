"""WSCL (Lu et al. 2023): a mixture of two strong views learns where the student is surest of it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from co2s_fast.data.catalogue import IGNORE
from co2s_fast.losses import CutMix
from co2s_fast.methods.base import MethodConfig, step_generator
from co2s_fast.methods.boxes import half_area_boxes
from co2s_fast.methods.pseudo_labels import CountsPseudoLabels, pseudo_labels_of
from co2s_fast.methods.quantiles import entropy, pooled_quantile
from co2s_fast.methods.reduce import rank_and_world

if TYPE_CHECKING:
    from co2s_fast.data import Batch
    from co2s_fast.models import Student

DRAWS = 0x35C1  # tells this method's draws of a step from those of others


class WSCLConfig(MethodConfig):
    """Options of wscl.

    Attributes:
        supervised_weight: factor of L_sup.
        s_weight: factor of the term of the mixed strong view.
        share: of the pixels, those that the student is surest of in the strong view, by entropy;
            the others' pseudo-labels are not learnt.
        selection: "pixel": each pixel's loss counts or not; "mean": as the release computes it, the
            mean loss of all pixels times the share of the chosen ones, so that none is chosen.
        mixing: what the student sees where a step mixes, for image i, outside and inside a box of
            half the image, j being the next image: "sc", s1 of i and s1 of j; "ds", s1 and s2 of i;
            "dc", s1 of i and s2 of j; "sdc", as "dc", with s1 and s2 exchanged at every other i.
        mixing_probability: of a step to mix; else the student sees s1.
        edge_enhance: probability of a strong view to have its edges enhanced.
    """

    name: Literal["wscl"] = "wscl"
    supervised_weight: float = Field(default=1.0, gt=0)
    s_weight: float = Field(default=1.0, ge=0)
    share: float = Field(default=0.2, gt=0, le=1)
    selection: Literal["pixel", "mean"] = "pixel"
    mixing: Literal["sdc", "sc", "ds", "dc"] = "sdc"
    mixing_probability: float = Field(default=0.5, ge=0, le=1)
    edge_enhance: float = Field(default=0.5, ge=0, le=1)


class WSCL(CountsPseudoLabels):
    """L = L_sup + Σ_i [e_i <= q] · CE(z_i, ŷ_i) / N for each student by itself.

    z are the logits of the mixed strong view, e their entropy, q the quantile `share` of e over the
    batch, ŷ the student's own labels of the weak view, mixed like the images, and N the number of
    pixels. No confidence is asked for. Pixels of padding count in none of e, the sum and N; in the
    release they do. The release enhances edges before greyscale and blur, here it is done after
    them, which differs by rounding and clipping. Its mask has no effect on single pixels; see
    `selection`. A step in parts or processes mixes images of the same part.

    Source:
        Lu et al., Weak-to-Strong Consistency Learning for Semisupervised Image Segmentation (IEEE
        TGRS 2023), from its authors' release.
    """

    name: ClassVar[str] = "wscl"
    Config: ClassVar[type[MethodConfig]] = WSCLConfig
    views: ClassVar[frozenset[str]] = frozenset({"x", "w", "s1", "s2"})
    config: WSCLConfig

    def forward(self, batch: Batch, step: int, total_steps: int) -> dict[str, Tensor]:
        """Losses of one step; see `Method.forward`."""
        images, cutmix = self.mix_strong_views(batch, step)
        maps = {"ignore": batch.ignore, "truth": batch.truth}
        seen = replace(batch, **{key: cutmix.mix_maps(each) for key, each in maps.items()
                                 if each is not None})  # fmt: skip
        real = torch.ones_like(images[:, 0], dtype=torch.bool)
        if seen.ignore is not None:
            real = seen.ignore != IGNORE
        terms, counts = self.loss_terms(), {}
        for name, student in self.students.items():
            logits = student.decode(student.features(torch.cat([batch.x, images])))
            # After the pass that learns: autocast may keep weights that were cast without gradient.
            label = cutmix.mix_maps(weak_labels(student, batch.w))
            labeled, strong = logits.split([len(batch.x), len(images)])
            self.add_supervised(terms, name, labeled, batch.y)
            chosen = self.surest(strong, real)
            if self.config.selection == "mean":
                total, valid = self.cross_entropy(strong, label, None, seen.ignore)
                total, chosen = total * pooled_share(chosen, real), real
            else:
                total, valid = self.cross_entropy(strong, label, chosen.float(), seen.ignore,
                                                  threshold=0.5)
            terms.add(f"{name}/s", self.config.s_weight, total, valid)
            counts.update(self.count_pseudo_labels(name, chosen, label, seen))
        return {**terms.finish(), **counts}

    @torch.no_grad()
    def mix_strong_views(self, batch: Batch, step: int) -> tuple[Tensor, CutMix]:
        """What the student sees, and where in it the maps of another image belong.

        Args:
            batch: left as it is.
            step: step index.

        Returns:
            [B, C, H, W] of the batch's type, and the boxes for labels and other maps; empty where
            the step does not mix.
        """
        config, device, size = self.config, batch.s1.device, len(batch.s1)
        rank, world = rank_and_world()
        start = (rank * self.parts + batch.part) * size  # this part's place in the global batch
        generator = step_generator(self.seed, step, DRAWS)
        mixes = torch.rand(1, generator=generator) < config.mixing_probability
        boxes = half_area_boxes(size, tuple(batch.s1.shape[-2:]), generator, batch.part, self.parts)
        boxes = (boxes * mixes).to(device, non_blocking=True)
        views = torch.cat([batch.s1, batch.s2])
        if config.edge_enhance > 0:
            draws = torch.rand(size * self.parts * world, 2, generator=generator)
            chosen = draws[start : start + size].T.flatten() < config.edge_enhance
            enhance_edges_(views, chosen.to(device, non_blocking=True))
        image = torch.arange(size, device=device)
        if config.mixing != "ds":
            image = image.roll(-1)
        shift = 0 if config.mixing == "sc" else size  # to the box's view from the one around it
        first = torch.ones(size, dtype=torch.bool, device=device)  # s1 around the box
        if config.mixing == "sdc":
            even = torch.arange(start, start + size) % 2 == 0
            first = (even | ~mixes).to(device, non_blocking=True)
        shown = torch.cat([first, ~first])
        partner = torch.cat([image + shift, image + size - shift])
        CutMix(boxes.repeat(2, 1) * shown[:, None], partner).mix_(views)
        one, other = views.split(size)
        if config.mixing == "sdc":
            one = torch.where(first[:, None, None, None], one, other)
        return one, CutMix(boxes, image)

    @torch.no_grad()
    def surest(self, logits: Tensor, real: Tensor) -> Tensor:
        """The real pixels in the lowest `share` of entropy, bool [B, H, W].

        Args:
            logits: [B, K, h, w].
            real: bool [B, H, W].
        """
        unsure = entropy(logits, tuple(real.shape[1:]))
        return real & (unsure <= pooled_quantile(unsure, real, self.config.share))

    def check_batch(self, batch_size: int, world: int) -> list[str]:
        """See `Method.check_batch`."""
        warnings = super().check_batch(batch_size, world)
        if batch_size == world * self.parts and self.config.mixing != "ds":
            warnings.append(
                "images are not mixed with each other: a part of the batch holds one image; raise "
                f"data.batch_size ({batch_size}) or lower train.accumulate"
            )
        return warnings


@torch.no_grad()
def weak_labels(student: Student, images: Tensor) -> Tensor:
    """The student's class of every pixel, [B, H, W]."""
    return pseudo_labels_of(student.decode(student.features(images)), images)[1]


@torch.no_grad()
def pooled_share(chosen: Tensor, counted: Tensor) -> Tensor:
    """Chosen over counted pixels of all processes, a scalar; 0 where nothing counts."""
    counts = torch.stack([chosen.sum(), counted.sum()])
    if rank_and_world()[1] > 1:
        dist.all_reduce(counts)
    return counts[0] / counts[1].clamp(min=1)


@torch.no_grad()
def enhance_edges_(images: Tensor, chosen: Tensor) -> Tensor:
    """Pillow's EDGE_ENHANCE on every band of the chosen images, in place.

    A pixel becomes (10 · itself - its eight neighbours) / 2, clipped and, of bytes, rounded half
    up; the outermost pixels stay.

    Args:
        images: uint8, or floating in [0, 1], [B, C, H, W], at least 3 x 3.
        chosen: bool [B].

    Returns:
        `images`.
    """
    inner = images[..., 1:-1, 1:-1]
    # Sums of whole numbers: exact, and no autocast shortens them as it would a convolution.
    sums = F.avg_pool2d(images.float(), 3, stride=1, divisor_override=1)
    sharp, most = (11 * inner.float() - sums) / 2, 1
    if images.dtype == torch.uint8:
        sharp, most = (sharp + 0.5).floor(), 255
    sharp = sharp.clamp(0, most).to(images.dtype)
    inner.copy_(torch.where(chosen[:, None, None, None], sharp, inner))
    return images
