"""Low-rank adapters on the attention of a frozen backbone (LoRA, Hu et al. 2022).

A weight W becomes W + alpha/rank · up @ down, evaluated as a second, narrow path beside the first:
no gradient of W's shape is ever computed, as it would be if the sum were formed (which is what
`torch.nn.utils.parametrize` does). peft's layers do not reach all weights here: timm's DINOv3 reads
`qkv.weight` and the value paths of the CLIP student read `in_proj_weight`, past a wrapped module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from co2s_fast.errors import UsageError
from co2s_fast.models.config import LoraConfig
from co2s_fast.models.self_attention import SelfAttention, attend

MARK = "lora."
"""In the name of every adapter parameter, and of no other."""


class LowRank(nn.Module):
    """`x -> alpha/rank · up @ down @ x`, zero at first: `up` starts at 0, `down` as a linear layer.

    Args:
        weight: the weight [outputs, inputs] it stands beside.
        config: rank, alpha, dropout.
    """

    def __init__(self, weight: Tensor, config: LoraConfig) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        self.scale, self.dropout = config.alpha / config.rank, config.dropout
        self.down = nn.Parameter(weight.new_empty(config.rank, inputs))
        self.up = nn.Parameter(weight.new_zeros(outputs, config.rank))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)

    def forward(self, x: Tensor, first_row: int = 0) -> Tensor:
        """[..., inputs] to [..., outputs - first_row]."""
        x = F.dropout(x, self.dropout, self.training)
        return F.linear(F.linear(x, self.down) * self.scale, self.up[first_row:])

    def delta(self) -> Tensor:
        """What is added to the weight, [outputs, inputs]."""
        return self.scale * self.up @ self.down


class LoraLinear(nn.Module):
    """A linear layer with an adapter beside it; its own parameters keep their names."""

    def __init__(self, base: nn.Linear, config: LoraConfig) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.lora = LowRank(base.weight, config)

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.Linear`."""
        return F.linear(x, self.weight, self.bias) + self.lora(x)

    def merged(self) -> nn.Linear:
        """One plain layer of the same outputs; it takes over the parameters."""
        outputs, inputs = self.weight.shape
        plain = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=self.bias is not None)
        self.weight.data += self.lora.delta().detach()
        plain.weight, plain.bias = self.weight, self.bias
        return plain


class LoraQkv(LoraLinear):
    """The joint projection of timm's attention that keeps query and value biases of its own.

    That attention calls `qkv` as a layer only where it has no such biases, so they move in here.
    """

    BIASES = ("q_bias", "k_bias", "v_bias")

    def __init__(self, attention: nn.Module, config: LoraConfig) -> None:
        super().__init__(attention.qkv, config)
        self.q_bias, self.v_bias = attention.q_bias, attention.v_bias
        self.register_buffer("k_bias", attention.k_bias, persistent=False)
        for name in self.BIASES:
            setattr(attention, name, None)

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.Linear`."""
        bias = torch.cat([self.q_bias, self.k_bias, self.v_bias])
        return F.linear(x, self.weight, bias) + self.lora(x)

    def give_back(self, attention: nn.Module) -> None:
        """Return the biases to the attention they came from."""
        for name in self.BIASES:
            setattr(attention, name, getattr(self, name))


class LoraAttention(nn.Module):
    """`nn.MultiheadAttention` on one sequence (batch first), with adapters on both projections."""

    def __init__(self, base: nn.MultiheadAttention, config: LoraConfig) -> None:
        super().__init__()
        plain = base.in_proj_weight is not None and base.bias_k is None and not base.add_zero_attn
        if not plain or not base.batch_first or base.dropout:
            raise UsageError(
                "trainable='lora' needs the plain attention of open_clip's vision tower (packed "
                "projection, batch first, no dropout, no extra keys), found another one"
            )
        self.num_heads = base.num_heads
        self.in_proj_weight, self.in_proj_bias = base.in_proj_weight, base.in_proj_bias
        self.in_proj_lora = LowRank(base.in_proj_weight, config)
        self.out_proj = LoraLinear(base.out_proj, config)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Attention of tokens [B, N, C] among themselves.

        Raises:
            ValueError: keys or values of other tokens, or attention weights, are asked for.
        """
        if key is not query or value is not query or need_weights:
            raise ValueError("this attention is of one sequence with itself and has no weights")
        mixed = F.linear(query, self.in_proj_weight, self.in_proj_bias) + self.in_proj_lora(query)
        return self.out_proj(attend(mixed, self.num_heads, attn_mask)), None

    def value(self, x: Tensor) -> Tensor:
        """The value projection alone, [B, N, C] to the same shape."""
        first = 2 * x.shape[-1]
        plain = F.linear(x, self.in_proj_weight[first:], self.in_proj_bias[first:])
        return plain + self.in_proj_lora(x, first)

    def merged(self) -> nn.MultiheadAttention:
        """Torch's own module of the same outputs; it takes over the parameters."""
        width = self.in_proj_weight.shape[1]
        plain = nn.utils.skip_init(SelfAttention, width, self.num_heads, batch_first=True)
        self.in_proj_weight.data += self.in_proj_lora.delta().detach()
        plain.in_proj_weight, plain.in_proj_bias = self.in_proj_weight, self.in_proj_bias
        out = self.out_proj.merged()
        plain.out_proj.weight, plain.out_proj.bias = out.weight, out.bias
        return plain


def add_adapters(backbone: nn.Module, config: LoraConfig) -> None:
    """Put adapters on every attention that a `ClipBackbone` or `TimmBackbone` evaluates.

    Draws from torch's generator. The backbone's outputs stay as they are until a step is made.

    Raises:
        UsageError: an attention whose projections are none of the known forms.
    """
    for block in _blocks(backbone):
        attention = block.attn
        if isinstance(attention, nn.MultiheadAttention):
            block.attn = LoraAttention(attention, config)
            continue
        names = [n for n in ("qkv", "q_proj", "k_proj", "v_proj", "proj")
                 if isinstance(getattr(attention, n, None), nn.Linear)]  # fmt: skip
        if "proj" not in names or len(names) not in (2, 4):
            raise UsageError(
                "trainable='lora' needs an attention with linear layers qkv (or q_proj, k_proj, "
                f"v_proj) and proj; {type(attention).__name__} has {names}"
            )
        for name in names:
            with_biases = name == "qkv" and getattr(attention, "q_bias", None) is not None
            adapted = (LoraQkv(attention, config) if with_biases
                       else LoraLinear(getattr(attention, name), config))  # fmt: skip
            setattr(attention, name, adapted)


def beside_adapters(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights saved without adapters, for a student that has some; those stay as they are.

    Args:
        weights: state dict of a student without adapters (one with them comes back unchanged).
        own: state dict of the student that has them.
    """
    if any(MARK in name for name in weights):
        return dict(weights)
    moved = {name: name.replace(".attn.qkv.", ".attn.") for name in own}
    saved = {name: name if name in weights else other for name, other in moved.items()}
    found = {name: weights[old] for name, old in saved.items() if old in weights}
    found |= {name: weights[name] for name in weights.keys() - saved.values()}  # unknown ones
    return found | {name: value for name, value in own.items() if MARK in name}


@torch.no_grad()
def merge_adapters(backbone: nn.Module) -> None:
    """Add every adapter to its weight and take it out; names become those without adapters."""
    for block in _blocks(backbone):
        attention = block.attn
        if isinstance(attention, LoraAttention):
            block.attn = attention.merged().train(attention.training)
            continue
        for name, layer in list(attention.named_children()):
            if isinstance(layer, LoraLinear):
                setattr(attention, name, layer.merged().train(layer.training))
            if isinstance(layer, LoraQkv):
                layer.give_back(attention)


def _blocks(backbone: nn.Module) -> Sequence[nn.Module]:
    if hasattr(backbone, "visual"):
        return backbone.visual.transformer.resblocks
    return backbone.model.blocks[: backbone.levels[-1] + 1]
