"""timm's rotary attention with queries and keys turned together: timm's results."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from co2s_fast.models.rotary import RotaryAttention, RotaryTables, rotate, use_rotary_attention

PREFIX, TOKENS, WIDTH, HEADS = 5, 6, 32, 2


def make_pair(**options) -> tuple[EvaAttention, RotaryAttention, Tensor, Tensor]:
    """timm's attention, ours with the same parameters, tokens and an embedding of random angles."""
    torch.manual_seed(0)
    options = {"num_prefix_tokens": PREFIX, "rotate_half": True, "scale_norm": False} | options
    theirs = EvaAttention(WIDTH, HEADS, **options)
    ours = RotaryAttention.of(copy.deepcopy(theirs), RotaryTables())
    angles = torch.rand(TOKENS, WIDTH // HEADS // 2).tile(2) * 6
    x = torch.randn(3, PREFIX + TOKENS, WIDTH)
    return theirs, ours, x, torch.cat([angles.sin(), angles.cos()], -1)


def values_and_gradients(module: nn.Module, x: Tensor, **options: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = module(x, **options)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
    return [out.detach(), x.grad, *(p.grad for p in module.parameters())]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_same_values_and_gradients(training, qkv_bias):
    theirs, ours, x, embedding = make_pair(qkv_bias=qkv_bias)
    found = [values_and_gradients(m.double().train(training), x.double(), rope=embedding.double())
             for m in (theirs, ours)]  # fmt: skip
    for theirs_, ours_ in zip(*found, strict=True):
        torch.testing.assert_close(ours_, theirs_, rtol=1e-10, atol=1e-12)


def test_weights_of_the_attention_are_dropped_in_training_alone():
    _, ours, x, embedding = make_pair(attn_drop=0.5)
    ours.train()
    assert not torch.equal(ours(x, rope=embedding), ours(x, rope=embedding))
    ours.eval()
    assert torch.equal(ours(x, rope=embedding), ours(x, rope=embedding))


def test_autocast_rounds_the_finished_rotation_once():
    theirs, ours, x, embedding = make_pair()
    with torch.autocast("cpu", torch.bfloat16):
        wanted, found = (module(x, rope=embedding) for module in (theirs, ours))
    assert found.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=0.01, atol=0.01)


@pytest.mark.parametrize(
    "options",
    [{"rotate_half": False}, {"qk_norm": True, "norm_layer": nn.LayerNorm},
     {"qkv_fused": False}, {"qkv_bias_separate": True}],
)  # fmt: skip
def test_other_kinds_are_left_to_timm(options):
    theirs, ours, x, embedding = make_pair(**options)
    assert torch.equal(ours(x, rope=embedding), theirs(x, rope=embedding))


def test_masks_and_missing_embeddings_are_left_to_timm():
    theirs, ours, x, embedding = make_pair()
    mask = torch.rand(PREFIX + TOKENS, PREFIX + TOKENS) > 0.2
    assert torch.equal(ours(x), theirs(x))
    found, wanted = (m(x, rope=embedding, attn_mask=mask) for m in (ours, theirs))
    assert torch.equal(found, wanted)


def test_rotation_keeps_lengths_and_the_prefix():
    _, _, _, embedding = make_pair()
    x = torch.randn(2, PREFIX + TOKENS, 2, HEADS, WIDTH // HEADS)
    out = rotate(x, *RotaryTables().of(embedding, PREFIX))
    assert torch.equal(out[:, :PREFIX], x[:, :PREFIX])
    assert not torch.equal(out[:, PREFIX:], x[:, PREFIX:])
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))


def test_tables_follow_the_embedding():
    tables, (_, _, _, first) = RotaryTables(), make_pair()
    kept = tables.of(first, 1)
    assert tables.of(first, 1)[0] is kept[0]
    assert tables.of(first, 2)[0].shape[0] == TOKENS + 2
    second = first.flip(0)
    torch.testing.assert_close(tables.of(second, 1)[0][1:, 0, 0], second.chunk(2, -1)[1])


def test_tables_made_for_inference_serve_training():
    _, ours, x, embedding = make_pair()
    with torch.inference_mode():
        ours(x, rope=embedding)
    ours(x, rope=embedding).sum().backward()
    assert ours.qkv.weight.grad is not None


def test_a_models_attentions_share_their_tables():
    model = timm.create_model("vit_tiny_patch16_dinov3_qkvb", num_classes=0, depth=3)
    names = list(model.state_dict())
    use_rotary_attention(model)
    assert all(type(block.attn) is RotaryAttention for block in model.blocks)
    assert len({id(block.attn.tables) for block in model.blocks}) == 1
    assert list(model.state_dict()) == names
    twin = copy.deepcopy(model)
    assert len({id(block.attn.tables) for block in twin.blocks}) == 1
    use_rotary_attention(plain := timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1))
    assert type(plain.blocks[0].attn) is not RotaryAttention
