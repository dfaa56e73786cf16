"""Triton stability loss, confusion matrix and CutMix against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from co2s_fast.kernels import corner_sums
from co2s_fast.kernels.confusion_matrix import confusion_matrix
from co2s_fast.kernels.cutmix import cutmix_
from co2s_fast.kernels.stability_loss import stability_loss, stability_loss_backward
from co2s_fast.ops import reference

# (classes, grid of a, grid of b, output grid, align_corners)
PAIRS = [
    pytest.param(5, (4, 5), (4, 5), (4, 5), False, id="equal"),
    pytest.param(5, (4, 5), (4, 5), (8, 10), False, id="whole"),
    pytest.param(6, (4, 5), (4, 5), (7, 11), True, id="fractional-aligned"),
    pytest.param(4, (6, 5), (3, 5), (6, 5), False, id="one-upsampled"),
    pytest.param(12, (3, 3), (2, 4), (6, 6), False, id="statistics"),
    pytest.param(40, (3, 3), (3, 3), (3, 3), False, id="class-blocks"),
    pytest.param(20, (2, 3), (2, 3), (4, 6), False, id="statistics-class-blocks"),
]


def students(classes, grid_a, grid_b, device):
    a = torch.randn(2, classes, *grid_a, device=device) * 4
    b = torch.randn(2, classes, *grid_b, device=device) * 4
    return a, (a + b) / 1.4 if grid_a == grid_b else b


def check_stability(a, b, out, align_corners, mask, needs) -> None:
    exact = [a.double().requires_grad_(), b.double().requires_grad_()]
    options = (0.5, *out, mask, 255, align_corners)
    wanted, wanted_counts = reference.stability_loss(*exact, *options)
    upstream = torch.tensor([1.7, -0.3], device=a.device)
    wanted_grads = torch.autograd.grad((wanted * upstream.double()).sum(), exact)
    divisors = a.shape[1] * wanted_counts.double()
    means, _, *_, scale = stability_loss(a, b, *options, True, True, True)
    torch.testing.assert_close(means.double(), wanted / divisors, rtol=2e-6, atol=1e-9)
    torch.testing.assert_close(scale.double(), 1 / divisors, rtol=1e-6, atol=0)
    sums, counts, *saved, none = stability_loss(a, b, *options, True, True, False)
    assert none.shape == (0,)
    grads = stability_loss_backward(upstream, a, b, *options, *needs, *saved)
    assert counts.tolist() == wanted_counts.tolist() and min(counts.tolist()) > 0
    torch.testing.assert_close(sums.double(), wanted, rtol=2e-6, atol=2e-6)
    for grad, need, wanted_grad in zip(grads, needs, wanted_grads, strict=True):
        if need:
            torch.testing.assert_close(grad.double(), wanted_grad, rtol=1e-5, atol=1e-5)
        else:
            assert grad.shape == (0,)


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
@pytest.mark.parametrize("out", [(3, 3), (6, 3)])
def test_stability_of_one_learner(out, needs, device) -> None:
    check_stability(*students(4, (3, 3), (3, 3), device), out, False, None, needs)


@pytest.mark.parametrize(("classes", "grid_a", "grid_b", "out", "align_corners"), PAIRS)
def test_stability(classes, grid_a, grid_b, out, align_corners, device) -> None:
    mask = ((torch.rand(2, *out) < 0.1) * 255).to(torch.uint8).to(device)
    a, b = students(classes, grid_a, grid_b, device)
    check_stability(a, b, out, align_corners, mask, (True, True))


def test_stability_splits_groups_and_no_mask(device, monkeypatch) -> None:
    monkeypatch.setattr(corner_sums, "CPU_PROGRAMS", 64)
    monkeypatch.setattr(corner_sums, "GPU_PROGRAMS", 64)
    monkeypatch.setattr(corner_sums, "SCRATCH_BYTES", 1)
    monkeypatch.setattr(corner_sums, "PARTIAL_SHARE", 1000)
    for classes in (4, 12):
        a, b = students(classes, (2, 1), (2, 1), device)
        check_stability(a, b, (8, 2), False, None, (True, True))


@pytest.mark.parametrize("out", [(3, 3), (6, 6)])
@pytest.mark.parametrize("classes", [4, 40])
def test_equal_students_both_learn_nothing(classes, out, device) -> None:
    a = torch.randn(1, classes, 3, 3, device=device) * 9
    b = a.to(memory_format=torch.channels_last)
    sums, counts, *saved, _ = stability_loss(a, b, 0.3, *out, None, 255, False, True, True, False)
    assert counts[0].item() == counts[1].item() > 0 and sums.tolist() == [0, 0]
    grads = stability_loss_backward(
        torch.ones(2, device=device), a, b, 0.3, *out, None, 255, False, True, True, *saved
    )
    assert not any(grad.count_nonzero().item() for grad in grads)


@pytest.mark.parametrize("out", [(2, 2), (4, 4)])
def test_nan_student_neither_teaches_nor_learns(out, device) -> None:
    a = torch.randn(1, 3, 2, 2, device=device)
    a[:, 0] += 9
    b = torch.full_like(a, float("nan"))
    sums, counts, *saved, scale = stability_loss(
        a, b, 0.5, *out, None, 255, False, True, True, True
    )
    assert sums.tolist() == [0, 0] and counts.tolist() == [0, 0]
    torch.testing.assert_close(scale.cpu(), torch.full((2,), 1 / 3))
    grads = stability_loss_backward(
        torch.ones(2, device=device), a, b, 0.5, *out, None, 255, False, True, True, *saved
    )
    assert not any(grad.count_nonzero().item() for grad in grads)


def test_stability_of_empty_batch(device) -> None:
    a = torch.zeros(0, 3, 2, 2, device=device)
    sums, counts, *saved, scale = stability_loss(
        a, a, 0.9, 4, 4, None, 255, False, True, True, True
    )
    assert sums.tolist() == [0, 0] and counts.tolist() == [0, 0]
    torch.testing.assert_close(scale.cpu(), torch.full((2,), 1 / 3))
    options = (sums, a, a, 0.9, 4, 4, None, 255, False, True, True, *saved)
    assert stability_loss_backward(*options)[0].shape == a.shape


@pytest.mark.parametrize("out", [(4, 5), (7, 9)])
@pytest.mark.parametrize("classes", [3, 20, 70])
def test_confusion_matrix_accumulates(classes, out, device) -> None:
    logits = torch.randn(2, classes, 4, 5, device=device)
    logits[0, 1, 2, 2] = float("nan")
    target = torch.randint(0, classes, (2, *out), device=device)
    target[:, 0] = 255
    matrix = torch.full((classes, classes), 7, device=device)
    confusion_matrix(logits, target, 255, False, matrix)
    assert (matrix - 7).equal(reference.confusion_matrix(logits, target, 255, False))
    target[0, 1, 0] = classes  # not a class: does not count, and writes nowhere else
    again = torch.full((classes, classes), 7, device=device)
    confusion_matrix(logits, target, 255, False, again)
    assert (matrix - again).sum().item() == 1 and (matrix >= again).all()


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.bool, torch.bfloat16, torch.float32, torch.int64]
)
def test_cutmix_reads_original_pixels(dtype, device) -> None:
    images = torch.randint(0, 255, (3, 2, 7, 9), device=device).to(dtype)
    boxes = torch.tensor([[0, 0, 5, 5], [2, 2, 90, 7], [4, 3, 4, 5]], dtype=torch.int32)
    partner = torch.tensor([1, 0, 0])
    boxes, partner = boxes.to(device), partner.to(device)
    for view in (images, images.to(memory_format=torch.channels_last), images[:, 0]):
        mixed = view.clone()
        cutmix_(mixed, boxes, partner)
        assert mixed.equal(reference.cutmix(view, boxes, partner))


def test_cutmix_ignores_a_partner_outside_the_batch(device) -> None:
    images = torch.rand(1, 1, 4, 4, device=device)
    boxes = torch.tensor([[0, 0, 4, 4]], dtype=torch.int32, device=device)
    mixed = images.clone()
    cutmix_(mixed, boxes, torch.tensor([5], device=device))
    assert mixed.equal(images)
    with pytest.raises(TypeError, match="complex128"):
        cutmix_(images.to(torch.complex128), boxes, torch.tensor([0], device=device))
