"""The stability loss's definition, by hand."""

from __future__ import annotations

import torch

from co2s_fast.ops import reference


def test_stability_by_hand():
    """Three pixels: a learns, both learn (equal), nobody is confident."""
    p_a = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.5, 0.5]], dtype=torch.float64)
    p_b = torch.tensor([[0.1, 0.9], [0.9, 0.1], [0.6, 0.4]], dtype=torch.float64)
    a, b = (p.log().T[None, :, None, :] for p in (p_a, p_b))
    sums, counts = reference.stability_loss(a, b, 0.8, 1, 3, None, 255, False)
    assert counts.tolist() == [2, 1]
    torch.testing.assert_close(sums, torch.tensor([0.5, 0.0], dtype=torch.float64))
