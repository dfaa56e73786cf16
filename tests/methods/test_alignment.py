"""Distribution alignment: the numbers by hand, what it does to pseudo-labels, padding, state."""

from __future__ import annotations

import pytest
import torch

from co2s_fast.methods.alignment import FLOOR, DistributionAlignment


def test_numbers_by_hand() -> None:
    align = DistributionAlignment(3, strength=0.5, momentum=0.75)
    logits = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0, 0, 0, 1, 255, 255, 255, 255], dtype=torch.uint8).view(1, 2, 4)
    shifted = align(logits, target, None)
    labeled = 0.75 / 3 + 0.25 * torch.tensor([0.75, 0.25, 0.0])
    predicted = 0.75 / 3 + 0.25 * logits.softmax(1).mean((0, 2, 3))
    shift = 0.5 * ((labeled + FLOOR).log() - (predicted + FLOOR).log())
    torch.testing.assert_close(shifted, logits + shift.view(1, 3, 1, 1))
    assert not shifted.requires_grad


def test_an_over_predicted_class_loses_confidence() -> None:
    align = DistributionAlignment(2, strength=1.0)
    logits = torch.tensor([3.2, 0.0]).view(1, 2, 1, 1).expand(1, 2, 4, 4)
    target = torch.tensor([[[0, 1]]], dtype=torch.uint8)
    before = logits.softmax(1).amax()
    for _ in range(100):
        shifted = align(logits, target, None)
    assert before > 0.95 > shifted.softmax(1).amax()


def test_padding_and_ignored_labels_count_for_nothing() -> None:
    align = DistributionAlignment(2, strength=1.0)
    logits = torch.zeros(1, 2, 2, 2)
    logits[..., 1, :] = torch.tensor([50.0, 0.0]).view(2, 1)
    ignore = torch.zeros(1, 8, 8, dtype=torch.uint8)
    ignore[:, 4:] = 255
    nothing = torch.full((1, 8, 8), 255, dtype=torch.uint8)
    align(logits, nothing, ignore)
    assert align.labeled.tolist() == [0.5, 0.5] == align.predicted.tolist()
    align(logits, nothing, torch.full_like(ignore, 255))
    assert align.predicted.tolist() == [0.5, 0.5]
    align(logits, nothing, None)
    assert align.predicted[0] > 0.5


@pytest.mark.parametrize("name", ["fixmatch", "unimatch", "co2s"])
def test_only_where_it_is_asked_for(make_method, make_batch, name) -> None:
    without = make_method(name)
    assert without.own_state() == {}
    method = make_method(name, distribution_alignment=1.0)
    assert set(method.own_state()) == {
        f"alignment.{s}.{b}" for s in ("clip", "ssm") for b in ("labeled", "predicted")
    }
    before = {key: value.clone() for key, value in method.own_state().items()}
    aligned, plain = method(make_batch(), 5, 10), without(make_batch(), 5, 10)
    assert aligned["clip/x"] == plain["clip/x"]
    assert aligned["clip/s1"] != plain["clip/s1"]
    assert all(not torch.equal(v, before[k]) for k, v in method.own_state().items())
