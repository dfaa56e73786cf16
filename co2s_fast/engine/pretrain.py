"""Self-supervised pretraining of the students' backbones on the unlabelled training images.

For students that start from random weights. Patches of an image are hidden and the backbone's
deepest map has to give their pixels: SimMIM (Xie et al., CVPR 2022: mask in the image, one linear
layer, L1 on hidden pixels) with the patch-wise normalised target of MAE (He et al., CVPR 2022).
No label is read, and no validation image.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from co2s_fast.data import Batch, build_loader, open_dataset, open_split
from co2s_fast.data.catalogue import IGNORE
from co2s_fast.data.writing import replacing, write_text
from co2s_fast.engine.bands import fit_students
from co2s_fast.engine.config import PretrainConfig, RunConfig
from co2s_fast.engine.log import say
from co2s_fast.engine.opening import chosen_device, chosen_precision
from co2s_fast.engine.outputs import check_writable
from co2s_fast.engine.start import derived_seed, student_seed
from co2s_fast.errors import DataError, UsageError
from co2s_fast.models import Student, build_student
from co2s_fast.models.loading import checksum
from co2s_fast.models.weights.files import OWN_BACKBONE, PRETRAINED, save_tensors


def pretrain(config: RunConfig, out: Path, *, progress: bool = True) -> list[Path]:
    """Pretrain the backbone of every student and write `OUT/<student>.safetensors`.

    The result depends on the configuration and the seed alone. It is written at the end, whole: a
    run that is stopped leaves nothing and starts anew.

    Args:
        config: students, data, seed and the `pretrain` section of a training run. The images are
            those that it would train on without labels.
        out: folder for the files and `pretrain.json`, which says what they come from.
        progress: draw a bar for each student.

    Returns:
        The files, for `train --pretrained OUT`.

    Raises:
        UsageError: a student that already starts from weights, or a folder that holds weights
            already or cannot be written to; both before anything is trained.
        DataError: anything wrong with the data, or a loss that is not finite.
    """
    for name, student in config.students.items():
        if student.weights is not None:
            raise UsageError(f"pretrain: student {name} starts from weights {student.weights!r}; "
                             "pretraining is for students that start from random ones, as those "
                             "of --recipe tiny do")
    spec = open_dataset(config.data)
    config = fit_students(config, spec)
    # No label is learnt from: there may be fewer than the training batch wants.
    split = open_split(config.data.model_copy(update={"batch_size": 1}), spec)
    if not split.unlabeled:
        raise DataError(f"{split.folder / 'unlabeled.txt'}: empty, and pretraining learns from "
                        "unlabelled images")
    files = [out / PRETRAINED, *(out / f"{name}.safetensors" for name in config.students)]
    if any(path.exists() for path in files):
        raise UsageError(f"{out} already holds pretrained weights; remove it, or give another "
                         "folder")
    check_writable(out)
    device = chosen_device(config.train)
    autocast = chosen_precision(config.train, device)
    data = config.data.model_copy(
        update={"batch_size": min(config.pretrain.batch_size, len(split.unlabeled)),
                "truth": False}
    )  # fmt: skip
    record: dict[str, Any] = {"pretrain": config.pretrain.model_dump(), "dataset": spec.name,
                              "channels": spec.channels,
                              "seed": config.seed, "images": len(split.unlabeled),
                              "students": {}}  # fmt: skip
    states = {}
    for index, (name, student_config) in enumerate(config.students.items()):
        seed = student_seed(config.seed, index)
        whole = student_config.model_copy(update={"trainable": "full"})
        student = build_student(whole, spec.classes, seed=seed).to(device)
        batches = build_loader(data, spec, split, views=("x", "w"), seed=config.seed,
                               start_step=0, total_steps=config.pretrain.steps, device=device)
        losses = train_one(student, iter(batches), config.pretrain, device, autocast=autocast,
                           seed=seed, name=name, progress=progress)  # fmt: skip
        states[name] = {k: v.cpu().contiguous() for k, v in student.backbone.state_dict().items()}
        record["students"][name] = {"model": student_config.model, "loss": losses,
                                    "sha256": checksum(student.backbone)}
        say(f"student {name}: loss {losses[0]:.3f} at first, {losses[-1]:.3f} at the end")
    paths = []
    for name, state in states.items():
        paths.append(out / f"{name}.safetensors")
        with replacing(paths[-1]) as temporary:
            save_tensors(temporary, state, OWN_BACKBONE)
    write_text(out / PRETRAINED, json.dumps(record, indent=1))
    return paths


def train_one(
    student: Student,
    batches: Iterator[Batch],
    config: PretrainConfig,
    device: torch.device,
    *,
    autocast: torch.autocast,
    seed: int,
    name: str,
    progress: bool,
) -> list[float]:
    """Pretrain one student's backbone in place.

    Returns:
        The mean loss of each twentieth of the steps.
    """
    patch, width = student.patch_size, student.backbone.widths[-1]
    generator = torch.Generator().manual_seed(derived_seed(seed, 0x3A5))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derived_seed(seed, 0x3A6))
        head = nn.Conv2d(width, student.channels * patch * patch, 1).to(device)
    for parameter in student.backbone.parameters():
        parameter.requires_grad_(True)
    parameters = [*student.backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.95),
                                  weight_decay=config.weight_decay, fused=True)  # fmt: skip
    student.train()
    sums, counts = [0.0] * 20, [0] * 20
    window, window_losses = -1, []
    bar = tqdm(range(config.steps), desc=f"pretrain {name}", unit="step", disable=not progress)
    for step in bar:
        batch = next(batches).to(device)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * rate(step, config)
        with autocast:
            loss = masked_image_loss(student, head, batch, config.mask_ratio, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        window_losses.append(loss.detach())
        window = step * 20 // config.steps
        if step + 1 == config.steps or (step + 1) * 20 // config.steps != window:
            values = torch.stack(window_losses).tolist()
            window_losses = []
            if not all(map(math.isfinite, values)):
                raise DataError(f"pretrain {name}: the loss is not finite at step {step + 1}; "
                                "lower pretrain.lr")
            sums[window] += sum(values)
            counts[window] += len(values)
            bar.set_postfix(loss=f"{values[-1]:.3f}")
    return [total / count for total, count in zip(sums, counts, strict=True) if count]


def rate(step: int, config: PretrainConfig) -> float:
    """Factor on the learning rate: linear warm-up, then half a cosine to 0."""
    warm = min((step + 1) / max(config.warmup_steps, 1), 1.0)
    return warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def masked_image_loss(
    student: Student,
    head: nn.Module,
    batch: Batch,
    mask_ratio: float,
    generator: torch.Generator,
) -> Tensor:
    """Mean absolute error on the hidden patches' normalised pixels.

    A patch's pixels are normalised by its own mean and deviation. Patches that touch padding are
    neither hidden nor predicted. 0 where none is left.
    """
    patch = student.patch_size
    images = batch.w if batch.w.is_floating_point() else batch.w.float() / 255
    height, width = images.shape[-2] // patch * patch, images.shape[-1] // patch * patch
    images = images[..., :height, :width]
    grid = (len(images), 1, height // patch, width // patch)
    hidden = (torch.rand(grid, generator=generator) < mask_ratio).to(images.device)
    if batch.ignore is not None:
        padding = (batch.ignore[:, None, :height, :width] == IGNORE).float()
        hidden = hidden & (F.max_pool2d(padding, patch) == 0)
    over = hidden.repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    gray = student.mean[None]
    predicted = head(student.features(torch.where(over, gray, images))[-1]).float()
    target = F.pixel_unshuffle(images, patch).unflatten(1, (student.channels, -1))
    mean, variance = target.mean((1, 2), keepdim=True), target.var((1, 2), keepdim=True)
    target = ((target - mean) / (variance + 1e-4).sqrt()).flatten(1, 2)
    error = (predicted - target).abs().mean(1, keepdim=True)
    return (error * hidden).sum() / hidden.sum().clamp(min=1)
