"""Layers with the parameters of torch's own that take less memory and time, most in half types.

Autocast evaluates norms in float32: it copies their input, keeps the copy for the backward pass,
and hands on an output that the next layer rounds again. The kernels for half types sum in float32
all the same; what differs is that scale and shift are rounded, as all other weights are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kind = TypeVar("Kind", bound=nn.Module)
QUICK = 1.702  # the slope in CLIP's approximation of GELU


def take_over(kind: type[Kind], base: nn.Module) -> Kind:
    """`base` with the methods of `kind`: parameters, names and settings are the very same."""
    taken = kind.__new__(kind)
    taken.__dict__.update(base.__dict__)
    return taken


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` that stays in autocast's type."""

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, ...] to the same shape."""
        if not _autocasts(input):  # exporters see the plain operator
            return super().forward(input)
        return _in_half(F.group_norm, input, self.num_groups, self.weight, self.bias, self.eps)


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` that stays in autocast's type."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., C] to the same shape."""
        if not _autocasts(input):
            return super().forward(input)
        shape = self.normalized_shape
        return _in_half(F.layer_norm, input, shape, self.weight, self.bias, self.eps)


def _autocasts(x: Tensor) -> bool:
    kind = x.device.type  # "meta", for one, knows no autocast
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def _in_half(
    norm: Callable[..., Tensor], x: Tensor, over: Any, weight: Tensor | None, bias: Tensor | None,
    eps: float,
) -> Tensor:  # fmt: skip
    """`norm` in autocast's type. timm's own form of this hands layer norms to apex, CPU or not."""
    dtype = torch.get_autocast_dtype(x.device.type)
    weight, bias = (None if each is None else each.to(dtype) for each in (weight, bias))
    with torch.autocast(x.device.type, enabled=False):
        return norm(x.to(dtype), over, weight, bias, eps)


def use_fast_layer_norms(module: nn.Module, kinds: Collection[type[nn.LayerNorm]]) -> None:
    """Exchange the layer norms inside `module` that are exactly of `kinds`.

    Parameters and their names stay. Other kinds may normalise another dimension, or want float32.
    """
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) in kinds:
                setattr(parent, name, take_over(LayerNorm, child))


class QuickMlp(nn.Sequential):
    """CLIP's two linear layers with `h · sigmoid(1.702 h)` between, parameters `c_fc` and `c_proj`.

    The factor goes into the first layer's weights, and out again with the second's: what is left
    is SiLU, one pass over the activations, of which one tensor is kept for the backward pass.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] to the same shape."""
        first, last = self.c_fc, self.c_proj
        hidden = F.silu(F.linear(x, QUICK * first.weight, QUICK * first.bias))
        return F.linear(hidden, last.weight / QUICK, last.bias)


def one_channel(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """`conv(x)`, [B, 1, h, w]: with zeros for a full tile of channels on a GPU in half types.

    The matrix units take no less, and what cuDNN has for one output channel takes several times as
    long, forward and backward.
    """
    if not (x.is_cuda and _autocasts(x)):
        return conv(x)
    weight = F.pad(conv.weight, (0, 0, 0, 0, 0, 0, 0, 7))
    return F.conv2d(x, weight, F.pad(conv.bias, (0, 7)), padding=conv.padding)[:, :1]
