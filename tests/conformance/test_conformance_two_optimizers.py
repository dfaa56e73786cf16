"""The stability loss where each student has a backward call and an optimizer of its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from co2s_fast.losses import stability_loss, stability_terms

SIZES = [None, (10, 11)]


@pytest.fixture(params=SIZES, ids=["equal", "up"])
def size(request):
    return request.param


def students(target):
    """Two networks whose outputs are sure enough to teach, and their input."""
    generator = torch.Generator().manual_seed(0)
    nets = [nn.Conv2d(3, 4, 1) for _ in "ab"]
    for net in nets:
        with torch.no_grad():
            net.weight.copy_(4 * torch.randn(net.weight.shape, generator=generator))
    x = torch.randn(2, 3, 5, 6, generator=generator)
    return [net.to(target.device) for net in nets], x.to(target.device)


def losses(nets, x, size, terms=False):
    function = stability_terms if terms else stability_loss
    return function(nets[0](x), nets[1](x), threshold=0.5, size=size)[:2]


def gradients(nets):
    return [None if net.weight.grad is None else net.weight.grad.clone() for net in nets]


def reset(nets):
    for net in nets:
        net.zero_grad(set_to_none=True)


@pytest.mark.parametrize("terms", [False, True])
@pytest.mark.parametrize("first", [0, 1])
def test_one_backward_call_each(target, size, terms, first):
    nets, x = students(target)
    a, b = losses(nets, x, size, terms)
    (2 * a + 3 * b).backward()
    wanted = gradients(nets)
    assert all(gradient.abs().sum() > 0 for gradient in wanted)
    reset(nets)
    both = losses(nets, x, size, terms)
    ((2, 3)[first] * both[first]).backward()
    assert nets[1 - first].weight.grad is None  # nor zeros, on which an optimizer would act
    ((3, 2)[first] * both[1 - first]).backward()
    for ours, gradient in zip(gradients(nets), wanted, strict=True):
        torch.testing.assert_close(ours, gradient)


@pytest.mark.parametrize("total", [
    lambda a, b: a + b, lambda a, b: 0.5 * (a + b), lambda a, b: 2 * a + 3 * b,
    lambda a, b: torch.stack([a, b]).sum(), lambda a, b: a, lambda a, b: 3 * b,
    lambda a, b: 0 * a + b,
], ids=["sum", "mean", "weighted", "stacked", "a", "b", "no a"])  # fmt: skip
def test_in_one_call_with_any_weights(target, size, total):
    nets, x = students(target)
    plain = [net(x) for net in nets]
    if size is not None:
        plain = [nn.functional.interpolate(z, size, mode="bilinear") for z in plain]
    p, q = (z.softmax(1) for z in plain)
    c, d = (z.amax(1).detach() for z in (p, q))
    a = (p - q.detach()).square().mean(1)[(d >= 0.5) & (d >= c)].mean()
    b = (q - p.detach()).square().mean(1)[(c >= 0.5) & (c >= d)].mean()
    total(a, b).backward()
    wanted = gradients(nets)
    reset(nets)
    total(*losses(nets, x, size)).backward()
    for ours, gradient in zip(gradients(nets), wanted, strict=True):
        assert (ours is None) == (gradient is None)
        if ours is not None:
            torch.testing.assert_close(ours, gradient, rtol=1e-4, atol=1e-6)


def test_again_while_the_graph_is_kept(target, size):
    nets, x = students(target)
    a, b = losses(nets, x, size)
    (a + b).backward(retain_graph=True)
    once = gradients(nets)
    (2 * a + b).backward(retain_graph=True)
    a.backward(retain_graph=True)
    b.backward()
    for ours, gradient, times in zip(gradients(nets), once, (4, 3), strict=True):
        torch.testing.assert_close(ours, times * gradient)


def test_one_student_alone_learns(target, size):
    nets, x = students(target)
    a, b = losses(nets, x, size)
    (a + b).backward()
    wanted = gradients(nets)
    for learner in (0, 1):
        reset(nets)
        nets[1 - learner].requires_grad_(False)
        both = losses(nets, x, size)
        assert [each.requires_grad for each in both] == [learner == 0, learner == 1]
        sum(both).backward()
        torch.testing.assert_close(nets[learner].weight.grad, wanted[learner])
        assert nets[1 - learner].weight.grad is None
        nets[1 - learner].requires_grad_(True)


def test_both_gradients_come_of_one_pass_where_both_are_wanted(target):
    """On equal grids, where nothing is saved: half the work of one pass each."""
    nets, x = students(target)
    calls = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(str(func))
            return func(*args, **(kwargs or {}))

    def passes(*backward_calls):
        reset(nets)
        a, b = losses(nets, x, None)
        calls.clear()
        with Count():
            for call in backward_calls:
                call(a, b).backward()
        return sum("stability_loss_backward" in name for name in calls)

    assert passes(lambda a, b: a + b) == 1
    assert passes(lambda a, b: 0.5 * sum([a, b])) == 1
    assert passes(lambda a, b: a, lambda a, b: b) == 2


def test_the_losses_may_be_added_to_in_place(target):
    nets, x = students(target)
    a, b = losses(nets, x, None)
    a += b
    a.backward()
    assert all(gradient is not None for gradient in gradients(nets))
