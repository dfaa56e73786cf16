"""The attention of one sequence with itself: torch's results, by fewer copies."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from co2s_fast.models.layers import take_over
from co2s_fast.models.self_attention import SelfAttention


@pytest.fixture
def pair():
    torch.manual_seed(0)
    base = nn.MultiheadAttention(24, 3, batch_first=True).double()
    nn.init.normal_(base.in_proj_bias)
    return base, take_over(SelfAttention, base)


@pytest.mark.parametrize("training", [False, True])
def test_same_values_and_gradients(pair, training):
    found = []
    for module in pair:
        module.train(training).zero_grad()
        x = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(1)).double()
        x.requires_grad_()
        out, weights = module(x, x, x, need_weights=False)
        assert weights is None
        out.square().sum().backward()
        found.append([out.detach(), x.grad, module.in_proj_weight.grad.clone()])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_takes_over_the_parameters(pair):
    base, ours = pair
    assert ours.state_dict().keys() == base.state_dict().keys()
    assert all(a is b for a, b in zip(base.parameters(), ours.parameters(), strict=True))


def test_what_is_not_plain_is_torch_s(pair):
    base, ours = pair
    x, y = torch.randn(2, 2, 5, 24, dtype=torch.float64)
    mask = torch.zeros(5, 5, dtype=torch.float64).masked_fill(torch.eye(5).bool(), float("-inf"))
    for arguments, options in (
        ((x, x, x), {"need_weights": True, "average_attn_weights": False}),
        ((x, x, x), {"need_weights": False, "attn_mask": mask}),
        ((x, y, y), {"need_weights": False}),
    ):
        for ours_part, part in zip(ours(*arguments, **options), base(*arguments, **options),
                                   strict=True):  # fmt: skip
            torch.testing.assert_close(ours_part, part)


def test_bfloat16_on_the_cpu_makes_no_copies_of_the_weights():
    """Turned sequence first, a batch of two is multiplied token by token, each with its weight."""
    attention = SelfAttention(64, 4, batch_first=True).eval()
    x = torch.randn(2, 9, 64)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        with torch.profiler.profile(record_shapes=True) as profile:
            attention(x, x, x, need_weights=False)
    copied = [e.input_shapes[0] for e in profile.events() if e.name == "aten::copy_"]
    assert copied and [9, 64, 192] not in copied
