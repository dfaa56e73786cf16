"""masked_cross_entropy on every backend against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from op_cases import BY_NAME, CASES, CLASS_COUNTS, HALF_CASES, Case, draw
from op_oracle import (
    assert_as_good_as_eager,
    cross_entropy_eager,
    cross_entropy_truth,
    rounding_of_logits,
    upstream,
)

from co2s_fast.losses import masked_cross_entropy, masked_cross_entropy_terms


def run(case, x, target, reduction="sum"):
    """Loss and gradient on the backend under test, with the upstream gradients of the truth."""
    y = x.to(target.device)
    z = y.a.detach().requires_grad_()
    options = {
        "threshold": 0.95,
        "ignore_mask": y.ignore_mask,
        "class_weight": y.class_weight,
        "cutmix": y.cutmix,
        "align_corners": case.align_corners,
    }
    loss = masked_cross_entropy(z, y.target, y.confidence, reduction=reduction, **options)
    scale = upstream(case).to(loss) if reduction == "none" else 1.7
    (loss * scale).sum().backward()
    assert z.grad.dtype == z.dtype
    assert loss.dtype == (torch.float64 if z.dtype == torch.float64 else torch.float32)
    _, valid, confident = masked_cross_entropy_terms(z.detach(), y.target, y.confidence, **options)
    return loss.detach(), (int(valid), int(confident)), z.grad


def check(case: Case, target, dtype: torch.dtype) -> None:
    x = draw(case, dtype)
    truth, counts, gradient = cross_entropy_truth(case, x, per_pixel=False)
    eager = cross_entropy_eager(case, x) or (None, None)
    loss, ours_counts, ours_gradient = run(case, x, target)
    assert ours_counts == tuple(counts.tolist())
    # The eager sum in half precision is far off; sums here are in float32 whatever the dtype.
    loss_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    loss_eager = eager[0] if dtype == torch.float32 else None
    assert_as_good_as_eager(loss, truth, loss_eager, loss_dtype, f"{case} sum")
    extra = rounding_of_logits(case, x)
    assert_as_good_as_eager(ours_gradient, gradient, eager[1], dtype, f"{case} gradient", extra)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sum_and_gradient(case, target):
    case = target.fit(case)
    check(case, target, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", HALF_CASES, ids=str)
def test_half_precision(case, dtype, target):
    target.leave_out(unless=case.name in ("equal", "tiny_up"))
    check(case, target, dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64(case, cpu_target):
    check(case, cpu_target, torch.float64)


@pytest.mark.parametrize("name", ["equal", "up4", "fraction_corners", "down", "nan_up", "batch_0"])
def test_map_with_a_gradient_for_each_pixel(name, target):
    target.leave_out(unless=name == "equal")
    case = BY_NAME[name]
    x = draw(case, torch.float32)
    truth, _, gradient = cross_entropy_truth(case, x, per_pixel=True)
    loss, _, ours = run(case, x, target, reduction="none")
    assert_as_good_as_eager(loss, truth, None, torch.float32, "map")
    assert_as_good_as_eager(ours, gradient, None, torch.float32, "gradient")


@pytest.mark.parametrize("size", [(4, 5), (8, 10)], ids=str)
def test_every_number_of_classes(size, target):
    target.leave_out(unless=size == (4, 5))
    for classes in CLASS_COUNTS:
        case = Case(f"K{classes}", classes=classes, grid=(4, 5), size=size, weighted=True)
        check(case, target, torch.float32)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
def test_integer_dtypes_of_the_maps(dtype, target):
    target.leave_out(unless=dtype == torch.int32)
    case = BY_NAME["tiny_up"]
    x = draw(case, torch.float32)
    truth, _, gradient = cross_entropy_truth(case, x, per_pixel=False)
    x.target, x.ignore_mask = x.target.to(dtype), x.ignore_mask.to(dtype)
    loss, _, ours = run(case, x, target)
    assert_as_good_as_eager(loss, truth, None, torch.float32, "sum")
    assert_as_good_as_eager(ours, gradient, None, torch.float32, "gradient")


@pytest.mark.parametrize("ignore_index", [-1, 0, 300])
def test_ignore_index_that_uint8_cannot_hold_or_that_is_a_class(ignore_index, target):
    z = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(0)).to(target.device)
    label = torch.arange(36, device=target.device).view(1, 6, 6).remainder(4)
    loss = [
        masked_cross_entropy(z, label.to(dtype), ignore_index=ignore_index, reduction="none")
        for dtype in (torch.uint8, torch.int64)
    ]
    truth = torch.nn.functional.cross_entropy(z, label, ignore_index=ignore_index, reduction="none")
    for ours in loss:
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-6)


def test_reductions_divide_by_what_they_say(target):
    case = BY_NAME["equal"]
    x = draw(case, torch.float32).to(target.device)
    options = {"ignore_mask": x.ignore_mask, "cutmix": x.cutmix}

    def loss(reduction):
        return masked_cross_entropy(x.a, x.target, x.confidence, reduction=reduction, **options)

    total, valid, confident = masked_cross_entropy_terms(x.a, x.target, x.confidence, **options)
    torch.testing.assert_close(loss("valid"), total / valid)
    torch.testing.assert_close(loss("confident"), total / confident)
    torch.testing.assert_close(loss("sum"), total)
    torch.testing.assert_close(loss("none").sum(), total, rtol=1e-5, atol=0)
    assert 0 < confident < valid < x.target.numel()


@pytest.mark.parametrize("reduction", ["valid", "confident"])
@pytest.mark.parametrize("name", ["all_ignored", "none_confident", "batch_0"])
def test_nothing_to_divide_by_gives_zero(name, reduction, target):
    target.leave_out(unless=reduction == "valid")
    x = draw(BY_NAME[name], torch.float32).to(target.device)
    z = x.a.detach().requires_grad_()
    loss = masked_cross_entropy(
        z, x.target, x.confidence, ignore_mask=x.ignore_mask, reduction=reduction
    )
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(z.grad, torch.zeros_like(z))


def test_threshold_is_inclusive_in_float32(target):
    z = torch.randn(1, 3, 2, 2, device=target.device)
    label = torch.zeros(1, 2, 2, dtype=torch.long, device=target.device)
    at = torch.tensor([[[0.95, 1.0], [0.9499999, float("nan")]]], device=target.device)
    _, valid, confident = masked_cross_entropy_terms(z, label, at, threshold=0.95)
    assert (int(valid), int(confident)) == (4, 2)


def test_classes_outside_the_range(target):
    z = torch.zeros(1, 6, 2, 3, device=target.device)
    for bad in (6, 254):
        label = torch.zeros(1, 2, 3, dtype=torch.uint8, device=target.device)
        label[0, 1, 2] = bad
        if target.device == "cpu":
            with pytest.raises((IndexError, ValueError), match=rf"target.*{bad}.*outside \[0, 6\)"):
                masked_cross_entropy(z, label)
        else:
            assert int(masked_cross_entropy_terms(z, label)[1]) == 5
    hidden = torch.full_like(label, 255)  # padding hides whatever the label is
    assert masked_cross_entropy(z, label, ignore_mask=hidden).item() == 0
    negative = torch.full((1, 2, 3), -1, device=target.device)
    if target.device == "cpu":
        with pytest.raises((IndexError, ValueError), match=r"target.*-1.*outside \[0, 6\)"):
            masked_cross_entropy(z, negative)


def test_a_million_pixels_and_one(target):
    target.leave_out()
    z = torch.randn(1, 2, 101, 9901, generator=torch.Generator().manual_seed(0))
    label = torch.ones(1, 101, 9901, dtype=torch.uint8)
    truth = torch.nn.functional.cross_entropy(z.double(), label.long(), reduction="sum")
    ours = masked_cross_entropy(z.to(target.device), label.to(target.device), reduction="sum").cpu()
    # A plain float32 sum of a million terms would be off by about 1e-4.
    assert abs(ours.double() / truth - 1) < 2e-6
