"""Mean-teacher-style training: an averaged copy of the network teaches it where it is surer.

    python examples/losses_mean_teacher.py

Two terms from the teacher: cross-entropy over the pixels where it is confident, averaged over
those, and the squared distance of the class probabilities where it is confident and at least as
sure as the student. `losses_before` spells them out; `losses_after` calls `masked_cross_entropy`
and `stability_loss` on the logits as the decoder emits them. Losses and gradients are equal.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from tiny import CLASSES, IGNORE, SIDE, Batch, Segmenter, show
from torch import Tensor, nn

from co2s_fast.losses import masked_cross_entropy, softmax_confidence, stability_loss

THRESHOLD, MOMENTUM = 0.7, 0.9


class Teacher:
    """Keeps the moving average of the student's weights; asked once a step."""

    def __init__(self) -> None:
        self.model: Segmenter | None = None

    @torch.no_grad()
    def __call__(self, student: nn.Module, images: Tensor) -> Tensor:
        if self.model is None:
            self.model = copy.deepcopy(student)
        for mine, theirs in zip(self.model.parameters(), student.parameters(), strict=True):
            mine.lerp_(theirs, 1 - MOMENTUM)
        return self.model(images)


def before() -> Callable[[nn.Module, Batch], Tensor]:
    teacher = Teacher()

    def up(logits: Tensor) -> Tensor:
        return F.interpolate(logits, (SIDE, SIDE), mode="bilinear", align_corners=False)

    def losses(model: nn.Module, batch: Batch) -> Tensor:
        taught = up(teacher(model, batch.weak)).softmax(1)
        conf, label = taught.max(1)
        valid = batch.ignore != IGNORE
        student = up(model(batch.strong1))

        confident = (conf >= THRESHOLD) & valid
        loss = F.cross_entropy(student, label, reduction="none") * confident
        loss_pseudo = loss.sum() / confident.sum().clamp(min=1)

        p = student.softmax(1)
        surer = confident & (conf >= p.amax(1))
        distance = (p - taught).square().mean(1) * surer
        loss_consistency = distance.sum() / surer.sum().clamp(min=1)

        loss_x = F.cross_entropy(up(model(batch.x)), batch.y, ignore_index=IGNORE)
        return loss_x + loss_pseudo + 10 * loss_consistency

    return losses


def after() -> Callable[[nn.Module, Batch], Tensor]:
    teacher = Teacher()

    def losses(model: nn.Module, batch: Batch) -> Tensor:
        taught = teacher(model, batch.weak)
        conf, label = softmax_confidence(taught, (SIDE, SIDE))
        student = model(batch.strong1)

        loss_pseudo = masked_cross_entropy(
            student, label, conf, threshold=THRESHOLD, ignore_mask=batch.ignore,
            reduction="confident",
        )  # fmt: skip
        loss_consistency, _ = stability_loss(
            student, taught, threshold=THRESHOLD, ignore_mask=batch.ignore
        )
        loss_x = masked_cross_entropy(model(batch.x), batch.y)
        return loss_x + loss_pseudo + 10 * loss_consistency

    return losses


if __name__ == "__main__":
    print(f"mean-teacher-style, {CLASSES} classes, random images")
    show(before(), after())
