"""The whole loss section of one co2s step: two students, five views, forward and backward."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks import eager
from benchmarks.harness import Case, Workload
from benchmarks.inputs import BATCH, CLASSES, CROP, make_batch, make_section_logits, without_compile

SECTION = "loss_section"
TITLE = "Whole loss section of one co2s step"
PROVIDERS = ("eager", "eager_in_batch", "compile", "reference", "cpp", "triton", "cuda")
# Half types: logits and gradients are rounded to them. The peers also compute in that type; ours
# are compared with the eager lines on the same, rounded logits in float32.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.01}


def build(
    provider: str, device: torch.device, grid: int, dtype: torch.dtype, in_float32: bool = False
) -> Workload:
    """All providers see the same logits; gradients are taken for the five views of each student."""
    batch = make_batch(device)
    logits = make_section_logits(grid, device, dtype, batch)
    if in_float32:
        logits = {
            student: {name: z.detach().float().requires_grad_(z.requires_grad)
                      for name, z in views.items()}
            for student, views in logits.items()
        }  # fmt: skip
    if provider in ("eager", "eager_in_batch"):
        call = partial(eager.loss_section, logits, batch, released=provider == "eager")
    elif provider == "compile":
        compiled = torch.compile(eager.loss_section, fullgraph=True, dynamic=False)
        call = partial(compiled, logits, batch, released=True, plain_indexing=False)
    else:
        from benchmarks import ours

        call = partial(ours.loss_section, logits, batch)
    leaves = tuple(z for views in logits.values() for z in views.values() if z.requires_grad)
    return Workload(call, leaves)


def case(name: str, grid: int, dtype: torch.dtype) -> Case:
    one_pass = 10 * BATCH * CLASSES * grid * grid * dtype.itemsize
    upsampled = grid < CROP
    lean = tuple(p for p in PROVIDERS if p != "eager_in_batch")
    truth = None
    if dtype != torch.float32:
        truth = partial(build, "eager", grid=grid, dtype=dtype, in_float32=True)
    return Case(
        name,
        PROVIDERS if upsampled else lean,
        partial(build, grid=grid, dtype=dtype),
        bytes_forward=one_pass,  # each logit read once
        bytes_backward=2 * one_pass,  # each logit read once more, each gradient written once
        tolerance=TOLERANCE[dtype],
        # The process that measures compiles once more, which takes long: on one grid only.
        memory=lean if upsampled else without_compile(lean),
        truth=truth,
    )


def cases(device: torch.device, quick: bool) -> list[Case]:
    """128² logits to 512² labels, and logits already at 512²; also bfloat16 on a GPU."""
    found = [case("128to512", CROP // 4, torch.float32), case("512", CROP, torch.float32)]
    if device.type == "cuda":
        found += [
            case("128to512_bf16", CROP // 4, torch.bfloat16),
            case("512_bf16", CROP, torch.bfloat16),
        ]
    return found
