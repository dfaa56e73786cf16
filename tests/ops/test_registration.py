"""The operators as eager code calls them, against `torch.ops.co2s` itself."""

from __future__ import annotations

import pytest
import torch

from co2s_fast.losses import masked_cross_entropy, stability_loss
from co2s_fast.ops.masked_cross_entropy import masked_cross_entropy as cross_entropy_op
from co2s_fast.ops.stability_loss import stability_loss as stability_op


def logits(seed: int) -> torch.Tensor:
    z = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed)) * 3
    return z.requires_grad_()


def operators():
    target = torch.randint(0, 3, (2, 8, 10), generator=torch.Generator().manual_seed(2))
    maps = (target, None, 0.95, None, 255, None, None, None, False, False)
    pair = (0.4, 8, 10, None, 255, False)
    return {
        "cross_entropy":
            (cross_entropy_op, torch.ops.co2s.masked_cross_entropy, 1, (*maps, True, 0)),
        "stability": (stability_op, torch.ops.co2s.stability_loss, 2, (*pair, True, True, True)),
    }  # fmt: skip


@pytest.mark.parametrize("name", operators())
def test_eager_code_gets_the_operator_and_its_derivative(name):
    eager, operator, students, options = operators()[name]
    results = []
    for call in (eager, operator):
        z = [logits(seed) for seed in range(students)]
        loss, counts, *_ = call(*z, *options)
        assert not counts.requires_grad and counts.min() > 0
        gradients = torch.autograd.grad(loss.sum(), z)
        assert all(gradient.count_nonzero() > 0 for gradient in gradients)
        results.append([loss.detach(), counts, *gradients])
    for got, wanted in zip(*results, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", operators())
def test_a_backward_of_the_operator_itself_leaves_its_results_alone(name):
    _, operator, students, options = operators()[name]
    z = [logits(seed) for seed in range(students)]
    results = operator(*z, *options)
    before = [result.detach().clone() for result in results]
    torch.autograd.grad(results[0].sum() * 3, z)
    assert all(torch.equal(result, kept) for result, kept in zip(results, before, strict=True))


def test_compiled_and_transformed_code_gets_the_operator():
    z, target = logits(0), torch.zeros(2, 8, 10, dtype=torch.int64)
    loss = masked_cross_entropy(z, target)
    graphs = []

    def backend(graph, _inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    compiled = torch.compile(masked_cross_entropy, fullgraph=True, backend=backend)
    assert torch.equal(compiled(z, target), loss)
    assert "co2s.masked_cross_entropy.default" in graphs[0]
    each = torch.func.vmap(lambda z: masked_cross_entropy(z, target))(torch.stack([z, 2 * z]))
    assert torch.equal(each[0], loss) and each[1] != each[0]


def test_only_the_loss_that_is_used_sends_a_gradient():
    a, b = logits(0), logits(1)
    loss_a, _ = stability_loss(a, b, threshold=0.4, size=(8, 10))
    alone = torch.autograd.grad(loss_a, (a, b))
    assert alone[0].count_nonzero() > 0 and alone[1].count_nonzero() == 0
