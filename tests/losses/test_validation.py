"""Wrong arguments: the exception's class, the argument it names, what was given and expected."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from co2s_fast.losses import (
    CutMix,
    MaskedCrossEntropyLoss,
    StabilityLoss,
    confusion_matrix,
    masked_cross_entropy,
    masked_cross_entropy_terms,
    softmax_confidence,
    stability_loss,
    stability_terms,
)

LOGITS = torch.zeros(2, 5, 4, 6)
LABEL = torch.zeros(2, 8, 12, dtype=torch.uint8)
CONFIDENCE = torch.ones(2, 8, 12)
BOXES = torch.zeros(2, 4, dtype=torch.int32)
PARTNER = torch.tensor([1, 0])
META = "meta"  # a second device that every machine has


def ce(logits=LOGITS, target=LABEL, confidence=None, **options):
    return masked_cross_entropy(logits, target, confidence, **options)


def stability(a=LOGITS, b=LOGITS, **options):
    return stability_loss(a, b, **options)


def matrix(logits=LOGITS, target=LABEL, **options):
    return confusion_matrix(logits, target, **options)


WRONG = {
    "logits list": (lambda: ce([1.0]), TypeError, "logits: expected a torch.Tensor, got list"),
    "logits 3d": (lambda: ce(LOGITS[0]), ValueError, r"logits: .*\[B,K,h,w\].*got \[5, 4, 6\]"),
    "no class": (lambda: ce(LOGITS[:, :0]), ValueError, r"logits: .*K.*got \[2, 0, 4, 6\]"),
    "no cell": (lambda: ce(LOGITS[:, :, :0]), ValueError, r"logits: .*got \[2, 5, 0, 6\]"),
    "logits int": (lambda: ce(LOGITS.int()), TypeError, "logits: .*float32.*got torch.int32"),
    "target none": (lambda: ce(target=None), TypeError, "target: .*Tensor, got NoneType"),
    "target shape": (lambda: ce(target=LABEL[:1]), ValueError,
                     r"target: expected shape \[2, H, W\], got \[1, 8, 12\]"),
    "target onehot": (lambda: ce(target=LABEL[:, None]), ValueError, r"target: .*\[2, 1, 8, 12\]"),
    "target empty": (lambda: ce(target=LABEL[:, :0]), ValueError, "target: .*at least one pixel"),
    "target float": (lambda: ce(target=LABEL.float()), TypeError,
                     "target: expected uint8, int32 or int64, got torch.float32"),
    "target device": (lambda: ce(target=LABEL.to(META)), ValueError, "target: .*on cpu.*got meta"),
    "target class": (lambda: ce(target=LABEL + 5), IndexError,
                     r"target: class 5 at image 0, row 0, column 0 is outside \[0, 5\)"),
    "confidence shape": (lambda: ce(confidence=CONFIDENCE[:, :4]), ValueError,
                         r"confidence: expected shape \[2, 8, 12\], got \[2, 4, 12\]"),
    "confidence int": (lambda: ce(confidence=LABEL), TypeError, "confidence: .*floating.*uint8"),
    "confidence device": (lambda: ce(confidence=CONFIDENCE.to(META)), ValueError,
                          "confidence: .*got meta"),
    "threshold high": (lambda: ce(threshold=1.5), ValueError, r"threshold: .*\[0, 1\], got 1.5"),
    "threshold low": (lambda: ce(threshold=-0.1), ValueError, r"threshold: .*\[0, 1\], got -0.1"),
    "threshold nan": (lambda: ce(threshold=float("nan")), ValueError, "threshold: .*got nan"),
    "threshold str": (lambda: ce(threshold="0.9"), TypeError, "threshold: .*number, got str"),
    "threshold bool": (lambda: ce(threshold=True), TypeError, "threshold: .*number, got bool"),
    "mask shape": (lambda: ce(ignore_mask=LABEL[:, 1:]), ValueError,
                   r"ignore_mask: expected shape \[2, 8, 12\], got \[2, 7, 12\]"),
    "mask bool": (lambda: ce(ignore_mask=LABEL.bool()), TypeError,
                  r"got torch.bool; .*torch.where\(ignore_mask, ignore_index, ignore_index \+ 1\)"),
    "target bool": (lambda: ce(target=LABEL.bool()), TypeError,
                    r"target: .*got torch.bool; .*target.to\(torch.uint8\)"),
    "threshold tensor": (lambda: ce(threshold=torch.full((5,), 0.9)), TypeError,
                         r"threshold: .*number, got Tensor; .*thresholds\[label\]"),
    "ignore_index": (lambda: ce(ignore_index=255.0), TypeError, "ignore_index: .*int, got float"),
    "ignore_index huge": (lambda: ce(ignore_index=2**70), ValueError, "ignore_index: .*64 bits"),
    "confidence bool": (lambda: ce(confidence=CONFIDENCE > 0.9), TypeError,
                        r"confidence: .*got torch.bool; .*confidence.float\(\)"),
    "weight shape": (lambda: ce(class_weight=torch.ones(4)), ValueError,
                     r"class_weight: expected shape \[5\].*got \[4\]"),
    "weight list": (lambda: ce(class_weight=[1.0] * 5), TypeError, "class_weight: .*got list"),
    "weight int": (lambda: ce(class_weight=torch.ones(5).int()), TypeError, "class_weight: .*int"),
    "weight grad": (lambda: ce(class_weight=torch.ones(5, requires_grad=True)), ValueError,
                    "class_weight: .*constant.*requires grad"),
    "cutmix type": (lambda: ce(cutmix=BOXES), TypeError, "cutmix: expected a CutMix, got Tensor"),
    "cutmix batch": (lambda: ce(cutmix=CutMix(BOXES[:1], PARTNER[1:])), ValueError,
                     "cutmix: expected 2 boxes.*got 1"),
    "reduction": (lambda: ce(reduction="mean"), ValueError,
                  "reduction: expected one of valid, confident, sum, none, got 'mean'"),
    "b shape": (lambda: stability(b=LOGITS[:, :4]), ValueError,
                r"logits_b: expected shape \[2, 5, 4, 6\] like logits_a, got \[2, 4, 4, 6\]"),
    "b dtype": (lambda: stability(b=LOGITS.double()), TypeError,
                "logits_b: expected torch.float32 like logits_a, got torch.float64"),
    "b device": (lambda: stability(b=LOGITS.to(META)), ValueError, "logits_b: .*got meta"),
    "size single": (lambda: stability(size=8), TypeError, r"size: .*\(height, width\), got 8"),
    "size zero": (lambda: stability(size=(0, 4)), ValueError, r"size: .*at least 1, got \(0, 4\)"),
    "size float": (lambda: stability(size=(8.0, 4)), TypeError, "size: expected an int, got float"),
    "size float shown": (lambda: stability(size=(8.5, 4)), TypeError, "size: .*got float 8.5"),
    "size mask": (lambda: stability(size=(8, 8), ignore_mask=LABEL), ValueError,
                  r"ignore_mask: expected shape \[2, 8, 8\], got \[2, 8, 12\]"),
    "stability threshold": (lambda: stability(threshold=2), ValueError, "threshold: .*got 2"),
    "label_dtype": (
        lambda: softmax_confidence(LOGITS, label_dtype=torch.int32),
        TypeError,
        "label_dtype: .*int32",
    ),
    "classes in a byte": (
        lambda: softmax_confidence(torch.zeros(1, 256, 2, 2), label_dtype=torch.uint8),
        ValueError,
        "label_dtype: .*256 classes",
    ),
    "confidence size": (lambda: softmax_confidence(LOGITS, (4, -1)), ValueError, "size: .*-1"),
    "out shape": (lambda: matrix(out=torch.zeros(4, 5).long()), ValueError,
                  r"out: expected shape \[5, 5\], got \[4, 5\]"),
    "out dtype": (lambda: matrix(out=torch.zeros(5, 5)), TypeError, "out: .*int64, got .*float32"),
    "matrix class": (lambda: matrix(target=LABEL + 7), IndexError, r"target: class 7.*\[0, 5\)"),
    "boxes list": (lambda: CutMix([[0, 0, 1, 1]], PARTNER), TypeError, "boxes: .*got list"),
    "boxes shape": (lambda: CutMix(BOXES[0], PARTNER), ValueError, r"boxes: .*\[B,4\], got \[4\]"),
    "boxes float": (lambda: CutMix(BOXES.float(), PARTNER), TypeError,
                    "boxes: .*integers.*float32"),
    "boxes bytes": (lambda: CutMix(BOXES.to(torch.int8), PARTNER), TypeError,
                    "boxes: .*int64.*got torch.int8"),
    "partner shape": (lambda: CutMix(BOXES, PARTNER[:1]), ValueError,
                      r"partner: expected shape \[2\].*got \[1\]"),
    "partner float": (lambda: CutMix(BOXES, PARTNER.float()), TypeError, "partner: .*integers"),
    "partner high": (lambda: CutMix(BOXES, PARTNER + 1), IndexError,
                     r"partner: 2 at image 0 is outside \[0, 2\)"),
    "partner low": (lambda: CutMix(BOXES, PARTNER - 2), IndexError, "partner: -1 at image 0"),
    "partner device": (lambda: CutMix(BOXES, PARTNER.to(META)), ValueError, "partner: .*got meta"),
    "images batch": (lambda: CutMix(BOXES, PARTNER).mix_(torch.zeros(3, 1, 4, 4)), ValueError,
                     r"images: .*B = 2, got \[3, 1, 4, 4\]"),
    "images grad": (lambda: CutMix(BOXES, PARTNER).mix_(torch.zeros(2, 4, 4, requires_grad=True)),
                    ValueError, "images: .*without grad"),
    "maps 4d": (lambda: CutMix(BOXES, PARTNER).mix_maps(torch.zeros(2, 1, 4, 4)), ValueError,
                r"maps: expected shape \[B,H,W\]"),
    "module reduction": (lambda: MaskedCrossEntropyLoss(reduction="mean"), ValueError, "reduction"),
    "module threshold": (lambda: StabilityLoss(threshold=3), ValueError, "threshold: .*got 3"),
    "module weight list": (lambda: MaskedCrossEntropyLoss(class_weight=[1.0] * 5), TypeError,
                           "class_weight: .*got list"),
    "module weight shape": (lambda: MaskedCrossEntropyLoss(class_weight=torch.ones(5, 1)),
                            ValueError, r"class_weight: expected shape \[K\].*got \[5, 1\]"),
    "module weight int": (lambda: MaskedCrossEntropyLoss(class_weight=torch.ones(5).int()),
                          TypeError, "class_weight: .*floating.*got torch.int32"),
    "module weight grad": (
        lambda: MaskedCrossEntropyLoss(class_weight=torch.ones(5, requires_grad=True)),
        ValueError, "class_weight: .*constant.*requires grad"),
}  # fmt: skip


WITH_CORNERS = {
    "cross entropy": ce,
    "terms": lambda **options: masked_cross_entropy_terms(LOGITS, LABEL, **options),
    "stability": stability,
    "stability terms": lambda **options: stability_terms(LOGITS, LOGITS, **options),
    "confidence": lambda **options: softmax_confidence(LOGITS, **options),
    "confusion": matrix,
    "cross entropy module": MaskedCrossEntropyLoss,
    "stability module": StabilityLoss,
}


@pytest.mark.parametrize("value", [None, 1, 0.0, "False", torch.tensor(True)])
@pytest.mark.parametrize("name", WITH_CORNERS)
def test_align_corners_is_a_bool(name, value):
    """The operators would take 1, and say of the others what they are called in a schema."""
    found = type(value).__name__
    with pytest.raises(TypeError, match=f"^align_corners: expected True or False, got {found}$"):
        WITH_CORNERS[name](align_corners=value)


@pytest.mark.parametrize("name", WRONG)
def test_error_names_the_argument(name):
    call, error, message = WRONG[name]
    with pytest.raises(error, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_functions_accept_the_same_arguments_when_right():
    cutmix = CutMix(BOXES, PARTNER)
    options = {"ignore_mask": LABEL.long(), "class_weight": torch.ones(5).half(), "cutmix": cutmix}
    assert ce(confidence=CONFIDENCE.bfloat16(), threshold=1, **options).item() > 0
    assert stability(size=[8, 12])[0].item() == 0
    assert softmax_confidence(LOGITS, torch.Size([8, 12]))[1].shape == (2, 8, 12)


def test_numbers_of_numpy_are_numbers():
    a = torch.randn(2, 5, 4, 6)
    options = {"confidence": CONFIDENCE / 2, "threshold": np.float32(0.5)}
    assert ce(a, ignore_index=np.int64(255), **options) == ce(a, confidence=None)
    assert ce(a, LABEL + 7, ignore_index=np.uint8(7)).item() == 0
    size = tuple(np.array([8, 12]))
    assert softmax_confidence(a, size)[1].shape == (2, 8, 12)
    assert stability(a, -a, size=size, ignore_index=np.int16(3))[0].shape == ()
    assert type(StabilityLoss(threshold=np.float16(0.5)).threshold) is float


def test_modules_equal_their_functions():
    torch.manual_seed(0)
    a, b = torch.randn(2, 5, 4, 6), torch.randn(2, 5, 4, 6)
    confidence = torch.rand(2, 8, 12)
    options = {
        "threshold": 0.4,
        "ignore_index": 3,
        "class_weight": torch.rand(5),
        "reduction": "confident",
        "align_corners": True,
    }
    label = torch.randint(0, 5, (2, 8, 12))
    mask = torch.randint(0, 5, (2, 8, 12))
    cutmix = CutMix(torch.tensor([[0, 0, 5, 5], [2, 2, 9, 7]]), PARTNER)
    module = MaskedCrossEntropyLoss(**options)
    assert torch.equal(
        module(a, label, confidence, ignore_mask=mask, cutmix=cutmix),
        masked_cross_entropy(a, label, confidence, ignore_mask=mask, cutmix=cutmix, **options),
    )
    assert "reduction='confident'" in repr(module)
    assert module.double().class_weight.dtype == torch.float64
    pair = {"threshold": 0.3, "ignore_index": 3, "align_corners": True}
    for ours, function in zip(
        StabilityLoss(**pair)(a, b, size=(8, 12), ignore_mask=mask),
        stability_loss(a, b, size=(8, 12), ignore_mask=mask, **pair),
        strict=True,
    ):
        assert torch.equal(ours, function) and ours > 0


def test_terms_add_up_over_shards():
    """The use of the terms: a global mean from the parts of a batch."""
    torch.manual_seed(0)
    logits, label = torch.randn(4, 5, 4, 6), torch.randint(0, 5, (4, 8, 12))
    label[:1] = 255
    label[2, :3] = 255
    parts = [masked_cross_entropy_terms(logits[i : i + 2], label[i : i + 2]) for i in (0, 2)]
    total, valid, confident = (sum(part) for part in zip(*parts, strict=True))
    assert valid == confident == (label != 255).sum()
    torch.testing.assert_close(total / valid, masked_cross_entropy(logits, label))
