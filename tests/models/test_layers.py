"""Norms that stay in autocast's type, CLIP's feed-forward by way of SiLU, a last convolution."""

from __future__ import annotations

import copy
from collections import OrderedDict
from types import SimpleNamespace

import open_clip.transformer
import pytest
import timm.layers
import torch
from torch import Tensor, nn

from co2s_fast.models import build_student, tiny_clip_config, tiny_ssm_config
from co2s_fast.models.layers import (
    GroupNorm,
    LayerNorm,
    QuickMlp,
    one_channel,
    take_over,
    use_fast_layer_norms,
)

SHAPES = {GroupNorm: (3, 16, 5, 7), LayerNorm: (3, 5, 16)}


def pair(kind: type[nn.Module]) -> tuple[nn.Module, nn.Module, Tensor]:
    """Ours, torch's with the same random parameters, and an input."""
    torch.manual_seed(0)
    plain = nn.GroupNorm(4, 16) if kind is GroupNorm else nn.LayerNorm(16)
    for parameter in plain.parameters():
        nn.init.normal_(parameter, 1.0, 0.3)
    ours = GroupNorm(4, 16) if kind is GroupNorm else LayerNorm(16)
    ours.load_state_dict(plain.state_dict())
    return ours, plain, torch.randn(SHAPES[kind], requires_grad=True)


def kept_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes of activations that the backward pass of `module(x)` holds on to."""
    own = {p.data_ptr() for p in module.parameters()}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    return sum(t.nbytes for t in kept.values())


@pytest.mark.parametrize("kind", [GroupNorm, LayerNorm])
def test_norm_is_torchs_own_without_autocast(kind):
    ours, plain, x = pair(kind)
    assert torch.equal(ours(x), plain(x))


@pytest.mark.parametrize("kind", [GroupNorm, LayerNorm])
def test_norm_stays_in_autocasts_type(kind):
    ours, plain, x = pair(kind)
    exact = plain(x)
    upstream = torch.randn_like(exact)
    wanted = torch.autograd.grad(exact, [x, *plain.parameters()], upstream)
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(x)
    found = torch.autograd.grad(out, [x, *ours.parameters()], upstream.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, atol=0.03, rtol=0.02)
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == torch.float32
        assert (got - want).norm() < 0.02 * want.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [GroupNorm, LayerNorm])
def test_norm_on_a_gpu_sums_in_float32(kind):
    """A mean far off zero would cost most digits if its sums were rounded."""
    ours, plain, x = pair(kind)
    ours, plain, x = ours.cuda(), plain.cuda(), (x + 8).cuda().bfloat16()
    with torch.autocast("cuda", torch.bfloat16):
        out = ours(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), plain(x.float()), atol=0.03, rtol=0.02)


def test_quick_mlp_is_clips_and_keeps_half():
    torch.manual_seed(0)
    quick = open_clip.transformer.QuickGELU()
    layers = {"c_fc": nn.Linear(16, 64), "gelu": quick, "c_proj": nn.Linear(64, 16)}
    plain = nn.Sequential(OrderedDict(layers)).double()
    ours = take_over(QuickMlp, copy.deepcopy(plain))
    assert ours.state_dict().keys() == plain.state_dict().keys()
    found = []
    for module in (plain, ours):
        x = torch.linspace(-12, 12, 960).double().view(2, 30, 16).requires_grad_()
        out = module(x)
        out.backward(torch.linspace(-1, 1, out.numel()).double().view_as(out))
        found.append([out.detach(), x.grad, *(p.grad for p in module.parameters())])
    for theirs, ours_ in zip(*found, strict=True):
        torch.testing.assert_close(ours_, theirs)
    for module in (plain, ours):  # as where the backbone's blocks are frozen
        module.requires_grad_(False)
    hidden = 2 * 30 * 64 * 8
    weights = 2 * 16 * 64 * 8
    assert kept_bytes(plain, x) == 2 * hidden
    assert kept_bytes(ours, x) == hidden + weights


def test_only_the_asked_for_norms_are_exchanged():
    module = nn.Sequential(nn.LayerNorm(4), timm.layers.LayerNorm2d(4), nn.Linear(4, 4))
    state = dict(module.state_dict())
    use_fast_layer_norms(module, {nn.LayerNorm})
    assert [type(each) for each in module] == [LayerNorm, timm.layers.LayerNorm2d, nn.Linear]
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("make", [tiny_clip_config, tiny_ssm_config])
def test_students_have_them(make):
    classes = [SimpleNamespace(name=f"c{i}", concepts=[f"c{i}"]) for i in range(3)]
    student = build_student(make(), classes, seed=0)
    norms = [m for m in student.modules() if isinstance(m, nn.LayerNorm | nn.GroupNorm)]
    assert norms
    assert all(isinstance(m, LayerNorm | GroupNorm) for m in norms)


def test_a_clip_student_has_the_mlp_of_its_activation():
    classes = [SimpleNamespace(name="c", concepts=["c"])]
    for activation, kind in (("quick_gelu", QuickMlp), ("gelu", nn.Sequential)):
        student = build_student(tiny_clip_config(activation=activation), classes, seed=0)
        blocks = student.backbone.visual.transformer.resblocks
        assert {type(block.mlp) for block in blocks} == {kind}


@pytest.mark.gpu
def test_the_decoders_last_convolution_on_a_gpu():
    torch.manual_seed(0)
    conv = nn.Conv2d(32, 1, 3, padding=1).cuda()
    x = torch.randn(6, 32, 24, 40, device="cuda", requires_grad=True)
    upstream = torch.rand(6, 1, 24, 40, device="cuda")  # of one sign: the bias sums it
    found = []
    for half in (False, True):
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            out = one_channel(conv, x)
        gradients = torch.autograd.grad(out, [x, *conv.parameters()], upstream.to(out.dtype))
        found.append([out.float(), *gradients])
    assert out.shape == (6, 1, 24, 40)
    for exact, rounded in zip(*found, strict=True):
        assert (rounded - exact).norm() < 0.01 * exact.norm()


def test_a_device_without_autocast():
    assert LayerNorm(4).to("meta")(torch.empty(2, 4, device="meta")).shape == (2, 4)
    assert GroupNorm(2, 4).to("meta")(torch.empty(2, 4, 3, device="meta")).shape == (2, 4, 3)
