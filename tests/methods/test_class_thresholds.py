"""Thresholds of each class: the numbers by hand, what passes, padding, state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from co2s_fast.losses import softmax_confidence
from co2s_fast.methods.class_thresholds import ClassThresholds


def two_classes() -> torch.Tensor:
    """Class 0 predicted with logit margin 4 in the upper half, class 1 with margin 1 below."""
    logits = torch.zeros(1, 2, 4, 4)
    logits[:, 0, :2], logits[:, 1, 2:] = 4.0, 1.0
    return logits


def test_numbers_by_hand() -> None:
    logits = two_classes()
    thresholds = ClassThresholds(2, strength=0.5, momentum=0.75)
    confidence, label = softmax_confidence(logits)
    rated = thresholds(logits, confidence, label, None)
    high, low = torch.sigmoid(torch.tensor([4.0, 1.0]))
    mean = 0.75 * 0.5 + 0.25 * torch.stack([high, low])
    torch.testing.assert_close(thresholds.mean, mean)
    expected = (low / (mean[1] / mean[0]).sqrt()).clamp(max=1).expand(2, 4)
    torch.testing.assert_close(rated[0, 2:], expected)
    torch.testing.assert_close(rated[0, :2], confidence[0, :2])


def test_a_hard_class_passes_with_less_confidence() -> None:
    logits = two_classes()
    thresholds = ClassThresholds(2, strength=1.0)
    confidence, label = softmax_confidence(logits, label_dtype=torch.uint8)
    assert not (confidence[0, 2:] >= 0.95).any()
    for _ in range(200):
        rated = thresholds(logits, confidence, label, None)
    assert (rated >= 0.95).all() and rated.max() <= 1
    torch.testing.assert_close(rated[0, :2], confidence[0, :2])


def test_padding_and_unseen_classes_change_nothing() -> None:
    logits = two_classes()
    thresholds = ClassThresholds(2, strength=1.0)
    confidence, label = softmax_confidence(logits)
    ignore = torch.zeros(1, 4, 4, dtype=torch.uint8)
    ignore[:, 2:] = 255
    thresholds(logits, confidence, label, ignore)
    assert thresholds.mean[1] == 0.5 < thresholds.mean[0]


def test_padding_of_a_batch_changes_nothing(make_method, make_batch) -> None:
    method, batch = make_method("unimatch", class_thresholds=1.0), make_batch()
    before = method.own_state()["thresholds.clip.mean"].clone()
    batch.ignore.fill_(255)
    method(batch, 5, 10)
    torch.testing.assert_close(method.own_state()["thresholds.clip.mean"], before)


def random_logits() -> torch.Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def take_in(logits: torch.Tensor) -> torch.Tensor:
    """The means after a batch."""
    thresholds = ClassThresholds(3, strength=1.0)
    thresholds(logits, *softmax_confidence(logits), None)
    return thresholds.mean


def _worker(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank,
                            world_size=2)  # fmt: skip
    torch.save(take_in(random_logits()[rank : rank + 1]), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_have_the_means_of_one(tmp_path) -> None:
    torch.multiprocessing.spawn(_worker, (tmp_path,), nprocs=2)
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), take_in(random_logits()))


@pytest.mark.parametrize("name", ["fixmatch", "unimatch", "co2s"])
def test_only_where_it_is_asked_for(make_method, make_batch, name) -> None:
    assert make_method(name).own_state() == {}
    method = make_method(name, class_thresholds=1.0)
    assert set(method.own_state()) == {"thresholds.clip.mean", "thresholds.ssm.mean"}
    before = {key: value.clone() for key, value in method.own_state().items()}
    method(make_batch(), 5, 10)
    assert all(not torch.equal(v, before[k]) for k, v in method.own_state().items())


def test_a_pixel_that_is_not_a_number_does_not_stay() -> None:
    thresholds = ClassThresholds(2, strength=1.0)
    clean = two_classes()
    confidence, label = softmax_confidence(clean)
    broken = clean.clone()
    broken[0, 0, 0, 0] = float("nan")
    thresholds(broken, confidence, label, None)
    assert thresholds.mean.isfinite().all()
    assert thresholds(clean, confidence, label, None).isfinite().all()
