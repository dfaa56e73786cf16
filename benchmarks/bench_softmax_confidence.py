"""Confidence and pseudo-label of every pixel of the label grid."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks import eager
from benchmarks.harness import Case, Workload
from benchmarks.inputs import BATCH, CLASSES, CROP, make_logits, without_compile

SECTION = "softmax_confidence"
TITLE = "softmax_confidence"
PROVIDERS = ("eager", "compile", "reference", "cpp", "triton", "cuda")


def build(provider: str, device: torch.device, grid: int) -> Workload:
    logits = make_logits(grid, 1, device)
    size = (CROP, CROP)
    if provider == "eager":
        return Workload(partial(eager.softmax_confidence, logits, size))
    if provider == "compile":
        compiled = torch.compile(eager.softmax_confidence, fullgraph=True, dynamic=False)
        return Workload(partial(compiled, logits, size))
    from co2s_fast.losses import softmax_confidence

    return Workload(partial(softmax_confidence, logits, size))


def cases(device: torch.device, quick: bool) -> list[Case]:
    return [
        Case(
            name,
            PROVIDERS if grid < CROP else without_compile(PROVIDERS),
            partial(build, grid=grid),
            bytes_forward=BATCH * (CLASSES * grid * grid * 4 + CROP * CROP * (4 + 8)),
        )
        for name, grid in (("128to512", CROP // 4), ("512", CROP))
    ]
