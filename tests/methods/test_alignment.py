"""Distribution alignment: the numbers by hand, what it does to pseudo-labels, padding, state."""

from __future__ import annotations

import pytest
import torch

from co2s_fast.methods.alignment import FLOOR, DistributionAlignment
from co2s_fast.methods.fixmatch import FixMatchConfig


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


def test_early_predictions_of_all_students_by_hand() -> None:
    first, second = (DistributionAlignment(3, strength=1.0, momentum=0.5, prior=0.25)
                     for _ in range(2))
    logits = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([[[0, 0, 0, 1]]], dtype=torch.uint8)
    mean = logits.softmax(1).mean((0, 2, 3))
    shifted = first(logits, target, None, taught=0.2, students=(first, second))
    labeled = 0.5 / 3 + 0.5 * torch.tensor([0.75, 0.25, 0.0])
    predicted = 0.5 / 3 + 0.5 * mean
    of_first = 0.6 / 3 + 0.4 * mean  # half of 1 - 0.2 is taken in
    early = (of_first + torch.full((3,), 1 / 3)) / 2
    shift = (0.75 * (labeled + FLOOR).log() + 0.25 * (early + FLOOR).log()
             - (predicted + FLOOR).log())  # fmt: skip
    torch.testing.assert_close(shifted, logits + shift.view(1, 3, 1, 1))
    torch.testing.assert_close(first.early, of_first)
    first(logits + torch.tensor([9.0, 0, 0]).view(1, 3, 1, 1), target, None, taught=1.0)
    torch.testing.assert_close(first.early, of_first)


def test_alone_a_student_has_its_own_early_predictions() -> None:
    logits = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([[[0, 0, 0, 1]]], dtype=torch.uint8)
    alone, listed = (DistributionAlignment(3, strength=1.0, prior=0.5) for _ in range(2))
    torch.testing.assert_close(alone(logits, target, None, taught=0.0),
                               listed(logits, target, None, taught=0.0, students=[listed]))


def test_what_students_predict_early_is_no_ground_to_align_to_without_a_ramp() -> None:
    with pytest.raises(ValueError, match="alignment_prior needs consistency_ramp > 0, found 0"):
        FixMatchConfig(distribution_alignment=1.0, alignment_prior=0.5)
    FixMatchConfig(alignment_prior=0.5)  # aligns to nothing
    FixMatchConfig(distribution_alignment=1.0, alignment_prior=0.5, consistency_ramp=0.3)


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


def test_padding_of_a_batch_counts_for_nothing(make_method, make_batch) -> None:
    method, batch = make_method("unimatch", distribution_alignment=1.0), make_batch()
    before = method.own_state()["alignment.clip.predicted"].clone()
    batch.ignore.fill_(255)
    method(batch, 5, 10)
    torch.testing.assert_close(method.own_state()["alignment.clip.predicted"], before)


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


def test_early_predictions_are_taken_in_as_far_as_the_ramp_leaves(make_method, make_batch) -> None:
    method = make_method("co2s", distribution_alignment=1.0, alignment_prior=0.5,
                         consistency_ramp=0.5)  # fmt: skip
    states = []
    for step in (0, 2, 5):
        method(make_batch(), step, 10)
        states.append(method.own_state()["alignment.clip.early"].clone())
    uniform = torch.full_like(states[0], 1 / len(states[0]))
    assert not torch.equal(states[0], uniform)
    assert not torch.equal(states[1], states[0])
    assert torch.equal(states[2], states[1])


def test_early_predictions_of_one_student_count_for_the_others(make_method, make_batch) -> None:
    found = []
    for early in ([1 / 3, 1 / 3, 1 / 3], [0.98, 0.01, 0.01]):
        method = make_method("co2s", distribution_alignment=1.0, alignment_prior=0.9,
                             consistency_ramp=0.5)  # fmt: skip
        method.own_state()["alignment.ssm.early"].copy_(torch.tensor(early))
        found.append(int(method(make_batch(), 0, 10)["clip/pseudo_class_0"]))
    assert found[1] > found[0]
