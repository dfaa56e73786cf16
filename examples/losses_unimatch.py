"""UniMatch-style training: two CutMixed strong views and one with dropped features.

    python examples/losses_unimatch.py

`losses_before` is how such loops are written: logits upsampled to the images' size, pseudo-labels
mixed by masks, one cross-entropy map a view. `losses_after` puts co2s_fast's ops in the place of
those lines, on the logits as the decoder emits them. Losses and gradients are equal.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tiny import CLASSES, IGNORE, SIDE, Batch, show
from torch import Tensor, nn

from co2s_fast.losses import CutMix, masked_cross_entropy, softmax_confidence

THRESHOLD = 0.95


def losses_before(model: nn.Module, batch: Batch) -> Tensor:
    def predict(images: Tensor, **options: bool) -> Tensor:
        return F.interpolate(
            model(images, **options), (SIDE, SIDE), mode="bilinear", align_corners=True
        )

    def box_mask(boxes: Tensor) -> Tensor:
        mask = torch.zeros(len(boxes), SIDE, SIDE, dtype=torch.bool)
        for image, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
            mask[image, y1:y2, x1:x2] = True
        return mask

    def consistency(logits: Tensor, label: Tensor, conf: Tensor, ignore: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, label, reduction="none")
        loss = loss * ((conf >= THRESHOLD) & (ignore != IGNORE))
        return loss.sum() / (ignore != IGNORE).sum().clamp(min=1)

    with torch.no_grad():
        conf, label = predict(batch.weak).softmax(1).max(1)

    loss_x = F.cross_entropy(predict(batch.x), batch.y, ignore_index=IGNORE)

    loss_s = []
    for strong, boxes in ((batch.strong1, batch.boxes1), (batch.strong2, batch.boxes2)):
        mask = box_mask(boxes)
        images = torch.where(mask[:, None], strong.roll(1, 0), strong)
        mixed = [torch.where(mask, maps.roll(1, 0), maps) for maps in (label, conf, batch.ignore)]
        loss_s.append(consistency(predict(images), *mixed))

    loss_fp = consistency(predict(batch.weak, drop_features=True), label, conf, batch.ignore)
    return (loss_x + 0.25 * loss_s[0] + 0.25 * loss_s[1] + 0.5 * loss_fp) / 2


def losses_after(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        conf, label = softmax_confidence(model(batch.weak), (SIDE, SIDE), align_corners=True)

    def consistency(logits: Tensor, cutmix: CutMix | None = None) -> Tensor:
        return masked_cross_entropy(
            logits, label, conf, threshold=THRESHOLD, ignore_mask=batch.ignore, cutmix=cutmix,
            align_corners=True,
        )  # fmt: skip

    loss_x = masked_cross_entropy(model(batch.x), batch.y, align_corners=True)

    loss_s = []
    for strong, boxes in ((batch.strong1, batch.boxes1), (batch.strong2, batch.boxes2)):
        cutmix = CutMix(boxes, partner=torch.arange(len(boxes)).roll(1))
        loss_s.append(consistency(model(cutmix.mix_(strong)), cutmix))

    loss_fp = consistency(model(batch.weak, drop_features=True))
    return (loss_x + 0.25 * loss_s[0] + 0.25 * loss_s[1] + 0.5 * loss_fp) / 2


if __name__ == "__main__":
    print(f"UniMatch-style, {CLASSES} classes, random images")
    show(losses_before, losses_after)
