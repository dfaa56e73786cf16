"""stability_loss on every backend against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from op_cases import BY_NAME, CASES, CLASS_COUNTS, HALF_CASES, Case, draw
from op_oracle import assert_as_good_as_eager, stability_eager, stability_truth

from co2s_fast.losses import stability_loss, stability_terms

# Interpolating ±1e4 in float32 leaves errors of 1e-3 in the logits, on which decisions then hang.
STABILITY_CASES = [case for case in CASES if case.name != "huge_up"]


def check(case: Case, target, dtype: torch.dtype) -> None:
    x = draw(case, dtype)
    truth, counts, gradients = stability_truth(case, x)
    eager = stability_eager(case, x) or (None, None, None)
    y = x.to(target.device)
    logits = [z.detach().requires_grad_() for z in (y.a, y.b)]
    sum_a, sum_b, count_a, count_b = stability_terms(
        *logits, threshold=x.threshold, size=case.size, ignore_mask=y.ignore_mask,
        align_corners=case.align_corners,
    )  # fmt: skip
    assert (int(count_a), int(count_b)) == tuple(counts.tolist())
    (1.7 * sum_a + 0.6 * sum_b).backward()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    sums = torch.stack([sum_a, sum_b]).detach()
    eager_sums = eager[0] if dtype == torch.float32 else None
    assert sums.dtype == wide
    assert_as_good_as_eager(sums, truth, eager_sums, wide, f"{case} sums")
    for ours, gradient, peer, name in zip(logits, gradients, eager[1:], "ab", strict=True):
        assert ours.grad.dtype == dtype
        assert_as_good_as_eager(ours.grad, gradient, peer, dtype, f"{case} gradient of {name}")


@pytest.mark.parametrize("case", STABILITY_CASES, ids=str)
def test_sums_and_gradients(case, target):
    case = target.fit(case)
    check(case, target, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", HALF_CASES, ids=str)
def test_half_precision(case, dtype, target):
    target.leave_out(unless=case.name == "equal")
    check(case, target, dtype)


@pytest.mark.parametrize("case", STABILITY_CASES, ids=str)
def test_float64(case, cpu_target):
    check(case, cpu_target, torch.float64)


@pytest.mark.parametrize("size", [(4, 5), (8, 10)], ids=str)
def test_every_number_of_classes(size, target):
    target.leave_out(unless=size == (4, 5))
    for classes in CLASS_COUNTS:
        case = Case(f"K{classes}", classes=classes, grid=(4, 5), size=size)
        check(case, target, torch.float32)


def test_each_loss_teaches_one_student(target):
    x = draw(BY_NAME["equal"], torch.float32).to(target.device)
    for side in (0, 1):
        logits = [z.detach().requires_grad_() for z in (x.a, x.b)]
        stability_loss(*logits, threshold=0.5, size=(9, 11))[side].backward()
        assert logits[side].grad.abs().sum() > 0
        other = logits[1 - side].grad
        assert other is None or not other.any()


@pytest.mark.parametrize("side", [0, 1])
def test_only_one_input_requires_grad(side, target):
    target.leave_out(unless=side == 1)
    x = draw(BY_NAME["equal"], torch.float32).to(target.device)
    both = [z.detach().requires_grad_() for z in (x.a, x.b)]
    one = [z.detach().requires_grad_(i == side) for i, z in enumerate((x.a, x.b))]
    for logits in (both, one):
        losses = stability_loss(*logits, threshold=0.5, size=(9, 11))
        (2 * losses[0] + 3 * losses[1]).backward()
    assert one[1 - side].grad is None
    assert torch.equal(one[side].grad, both[side].grad)


def test_loss_divides_by_classes_and_learning_pixels(target):
    x = draw(BY_NAME["equal"], torch.float32).to(target.device)
    options = {"threshold": 0.5, "size": (9, 11)}
    sum_a, sum_b, count_a, count_b = stability_terms(x.a, x.b, **options)
    loss_a, loss_b = stability_loss(x.a, x.b, **options)
    torch.testing.assert_close(loss_a, sum_a / (6 * count_a))
    torch.testing.assert_close(loss_b, sum_b / (6 * count_b))
    assert count_a > 0 and count_b > 0 and count_a != count_b


@pytest.mark.parametrize("name", ["none_confident", "all_ignored", "batch_0"])
def test_nobody_learns(name, target):
    target.leave_out(unless=name == "batch_0")
    case = BY_NAME[name]
    x = draw(case, torch.float32).to(target.device)
    logits = [z.detach().requires_grad_() for z in (x.a, x.b)]
    losses = stability_loss(
        *logits, threshold=x.threshold, size=case.size, ignore_mask=x.ignore_mask
    )
    sum(losses).backward()
    assert [loss.item() for loss in losses] == [0, 0]
    assert not any(z.grad.any() for z in logits)


@pytest.mark.parametrize("size", [(5, 6), (20, 24)], ids=str)
@pytest.mark.parametrize("classes", [3, 6, 40])
def test_equal_students_teach_each_other_nothing(classes, size, target):
    """Exactly nothing, however the two are laid out: no product is fused into a difference."""
    target.leave_out(unless=(classes, size) == (3, (5, 6)))
    a = torch.randn(2, classes, 5, 6, generator=torch.Generator().manual_seed(5)) * 4
    a = a.to(target.device)
    for b in (a.clone(), a.contiguous(memory_format=torch.channels_last)):
        logits = [z.detach().requires_grad_() for z in (a, b)]
        sum_a, sum_b, count_a, count_b = stability_terms(*logits, threshold=0.3, size=size)
        (sum_a + sum_b).backward()
        assert count_a == count_b > 0 and sum_a == 0 and sum_b == 0
        assert not any(z.grad.any() for z in logits)


def test_size_follows_the_ignore_mask(target):
    target.leave_out()
    x = draw(BY_NAME["up4"], torch.float32).to(target.device)
    given = stability_loss(x.a, x.b, threshold=0.5, size=(32, 32), ignore_mask=x.ignore_mask)
    follows = stability_loss(x.a, x.b, threshold=0.5, ignore_mask=x.ignore_mask)
    assert torch.equal(torch.stack(given), torch.stack(follows))
