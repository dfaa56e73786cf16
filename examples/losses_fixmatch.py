"""FixMatch-style training: one strong view learns the confident pseudo-labels of the weak one.

    python examples/losses_fixmatch.py

`losses_before` upsamples the logits and averages the masked cross-entropy map; `losses_after` is
the same in two calls, on the logits as the decoder emits them. Losses and gradients are equal.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tiny import CLASSES, IGNORE, SIDE, Batch, show
from torch import Tensor, nn

from co2s_fast.losses import masked_cross_entropy, softmax_confidence

THRESHOLD = 0.8


def losses_before(model: nn.Module, batch: Batch) -> Tensor:
    def predict(images: Tensor) -> Tensor:
        return F.interpolate(model(images), (SIDE, SIDE), mode="bilinear", align_corners=False)

    with torch.no_grad():
        conf, label = predict(batch.weak).softmax(1).max(1)
    supervised = F.cross_entropy(predict(batch.x), batch.y, ignore_index=IGNORE)
    loss = F.cross_entropy(predict(batch.strong1), label, reduction="none")
    unsupervised = (loss * (conf >= THRESHOLD)).mean()
    return supervised + unsupervised


def losses_after(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        conf, label = softmax_confidence(model(batch.weak), (SIDE, SIDE))
    supervised = masked_cross_entropy(model(batch.x), batch.y)
    unsupervised = masked_cross_entropy(model(batch.strong1), label, conf, threshold=THRESHOLD)
    return supervised + unsupervised


if __name__ == "__main__":
    print(f"FixMatch-style, {CLASSES} classes, random images")
    show(losses_before, losses_after)
