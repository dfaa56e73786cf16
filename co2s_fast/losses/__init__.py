"""Fused losses for semi-supervised segmentation, to be used in any PyTorch training loop.

Logits may come on a smaller grid than labels: every loss then behaves as if they had been upsampled
bilinearly, without ever storing the upsampled tensor. `co2s_fast.ops` tells which backend runs.
"""

from __future__ import annotations

from co2s_fast.losses.confidence import softmax_confidence
from co2s_fast.losses.confusion import confusion_matrix
from co2s_fast.losses.cross_entropy import masked_cross_entropy, masked_cross_entropy_terms
from co2s_fast.losses.cutmix import CutMix
from co2s_fast.losses.modules import MaskedCrossEntropyLoss, StabilityLoss
from co2s_fast.losses.stability import stability_loss, stability_terms

__all__ = [
    "CutMix",
    "MaskedCrossEntropyLoss",
    "StabilityLoss",
    "confusion_matrix",
    "masked_cross_entropy",
    "masked_cross_entropy_terms",
    "softmax_confidence",
    "stability_loss",
    "stability_terms",
]
