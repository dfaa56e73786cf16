"""The cross-entropy's definition: its derivative, and what counts, by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from co2s_fast.losses import masked_cross_entropy
from co2s_fast.ops import reference


def z(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def test_cross_entropy_gradients_by_autograd():
    label = torch.tensor([[[0, 1], [255, 2]]])
    confidence = torch.tensor([[[1.0, 0.2], [1.0, 0.97]]])
    weight = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)

    def loss(x, per_pixel):
        return reference.masked_cross_entropy(
            x, label, confidence, 0.95, None, 255, weight, None, None, per_pixel, False
        )[0]

    x = z(1, 3, 2, 2)
    for per_pixel in (False, True):
        assert torch.autograd.gradcheck(lambda x, p=per_pixel: loss(x, p), (x,))
    expected = F.cross_entropy(x[:, :, 0, 0], torch.tensor([0]))
    expected = expected + 3 * F.cross_entropy(x[:, :, 1, 1], torch.tensor([2]))
    torch.testing.assert_close(loss(x, False), expected)


@pytest.mark.parametrize(("reduction", "share"), [("valid", 2 / 3), ("confident", 1), ("sum", 2)])
def test_what_the_sum_is_divided_by(reduction, share):
    """Four pixels: two confident, one not, one ignored; every pixel loses log 2."""
    logits = torch.zeros(1, 2, 1, 4)
    label = torch.tensor([[[0, 1, 1, 255]]])
    confidence = torch.tensor([[[0.95, 1.0, 0.94, 1.0]]])
    loss = masked_cross_entropy(logits, label, confidence, reduction=reduction)
    torch.testing.assert_close(loss, torch.tensor(share * math.log(2)))
