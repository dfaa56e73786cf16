"""Each op in plain differentiable PyTorch: the specification, the fallback and the test oracle.

Everything is computed in float32, or float64 for float64 logits, whatever the logits' dtype.
Notation: logits [B,K,h,w] on the decoder's grid, maps [B,H,W] on the grid of labels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, confidences and saved gradients for logits of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def up(logits: Tensor, height: int, width: int, align_corners: bool) -> Tensor:
    """`F.interpolate(logits, (height, width), mode="bilinear")`, the identity on equal grids."""
    logits = logits.to(wide(logits.dtype))
    if logits.shape[2:] == (height, width):
        return logits  # not by interpolation: its zero weights would spread a NaN
    return F.interpolate(logits, (height, width), mode="bilinear", align_corners=align_corners)


def up_transposed(gradient: Tensor, height: int, width: int, align_corners: bool) -> Tensor:
    """The transpose of `up`: a gradient on the label grid, brought to the height × width grid."""
    if gradient.shape[2:] == (height, width):
        return gradient
    input_size = (*gradient.shape[:2], height, width)
    return torch.ops.aten.upsample_bilinear2d_backward(
        gradient, gradient.shape[2:], input_size, align_corners
    )


def paste(maps: Tensor, boxes: Tensor | None, partner: Tensor | None) -> Tensor:
    """`maps` [B,...,H,W] with each image's box taken from its partner's original."""
    if boxes is None or partner is None:
        return maps
    if maps.device.type == "cpu":
        check_partner(partner)
    height, width = maps.shape[-2:]
    x1, y1, x2, y2 = boxes.long().unbind(1)
    y = torch.arange(height, device=maps.device)[None, :, None]
    x = torch.arange(width, device=maps.device)[None, None, :]
    rows = (y >= y1[:, None, None]) & (y < y2[:, None, None])
    columns = (x >= x1[:, None, None]) & (x < x2[:, None, None])
    known = (partner >= 0) & (partner < len(maps))  # an unknown partner on a GPU: no box
    inside = rows & columns & known[:, None, None]
    inside = inside.view(len(maps), *[1] * (maps.dim() - 3), height, width)
    return torch.where(inside, maps[torch.where(known, partner, 0)], maps)


def check_classes(label: Tensor, valid: Tensor, num_classes: int, ignore_index: int) -> None:
    """Raise IndexError when a valid pixel of `label` [B,H,W] is no class. Waits for the device."""
    bad = valid & ((label < 0) | (label >= num_classes))
    if bad.any():
        image, row, column = bad.nonzero()[0].tolist()
        raise IndexError(
            f"target: class {label[image, row, column].item()} at image {image}, row {row}, "
            f"column {column} is outside [0, {num_classes}) and is not ignore_index "
            f"({ignore_index})"
        )


def check_partner(partner: Tensor | None) -> None:
    """Raise IndexError when `partner` [B] names no image of the batch. Waits for the device."""
    if partner is None or not len(partner):
        return
    bad = (partner < 0) | (partner >= len(partner))
    if bad.any():
        image = int(bad.nonzero()[0])
        raise IndexError(
            f"partner: {partner[image].item()} at image {image} is outside [0, {len(partner)})"
        )


def valid_pixels(
    target: Tensor,
    ignore_mask: Tensor | None,
    ignore_index: int,
    num_classes: int,
    boxes: Tensor | None = None,
    partner: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Labels int64 [B,H,W] read through the boxes, and where they count."""
    label = paste(target, boxes, partner).long()
    valid = label != ignore_index
    if ignore_mask is not None:
        valid = valid & (paste(ignore_mask, boxes, partner).long() != ignore_index)
    if label.device.type == "cpu":
        check_classes(label, valid, num_classes, ignore_index)
    else:  # no check without a host sync: such a pixel does not count
        valid = valid & (label >= 0) & (label < num_classes)
    return label, valid


def softmax_confidence(
    logits: Tensor,
    height: int,
    width: int,
    align_corners: bool,
    label_dtype: torch.dtype = torch.int64,
) -> tuple[Tensor, Tensor]:
    """Confidence and pseudo-label [B,H,W]: `up(logits).softmax(1).max(1)`."""
    confidence, label = up(logits, height, width, align_corners).softmax(1).max(1)
    return confidence, label.to(label_dtype)


def masked_cross_entropy(
    logits: Tensor,
    target: Tensor,
    confidence: Tensor | None,
    threshold: float,
    ignore_mask: Tensor | None,
    ignore_index: int,
    class_weight: Tensor | None,
    boxes: Tensor | None,
    partner: Tensor | None,
    per_pixel: bool,
    align_corners: bool,
) -> tuple[Tensor, Tensor]:
    """Sum (or map) of cross-entropy over valid, confident pixels; counts (valid, those)."""
    label, valid = valid_pixels(target, ignore_mask, ignore_index, logits.shape[1], boxes, partner)
    taken = valid
    if confidence is not None:
        taken = valid & (paste(confidence, boxes, partner) >= threshold)
    z = up(logits, *target.shape[1:], align_corners)
    z = torch.where(taken[:, None], z, 0)  # a NaN elsewhere must not reach the gradient
    weight = None if class_weight is None else class_weight.to(z.dtype)
    loss = F.cross_entropy(z, torch.where(taken, label, 0), weight=weight, reduction="none")
    loss = torch.where(taken, loss, 0)
    counts = torch.stack([valid.sum(), taken.sum()])
    return (loss if per_pixel else loss.sum(dtype=torch.float64).to(z.dtype)), counts


def stability_loss(
    logits_a: Tensor,
    logits_b: Tensor,
    threshold: float,
    height: int,
    width: int,
    ignore_mask: Tensor | None,
    ignore_index: int,
    align_corners: bool,
) -> tuple[Tensor, Tensor]:
    """Sums [2] of Σ_k (p_a - p_b)² where a learns and where b learns; counts [2] of the pixels."""
    z_a = up(logits_a, height, width, align_corners)
    z_b = up(logits_b, height, width, align_corners)
    p_a, p_b = z_a.detach().softmax(1), z_b.detach().softmax(1)
    learns = learners(p_a, p_b, threshold, ignore_mask, ignore_index)
    sums = []
    for pixels, z, teacher in zip(learns, (z_a, z_b), (p_b, p_a), strict=True):
        p = torch.where(pixels[:, None], z, 0).softmax(1)  # a NaN must not reach the gradient
        difference = torch.where(pixels[:, None], p - teacher, 0)
        sums.append(difference.square().sum(dtype=torch.float64))
    return torch.stack(sums).to(z_a.dtype), torch.stack([pixels.sum() for pixels in learns])


def learners(
    p_a: Tensor, p_b: Tensor, threshold: float, ignore_mask: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Where a learns from b and where b learns from a: the other is confident and no less sure."""
    c_a, c_b = p_a.amax(1), p_b.amax(1)
    a_learns = (c_b >= threshold) & (c_b >= c_a)
    b_learns = (c_a >= threshold) & (c_a >= c_b)
    if ignore_mask is None:
        return a_learns, b_learns
    valid = ignore_mask.long() != ignore_index
    return a_learns & valid, b_learns & valid


def confusion_matrix(
    logits: Tensor, target: Tensor, ignore_index: int, align_corners: bool
) -> Tensor:
    """Counts int64 [K,K]: rows are the truth, columns `up(logits).argmax(1)`."""
    num_classes = logits.shape[1]
    label, valid = valid_pixels(target, None, ignore_index, num_classes)
    prediction = up(logits, *target.shape[1:], align_corners).argmax(1)
    cell = torch.where(valid, label * num_classes + prediction, 0)
    counts = torch.zeros(num_classes**2, dtype=torch.int64, device=logits.device)
    counts.scatter_add_(0, cell.flatten(), valid.long().flatten())  # bincount waits for the device
    return counts.view(num_classes, num_classes)


def cutmix(images: Tensor, boxes: Tensor, partner: Tensor) -> Tensor:
    """`images` with each one's box replaced by the same box of its partner's original."""
    return paste(images, boxes, partner)
