"""Where the eager formulation wins: pseudo-labels and their loss over sizes and class counts."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks import eager
from benchmarks.harness import Case, Workload

SECTION = "crossover"
TITLE = "Pseudo-labels and masked cross-entropy, over sizes and class counts"
PROVIDERS = ("eager", "cpp", "triton", "cuda")
BATCH = 4
SIDES = (16, 64, 256)
CLASSES = (2, 6, 32, 150)
UPSAMPLING = 4


def eager_loss(strong: Tensor, weak: Tensor, ignore: Tensor) -> Tensor:
    confidence, label = eager.softmax_confidence(weak, ignore.shape[-2:])
    return eager.masked_cross_entropy(strong, label, confidence, ignore)


def our_loss(strong: Tensor, weak: Tensor, ignore: Tensor) -> Tensor:
    from co2s_fast.losses import masked_cross_entropy, softmax_confidence

    confidence, label = softmax_confidence(weak, tuple(ignore.shape[-2:]))
    return masked_cross_entropy(
        strong, label, confidence, threshold=eager.THRESHOLD, ignore_mask=ignore
    )


def build(
    provider: str, device: torch.device, side: int, classes: int, upsampling: int
) -> Workload:
    generator = torch.Generator().manual_seed(side * classes)
    shape = (2, BATCH, classes, side // upsampling, side // upsampling)
    weak, strong = (torch.randn(shape, generator=generator) * 4).to(device)
    ignore = torch.zeros(BATCH, side, side, dtype=torch.uint8, device=device)
    leaf = strong.clone().requires_grad_()
    call = eager_loss if provider == "eager" else our_loss
    return Workload(partial(call, leaf, weak, ignore), (leaf,))


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Logits of every class count on every grid, equal to the labels' and a quarter of it."""
    return [
        Case(
            f"{classes} classes, {side // up}² to {side}²",
            PROVIDERS,
            partial(build, side=side, classes=classes, upsampling=up),
            memory=(),
        )
        for up in (1, UPSAMPLING)
        for side in SIDES
        for classes in CLASSES
    ]
