"""Values and gradients of the released Co2S and UniMatch training loops, on every backend.

The released code runs in float32, whose own distance from its float64 run is up to 3e-6; so 1e-5.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from co2s_fast.losses import (
    CutMix,
    masked_cross_entropy,
    softmax_confidence,
    stability_loss,
    stability_terms,
)

RTOL = 1e-5
CASES = ["k6_fp32", "k6_edge"]
STUDENTS = ["clip", "dino"]
THRESHOLD = 0.95


class Fixture:
    """One case's arrays as tensors on the target's device; float16 holds exact float32 numbers."""

    def __init__(self, file, case, device):
        self.file, self.prefix, self.device = file, f"loop/{case}/", device

    def __call__(self, key):
        array = self.file[self.prefix + key]
        if array.dtype == np.float16:
            array = array.astype(np.float32)
        return torch.from_numpy(array.copy()).to(self.device)

    def scalar(self, key):
        return float(self.file[f"{self.prefix}scalar/{key}"])


@pytest.fixture(params=CASES)
def data(request, golden, target):
    return Fixture(golden("losses.npz"), request.param, target.device)


def assert_gradient(ours, expected):
    """Relative to the largest gradient: tiny entries are differences of near-equal numbers."""
    torch.testing.assert_close(
        ours, expected, rtol=RTOL, atol=RTOL * float(expected.abs().max().clamp(min=1e-12))
    )


def ce_terms(data, student, logits):
    """The four cross-entropy terms of one student, as the released loop forms them."""
    ignore = data("ignore_mask")
    terms = {
        "x": masked_cross_entropy(logits["x"], data("mask_x")),
        "fp": masked_cross_entropy(
            logits["w_fp"], data(f"pseudo/{student}/label_w"), data(f"pseudo/{student}/conf_w"),
            ignore_mask=ignore,
        ),
    }  # fmt: skip
    for view in "12":
        terms[f"s{view}"] = masked_cross_entropy(
            logits[f"s{view}"],
            data(f"pseudo/{student}/label_mixed{view}"),
            data(f"pseudo/{student}/conf_mixed{view}"),
            ignore_mask=data(f"ignore_mixed{view}"),
        )
    return terms


@pytest.mark.parametrize("student", STUDENTS)
def test_terms_and_gradients_of_the_released_loop(data, student, target):
    target.leave_out(unless=student == "clip" and data.prefix.endswith("k6_edge/"))
    logits = {
        view: data(f"logits/{student}/{view}").requires_grad_()
        for view in ("x", "w_fp", "s1", "s2")
    }
    terms = ce_terms(data, student, logits)
    for name, term in terms.items():
        assert term.item() == pytest.approx(data.scalar(f"pixelwise/{student}/{name}"), rel=RTOL)
        if student == "clip":
            assert term.item() == pytest.approx(data.scalar(f"unimatch_on_clip/{name}"), rel=RTOL)
    total = 0.5 * (terms["x"] + 0.25 * (terms["s1"] + terms["s2"]) + 0.5 * terms["fp"])
    weighted = data.scalar(f"pixelwise/{student}/stab_weighted")  # a constant in the release
    assert total.item() + weighted == pytest.approx(
        data.scalar(f"pixelwise/{student}/total"), rel=RTOL
    )
    if student == "clip":
        assert total.item() == pytest.approx(data.scalar("unimatch_on_clip/total"), rel=RTOL)
    total.backward()
    for view, z in logits.items():
        assert_gradient(z.grad, data(f"grad_total/{student}/{view}"))


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("view", ["1", "2"])
def test_reading_through_the_box_equals_the_released_mixing(data, student, view, target):
    """The partner is another batch there; here both are halves of one batch of six."""
    target.leave_out(unless=(student, view) == ("clip", "1") and "fp32" in data.prefix)
    pseudo = [softmax_confidence(data(f"logits/{student}/{v}")) for v in ("w", "w_other")]
    confidence, label = (torch.cat(pair) for pair in zip(*pseudo, strict=True))
    ignore = torch.cat([data("ignore_mask"), data("ignore_mask_other")])
    boxes = torch.zeros(6, 4, dtype=torch.int32)
    for image, mask in enumerate(data(f"mix{view}").cpu()):
        rows, columns = mask.nonzero(as_tuple=True)
        if len(rows):
            boxes[image] = torch.stack(
                [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            )
    assert (boxes[:3, 2] > 0).any(), "the fixture mixes nothing"
    cutmix = CutMix(boxes, torch.tensor([3, 4, 5, 0, 1, 2])).to(label.device)

    def mixed(maps):
        return cutmix.mix_maps(maps)[:3]

    assert torch.equal(mixed(label).byte(), data(f"pseudo/{student}/label_mixed{view}"))
    assert torch.equal(mixed(ignore), data(f"ignore_mixed{view}"))
    torch.testing.assert_close(
        mixed(confidence), data(f"pseudo/{student}/conf_mixed{view}"), rtol=RTOL, atol=0
    )
    z = data(f"logits/{student}/s{view}").requires_grad_()
    loss = masked_cross_entropy(
        torch.cat([z, torch.zeros_like(z)]), label, confidence, ignore_mask=ignore, cutmix=cutmix,
        reduction="none",
    )[:3].sum() / (mixed(ignore) != 255).sum()  # fmt: skip
    expected = data.scalar(f"pixelwise/{student}/s{view}")
    assert loss.item() == pytest.approx(expected, rel=RTOL)
    (loss * 0.125).backward()
    assert_gradient(z.grad, data(f"grad_total/{student}/s{view}"))


def test_images_are_mixed_as_released(golden, target):
    data = Fixture(golden("losses.npz"), "k6_fp32", target.device)
    mask = data("mix1")[0].cpu()
    rows, columns = mask.nonzero(as_tuple=True)
    box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    boxes = torch.tensor([box, [0, 0, 0, 0]], dtype=torch.int32)
    images = torch.cat([data("img/s1"), data("img/s1_other")])
    CutMix(boxes, torch.tensor([1, 0])).to(target.device).mix_(images)
    assert torch.equal(images[:1], data("img/s1_mixed"))


@pytest.mark.parametrize("student", STUDENTS)
def test_pseudo_labels(data, student):
    confidence, label = softmax_confidence(data(f"logits/{student}/w"))
    assert torch.equal(label.byte(), data(f"pseudo/{student}/label_w"))
    expected = data(f"pseudo/{student}/conf_w")
    torch.testing.assert_close(confidence, expected, rtol=RTOL, atol=0)
    assert torch.equal(confidence >= THRESHOLD, expected >= THRESHOLD)


def test_pseudo_labels_of_extreme_logits(golden, target):
    file = golden("losses.npz")
    logits, conf, label = (
        torch.from_numpy(file[f"pseudo_extreme/{key}"]).to(target.device)
        for key in ("logits", "conf", "label")
    )
    ours_conf, ours_label = softmax_confidence(logits)
    assert torch.equal(ours_label.byte(), label)
    torch.testing.assert_close(ours_conf, conf, rtol=RTOL, atol=0)


def test_stability_values_masks_and_gradients(data):
    """The release detaches the weak logits; `raw` with a detached teacher is the paper's form."""
    logits = [data(f"logits/{student}/w").requires_grad_() for student in STUDENTS]
    losses = stability_loss(*logits)
    weight = data.scalar("pixelwise/stab_weight")
    for student, loss in zip(STUDENTS, losses, strict=True):
        raw = data.scalar(f"stab/{student}/raw")
        assert loss.item() == pytest.approx(raw, rel=RTOL)
        assert weight * loss.item() == pytest.approx(
            data.scalar(f"pixelwise/{student}/stab_weighted"), rel=RTOL
        )
    sum(losses).backward()
    for student, z in zip(STUDENTS, logits, strict=True):
        expected = data(f"stab/grad_raw/{student}")
        assert_gradient(z.grad, expected)
        norm = data.scalar(f"stab/{student}/grad_norm")
        assert z.grad.norm().item() == pytest.approx(norm, rel=RTOL)
        # Where nobody is taught nothing moves: the decision of each pixel, not only their sum.
        outside = data(f"stab/{student}_student_mask")[:, None] == 0
        assert not (z.grad * outside).any()


def test_stability_counts_its_pupils(data):
    logits = [data(f"logits/{student}/w") for student in STUDENTS]
    counts = stability_terms(*logits)[2:]
    for student, count in zip(STUDENTS, counts, strict=True):
        assert int(count) == int(data(f"stab/{student}_student_mask").sum())
