"""The paper's students at their own size: two whole steps on the CPU."""

from __future__ import annotations

import math

import pytest
import torch

from co2s_fast.data import Batch, load_dataset
from co2s_fast.methods import get_method
from co2s_fast.models import StudentConfig, TextConfig, build_student

SIDE = 96  # 6 x 6 tokens: the networks have their full size, the images need not


def full_size_students(num_classes: int) -> dict:
    classes = load_dataset("potsdam").classes[:num_classes]
    clip = StudentConfig(backbone="clip", weights=None, text=TextConfig(source="hash"))
    ssm = StudentConfig(backbone="timm", weights=None)
    return {n: build_student(c, classes, seed=i) for i, (n, c) in enumerate(
        {"clip": clip, "ssm": ssm}.items())}  # fmt: skip


def make_batch(num_classes: int) -> Batch:
    generator = torch.Generator().manual_seed(0)

    def images() -> torch.Tensor:
        return torch.randint(0, 256, (2, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)

    labels = torch.randint(0, num_classes, (2, SIDE, SIDE), generator=generator)
    boxes = torch.tensor([[8, 8, 60, 40], [0, 0, 0, 0]], dtype=torch.int32)
    return Batch(
        x=images(), y=labels.to(torch.uint8), w=images(), s1=images(), s2=images(),
        ignore=torch.zeros(2, SIDE, SIDE, dtype=torch.uint8), boxes1=boxes, boxes2=boxes.flip(0),
        labeled_files=["a", "b"], unlabeled_files=["c", "d"],
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # both backbones are random here, on purpose
def test_two_steps_with_the_papers_students() -> None:
    students = full_size_students(6)
    method_class = get_method("co2s")
    method = method_class(students, method_class.Config(threshold=0.0))
    frozen = {n: p.detach().clone() for n, p in method.named_parameters() if not p.requires_grad}
    groups = [group for s in students.values() for group in s.parameter_groups(1e-4, 0.01)]
    for group in groups:
        group.pop("name")
    optimizer = torch.optim.AdamW(groups, fused=True)
    method.train()
    for step in range(2):
        losses = method(make_batch(6), step, 10)
        assert math.isfinite(float(losses["loss"]))
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        optimizer.step()
    assert sum(p.numel() for p in method.parameters() if p.requires_grad) > 55e6
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter).all(), name
        else:
            assert torch.equal(parameter, frozen[name]), name
