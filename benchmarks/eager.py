"""The peers' formulation of the losses: full-resolution logits, softmax, masks, mixed copies.

This is how training code of the UniMatch family is written, in our words: every view's logits are
first brought to the label grid, pseudo-labels, confidences and padding masks are copied and mixed,
and each loss is a map that is masked and summed. The stability loss follows the paper, that is
with a live gradient into the learner (the release detaches it, which would make the eager step
cheaper by a part of one backward pass, and the term idle).

With `plain_indexing` the copies are mixed by boolean assignment and the valid pixels are counted on
the host, as released. Without it the same work is written with `torch.where` and device-side
counts, which is the form that torch.compile can take whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = 255
THRESHOLD = 0.95
STABILITY_WEIGHT = 0.5
VIEWS = ("x", "w", "fp", "s1", "s2")

Logits = dict[str, dict[str, Tensor]]


@dataclass
class Batch:
    """What the loss section needs beside logits. Boxes are maps for the peers, lists for us."""

    labels: Tensor  # int64 [B, H, W]
    ignore: Tensor  # uint8 [B, H, W], 255 where padding
    boxes: tuple[Tensor, Tensor]  # int32 [B, 4] each: x1, y1, x2, y2
    box_maps: tuple[Tensor, Tensor]  # int64 [B, H, W] each: 1 inside the box
    partner: Tensor  # int64 [B]
    threshold: float = THRESHOLD

    @property
    def size(self) -> tuple[int, int]:
        return self.labels.shape[1], self.labels.shape[2]


def upsample(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring logits [B, K, h, w] to the label grid; as they are when they are there already."""
    if tuple(logits.shape[-2:]) == tuple(size):
        return logits
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def softmax_confidence(logits: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Confidence and label of every pixel, from full-resolution probabilities."""
    confidence, label = upsample(logits, size).softmax(dim=1).max(dim=1)
    return confidence, label


def paste(weak: Tensor, other: Tensor, box: Tensor, plain_indexing: bool) -> Tensor:
    """Copy of `weak` [B, H, W] with the pixels of `other` where `box` is 1."""
    if not plain_indexing:
        return torch.where(box == 1, other, weak)
    mixed = weak.clone()
    mixed[box == 1] = other[box == 1]
    return mixed


def count(valid: Tensor, plain_indexing: bool) -> Any:
    """Number of valid pixels: on the host as released, or on the device."""
    return max(valid.sum().item(), 1) if plain_indexing else valid.sum().clamp(min=1)


def masked_cross_entropy(
    logits: Tensor,  # [B, K, h, w]
    target: Tensor,  # int64 [B, H, W]
    confidence: Tensor | None,
    ignore: Tensor | None,
    plain_indexing: bool = True,
    threshold: float = THRESHOLD,
) -> Tensor:
    """Cross-entropy over valid and confident pixels, divided by the count of valid ones."""
    full = upsample(logits, tuple(target.shape[-2:]))
    loss = F.cross_entropy(full, target, ignore_index=IGNORE, reduction="none")
    valid = target != IGNORE
    if ignore is not None:
        valid = valid & (ignore != IGNORE)
    taken = valid if confidence is None else valid & (confidence >= threshold)
    return (loss * taken).sum() / count(valid, plain_indexing)


def stability_loss(
    logits_a: Tensor,
    logits_b: Tensor,
    size: tuple[int, int],
    ignore: Tensor | None = None,
    threshold: float = THRESHOLD,
) -> tuple[Tensor, Tensor]:
    """Masked mean squared error of probabilities; the more confident student teaches."""
    p_a, p_b = (upsample(z, size).softmax(dim=1) for z in (logits_a, logits_b))
    c_a, c_b = p_a.detach().amax(dim=1), p_b.detach().amax(dim=1)
    learns_a = (c_b >= threshold) & (c_b >= c_a)
    learns_b = (c_a >= threshold) & (c_a >= c_b)
    losses = []
    for pupil, teacher, learns in ((p_a, p_b, learns_a), (p_b, p_a, learns_b)):
        if ignore is not None:
            learns = learns & (ignore != IGNORE)
        squared = F.mse_loss(pupil, teacher.detach(), reduction="none").mean(dim=1)
        losses.append((squared * learns).sum() / learns.sum().clamp(min=1))
    return losses[0], losses[1]


def student_losses(
    logits: dict[str, Tensor], batch: Batch, released: bool, plain_indexing: bool
) -> Tensor:
    """½ (supervised + ½ fp + ¼ s1 + ¼ s2) of one student, by its own pseudo-labels.

    `released`: the mix partner is a second weak view that got its own forward pass, so its
    pseudo-labels are computed too ("w_other"). Otherwise the partner is read from the batch.
    """
    confidence, label = softmax_confidence(logits["w"].detach(), batch.size)
    if released:
        other_confidence, other_label = softmax_confidence(logits["w_other"], batch.size)
    else:
        other_confidence, other_label = confidence[batch.partner], label[batch.partner]
    other_ignore = batch.ignore[batch.partner]
    options = (plain_indexing, batch.threshold)
    total = masked_cross_entropy(logits["x"], batch.labels, None, None, *options)
    total = total + 0.5 * masked_cross_entropy(
        logits["fp"], label, confidence, batch.ignore, *options
    )
    for view, box in zip(("s1", "s2"), batch.box_maps, strict=True):
        mixed = (
            paste(mine, other, box, plain_indexing)
            for mine, other in (
                (label, other_label),
                (confidence, other_confidence),
                (batch.ignore, other_ignore),
            )
        )
        total = total + 0.25 * masked_cross_entropy(logits[view], *mixed, *options)
    return 0.5 * total


def loss_section(
    logits: Logits, batch: Batch, released: bool = True, plain_indexing: bool = True
) -> Tensor:
    """All losses of one co2s step: both students and the stability loss between them."""
    first, second = logits.values()
    losses = [student_losses(z, batch, released, plain_indexing) for z in (first, second)]
    stability = stability_loss(first["w"], second["w"], batch.size, batch.ignore, batch.threshold)
    return sum(losses) + STABILITY_WEIGHT * sum(stability)
