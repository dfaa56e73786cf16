"""Pseudo-labels of a step: taken from logits, and counted for the log."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from co2s_fast.data.catalogue import IGNORE
from co2s_fast.losses import softmax_confidence
from co2s_fast.methods.base import Method

if TYPE_CHECKING:
    from co2s_fast.data import Batch


class CountsPseudoLabels(Method):
    """A method that learns from pseudo-labels, which are counted as `count_pseudo_labels` does."""

    @torch.no_grad()
    def count_pseudo_labels(
        self, name: str, chosen: Tensor, label: Tensor, batch: Batch
    ) -> dict[str, Tensor]:
        """Counts behind coverage, classes of pseudo-labels and, with labels, accuracy (Eq. 12).

        Args:
            name: of the student that learns from them.
            chosen: bool [B, H, W], the pixels whose pseudo-label is learnt.
            label: of every pixel, uint8 or int64 [B, H, W].
            batch: the unlabelled images of the labels.
        """
        valid = torch.ones_like(chosen) if batch.ignore is None else batch.ignore != IGNORE
        chosen = chosen & valid
        counts = {f"{name}/pseudo_valid": valid.sum(), f"{name}/pseudo_confident": chosen.sum()}
        if batch.truth is not None:
            known = chosen & (batch.truth != IGNORE)
            counts[f"{name}/pseudo_known"] = known.sum()
            counts[f"{name}/pseudo_correct"] = (known & (label == batch.truth)).sum()
        # One pass a class over bytes: no synchronisation, and no atomics on a handful of addresses.
        classes = torch.where(chosen, label, IGNORE).to(torch.uint8)
        for index, key in enumerate(self.class_counts()[name]):
            counts[key] = (classes == index).sum()
        return counts

    def class_counts(self) -> dict[str, list[str]]:
        """See `Method.class_counts`."""
        return {
            name: [f"{name}/pseudo_class_{k}" for k in range(student.num_classes)]
            for name, student in self.students.items()
        }

    def ratios(self) -> dict[str, tuple[str, str]]:
        """Coverage (share of valid pixels that are learnt) and accuracy of each student's."""
        ratios = {}
        for name in self.students:
            confident = f"{name}/pseudo_confident"
            ratios[f"coverage/{name}"] = (confident, f"{name}/pseudo_valid")
            known = f"{name}/pseudo_known"
            ratios[f"pseudo_accuracy/{name}"] = (f"{name}/pseudo_correct", known)
        return ratios


def real_pixels(label: Tensor, batch: Batch) -> Tensor:
    """Labels [B, H, W] with `IGNORE` in the padding of the unlabelled crops."""
    return label if batch.ignore is None else torch.where(batch.ignore == IGNORE, IGNORE, label)


def pseudo_labels_of(logits: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence and label of every pixel of `images`, labels as bytes where they fit."""
    fits = logits.shape[1] <= IGNORE
    return softmax_confidence(
        logits, size=images.shape[-2:], label_dtype=torch.uint8 if fits else torch.int64
    )
