"""A step's batch in parts, one after another: what adds up to what, and what cannot be."""

from __future__ import annotations

import pytest
import torch

from co2s_fast.data import Batch
from co2s_fast.errors import UsageError
from co2s_fast.methods import METHODS, get_method


def backward(method, batch: Batch, parts: int):
    """Summed outputs of all parts, and the gradients."""
    method.double().take_parts(parts)
    outputs: dict[str, torch.Tensor] = {}
    for part in batch.parts(parts):
        share = method(part, 3, 10)
        share["loss"].backward()
        outputs = {k: outputs.get(k, 0) + v.detach() for k, v in share.items()}
    return outputs, {n: p.grad for n, p in method.named_parameters() if p.grad is not None}


# Others have quantiles and draws of the whole batch, which its shards share and its parts do not.
BY_SHARD = [name for name in METHODS
            if name == "onlysup" or "cutmix_shards" in get_method(name).Config.model_fields]


@pytest.mark.parametrize("name", BY_SHARD)
@pytest.mark.parametrize("shards_kept", [False, True])
def test_parts_add_up_to_a_batch_with_means_by_part(
    make_method, make_batch, name, shards_kept
) -> None:
    """Dropped channels, partners, losses, counts and gradients, as shards of one pass have them."""
    shards = {"mean_shards": 2}
    if name != "onlysup":
        shards["cutmix_shards"] = 2
    expected, gradients = backward(make_method(name, **shards), make_batch(), 1)
    found, summed = backward(make_method(name, **shards if shards_kept else {}), make_batch(), 2)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-12, msg=key)
    assert summed.keys() == gradients.keys() and len(gradients) > 10
    for key, value in gradients.items():
        torch.testing.assert_close(summed[key], value, rtol=1e-7, atol=1e-12, msg=key)
    if name == "co2s":
        assert expected["clip/stability"] > 0 and expected["clip/fp"] > 0
        whole, _ = backward(make_method(name), make_batch(), 1)
        assert not torch.isclose(whole["clip/x"], expected["clip/x"], rtol=1e-6)


def test_parts_of_two_augmentations(make_method, make_batch) -> None:
    """Partners of the same image stay beside it."""
    released = {"cutmix_partner": "same-image", "mean_shards": 2}

    def doubled() -> Batch:
        one, two = make_batch(), make_batch(seed=5)
        names = ("w", "s1", "s2", "ignore", "boxes1", "boxes2", "truth")
        both = {n: torch.cat([getattr(one, n), getattr(two, n)]) for n in names}
        return Batch(x=one.x, y=one.y, **both)

    expected, gradients = backward(make_method("co2s", **released), doubled(), 1)
    found, summed = backward(make_method("co2s", **released), doubled(), 2)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-12, msg=key)
    for key, value in gradients.items():
        torch.testing.assert_close(summed[key], value, rtol=1e-7, atol=1e-12, msg=key)


def test_a_batch_in_parts(make_batch) -> None:
    batch = make_batch()
    batch.labeled_files, batch.unlabeled_files = list("abcd"), list("efgh")
    batch.damaged = ["one"]
    first, second = batch.parts(2)
    assert (first.part, second.part) == (0, 1)
    assert torch.equal(torch.cat([first.s1, second.s1]), batch.s1)
    assert (first.labeled_files, second.unlabeled_files) == (["a", "b"], ["g", "h"])
    assert (first.damaged, second.damaged) == (["one"], [])
    assert second.colours is None
    assert first.x.data_ptr() == batch.x.data_ptr()  # no copy
    assert batch.parts(1)[0] is batch
    with pytest.raises(ValueError, match="4 images cannot be divided into 3 parts"):
        batch.parts(3)


@pytest.mark.parametrize("options", [
    {"distribution_alignment": 1.0, "alignment_prior": 0.5, "consistency_ramp": 0.5},
    {"class_thresholds": 1.0},
])  # fmt: skip
def test_running_means_move_as_far_in_parts(make_method, make_batch, options) -> None:
    half = make_batch(2)
    names = ("x", "y", "w", "s1", "s2", "ignore", "boxes1", "boxes2", "truth")
    twice = Batch(**{n: torch.cat([getattr(half, n)] * 2) for n in names})
    states = []
    for parts in (1, 2):
        method = make_method("co2s", **options)
        fresh = {k: v.double() for k, v in method.own_state().items()}
        backward(method, twice, parts)
        states.append(method.own_state())
    whole, parted = states
    assert len(whole) in (2, 6)
    for key, value in whole.items():
        torch.testing.assert_close(parted[key], value, rtol=1e-6, atol=1e-9, msg=key)
        assert not torch.equal(value, fresh[key]), key


def test_parts_that_cannot_be(make_method) -> None:
    method = make_method("co2s")
    method.take_parts(3)
    with pytest.raises(UsageError, match=r"accumulate: 8 images.* on 1 processes .* 3 equal parts"):
        method.check_batch(8, 1)
    method.take_parts(2)
    assert method.check_batch(8, 2) == []
    (warning,) = method.check_batch(4, 2)
    assert "CutMix does nothing" in warning and "train.accumulate" in warning
    method = make_method("co2s", mean_shards=3)
    method.take_parts(2)
    with pytest.raises(UsageError, match=r"shards: 6 images.* in 2 parts \(train.accumulate\)"):
        method.check_batch(6, 1)
    method = make_method("co2s", cutmix_shards=3)
    method.take_parts(2)
    with pytest.raises(UsageError, match="3 shards cannot be divided among 1 processes in 2 parts"):
        method.check_batch(12, 1)
