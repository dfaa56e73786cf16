"""The stability loss between two students, both gradients."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks import eager
from benchmarks.harness import Case, Workload
from benchmarks.inputs import BATCH, CLASSES, CROP, make_batch, make_logits, without_compile

SECTION = "stability_loss"
TITLE = "stability_loss"
PROVIDERS = ("eager", "compile", "reference", "cpp", "triton", "cuda")


def eager_sum(a: Tensor, b: Tensor, ignore: Tensor) -> Tensor:
    return sum(eager.stability_loss(a, b, tuple(ignore.shape[-2:]), ignore))


def build(provider: str, device: torch.device, grid: int) -> Workload:
    batch = make_batch(device)
    a, b = (make_logits(grid, seed, device).requires_grad_() for seed in (1, 2))
    if provider == "eager":
        call = partial(eager_sum, a, b, batch.ignore)
    elif provider == "compile":
        compiled = torch.compile(eager_sum, fullgraph=True, dynamic=False)
        call = partial(compiled, a, b, batch.ignore)
    else:
        from co2s_fast.losses import stability_loss

        options = {"threshold": eager.THRESHOLD, "size": batch.size, "ignore_mask": batch.ignore}

        def call() -> Tensor:
            return sum(stability_loss(a, b, **options))

    return Workload(call, (a, b))


def cases(device: torch.device, quick: bool) -> list[Case]:
    found = []
    for name, grid in (("128to512", CROP // 4), ("512", CROP)):
        one_pass = 2 * BATCH * CLASSES * grid * grid * 4
        names = PROVIDERS if grid < CROP else without_compile(PROVIDERS)
        found.append(Case(name, names, partial(build, grid=grid), one_pass, 2 * one_pass))
    return found
