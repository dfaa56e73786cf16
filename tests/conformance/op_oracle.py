"""The float64 truth, the eager formulation people write, and the rule that compares with them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from op_cases import Case, Inputs
from torch import Tensor

from co2s_fast.ops import reference

# An implementation may err as much as twice the eager formulation in the same dtype does, plus
# this share of the largest value: half a dozen roundings of float32, one of the half types in
# which gradients are returned.
SLACK = {
    torch.float64: 1e-11,
    torch.float32: 2e-6,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-10,
}
EAGER_FACTOR = 2.0


def rounding_of_logits(case: Case, x: Inputs) -> float:
    """What a gradient may err because interpolating rounds logits to one part in 2**23.

    Matters for logits of 1e4 only, where the order of the four products (fused or not) decides.
    """
    if case.grid == case.size or not x.a.numel():
        return 0.0
    eps = torch.finfo(torch.float64 if x.a.dtype == torch.float64 else torch.float32).eps
    return eps * float(x.a.detach().nan_to_num(0).abs().max())


def assert_as_good_as_eager(
    ours: Tensor,
    truth: Tensor,
    eager: Tensor | None,
    dtype: torch.dtype,
    what: str,
    extra: float = 0.0,
) -> None:
    """Assert that `ours` is as near to `truth` as `eager` is, up to the slack and `extra`."""
    assert ours.shape == truth.shape, f"{what}: shape {tuple(ours.shape)}, not {tuple(truth.shape)}"
    if not truth.numel():
        return
    ours, truth = ours.double().cpu(), truth.double()
    assert torch.equal(ours.isnan(), truth.isnan()), f"{what}: NaN at other places"
    ours, truth = ours.nan_to_num(0), truth.nan_to_num(0)
    allowed = SLACK[dtype] * truth.abs().max() + extra
    if eager is not None and dtype != torch.float64:
        eager_error = (eager.double().cpu().nan_to_num(0) - truth).abs().max()
        allowed = allowed + EAGER_FACTOR * eager_error
    error = (ours - truth).abs()
    worst = int(error.argmax())
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
    assert error.max() <= allowed, (
        f"{what}: worst at {where}: got {ours.flatten()[worst]:.9g}, truth "
        f"{truth.flatten()[worst]:.9g}, error {error.max():.3g} > allowed {allowed:.3g}; "
        f"{(error > allowed).double().mean():.1%} of values fail"
    )


def upstream(case: Case) -> Tensor:
    """A gradient from above that is not 1 and differs from pixel to pixel."""
    generator = torch.Generator().manual_seed(99)
    return torch.rand(case.batch, *case.size, generator=generator, dtype=torch.float64) - 0.3


def cross_entropy_truth(case: Case, x: Inputs, per_pixel: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (sum or map), counts and the gradient of 1.7 · sum or of the map · upstream."""
    z = x.a.detach().double().requires_grad_()
    boxes, partner = (x.cutmix.boxes, x.cutmix.partner) if x.cutmix else (None, None)
    weight = None if x.class_weight is None else x.class_weight.double()
    loss, counts = reference.masked_cross_entropy(
        z, x.target, x.confidence, 0.95, x.ignore_mask, 255, weight, boxes, partner, per_pixel,
        case.align_corners,
    )  # fmt: skip
    (loss * (upstream(case) if per_pixel else 1.7)).sum().backward()
    return loss.detach(), counts, z.grad


def mix(x: Inputs, maps: Tensor) -> Tensor:
    """The maps read through the boxes, by the reference whatever backend is under test."""
    if x.cutmix is None:
        return maps
    return reference.paste(maps, x.cutmix.boxes, x.cutmix.partner)


def cross_entropy_eager(case: Case, x: Inputs) -> tuple[Tensor, Tensor] | None:
    """Sum and gradient of 1.7 · sum as training code has it, in the logits' dtype."""
    if not case.batch or case.values == "nan":
        return None  # F.interpolate and the multiplication by a mask do not survive these
    z = x.a.detach().clone().requires_grad_()
    target = mix(x, x.target).long()
    full = F.interpolate(z, case.size, mode="bilinear", align_corners=case.align_corners)
    weight = None if x.class_weight is None else x.class_weight.to(z.dtype)
    loss = F.cross_entropy(full, target, weight=weight, ignore_index=255, reduction="none")
    if x.confidence is not None:
        loss = loss * (mix(x, x.confidence) >= 0.95)
    if x.ignore_mask is not None:
        loss = loss * (mix(x, x.ignore_mask) != 255)
    total = loss.sum()
    (total * 1.7).backward()
    return total.detach(), z.grad


def stability_truth(case: Case, x: Inputs) -> tuple[Tensor, Tensor, list]:
    """Sums, counts and the gradients of 1.7 · sum_a + 0.6 · sum_b."""
    logits = [z.detach().double().requires_grad_() for z in (x.a, x.b)]
    sums, counts = reference.stability_loss(
        *logits, x.threshold, *case.size, x.ignore_mask, 255, case.align_corners
    )
    (sums * sums.new_tensor([1.7, 0.6])).sum().backward()
    return sums.detach(), counts, [z.grad for z in logits]


def stability_eager(case: Case, x: Inputs) -> list[Tensor] | None:
    """Gradients of 1.7 · sum_a + 0.6 · sum_b as training code has it, in the logits' dtype."""
    if not case.batch or case.values == "nan":
        return None
    logits = [z.detach().clone().requires_grad_() for z in (x.a, x.b)]
    p_a, p_b = (
        F.interpolate(z, case.size, mode="bilinear", align_corners=case.align_corners).softmax(1)
        for z in logits
    )
    learns = reference.learners(p_a, p_b, x.threshold, x.ignore_mask, 255)
    sums = [
        (((p - q.detach()) ** 2) * m[:, None]).sum()
        for p, q, m in zip((p_a, p_b), (p_b, p_a), learns, strict=True)
    ]
    (1.7 * sums[0] + 0.6 * sums[1]).backward()
    return [torch.stack(sums).detach(), *(z.grad for z in logits)]
