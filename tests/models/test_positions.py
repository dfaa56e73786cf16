"""The CLIP tower's table of positions on the grid at hand, kept where it is frozen."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from co2s_fast.models import build_student, clip, tiny_clip_config

CLASSES = [SimpleNamespace(name=f"c{i}", concepts=[f"c{i}"]) for i in range(3)]


@pytest.fixture
def resized(monkeypatch):
    """Grids that a table was resized to, in order."""
    grids, plain = [], clip.resize_positions

    def counting(table, old, new, prefix=1):
        grids.append(tuple(new))
        return plain(table, old, new, prefix)

    monkeypatch.setattr(clip, "resize_positions", counting)
    return grids


@pytest.mark.filterwarnings("ignore::co2s_fast.models.student.RandomBackboneWarning")
def test_a_frozen_table_is_resized_once_a_grid_and_weight(resized):
    student = build_student(tiny_clip_config(trainable="attention"), CLASSES, seed=0).eval()
    image = torch.rand(1, 3, 48, 64)
    with torch.inference_mode():
        first = student(image)
    student(image).sum().backward()  # a table made for inference serves training
    assert resized == [(3, 4)]
    student(torch.rand(1, 3, 64, 48))
    student(image)
    assert resized == [(3, 4), (4, 3), (3, 4)]
    state = student.state_dict()
    name = "backbone.visual.positional_embedding"
    student.load_state_dict(state | {name: torch.randn_like(state[name])})
    assert not torch.allclose(student(image), first)
    assert len(resized) == 4


def test_a_table_that_learns_is_resized_every_time(resized):
    student = build_student(tiny_clip_config(), CLASSES, seed=0)
    for _ in range(2):
        student(torch.rand(1, 3, 48, 64)).sum().backward()
    assert resized == [(3, 4)] * 2
    assert student.backbone.visual.positional_embedding.grad.abs().sum() > 0
