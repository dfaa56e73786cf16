"""WSCL: what is mixed with what, which pixels are learnt, and each term by plain PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from pydantic import ValidationError

from co2s_fast.methods import get_method, wscl
from co2s_fast.methods.wscl import enhance_edges_

ALWAYS = {"mixing_probability": 1.0, "edge_enhance": 0.0}
BOXES = torch.tensor([[5, 10, 40, 60], [0, 0, 32, 64], [20, 3, 64, 50], [1, 2, 50, 44]],
                     dtype=torch.int32)  # fmt: skip


@pytest.fixture(autouse=True)
def fixed_boxes(monkeypatch, request) -> None:
    """The same boxes at every step, unless a test is marked to draw them."""
    if "draws" in request.fixturenames:
        return
    monkeypatch.setattr(
        wscl, "half_area_boxes",
        lambda images, size, generator, part=0, parts=1: BOXES[part * images :][:images],
    )  # fmt: skip


@pytest.fixture
def draws() -> None:
    """Asks for boxes as they are drawn."""


def paste(outside, inside, box):
    """One image or map with the box of another."""
    x1, y1, x2, y2 = box.tolist()
    mixed = outside.clone()
    mixed[..., y1:y2, x1:x2] = inside[..., y1:y2, x1:x2]
    return mixed


def expected_views(batch, mixing: str) -> torch.Tensor:
    images = []
    for i in range(len(batch.s1)):
        j = (i + 1) % len(batch.s1)
        mine, other = (batch.s1, batch.s2)
        if mixing == "sdc" and i % 2:
            mine, other = other, mine
        source = {"sc": batch.s1[j], "ds": batch.s2[i]}.get(mixing, other[j])
        images.append(paste(mine[i], source, BOXES[i]))
    return torch.stack(images)


def expected_maps(maps, mixing: str) -> torch.Tensor:
    if mixing == "ds":
        return maps
    return torch.stack([paste(each, maps[(i + 1) % len(maps)], BOXES[i])
                        for i, each in enumerate(maps)])  # fmt: skip


def expected_term(student, batch, mixing="sdc", selection="pixel", share=0.2, views=None):
    """The strong view's term, which pixels it learns, and their labels, at full resolution."""
    views = expected_views(batch, mixing) if views is None else views
    size = batch.w.shape[-2:]
    with torch.no_grad():
        label = F.interpolate(student(batch.w), size, mode="bilinear").argmax(1)
    label, ignore = expected_maps(label, mixing), expected_maps(batch.ignore, mixing)
    real = ignore != 255
    logits = F.interpolate(student(views), size, mode="bilinear")
    p = logits.detach().softmax(1)
    bits = -(p * p.log2()).sum(1)
    chosen = real & (bits <= torch.quantile(bits[real], share))
    loss = F.cross_entropy(logits, label, reduction="none")
    if selection == "pixel":
        return (loss * chosen).sum() / real.sum(), chosen, label
    return loss[real].mean() * chosen.sum() / real.sum(), real, label


def supervised(student, batch):
    logits = F.interpolate(student(batch.x), batch.y.shape[1:], mode="bilinear")
    return F.cross_entropy(logits, batch.y.long(), ignore_index=255)


def gradients(loss, method):
    parameters = [p for p in method.parameters() if p.requires_grad]
    return torch.autograd.grad(loss, parameters)


@pytest.mark.parametrize("mixing", ["sdc", "sc", "ds", "dc"])
def test_views_and_maps_are_mixed_as_named(make_method, make_batch, mixing) -> None:
    method, batch, before = make_method("wscl", mixing=mixing, **ALWAYS), make_batch(), make_batch()
    images, cutmix = method.mix_strong_views(batch, 3)
    assert torch.equal(images, expected_views(before, mixing))
    assert torch.equal(cutmix.mix_maps(batch.y), expected_maps(before.y, mixing))
    method(batch, 3, 10)
    for name in ("x", "y", "w", "s1", "s2", "ignore", "truth"):
        assert torch.equal(getattr(batch, name), getattr(before, name)), name


def test_modes_differ(make_batch) -> None:
    seen = [expected_views(make_batch(), mixing) for mixing in ("sdc", "sc", "ds", "dc")]
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_a_step_that_does_not_mix_shows_the_first_view(make_method, make_batch) -> None:
    method = make_method("wscl", mixing_probability=0.0, edge_enhance=0.0)
    batch = make_batch()
    images, cutmix = method.mix_strong_views(batch, 3)
    assert torch.equal(images, batch.s1)
    assert torch.equal(cutmix.mix_maps(batch.y), batch.y)


@pytest.mark.parametrize("options", [
    {}, {"mixing": "ds", "share": 0.5}, {"mixing": "sc", "selection": "mean"}, {"s_weight": 0.3},
    {"selection": "mean", "share": 0.35, "supervised_weight": 0.7},
])  # fmt: skip
def test_terms_and_gradients_are_those_of_plain_pytorch(make_method, make_batch, options) -> None:
    method, batch = make_method("wscl", **ALWAYS, **options).double(), make_batch()
    out = method(make_batch(), 3, 10)
    config, loss = method.config, 0.0
    for name, student in method.students.items():
        strong, chosen, label = expected_term(student, batch, config.mixing, config.selection,
                                              config.share)  # fmt: skip
        x = supervised(student, batch)
        torch.testing.assert_close(out[f"{name}/x"], x.detach(), rtol=1e-9, atol=0)
        # The share of the mean is a ratio of counts in single precision.
        torch.testing.assert_close(out[f"{name}/s"], strong.detach(), rtol=1e-7, atol=0)
        loss = loss + config.supervised_weight * x + config.s_weight * strong
        truth = expected_maps(batch.truth, config.mixing)
        known = chosen & (truth != 255)
        assert out[f"{name}/pseudo_confident"] == chosen.sum() > 500
        assert out[f"{name}/pseudo_known"] == known.sum()
        assert out[f"{name}/pseudo_correct"] == (known & (label == truth)).sum() > 0
        for k, key in enumerate(method.class_counts()[name]):
            assert out[key] == (chosen & (label == k)).sum()
    torch.testing.assert_close(out["loss"], loss, rtol=1e-7, atol=0)
    for found, wanted in zip(gradients(out["loss"], method), gradients(loss, method), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-10)


def test_the_share_is_learnt_of_real_pixels_alone(make_method, make_batch) -> None:
    out = make_method("wscl", **ALWAYS)(make_batch(), 3, 10)
    real = int((expected_maps(make_batch().ignore, "sdc") != 255).sum())
    for name in ("clip", "ssm"):
        assert out[f"{name}/pseudo_valid"] == real < 4 * 64 * 64
        assert int(out[f"{name}/pseudo_confident"]) == pytest.approx(0.2 * real, abs=3)


def test_all_pixels_chosen_is_the_mean_over_all(make_method, make_batch) -> None:
    one = make_method("wscl", share=1.0, **ALWAYS)(make_batch(), 3, 10)
    other = make_method("wscl", share=1.0, selection="mean", **ALWAYS)(make_batch(), 3, 10)
    fifth = make_method("wscl", selection="mean", **ALWAYS)(make_batch(), 3, 10)
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, rtol=1e-5, atol=0)
    torch.testing.assert_close(fifth["clip/s"], 0.2 * one["clip/s"], rtol=1e-3, atol=0)
    assert fifth["clip/pseudo_confident"] == one["clip/pseudo_confident"]


@pytest.mark.parametrize("selection", ["pixel", "mean"])
def test_means_of_shards_share_one_quantile(make_method, make_batch, selection) -> None:
    options = {"selection": selection, **ALWAYS}
    method, batch = make_method("wscl", mean_shards=2, **options).double(), make_batch()
    out = method(make_batch(), 3, 10)
    for name, student in method.students.items():
        _, chosen, label = expected_term(student, batch)
        real = expected_maps(batch.ignore, "sdc") != 255
        logits = F.interpolate(student(expected_views(batch, "sdc")), (64, 64), mode="bilinear")
        loss = F.cross_entropy(logits, label, reduction="none").detach()
        taken = chosen if selection == "pixel" else real * (chosen.sum() / real.sum())
        means = [(loss * taken)[part].sum() / real[part].sum()
                 for part in (slice(0, 2), slice(2, 4))]  # fmt: skip
        torch.testing.assert_close(out[f"{name}/s"], sum(means) / 2, rtol=1e-6, atol=0)


def test_a_part_mixes_by_its_place_in_the_batch(make_method, make_batch) -> None:
    """Parts of one image: s2 stands around the box of every other one, its own s1 in it."""
    method, batch = make_method("wscl", **ALWAYS), make_batch()
    method.take_parts(4)
    for i, part in enumerate(batch.parts(4)):
        views = [batch.s1[i], batch.s2[i]]
        outside, inside = views[::-1] if i % 2 else views
        assert torch.equal(method.mix_strong_views(part, 3)[0][0], paste(outside, inside, BOXES[i]))
    (warning,) = method.check_batch(4, 1)
    assert "not mixed with each other" in warning
    assert method.check_batch(8, 1) == make_method("wscl", mixing="ds").check_batch(1, 1) == []


def test_a_part_has_half_of_its_own_mean(make_method, make_batch) -> None:
    method, batch = make_method("wscl", mixing="ds", **ALWAYS).double(), make_batch()
    method.take_parts(2)
    views = expected_views(batch, "ds")
    for index, part in enumerate(batch.parts(2)):
        out = method(part, 3, 10)
        for name, student in method.students.items():
            term = expected_term(student, part, "ds", views=views[2 * index :][:2])[0]
            torch.testing.assert_close(out[f"{name}/s"], term.detach() / 2, rtol=1e-9, atol=0)


def test_edges_are_enhanced_as_pillow_does() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 3, 17, 23), generator=generator, dtype=torch.uint8)
    images[1] = images[1] // 32 + 100  # nothing is clipped
    images[2, :, 5:9] = 255
    images[3] = images[3] // 128 * 255
    chosen = torch.tensor([True, True, True, True, False, True])
    found = images.clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert enhance_edges_(found, chosen) is found
    for image, took, enhance in zip(images, found, chosen, strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        if enhance:
            picture = picture.filter(ImageFilter.EDGE_ENHANCE)
        assert np.array_equal(np.asarray(picture), took.permute(1, 2, 0).numpy())
    bands = torch.cat([images, images[:, :2]], 1)
    assert torch.equal(enhance_edges_(bands, chosen)[:, :3], found)


def test_edges_of_floating_images_are_those_of_bytes() -> None:
    images = torch.randint(0, 256, (2, 4, 20, 24), dtype=torch.uint8)
    chosen = torch.tensor([True, False])
    found = enhance_edges_(images / 255, chosen)
    bytes_ = enhance_edges_(images.clone(), chosen)
    assert found.dtype == torch.float32 and found.max() <= 1 and found.min() >= 0
    torch.testing.assert_close(found, bytes_ / 255, rtol=0, atol=0.51 / 255)
    assert len(found.unique()) > 256  # not rounded


def test_edges_are_enhanced_before_the_views_are_mixed(make_method, make_batch) -> None:
    batch = make_batch()
    for view in (batch.s1, batch.s2):
        enhance_edges_(view, torch.ones(4, dtype=torch.bool))
    method = make_method("wscl", mixing_probability=1.0, edge_enhance=1.0)
    assert torch.equal(method.mix_strong_views(make_batch(), 3)[0], expected_views(batch, "sdc"))


def test_half_of_the_views_and_of_the_steps(make_method, make_batch, draws) -> None:
    """Each view by a draw of its own, which parts share with the whole; steps by another one."""
    method, batch = make_method("wscl"), make_batch()
    never = make_method("wscl", edge_enhance=0.0, mixing_probability=0.0)
    plain = make_method("wscl", mixing="sc", mixing_probability=0.0)
    parted = make_method("wscl", mixing="sc", mixing_probability=0.0)
    parted.take_parts(2)
    mixed, enhanced = [], []
    for step in range(120):
        boxes = method.mix_strong_views(batch, step)[1].boxes
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        mixed.append(bool(area.any()))
        if mixed[-1]:
            assert ((area - 64 * 64 / 2).abs() <= 32).all() and len(boxes.unique(dim=0)) > 1
        images = plain.mix_strong_views(batch, step)[0]
        halves = [parted.mix_strong_views(part, step)[0] for part in batch.parts(2)]
        assert torch.equal(torch.cat(halves), images)
        enhanced.append((images != batch.s1).flatten(1).any(1))
        assert torch.equal(never.mix_strong_views(batch, step)[0], batch.s1)
    assert 40 < sum(mixed) < 80
    enhanced = torch.stack(enhanced).double()
    assert ((enhanced.mean(0) - 0.5).abs() < 0.17).all()
    assert torch.corrcoef(enhanced.T).fill_diagonal_(0).abs().max() < 0.35


def test_a_step_is_a_function_of_seed_and_step(make_method, make_batch, draws) -> None:
    first, again = make_method("wscl"), make_method("wscl")
    torch.manual_seed(99)
    expected = first(make_batch(), 4, 10)
    torch.manual_seed(7)
    assert again(make_batch(), 4, 10)["loss"] == expected["loss"]
    assert again(make_batch(), 5, 10)["clip/s"] != expected["clip/s"]


@pytest.mark.parametrize("selection", ["pixel", "mean"])
def test_without_a_real_pixel_labels_alone_are_learnt(make_method, make_batch, selection) -> None:
    method, batch = make_method("wscl", selection=selection, **ALWAYS), make_batch()
    batch.ignore = torch.full_like(batch.ignore, 255)
    out = method(batch, 3, 10)
    assert out["clip/s"] == out["clip/pseudo_valid"] == out["clip/pseudo_confident"] == 0
    labels = sum(supervised(student, batch) for student in method.students.values())
    for found, wanted in zip(gradients(out["loss"], method), gradients(labels, method),
                             strict=True):  # fmt: skip
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)


def test_padding_and_truth_may_be_missing(make_method, make_batch) -> None:
    batch, padded = make_batch(), make_batch()
    batch.ignore = batch.truth = None
    padded.ignore = torch.zeros_like(padded.ignore)
    out = make_method("wscl", **ALWAYS)(batch, 3, 10)
    same = make_method("wscl", **ALWAYS)(padded, 3, 10)
    assert "clip/pseudo_correct" not in out and "clip/pseudo_correct" in same
    assert all(torch.equal(value, same[key]) for key, value in out.items())
    assert out["clip/pseudo_valid"] == 4 * 64 * 64


def test_it_learns(make_method, make_batch) -> None:
    method = make_method("wscl", edge_enhance=0.5, mixing_probability=1.0)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=2e-3)
    batch, seen = make_batch(), []
    batch.x //= 4
    batch.x[:, :, :, 32:] += 150
    batch.y = (batch.x[:, 0] > 100).to(torch.uint8)
    for _ in range(12):
        out = method(batch, 3, 10)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        seen.append({key: float(value.detach()) for key, value in out.items()})
    for key in ("loss", "clip/x", "clip/s", "ssm/x", "ssm/s"):
        assert seen[-1][key] < 0.8 * seen[0][key], key


@pytest.mark.parametrize("option", [{"share": 0.0}, {"share": 1.1}, {"mixing": "cs"},
                                    {"edge_enhance": 1.5}, {"mixing_probability": -0.1},
                                    {"selection": "all"}, {"supervised_weight": 0.0}])  # fmt: skip
def test_options_out_of_range(option) -> None:
    with pytest.raises(ValidationError, match=next(iter(option))):
        get_method("wscl").Config(**option)
