"""Triton cross-entropy and confidence against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from co2s_fast.kernels import corner_sums
from co2s_fast.kernels.masked_cross_entropy import (
    masked_cross_entropy,
    masked_cross_entropy_backward,
)
from co2s_fast.kernels.softmax_confidence import softmax_confidence
from co2s_fast.ops import reference

# (batch, classes, low grid, label grid, align_corners)
GRIDS = [
    pytest.param(3, 6, (5, 6), (5, 6), False, id="equal"),
    pytest.param(2, 6, (4, 5), (16, 20), False, id="whole-4x"),
    pytest.param(2, 5, (4, 4), (12, 12), False, id="whole-3x"),
    pytest.param(2, 5, (4, 5), (9, 13), False, id="fractional"),
    pytest.param(2, 5, (4, 5), (9, 13), True, id="fractional-aligned"),
    pytest.param(1, 4, (9, 11), (4, 5), False, id="down"),
    pytest.param(1, 4, (9, 11), (4, 5), True, id="down-aligned"),
    pytest.param(2, 3, (1, 1), (3, 4), False, id="one-cell"),
    pytest.param(1, 3, (1, 1), (3, 4), True, id="one-cell-aligned"),
    pytest.param(1, 3, (3, 4), (1, 1), True, id="one-pixel-aligned"),
    pytest.param(2, 1, (3, 3), (6, 6), False, id="one-class"),
    pytest.param(2, 18, (3, 4), (6, 8), False, id="statistics"),
    pytest.param(1, 40, (3, 3), (3, 3), False, id="class-blocks"),
    pytest.param(1, 300, (2, 2), (2, 2), False, id="300-classes"),
]


def inputs(batch: int, classes: int, out: tuple[int, int], device: str) -> dict:
    shape = (batch, *out)
    target = torch.randint(0, classes, shape)
    target[torch.rand(shape) < 0.2] = 255
    return {
        "target": target.to(torch.uint8).to(device),
        "confidence": torch.rand(shape).to(device),
        "threshold": 0.4,
        "ignore_mask": ((torch.rand(shape) < 0.1) * 255).to(torch.uint8).to(device),
        "ignore_index": 255,
        "class_weight": (torch.rand(classes) + 0.2).to(device),
        "boxes": torch.tensor([[1, 0, out[1] - 1, out[0]], [0, 1, 9, 3], [2, 1, 2, 4]])[:batch]
        .int()
        .to(device),
        "partner": torch.arange(batch).roll(1).to(device),
    }


def check(
    logits: Tensor, options: dict, per_pixel: bool, align_corners: bool, slack: float
) -> None:
    """Loss, counts and gradient against autograd of the float64 reference."""
    exact = logits.double().requires_grad_()
    arguments = (*options.values(), per_pixel, align_corners)
    wanted, wanted_counts = reference.masked_cross_entropy(exact, *arguments)
    upstream = torch.rand_like(wanted) + 0.5
    (wanted_grad,) = torch.autograd.grad(wanted, exact, upstream)
    loss, counts, saved, scale = masked_cross_entropy(logits, *arguments, True, -1)
    grad = masked_cross_entropy_backward(upstream.float(), logits, *arguments, saved)
    assert saved.shape == scale.shape == (0,)
    assert loss.dtype == torch.float32 and counts.dtype == torch.int64
    assert counts.tolist() == wanted_counts.tolist()
    assert grad.dtype == logits.dtype and grad.is_contiguous()
    torch.testing.assert_close(loss.double(), wanted, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(grad.double(), wanted_grad, rtol=slack, atol=slack)
    for mean_over in () if per_pixel else (0, 1):
        mean, counts, _, scale = masked_cross_entropy(logits, *arguments, True, mean_over)
        assert counts.tolist() == wanted_counts.tolist()
        divisor = wanted_counts[mean_over].clamp(min=1).double()
        torch.testing.assert_close(mean.double(), wanted.detach() / divisor, rtol=2e-6, atol=0)
        torch.testing.assert_close(scale.double(), 1 / divisor, rtol=1e-7, atol=0)


@pytest.mark.parametrize("per_pixel", [False, True])
@pytest.mark.parametrize(("batch", "classes", "low", "out", "align_corners"), GRIDS)
def test_loss_and_gradient(batch, classes, low, out, align_corners, per_pixel, device) -> None:
    logits = torch.randn(batch, classes, *low, device=device) * 3
    check(logits, inputs(batch, classes, out, device), per_pixel, align_corners, slack=1e-5)


@pytest.mark.parametrize("out", [(4, 5), (8, 10)])
def test_only_labels(out, device) -> None:
    options = dict.fromkeys(inputs(2, 3, out, device))
    options.update(target=torch.randint(0, 3, (2, *out), device=device), ignore_index=255)
    options["threshold"] = 0.95
    check(torch.randn(2, 3, 4, 5, device=device), options, False, False, slack=1e-5)


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded", "transposed"])
@pytest.mark.parametrize("out", [(4, 6), (8, 12)])
def test_strides(layout, out, device) -> None:
    logits = {
        "channels_last": torch.randn(2, 5, 4, 6).to(memory_format=torch.channels_last),
        "sliced": torch.randn(3, 7, 6, 13)[1:, 1:6, 1:5, :12:2],
        "expanded": torch.randn(1, 5, 4, 6).expand(2, 5, 4, 6),
        "transposed": torch.randn(2, 5, 6, 4).transpose(2, 3),
    }[layout].to(device)
    options = inputs(2, 5, out, device)
    options["target"] = options["target"].transpose(1, 2).contiguous().transpose(1, 2).int()
    options["confidence"] = options["confidence"][:1].expand(2, *out)
    check(logits, options, True, False, slack=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out", [(4, 6), (8, 12)])
def test_half_precision_only_rounds_the_gradient(dtype, out, device) -> None:
    logits = (torch.randn(2, 6, 4, 6, device=device) * 3).to(dtype)
    # float32 inside: one rounding of the result, half a unit in the last place
    check(logits, inputs(2, 6, out, device), False, False, slack=torch.finfo(dtype).eps)


def test_splits_and_groups_change_nothing(device, monkeypatch) -> None:
    monkeypatch.setattr(corner_sums, "CPU_PROGRAMS", 64)
    monkeypatch.setattr(corner_sums, "GPU_PROGRAMS", 64)
    monkeypatch.setattr(corner_sums, "SCRATCH_BYTES", 1)
    monkeypatch.setattr(corner_sums, "PARTIAL_SHARE", 1000)
    for classes, out in ((4, (12, 4)), (18, (8, 2))):
        logits = torch.randn(2, classes, 3, 2, device=device)
        check(logits, inputs(2, classes, out, device), True, False, slack=1e-5)


@pytest.mark.parametrize("out", [(3, 3), (6, 6)])
def test_nothing_taken_is_zero(out, device) -> None:
    options = inputs(2, 4, out, device)
    options["confidence"] = torch.zeros_like(options["confidence"])
    logits = torch.full((2, 4, 3, 3), float("nan"), device=device)
    loss, counts, saved, scale = masked_cross_entropy(
        logits, *options.values(), False, False, True, 1
    )
    assert scale.item() == 1
    grad = masked_cross_entropy_backward(
        torch.ones((), device=device), logits, *options.values(), False, False, saved
    )
    assert loss.item() == 0 and counts[1].item() == 0 and counts[0].item() > 0
    assert grad.count_nonzero().item() == 0


@pytest.mark.parametrize("out", [(3, 4), (6, 8)])
def test_bad_class_is_not_valid_and_bad_partner_no_box(out, device) -> None:
    target = torch.randint(0, 4, (2, *out), device=device)
    good, bad = target.clone(), target.clone()
    good[0, 0], bad[0, 0], bad[0, 0, 1] = 255, 4, -7
    rest = (None, 0.95, None, 255, None)
    logits = torch.randn(2, 4, 3, 4, device=device)
    wanted = masked_cross_entropy(logits, good, *rest, None, None, False, False, True, 0)
    found = masked_cross_entropy(logits, bad, *rest, None, None, False, False, True, 0)
    assert found[0].equal(wanted[0]) and found[1].equal(wanted[1])
    boxes = torch.tensor([[0, 0, 2, 2], [0, 0, 0, 0]], dtype=torch.int32, device=device)
    partner = torch.tensor([10**9, 0], device=device)
    plain = masked_cross_entropy(logits, target, *rest, None, None, False, False, True, 0)
    boxed = masked_cross_entropy(logits, target, *rest, boxes, partner, False, False, True, 0)
    assert boxed[0].equal(plain[0]) and boxed[1].equal(plain[1])


@pytest.mark.parametrize("out", [(3, 3), (6, 6)])
def test_nan_stays_where_it_is(out, device) -> None:
    logits = torch.randn(1, 3, 3, 3, device=device)
    poisoned = logits.clone()
    poisoned[0, 1, 0, 0] = float("nan")
    target = torch.zeros(1, *out, dtype=torch.int64, device=device)
    # the corner cell reaches no further than the first cell's width beyond its own pixels
    reach = 1 if out == (3, 3) else 3
    target[0, :reach, :reach] = 255
    options = (target, None, 0.9, None, 255, None, None, None, False, False)
    one = torch.ones((), device=device)
    for function in (lambda z: masked_cross_entropy(z, *options, True, -1)[0],
                     lambda z: masked_cross_entropy_backward(one, z, *options, one)):  # fmt: skip
        assert function(poisoned).equal(function(logits))
    confidence, label = softmax_confidence(poisoned, *out, False)
    touched = torch.zeros(1, *out, dtype=torch.bool, device=device)
    touched[0, :reach, :reach] = True
    assert confidence.isnan().equal(touched) and label[touched].count_nonzero().item() == 0


@pytest.mark.parametrize("scale", [1e4, 1.0])
@pytest.mark.parametrize(("batch", "classes", "low", "out", "align_corners"), GRIDS)
def test_confidence(batch, classes, low, out, align_corners, scale, device) -> None:
    # whole steps: enlarged to 1e4 the float32 interpolation itself must not blur the comparison
    logits = torch.randint(-3, 4, (batch, classes, *low), device=device) * scale
    confidence, label = softmax_confidence(logits, *out, align_corners)
    p = reference.up(logits.double(), *out, align_corners).softmax(1)
    # at 1e4 float32 positions move logits by 1e4 * 1e-6
    slack = 2e-6 if scale == 1 else 2e-2
    torch.testing.assert_close(confidence.double(), p.amax(1), rtol=slack, atol=slack)
    chosen = p.gather(1, label[:, None])[:, 0]
    torch.testing.assert_close(chosen, p.amax(1), rtol=slack, atol=slack)


def test_ties_go_to_the_lowest_class(device) -> None:
    logits = torch.zeros(1, 40, 2, 2, device=device)
    logits[:, 3], logits[:, 37], logits[:, 1, 0, 0] = 2, 2, 2
    _, label = softmax_confidence(logits, 2, 2, False)
    assert label.tolist() == [[[1, 3], [3, 3]]]


def test_wrong_inputs_are_named() -> None:
    with pytest.raises(TypeError, match=r"logits: .*float64"):
        softmax_confidence(torch.zeros(1, 2, 3, 3, dtype=torch.float64), 3, 3, False)
    with pytest.raises(ValueError, match=r"logits: expected classes and cells"):
        softmax_confidence(torch.zeros(1, 0, 1, 1), 1, 1, False)


def test_empty_batch(device) -> None:
    logits = torch.zeros(0, 3, 2, 2, device=device)
    target = torch.zeros(0, 4, 4, dtype=torch.uint8, device=device)
    rest = (None, 0.9, None, 255, None, None, None, False, False)
    loss, counts, saved, scale = masked_cross_entropy(logits, target, *rest, True, 0)
    assert scale.item() == 1
    assert loss.item() == 0 and counts.tolist() == [0, 0]
    assert masked_cross_entropy_backward(loss, logits, target, *rest, saved).shape == logits.shape
    assert softmax_confidence(logits, 4, 4, False)[1].shape == (0, 4, 4)
