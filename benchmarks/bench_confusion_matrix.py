"""Accumulating the confusion matrix of a batch, as validation does."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks import eager
from benchmarks.harness import Case, Workload
from benchmarks.inputs import BATCH, CLASSES, CROP, make_batch, make_logits

SECTION = "confusion_matrix"
TITLE = "confusion_matrix"
PROVIDERS = ("eager", "reference", "cpp", "triton", "cuda")


def eager_confusion(logits: Tensor, target: Tensor) -> Tensor:
    """Argmax of upsampled logits, then a count of (truth, prediction) pairs."""
    classes = logits.shape[1]
    prediction = eager.upsample(logits, tuple(target.shape[-2:])).argmax(dim=1)
    valid = target != eager.IGNORE
    pairs = target[valid] * classes + prediction[valid]
    return torch.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def build(provider: str, device: torch.device, grid: int) -> Workload:
    target = make_batch(device).labels
    logits = make_logits(grid, 1, device)
    if provider == "eager":
        return Workload(partial(eager_confusion, logits, target))
    from co2s_fast.losses import confusion_matrix

    return Workload(partial(confusion_matrix, logits, target))


def cases(device: torch.device, quick: bool) -> list[Case]:
    return [
        Case(
            name,
            PROVIDERS,
            partial(build, grid=grid),
            bytes_forward=BATCH * (CLASSES * grid * grid * 4 + CROP * CROP * 8),
        )
        for name, grid in (("128to512", CROP // 4), ("512", CROP))
    ]
