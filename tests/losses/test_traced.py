"""The losses in graphs that serve any size and any threshold."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx

from co2s_fast.losses import masked_cross_entropy, softmax_confidence, stability_loss

THRESHOLDS = [0.5 + 0.01 * step for step in range(10)]


def logits(seed=0):
    return torch.randn(2, 5, 6, 7, generator=torch.Generator().manual_seed(seed))


def confidence_of(z, image):
    return softmax_confidence(z, image.shape[-2:])[0]


def stability_of(z, image):
    return stability_loss(z, z.flip(0), threshold=0.3, size=image.shape[-2:])[0]


@pytest.fixture(params=[confidence_of, stability_of])
def function(request):
    return request.param


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_compiled_graph_serves_any_size(function, dynamic):
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=dynamic)
    for step in range(5):
        image = torch.empty(1, 1, 24 + step, 30 + step)
        torch.testing.assert_close(compiled(logits(), image), function(logits(), image))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_serves_any_size(function, strict):
    class Module(torch.nn.Module):
        def forward(self, z, image):
            return function(z, image)

    sizes = {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    program = torch.export.export(Module(), (logits(), torch.empty(1, 1, 24, 30)), strict=strict,
                                  dynamic_shapes=({}, sizes))  # fmt: skip
    other = torch.empty(1, 1, 29, 17)
    torch.testing.assert_close(program.module()(logits(), other), function(logits(), other))


def test_symbolic_tracing(function):
    image = torch.empty(1, 1, 24, 30)
    graph = make_fx(function, tracing_mode="symbolic")(logits(), image)
    torch.testing.assert_close(graph(logits(), image), function(logits(), image))


def test_a_compiled_graph_serves_any_threshold():
    """As schedules and adaptive thresholds want it."""
    torch._dynamo.reset()
    label = torch.randint(5, (2, 6, 7), generator=torch.Generator().manual_seed(1))
    confidence = torch.rand(2, 6, 7, generator=torch.Generator().manual_seed(2))

    def loss(z, threshold):
        return masked_cross_entropy(z, label, confidence, threshold=threshold)

    counter = CompileCounter()
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for threshold in THRESHOLDS:
        torch.testing.assert_close(compiled(logits(), threshold), loss(logits(), threshold))
    assert counter.frame_count <= 2
