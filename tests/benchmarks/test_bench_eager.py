"""The peers' formulation is what the released code computes, and what our losses compute."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from benchmarks import bench_confusion_matrix, bench_cutmix, eager, harness, inputs, ours
from co2s_fast.losses import CutMix, confusion_matrix

CPU = torch.device("cpu")
STUDENTS = ("clip", "dino")
# Two float32 formulations of one sum over at most 10^4 pixels.
CLOSE = 2e-5


def section(grid: int, crop: int) -> tuple[eager.Logits, eager.Batch, list[torch.Tensor]]:
    batch = inputs.make_batch(CPU, crop)
    logits = inputs.make_section_logits(grid, CPU, torch.float32, batch)
    leaves = [z for views in logits.values() for z in views.values() if z.requires_grad]
    return logits, batch, leaves


def results_of(function, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    loss = function()
    return [t.detach().double() for t in (loss, *torch.autograd.grad(loss, leaves))]


@pytest.mark.parametrize("case", ["k6_fp32", "k6_edge"])
@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("plain_indexing", [True, False])
def test_released_values(golden, case, student, plain_indexing):
    data = golden("losses.npz")
    root = f"loop/{case}"

    def read(key: str) -> torch.Tensor:
        return torch.from_numpy(data[f"{root}/{key}"])

    logits = {view: read(f"logits/{student}/{view}").float() for view in ("x", "w", "s1", "s2")}
    logits["fp"] = read(f"logits/{student}/w_fp").float()
    logits["w_other"] = read(f"logits/{student}/w_other").float()
    # The released partner is a second weak view with a padding map of its own; ours is an image of
    # the batch. With twice the batch, the second half being that view, both are one thing.
    labels, count = read("mask_x").long(), len(logits["x"])
    mixed_ignore = torch.cat([read("ignore_mask"), read("ignore_mask_other")])
    batch = eager.Batch(
        labels=labels,
        ignore=mixed_ignore[:count],
        boxes=(torch.empty(0), torch.empty(0)),
        box_maps=(read("mix1").long(), read("mix2").long()),
        partner=torch.arange(count),
    )
    total = eager.masked_cross_entropy(logits["x"], labels, None, None, plain_indexing)
    confidence, label = eager.softmax_confidence(logits["w"], batch.size)
    other_confidence, other_label = eager.softmax_confidence(logits["w_other"], batch.size)
    terms = {
        "x": total,
        "fp": eager.masked_cross_entropy(
            logits["fp"], label, confidence, batch.ignore, plain_indexing
        ),
    }
    maps = (
        (label, other_label),
        (confidence, other_confidence),
        (mixed_ignore[:count], mixed_ignore[count:]),
    )
    for view, box in zip(("s1", "s2"), batch.box_maps, strict=True):
        mixed = [eager.paste(mine, other, box, plain_indexing) for mine, other in maps]
        terms[view] = eager.masked_cross_entropy(logits[view], *mixed, plain_indexing)
    for name, value in terms.items():
        expected = float(data[f"{root}/scalar/pixelwise/{student}/{name}"])
        assert float(value) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("case", ["k6_fp32", "k6_edge"])
def test_released_stability(golden, case):
    data = golden("losses.npz")
    weak = [
        torch.from_numpy(data[f"loop/{case}/logits/{s}/w"]).float().requires_grad_()
        for s in STUDENTS
    ]
    losses = eager.stability_loss(*weak, tuple(weak[0].shape[-2:]))
    for student, loss, leaf in zip(STUDENTS, losses, weak, strict=True):
        raw = float(data[f"loop/{case}/scalar/stab/{student}/raw"])
        assert float(loss.detach()) == pytest.approx(raw, rel=1e-5)
        expected = torch.from_numpy(data[f"loop/{case}/stab/grad_raw/{student}"])
        (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-9)


def test_forms_of_the_section_agree():
    logits, batch, leaves = section(12, 48)
    expected = results_of(partial(eager.loss_section, logits, batch), leaves)
    for options in ({"plain_indexing": False}, {"released": False}):
        found = results_of(partial(eager.loss_section, logits, batch, **options), leaves)
        assert harness.disagreement(found, expected) < CLOSE


@pytest.mark.parametrize(("grid", "crop"), [(12, 48), (32, 32), (13, 50)])
def test_section_agrees_with_ours(grid, crop):
    logits, batch, leaves = section(grid, crop)
    expected = results_of(partial(eager.loss_section, logits, batch), leaves)
    found = results_of(partial(ours.loss_section, logits, batch), leaves)
    assert harness.disagreement(found, expected) < CLOSE


def test_about_half_the_pixels_are_confident():
    confidence, _ = eager.softmax_confidence(
        inputs.make_logits(128, 1, CPU), (inputs.CROP, inputs.CROP)
    )
    assert 0.4 < float((confidence >= eager.THRESHOLD).float().mean()) < 0.65


def test_confusion_matrix_agrees_with_ours():
    batch = inputs.make_batch(CPU, 48)
    logits = inputs.make_logits(12, 1, CPU)
    expected = bench_confusion_matrix.eager_confusion(logits, batch.labels)
    assert torch.equal(confusion_matrix(logits, batch.labels), expected)


def test_cutmix_agrees_with_ours():
    batch = inputs.make_batch(CPU, 48)
    images = torch.randint(256, (inputs.BATCH, 3, 48, 48), dtype=torch.uint8)
    expected = bench_cutmix.eager_mix(images.clone(), batch.box_maps[0], batch.partner)
    assert not torch.equal(images, expected)
    CutMix(batch.boxes[0], batch.partner).mix_(images)
    assert torch.equal(images, expected)
