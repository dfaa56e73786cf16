"""softmax_confidence, confusion_matrix and cutmix_ on every backend."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_cases import BY_NAME, CASES, CLASS_COUNTS, HALF_CASES, Case, draw
from op_oracle import assert_as_good_as_eager

from co2s_fast.losses import (
    CutMix,
    confusion_matrix,
    masked_cross_entropy,
    softmax_confidence,
    stability_loss,
)
from co2s_fast.ops import reference


def clear_labels(case: Case, logits: torch.Tensor) -> torch.Tensor:
    """Pixels [B,H,W] whose two highest logits are clearly apart, or exactly tied class maps."""
    z = reference.up(logits.double(), *case.size, case.align_corners)
    if case.classes == 1:
        return torch.ones_like(z[:, 0], dtype=torch.bool)
    top = z.topk(2, dim=1).values
    gap = top[:, 0] - top[:, 1]
    return (gap > 1e-6 * z.abs().amax(1).clamp(min=1)) | (gap == 0) | gap.isnan()


def check_confidence(case: Case, target, dtype: torch.dtype) -> None:
    x = draw(case, dtype)
    truth, truth_label = reference.softmax_confidence(x.a.double(), *case.size, case.align_corners)
    confidence, label = softmax_confidence(
        x.a.to(target.device), case.size, align_corners=case.align_corners
    )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert confidence.dtype == wide and label.dtype == torch.int64
    eager = reference.softmax_confidence(x.a.to(wide), *case.size, case.align_corners)[0]
    assert_as_good_as_eager(confidence, truth, eager, wide, f"{case} confidence")
    clear = clear_labels(case, x.a)
    if clear.numel():
        assert clear.double().mean() > 0.9, "the case compares too little"
    assert torch.equal(label.cpu()[clear], truth_label[clear])
    same, byte = softmax_confidence(
        x.a.to(target.device), case.size, align_corners=case.align_corners, label_dtype=torch.uint8
    )
    assert byte.dtype == torch.uint8 and torch.equal(byte.long(), label)
    assert torch.equal(same.nan_to_num(2), confidence.nan_to_num(2))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_confidence(case, target):
    case = target.fit(case)
    check_confidence(case, target, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", HALF_CASES[:4], ids=str)
def test_confidence_of_half_precision(case, dtype, target):
    target.leave_out(unless=case.name == "equal")
    check_confidence(case, target, dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_confidence_in_float64(case, cpu_target):
    check_confidence(case, cpu_target, torch.float64)


def test_ties_go_to_the_lowest_class(target):
    z = torch.zeros(1, 150, 4, 5, device=target.device)
    z[:, 7:140:7] = 3
    for size in ((4, 5), (8, 10), (7, 11)):
        confidence, label = softmax_confidence(z, size)
        assert (label == 7).all()
        assert torch.allclose(confidence, confidence[0, 0, 0])


def test_nan_gives_nan_confidence_and_class_0(target):
    z = torch.randn(1, 5, 3, 40, device=target.device)
    z[0, 3, 1, 7] = float("nan")
    z[0, :, 2, 33] = float("nan")
    confidence, label = softmax_confidence(z)
    bad = torch.zeros(1, 3, 40, dtype=torch.bool)
    bad[0, 1, 7] = bad[0, 2, 33] = True
    assert torch.equal(confidence.isnan().cpu(), bad)
    assert not label.cpu()[bad].any()


@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize("size", [(6, 10), (6, 40), (12, 5), (3, 5), (6, 3)])
def test_a_nan_stays_among_the_pixels_that_read_it(size, corners, cpu_target):
    """Along an axis of equal lengths a pixel reads one cell: not its neighbour, not times 0."""
    torch.manual_seed(1)
    z = torch.randn(1, 3, 6, 5)
    z[0, 0, 3, 2] = float("nan")
    z[0, 2, 1, 4] = float("-inf")
    bad = ~F.interpolate(z, size, mode="bilinear", align_corners=corners).isfinite().all(1)
    confidence, _ = softmax_confidence(z, size, align_corners=corners)
    assert not confidence[~bad].isnan().any()
    label = torch.randint(0, 3, (1, *size)).masked_fill(bad, 255)
    x, other = z.clone().requires_grad_(), torch.randn_like(z).requires_grad_()
    loss = masked_cross_entropy(x, label, align_corners=corners)
    mask = label.masked_fill(~bad, 0)
    losses = stability_loss(x, other, threshold=0.2, ignore_mask=mask, align_corners=corners)
    (loss + sum(losses)).backward()
    assert loss.isfinite() and x.grad.isfinite().all() and other.grad.isfinite().all()


def check_confusion_matrix(case: Case, target) -> None:
    x = draw(case, torch.float32)
    label = torch.where(clear_labels(case, x.a), x.target, 255)
    truth = reference.confusion_matrix(x.a.double(), label, 255, case.align_corners)
    y, label = x.to(target.device), label.to(target.device)
    matrix = confusion_matrix(y.a, label, align_corners=case.align_corners)
    assert torch.equal(matrix.cpu(), truth)
    again = confusion_matrix(y.a, label, out=matrix, align_corners=case.align_corners)
    assert again is matrix and torch.equal(matrix.cpu(), 2 * truth)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_confusion_matrix(case, target):
    case = target.fit(case)
    if case.values == "nan":
        pytest.skip("a NaN logit is covered below")
    check_confusion_matrix(case, target)


@pytest.mark.parametrize("size", [(4, 5), (8, 10)], ids=str)
def test_every_number_of_classes(size, target):
    target.leave_out(unless=size == (4, 5))
    for classes in CLASS_COUNTS:
        case = Case(f"K{classes}", classes=classes, grid=(4, 5), size=size)
        check_confidence(case, target, torch.float32)
        check_confusion_matrix(case, target)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_confusion_matrix_of_half_precision(dtype, target):
    case = BY_NAME["fraction"]
    x = draw(case, dtype)
    label = torch.where(clear_labels(case, x.a), x.target, 255)
    truth = reference.confusion_matrix(x.a.double(), label, 255, False)
    ours = confusion_matrix(x.a.to(target.device), label.to(target.device))
    assert torch.equal(ours.cpu(), truth)


def test_confusion_matrix_of_many_classes_and_into_a_view(target):
    z = torch.randn(2, 150, 6, 7, generator=torch.Generator().manual_seed(3)).to(target.device)
    label = torch.arange(84, device=target.device).view(2, 6, 7).add(60)
    truth = reference.confusion_matrix(z.cpu(), label.cpu(), 255, False)
    room = torch.zeros(150, 300, dtype=torch.int64, device=target.device)
    confusion_matrix(z, label, out=room[:, ::2])
    assert torch.equal(room[:, ::2].cpu(), truth)
    assert not room[:, 1::2].any()


def test_confusion_matrix_counts_a_nan_as_argmax_does(target):
    z = torch.zeros(1, 4, 1, 3)
    z[0, 3, 0, :] = 2
    z[0, 1, 0, 1] = float("nan")
    z[0, 1:3, 0, 2] = float("nan")
    matrix = confusion_matrix(
        z.to(target.device), torch.zeros(1, 1, 3, dtype=torch.uint8, device=target.device)
    )
    assert matrix[0].tolist() == [0, 2, 0, 1]


def test_confusion_matrix_refuses_unknown_classes(target):
    label = torch.full((1, 2, 2), 4, device=target.device)
    z = torch.zeros(1, 4, 2, 2, device=target.device)
    if target.device == "cpu":
        with pytest.raises((IndexError, ValueError), match=r"target.*outside \[0, 4\)"):
            confusion_matrix(z, label)
    else:
        assert not confusion_matrix(z, label).any()


BOXES = torch.tensor([[1, 2, 9, 8], [0, 0, 0, 5], [-4, 5, 40, 70], [6, 1, 12, 11]])
PARTNER = torch.tensor([1, 2, 0, 3])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float32, torch.float16,
                                   torch.int64, torch.float64], ids=str)  # fmt: skip
@pytest.mark.parametrize("channels", [0, 1, 3])
def test_cutmix_pastes_the_original_pixels(dtype, channels, target):
    shape = (4, 12, 13) if channels == 0 else (4, channels, 12, 13)
    images = torch.randint(0, 2 if dtype == torch.bool else 200, shape).to(dtype)
    mixed = images.clone()
    for image, (x1, y1, x2, y2) in enumerate(BOXES.clamp(min=0).tolist()):
        mixed[image, ..., y1:y2, x1:x2] = images[PARTNER[image], ..., y1:y2, x1:x2]
    cutmix = CutMix(BOXES, PARTNER).to(target.device)
    ours = images.clone().to(target.device)
    assert cutmix.mix_(ours) is ours
    assert torch.equal(ours.cpu(), mixed)
    if channels == 0:
        assert torch.equal(cutmix.mix_maps(images.to(target.device)).cpu(), mixed)


@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
def test_cutmix_writes_through_strides(layout, target):
    images = torch.rand(4, 3, 12, 13)
    cutmix = CutMix(BOXES, PARTNER).to(target.device)
    expected = cutmix.mix_(images.clone().to(target.device))
    if layout == "channels_last":
        view = images.to(target.device).contiguous(memory_format=torch.channels_last)
        room = view
    else:
        room = torch.zeros(4, 3, 14, 30, device=target.device)
        view = room[:, :, 1:13, 2:28:2]
        view.copy_(images)
    cutmix.mix_(view)
    assert torch.equal(view, expected)
    if layout == "sliced":
        assert not room[:, :, :, 3::2].any() and not room[:, :, 0].any()


def test_cutmix_of_an_empty_batch(target):
    cutmix = CutMix(torch.zeros(0, 4, dtype=torch.int32), torch.zeros(0, dtype=torch.int64))
    cutmix = cutmix.to(target.device)
    assert cutmix.mix_(torch.zeros(0, 3, 4, 4, device=target.device)).shape == (0, 3, 4, 4)
