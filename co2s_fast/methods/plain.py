"""The same step in plain PyTorch: what the fused step must equal, and what it is timed against.

Every view makes its own pass through a student, logits are upsampled to the label's size, and each
loss is written with `F.interpolate`, `softmax` and `F.cross_entropy`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from co2s_fast.data.catalogue import IGNORE
from co2s_fast.methods.base import channel_keep_masks, step_generator
from co2s_fast.methods.boxes import box_masks
from co2s_fast.methods.ramp import cosine_ramp

if TYPE_CHECKING:
    from co2s_fast.data import Batch
    from co2s_fast.methods.co2s import Co2S
    from co2s_fast.models import Student


def plain_co2s_losses(
    method: Co2S, batch: Batch, step: int, total_steps: int
) -> dict[str, Tensor]:
    """What `method(batch, step, total_steps)` returns, without its counts, on one process.

    Args:
        method: students and options; only its configuration and students are used.
        batch: as the pipeline yields it; left as it is.
        step: step index.
        total_steps: steps in the whole run.
    """
    config = method.config
    for option, plain in (("distribution_alignment", 0), ("class_thresholds", 0),
                          ("consistency_ramp", 0), ("mean_shards", 1),
                          ("cutmix_partner", "batch"),
                          ("teacher", "student")):  # fmt: skip
        if getattr(config, option) != plain:
            raise ValueError(f"the plain step needs {option}={plain!r}")
    if method.parts != 1:
        raise ValueError(f"the plain step takes a batch in one part, the method in {method.parts}")
    size = batch.w.shape[-2:]
    valid = torch.ones_like(batch.w[:, 0], dtype=torch.bool)
    if batch.ignore is not None:
        valid = batch.ignore != IGNORE
    partner = method.partners(len(batch.w), batch.w.device)
    inside = {v: box_masks(getattr(batch, f"boxes{v[1:]}"), size) for v in ("s1", "s2")}
    result: dict[str, Tensor] = {}
    weak = {}
    for index, (name, student) in enumerate(method.students.items()):
        logits = {"x": upsampled(student(batch.x), size), "w": upsampled(student(batch.w), size)}
        logits["fp"] = upsampled(perturbed(method, index, student, batch.w, step), size)
        for view, mask in inside.items():
            images = getattr(batch, view)
            mixed = torch.where(mask[:, None], images[partner], images)
            logits[view] = upsampled(student(mixed), size)
        weak[name] = logits["w"]
        confidence, label = logits["w"].detach().softmax(1).max(1)
        target = batch.y.long()
        taken = target != IGNORE
        result[f"{name}/x"] = masked_mean(
            logits["x"], target, taken, taken, method.class_weight
        )
        taken = confidence >= config.threshold
        result[f"{name}/fp"] = masked_mean(logits["fp"], label, valid & taken, valid)
        for view, mask in inside.items():
            chosen, sure, real = (
                torch.where(mask, each[partner], each) for each in (label, taken, valid)
            )
            result[f"{name}/{view}"] = masked_mean(logits[view], chosen, real & sure, real)
    ramp = cosine_ramp(step, total_steps, config.stability_weight, config.stability_ramp)
    pair = list(weak.items())
    for (name, mine), (_, other) in (pair, pair[::-1]):
        real = valid if config.stability_padding == "mask" else torch.ones_like(valid)
        term = one_way_stability(mine, other.detach(), config.threshold, real)
        result[f"{name}/stability"] = term
        if config.stability_gradient == "none":
            term = term.detach()
        result[f"{name}/total"] = (
            config.supervised_weight * result[f"{name}/x"]
            + sum(getattr(config, f"{v}_weight") * result[f"{name}/{v}"] for v in method.strong)
            + ramp * term
        )
    loss = sum(result[f"{name}/total"] for name in weak)
    return {**{key: value.detach() for key, value in result.items()}, "loss": loss}


def upsampled(logits: Tensor, size: torch.Size) -> Tensor:
    """Logits at the labels' size."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.interpolate(wide, size, mode="bilinear", align_corners=False)


def perturbed(method: Co2S, index: int, student: Student, images: Tensor, step: int) -> Tensor:
    """Logits of images whose feature maps lost the channels that the step drops."""
    features = student.features(images)
    generator = step_generator(method.seed, step, index)
    rate = student.config.feature_dropout
    keep = channel_keep_masks(features, rate, generator)
    dropped = [
        level * mask[:, :, None, None] / (1 - rate)
        for level, mask in zip(features, keep, strict=True)
    ]
    return student.decode(tuple(dropped))


def masked_mean(
    logits: Tensor, target: Tensor, taken: Tensor, counted: Tensor, weight: Tensor | None = None
) -> Tensor:
    """Cross entropy summed over `taken`, divided by the number of `counted`; 0 of none is 0."""
    # 255 is no class: such pixels are never taken, and any class will do for them.
    known = target.masked_fill(target == IGNORE, 0)
    weight = None if weight is None else weight.to(logits.dtype)
    loss = F.cross_entropy(logits, known, weight, reduction="none")
    return (loss * taken).sum() / counted.sum().clamp(min=1)


def one_way_stability(mine: Tensor, other: Tensor, threshold: float, real: Tensor) -> Tensor:
    """Mean squared distance of probabilities where the other student is surer and sure enough."""
    p, q = mine.softmax(1), other.softmax(1)
    learns = (q.amax(1) >= threshold) & (q.amax(1) >= p.detach().amax(1)) & real
    distance = (p - q).square().sum(1) / p.shape[1]
    return (distance * learns).sum() / learns.sum().clamp(min=1)
