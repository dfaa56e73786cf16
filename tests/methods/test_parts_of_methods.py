"""What methods are made of: entropies, quantiles, boxes, and modules of their own."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from co2s_fast.engine.config import TrainConfig
from co2s_fast.engine.optimizer import build_optimizer
from co2s_fast.methods.base import Method, MethodConfig, seeded_init, step_generator
from co2s_fast.methods.boxes import half_area_boxes
from co2s_fast.methods.quantiles import entropy, pooled_quantile


def test_entropy_is_of_the_upsampled_logits() -> None:
    logits = torch.randn(3, 5, 4, 6, dtype=torch.float64) * 4
    p = F.interpolate(logits, (16, 24), mode="bilinear").softmax(1)
    torch.testing.assert_close(entropy(logits, (16, 24)), -(p * p.log()).sum(1))
    flat = entropy(torch.zeros(1, 7, 2, 2), (4, 4))
    torch.testing.assert_close(flat, torch.full((1, 4, 4), math.log(7)))
    sure = entropy(torch.tensor([1e4, -1e4])[None, :, None, None], (1, 1))
    assert sure.item() == 0 and sure.dtype == torch.float32
    assert entropy(logits.bfloat16().requires_grad_(), (8, 8)).requires_grad is False


@pytest.mark.parametrize("share", [0.0, 0.2, 0.73, 1.0])
def test_a_quantile_is_of_the_counted_pixels_alone(share) -> None:
    values = torch.randn(2, 9, 11, dtype=torch.float64)
    counted = torch.rand(2, 9, 11) < 0.6
    expected = torch.quantile(values[counted], share)
    torch.testing.assert_close(pooled_quantile(values, counted, share), expected)
    share = torch.tensor(share, dtype=torch.float64)
    torch.testing.assert_close(pooled_quantile(values, counted, share), expected)


def test_a_quantile_of_more_pixels_than_a_float_counts() -> None:
    values = torch.zeros(2**24 + 4)
    values[-1] = 1
    counted = torch.ones((), dtype=torch.bool).expand_as(values)
    assert pooled_quantile(values, counted, 1.0) == 1


def test_a_quantile_of_few_or_no_pixels() -> None:
    values, none = torch.rand(2, 4, 4), torch.zeros(2, 4, 4, dtype=torch.bool)
    assert pooled_quantile(values, none, 0.2) == torch.inf
    one = none.clone()
    one[1, 2, 3] = True
    assert pooled_quantile(values, one, 0.9) == values[1, 2, 3]


@pytest.mark.parametrize("size", [(64, 64), (33, 50), (4, 4)])
def test_boxes_cover_half_an_image_and_lie_in_it(size) -> None:
    height, width = size
    boxes = half_area_boxes(2000, size, step_generator(0)).long()
    x1, y1, x2, y2 = boxes.unbind(1)
    assert (x1 >= 0).all() and (y1 >= 0).all() and (x2 <= width).all() and (y2 <= height).all()
    wide, high = x2 - x1, y2 - y1
    assert (wide.min(), wide.max()) == (width // 2 + 1, width - 1)
    assert ((wide * high - height * width / 2).abs() <= wide / 2).all()
    if size == (64, 64):  # uniform: the mean of U{33..63}, and of a place between none and all
        assert abs(wide.double().mean() - 48) < 1
        assert abs((x1 / (width - wide).clamp(min=1)).mean() - 0.5) < 0.02


def test_boxes_are_drawn_for_the_global_batch(monkeypatch) -> None:
    whole = half_area_boxes(8, (32, 32), step_generator(3))
    parts = [half_area_boxes(4, (32, 32), step_generator(3), part, 2) for part in range(2)]
    assert torch.equal(torch.cat(parts), whole)
    ranks = []
    for rank in range(2):
        monkeypatch.setattr("co2s_fast.methods.base.rank_and_world", lambda rank=rank: (rank, 2))
        ranks += [half_area_boxes(2, (32, 32), step_generator(3), part, 2) for part in range(2)]
    assert torch.equal(torch.cat(ranks), whole)


def test_initial_weights_follow_their_seed_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    with seeded_init(5, 2):
        first = nn.Linear(3, 3).weight
    assert torch.equal(torch.rand(1), expected)
    with seeded_init(5, 2):
        assert torch.equal(nn.Linear(3, 3).weight, first)
    with seeded_init(6, 2):
        assert not torch.equal(nn.Linear(3, 3).weight, first)


class OwnConfig(MethodConfig):
    name: Literal["own"] = "own"


class Own(Method):
    """A scale of its own for each student, a frozen one beside it, and one value that is a loss."""

    name: ClassVar[str] = "own"
    Config: ClassVar[type[MethodConfig]] = OwnConfig
    views: ClassVar[frozenset[str]] = frozenset({"x", "w"})

    def __init__(self, students, config, *, seed=0):
        super().__init__(students, config, seed=seed)
        self.scales = nn.ModuleDict({name: nn.Linear(1, 1) for name in students})
        self.fixed = nn.ModuleDict(
            {name: nn.Linear(1, 1).requires_grad_(False) for name in students}
        )

    def forward(self, batch, step, total_steps):
        terms = self.loss_terms()
        counted = batch.y != 255
        for name, student in self.students.items():
            scale = self.scales[name].weight.sum()
            self.add_value(terms, f"{name}/value", 0.5, scale)
            losses = scale * (batch.y * counted).to(scale.dtype)
            self.add_pixels(terms, f"{name}/pixels", 2.0, losses, counted)
            self.add_supervised(terms, name, student(batch.x), batch.y)
        return terms.finish()


def test_modules_of_a_method_learn_and_are_saved(students) -> None:
    method = Own(students(), OwnConfig())
    own = method.own_parameters()
    assert {label: len(found) for label, found in own.items()} == {"clip/scales": 2,
                                                                  "ssm/scales": 2}
    assert set(own["ssm/scales"]) == set(method.scales["ssm"].parameters())
    state = method.own_state()
    assert state.keys() == {f"{module}.{student}.{name}" for module in ("scales", "fixed")
                            for student in ("clip", "ssm") for name in ("weight", "bias")}
    train = TrainConfig(steps=1, lr=1e-3, decoder_multiplier=5, weight_decay=0.25)
    groups = build_optimizer(method.students, train, own).param_groups[-2:]
    assert [group["name"] for group in groups] == ["clip/scales", "ssm/scales"]
    for group in groups:
        assert (group["lr"], group["initial_lr"], group["weight_decay"]) == (5e-3, 5e-3, 0.25)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("parts", [1, 2])
def test_values_and_maps_are_means_however_a_batch_is_shared(
    students, make_batch, shards, parts
) -> None:
    method = Own(students(), OwnConfig(mean_shards=shards))
    method.take_parts(parts)
    batch, out = make_batch(), {}
    for part in batch.parts(parts):
        for key, value in method(part, 0, 10).items():
            out[key] = out.get(key, 0) + value
    halves = batch.y.chunk(max(shards, parts))
    means = [(half * (half != 255)).sum() / (half != 255).sum() for half in halves]
    for name, module in method.scales.items():
        scale = module.weight.sum().detach()
        torch.testing.assert_close(out[f"{name}/value"], scale)
        torch.testing.assert_close(out[f"{name}/pixels"], scale * sum(means) / len(means))
        expected = 0.5 * (scale + out[f"{name}/x"]) + 2 * out[f"{name}/pixels"]
        torch.testing.assert_close(out[f"{name}/total"], expected)
    out["loss"].backward()
    assert all(p.grad is not None for found in method.own_parameters().values() for p in found
               if p is not method.scales["clip"].bias and p is not method.scales["ssm"].bias)
