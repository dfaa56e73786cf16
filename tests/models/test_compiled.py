"""torch.compile region by region: the same results, and one graph for all blocks of a kind."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch

from co2s_fast.models import build_student, tiny_clip_config, tiny_ssm_config
from co2s_fast.models.compiled import compile_student

CLASSES = [SimpleNamespace(name=f"c{i}", concepts=[f"c{i}"]) for i in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize(("make", "graphs"), [(tiny_clip_config, 3), (tiny_ssm_config, 2)])
def test_blocks_share_a_graph(make, graphs, monkeypatch):
    captured = []

    def backend(graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        captured.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    student = build_student(make(), CLASSES, seed=0)
    names = list(student.state_dict())
    images = torch.rand(2, 3, 64, 64)
    found = []
    for compiled in (False, True):
        if compiled:
            compile_student(student)
        student.zero_grad()
        out = student(images)
        out.sum().backward()
        gradients = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
        found.append((out.detach(), gradients))
    (plain, plain_gradients), (ours, our_gradients) = found
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    assert our_gradients.keys() == plain_gradients.keys()
    for name, gradient in our_gradients.items():
        torch.testing.assert_close(gradient, plain_gradients[name], rtol=1e-3, atol=1e-4, msg=name)
    assert list(student.state_dict()) == names
    assert len(captured) == graphs  # blocks, value paths and the decoder
