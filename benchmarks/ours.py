"""The loss section of a co2s step written with `co2s_fast.losses`."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.eager import STABILITY_WEIGHT, Batch, Logits
from co2s_fast.losses import CutMix, masked_cross_entropy, softmax_confidence, stability_loss


def student_losses(logits: dict[str, Tensor], batch: Batch) -> Tensor:
    """½ (supervised + ½ fp + ¼ s1 + ¼ s2) of one student, straight from the decoder's grid."""
    confidence, label = softmax_confidence(
        logits["w"].detach(), batch.size, label_dtype=torch.uint8
    )
    total = masked_cross_entropy(logits["x"], batch.labels)
    options = {"threshold": batch.threshold, "ignore_mask": batch.ignore}
    total = total + 0.5 * masked_cross_entropy(logits["fp"], label, confidence, **options)
    for view, boxes in zip(("s1", "s2"), batch.boxes, strict=True):
        mix = CutMix(boxes, batch.partner)
        term = masked_cross_entropy(logits[view], label, confidence, cutmix=mix, **options)
        total = total + 0.25 * term
    return 0.5 * total


def loss_section(logits: Logits, batch: Batch) -> Tensor:
    """All losses of one co2s step: both students and the stability loss between them."""
    first, second = logits.values()
    losses = [student_losses(z, batch) for z in (first, second)]
    stability = stability_loss(
        first["w"],
        second["w"],
        threshold=batch.threshold,
        size=batch.size,
        ignore_mask=batch.ignore,
    )
    return sum(losses) + STABILITY_WEIGHT * sum(stability)
