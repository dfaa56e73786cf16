"""The released training step: partners of the same image, a mean a GPU, no stability gradient.

Against the stored values of the released loop, and against the same step written out plainly.
"""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from co2s_fast.data import Batch
from co2s_fast.engine.config import load_config
from co2s_fast.errors import UsageError
from co2s_fast.methods.base import channel_keep_masks, step_generator
from co2s_fast.methods.co2s import Co2S
from co2s_fast.methods.ramp import cosine_ramp
from co2s_fast.methods.unimatch import UniMatchConfig

RELEASED = {"stability_gradient": "none", "stability_padding": "include",
            "cutmix_partner": "same-image"}  # fmt: skip
VIEWS = ("x", "w", "s1", "s2", "w_fp")


class Recorded(nn.Module):
    """A student whose logits were stored: of its five views, and of the partners' weak view."""

    class config:
        feature_dropout = 0.5

    def __init__(self, views: dict[str, torch.Tensor], other: torch.Tensor) -> None:
        super().__init__()
        self.num_classes = other.shape[1]
        self.views = nn.ParameterDict({k: nn.Parameter(v.clone()) for k, v in views.items()})
        self.other = nn.Parameter(other.clone())

    def features(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        return (images.float(),)

    def perturb(self, features, generator=None, keep=None):
        return features

    def decode(self, features) -> torch.Tensor:
        if len(features[0]) == len(self.other):
            return self.other * 1
        return torch.cat([self.views[view] for view in VIEWS])


def boxes_of(masks: np.ndarray) -> torch.Tensor:
    """Boxes of 0/1 masks, and as many empty ones for the partners."""
    boxes = torch.zeros(2 * len(masks), 4, dtype=torch.int32)
    for box, mask in zip(boxes, masks, strict=False):
        rows, columns = mask.nonzero()
        if len(rows):
            box[:] = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    return boxes


@pytest.mark.parametrize("case", ["k6_fp32", "k6_edge"])
def test_values_and_gradients_of_the_released_loop(golden, case) -> None:
    file = golden("losses.npz")

    def stored(key: str) -> np.ndarray:
        return file[f"loop/{case}/{key}"]

    def logits(student: str, view: str) -> torch.Tensor:
        return torch.from_numpy(stored(f"logits/{student}/{view}").astype(np.float32))

    names = {"clip": "clip", "ssm": "dino"}
    students = {
        ours: Recorded({view: logits(theirs, view) for view in VIEWS}, logits(theirs, "w_other"))
        for ours, theirs in names.items()
    }
    weight = float(stored("scalar/pixelwise/stab_weight"))
    config = load_config("own", compat="official-train").method
    # The recorded loop ran on one process, at a step where λ(t) has the stored value.
    of_this_step = {"mean_shards": 1, "stability_weight": weight, "stability_ramp": 0.0}
    method = Co2S(students, config.model_copy(update=of_this_step))
    images = torch.zeros(6, 3, 40, 40, dtype=torch.uint8)
    strong = images.clone()
    if case == "k6_fp32":
        strong[0] = torch.from_numpy(stored("img/s1"))[0]
        strong[3] = torch.from_numpy(stored("img/s1_other"))[0]
    batch = Batch(
        x=images[:3], y=torch.from_numpy(stored("mask_x")), w=images, s1=strong, s2=images.clone(),
        ignore=torch.from_numpy(
            np.concatenate([stored("ignore_mask"), stored("ignore_mask_other")])
        ),
        boxes1=boxes_of(stored("mix1")), boxes2=boxes_of(stored("mix2")),
    )  # fmt: skip
    out = method(batch, 5, 10)
    if case == "k6_fp32":
        assert torch.equal(batch.s1[:1], torch.from_numpy(stored("img/s1_mixed")))
    out["loss"].backward()
    for ours, theirs in names.items():
        for term in ("x", "s1", "s2", "fp", "total"):
            expected = float(stored(f"scalar/pixelwise/{theirs}/{term}"))
            assert out[f"{ours}/{term}"].item() == pytest.approx(expected, rel=1e-5), term
        raw = float(stored(f"scalar/stab/{theirs}/raw"))
        assert out[f"{ours}/stability"].item() == pytest.approx(raw, rel=1e-5)
        for view in VIEWS:
            found = students[ours].views[view].grad
            if view == "w":
                assert not found.any(), "the weak view learns"
                continue
            expected = torch.from_numpy(stored(f"grad_total/{theirs}/{view}"))
            room = 1e-5 * float(expected.abs().max().clamp(min=1e-12))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=room)
        assert students[ours].other.grad is None


@pytest.fixture
def make_double_batch(make_batch):
    """A batch whose unlabelled half is followed by its second augmentation."""

    def build(size: int = 4) -> Batch:
        first, second = make_batch(size, seed=0), make_batch(size, seed=1)
        both = {
            f.name: torch.cat([getattr(first, f.name), getattr(second, f.name)])
            for f in fields(Batch)
            if f.name not in ("x", "y") and isinstance(getattr(first, f.name), torch.Tensor)
        }
        names = [str(i) for i in range(size)]
        return replace(first, **both, unlabeled_files=names * 2)

    return build


def written_out(method: Co2S, batch: Batch, step: int, total: int, shards: int) -> dict:
    """The released step: view by view, shard by shard, on full-size logits."""
    size, config = len(batch.x), method.config
    pixels = batch.x.shape[-2:]

    def full(logits: torch.Tensor) -> torch.Tensor:
        return F.interpolate(logits, pixels, mode="bilinear", align_corners=False)

    inside = {}
    for view in ("1", "2"):
        mask = torch.zeros(size, *pixels, dtype=torch.bool)
        for image, (x1, y1, x2, y2) in enumerate(getattr(batch, f"boxes{view}")[:size].tolist()):
            mask[image, y1:y2, x1:x2] = True
        inside[view] = mask
    result: dict[str, torch.Tensor] = {}
    weak = {}
    for index, (name, student) in enumerate(method.students.items()):
        with torch.no_grad():
            conf_mate, label_mate = full(student(batch.w[size:])).softmax(1).max(1)
        z_x, z_w = full(student(batch.x)), full(student(batch.w[:size]))
        features = student.features(batch.w[:size])
        keep = channel_keep_masks(features, 0.5, step_generator(method.seed, step, index))
        z_fp = full(student.decode(student.perturb(features, keep=keep)))
        weak[name] = z_w.detach()
        conf, label = weak[name].softmax(1).max(1)
        views = {"fp": (z_fp, label, conf, batch.ignore[:size])}
        for view, mask in inside.items():
            images = getattr(batch, f"s{view}")
            mixed = torch.where(mask[:, None], images[size:], images[:size])
            views[f"s{view}"] = (
                full(student(mixed)), torch.where(mask, label_mate, label),
                torch.where(mask, conf_mate, conf),
                torch.where(mask, batch.ignore[size:], batch.ignore[:size]),
            )  # fmt: skip
        terms = {}
        step_by = size // shards
        parts = [slice(i, i + step_by) for i in range(0, size, step_by)]
        terms["x"] = [F.cross_entropy(z_x[p], batch.y[p].long(), ignore_index=255) for p in parts]
        for view, (z, y, c, ignored) in views.items():
            loss = F.cross_entropy(z, y, reduction="none") * ((c >= config.threshold)
                                                              & (ignored != 255))  # fmt: skip
            terms[view] = [loss[p].sum() / (ignored[p] != 255).sum() for p in parts]
        means = {key: torch.stack(values).mean() for key, values in terms.items()}
        result |= {f"{name}/{key}": value for key, value in means.items()}
        result[f"{name}/total"] = 0.5 * (
            means["x"] + 0.25 * means["s1"] + 0.25 * means["s2"] + 0.5 * means["fp"]
        )
    ramp = cosine_ramp(step, total, 0.5, config.stability_ramp)
    for mine, other in (("clip", "ssm"), ("ssm", "clip")):
        p, q = weak[mine].softmax(1), weak[other].softmax(1)
        mask = (q.amax(1) >= config.threshold) & (q.amax(1) >= p.amax(1))
        distance = (p - q).square().mean(1)
        values = [(distance[s] * mask[s]).sum() / mask[s].sum() for s in parts]
        result[f"{mine}/stability"] = torch.stack(values).mean()
        result[f"{mine}/total"] = result[f"{mine}/total"] + ramp * result[f"{mine}/stability"]
    return result | {"loss": result["clip/total"] + result["ssm/total"]}


def gradients(method: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    method.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in method.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_equals_the_step_written_out(make_method, make_double_batch, shards) -> None:
    method = make_method(**RELEASED, mean_shards=shards, stability_ramp=0.0).double()
    expected = written_out(method, make_double_batch(), 7, 20, shards)
    slopes = gradients(method, expected["loss"])
    found = method(make_double_batch(), 7, 20)
    assert gradients(method, found["loss"]).keys() == slopes.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-12, msg=key)
    for name, value in gradients(method, method(make_double_batch(), 7, 20)["loss"]).items():
        torch.testing.assert_close(value, slopes[name], rtol=1e-6, atol=1e-10, msg=name)
    assert found["clip/stability"] + found["ssm/stability"] > 0
    assert all(found[f"{s}/{t}"] > 0 for s in ("clip", "ssm") for t in ("x", "fp", "s1", "s2"))


def test_a_mean_of_shards_is_another_number(make_method, make_batch) -> None:
    whole, shards = (
        make_method(mean_shards=n).double()(make_batch(), 3, 10)["loss"] for n in (1, 2)
    )  # fmt: skip
    assert not torch.isclose(whole, shards, rtol=1e-6, atol=0)


def test_partners_in_the_batch_may_be_in_another_shard(make_method, make_batch) -> None:
    """Equal counts in every shard: then the mean of means is the mean."""
    losses = []
    for shards in (1, 4):
        method, batch = make_method(mean_shards=shards).double(), make_batch()
        batch.y[batch.y == 255] = 0
        batch.ignore.zero_()
        out = method(batch, 3, 10)
        losses.append({k: v for k, v in out.items() if "stability" not in k and "tot" not in k})
    for key, value in losses[0].items():
        if key != "loss":
            torch.testing.assert_close(losses[1][key], value, rtol=1e-9, atol=1e-12, msg=key)


def test_counts_are_of_the_batch_proper(make_method, make_double_batch, make_batch) -> None:
    method = make_method(**RELEASED)
    batch = make_double_batch()
    found, plain = method(batch, 3, 10), make_method()(make_batch(), 3, 10)
    for key in ("clip/pseudo_valid", "ssm/pseudo_confident", "clip/pseudo_correct", "clip/fp"):
        assert found[key] == plain[key], key
    assert found["clip/s1"] != plain["clip/s1"]
    assert method.views == {"x", "w", "s1", "s2", "partner"}
    assert make_method().views == {"x", "w", "s1", "s2"}


def test_a_shard_without_pixels_counts_as_zero(make_method, make_double_batch) -> None:
    method, batch = make_method(**RELEASED, mean_shards=4), make_double_batch()
    batch.y[0] = 255
    batch.ignore[[0, 4]] = 255
    loss = method(batch, 3, 10)["loss"]
    assert torch.isfinite(loss)
    assert all(g.isfinite().all() for g in gradients(method, loss).values())


def test_what_cannot_work_is_refused(make_method) -> None:
    with pytest.raises(UsageError, match="mean_shards: 6 images"):
        make_method(mean_shards=4).check_batch(6, 1)
    with pytest.raises(UsageError, match="on 2 processes cannot be divided into 3 shards"):
        make_method(mean_shards=3).check_batch(6, 2)
    assert make_method(**RELEASED, mean_shards=4).check_batch(4, 4) == []
    with pytest.raises(ValueError, match="distribution_alignment needs cutmix_partner 'batch'"):
        UniMatchConfig(cutmix_partner="same-image", distribution_alignment=1.0)
