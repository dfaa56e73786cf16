"""Pseudo-labels and teachers made under `torch.inference_mode`, which autograd cannot keep."""

from __future__ import annotations

import pytest
import torch

from co2s_fast.losses import CutMix, masked_cross_entropy, softmax_confidence, stability_loss
from co2s_fast.ops import backend_status, use_backend


def maps_of(teacher, size):
    confidence, label = softmax_confidence(teacher, size)
    boxes = CutMix(torch.tensor([[0, 0, 3, 3], [1, 1, 4, 3]]), torch.tensor([1, 0]))
    return {"target": label, "confidence": confidence, "ignore_mask": label.new_zeros(label.shape),
            "class_weight": teacher.new_ones(teacher.shape[1]), "cutmix": boxes, "threshold": 0.3}


@pytest.mark.parametrize("name", ["reference", "cpp"])
@pytest.mark.parametrize("size", [(5, 6), (10, 12)])
def test_gradients_are_those_of_plain_tensors(size, name):
    status = backend_status()[name]
    if not status.live:
        pytest.skip(f"backend {name}: {status.why}")
    torch.manual_seed(0)
    start, teacher = torch.randn(2, 4, 5, 6), torch.randn(2, 4, 5, 6)
    gradients = []
    for mode in (torch.inference_mode, torch.no_grad):
        student = start.clone().requires_grad_()
        with use_backend(name):
            with mode():
                fixed = teacher.clone()
                maps = maps_of(fixed, size)
            loss = masked_cross_entropy(student, **maps)
            loss_a, loss_b = stability_loss(student, fixed, size=size, threshold=0.3,
                                            ignore_mask=maps["ignore_mask"])
            (loss + loss_a + loss_b).backward()
        gradients.append(student.grad)
    assert gradients[0].any()
    assert torch.equal(*gradients)
