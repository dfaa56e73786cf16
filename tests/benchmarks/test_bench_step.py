"""The released way of evaluating the networks gives what ours gives, gradients included."""

from __future__ import annotations

import copy

import pytest
import torch

from benchmarks import bench_step, released

CPU = torch.device("cpu")
OURS = ("co2s_fast.models.layers", "co2s_fast.models.rotary")


@pytest.mark.parametrize("name", ["clip", "ssm"])
def test_released_networks_give_the_same(name):
    student = bench_step.make_students(CPU, tiny=True)[name].double()
    plain = released.with_plain_layers(copy.deepcopy(student))
    assert not [m for m in plain.modules() if type(m).__module__ in OURS]
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (2, 3, 64, 96), generator=generator).byte()
    results = []
    for network, features, decode in (
        (student, student.features, student.decode),
        (plain, lambda x: released.features(plain, x), lambda f: released.decode(plain, f)),
    ):
        logits = decode(features(images))
        upstream = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype)
        logits.backward(upstream.view_as(logits))
        gradients = {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}
        results.append((logits.detach(), gradients))
    (ours, our_gradients), (theirs, their_gradients) = results
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert our_gradients.keys() == their_gradients.keys() and len(our_gradients) > 50
    for key, gradient in our_gradients.items():
        torch.testing.assert_close(gradient, their_gradients[key], rtol=1e-8, atol=1e-11, msg=key)


def test_a_released_step_runs_and_its_networks_are_the_only_difference():
    losses = []
    for ours in (False, True):
        torch.manual_seed(0)  # of the feature dropout
        step = bench_step.eager_step(CPU, tiny=True, crop=64, ours=ours)
        losses.append([float(step()) for _ in range(2)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][0] != losses[0][1]


def test_the_released_step_in_half_precision_is_the_same_step():
    torch.manual_seed(0)
    full = float(bench_step.eager_step(CPU, tiny=True, crop=64)())
    torch.manual_seed(0)
    half = float(bench_step.build("eager_autocast", CPU, tiny=True, crop=64).forward())
    assert half != full and half == pytest.approx(full, rel=0.05)


def test_cudnn_times_its_algorithms_for_the_released_step_alone():
    before, seen = torch.backends.cudnn.benchmark, []

    def step():
        seen.append(torch.backends.cudnn.benchmark)
        raise KeyError

    with pytest.raises(KeyError):
        bench_step.with_tuned_cudnn(step)()
    assert seen == [True] and torch.backends.cudnn.benchmark == before
