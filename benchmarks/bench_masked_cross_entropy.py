"""Cross-entropy of one strong view against confident, mixed pseudo-labels."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks import eager
from benchmarks.harness import Case, NotMeasured, Workload
from benchmarks.inputs import BATCH, CLASSES, CROP, make_batch, make_logits, without_compile

SECTION = "masked_cross_entropy"
TITLE = "masked_cross_entropy with CutMix"
PROVIDERS = ("eager", "compile", "liger", "reference", "cpp", "triton", "cuda")


def mixed_loss(
    logits: Tensor,
    label: Tensor,
    confidence: Tensor,
    batch: eager.Batch,
    plain_indexing: bool = True,
) -> Tensor:
    """The peers' way: mixed copies of label, confidence and padding, then a masked mean."""
    mixed = (
        eager.paste(t, t[batch.partner], batch.box_maps[0], plain_indexing)
        for t in (label, confidence, batch.ignore)
    )
    return eager.masked_cross_entropy(logits, *mixed, plain_indexing)


def liger_loss(logits: Tensor, label: Tensor, confidence: Tensor, batch: eager.Batch) -> Tensor:
    """The same with liger-kernel's cross entropy over rows of full-resolution logits."""
    from liger_kernel.transformers import LigerCrossEntropyLoss

    target, sure, ignore = (
        eager.paste(t, t[batch.partner], batch.box_maps[0], False)
        for t in (label, confidence, batch.ignore)
    )
    valid = ignore != eager.IGNORE
    target = target.masked_fill(~(valid & (sure >= eager.THRESHOLD)), eager.IGNORE)
    full = eager.upsample(logits, batch.size)
    rows = full.permute(0, 2, 3, 1).reshape(-1, full.shape[1])
    total = LigerCrossEntropyLoss(ignore_index=eager.IGNORE, reduction="sum")(rows, target.view(-1))
    return total / valid.sum().clamp(min=1)


def build(provider: str, device: torch.device, grid: int) -> Workload:
    batch = make_batch(device)
    logits = make_logits(grid, 1, device).requires_grad_()
    confidence, label = eager.softmax_confidence(make_logits(grid, 2, device), batch.size)
    if provider == "eager":
        call = partial(mixed_loss, logits, label, confidence, batch)
    elif provider == "compile":
        compiled = torch.compile(mixed_loss, fullgraph=True, dynamic=False)
        call = partial(compiled, logits, label, confidence, batch, plain_indexing=False)
    elif provider == "liger":
        try:
            import liger_kernel.transformers  # noqa: F401
        except ImportError as error:
            raise NotMeasured(f"liger-kernel does not import: {error}") from error
        call = partial(liger_loss, logits, label, confidence, batch)
    else:
        from co2s_fast.losses import CutMix, masked_cross_entropy

        mix = CutMix(batch.boxes[0], batch.partner)
        options = {"threshold": eager.THRESHOLD, "ignore_mask": batch.ignore, "cutmix": mix}
        call = partial(masked_cross_entropy, logits, label, confidence, **options)
    return Workload(call, (logits,))


def cases(device: torch.device, quick: bool) -> list[Case]:
    found = []
    for name, grid in (("128to512", CROP // 4), ("512", CROP)):
        one_pass = BATCH * CLASSES * grid * grid * 4
        names = PROVIDERS if grid < CROP else without_compile(PROVIDERS)
        found.append(Case(name, names, partial(build, grid=grid), one_pass, 2 * one_pass))
    return found
