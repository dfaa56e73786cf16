"""timm's attention with rotary embedding: queries and keys turned together, prefix tokens included.

timm rotates each by itself, patch tokens apart from the prefix, with a concatenation for every
half: many passes over tensors of activations.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from co2s_fast.models.layers import take_over


class RotaryTables:
    """Cosines and sines by token and channel, kept for the last embedding; blocks share one."""

    def __init__(self) -> None:
        self._kept: tuple[Tensor, int, tuple[Tensor, Tensor]] | None = None

    def of(self, embedding: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
        """Tables [prefix + N, 1, 1, D] that leave the first `prefix` tokens as they are.

        Args:
            embedding: [N, 2 D], sines then cosines.
            prefix: number of class and register tokens.
        """
        if torch.compiler.is_compiling():
            return self.build(embedding, prefix)
        if self._kept is None or self._kept[0] is not embedding or self._kept[1] != prefix:
            # A tensor made under inference_mode could not take part in a later training step.
            with torch.inference_mode(False), torch.no_grad():
                self._kept = (embedding, prefix, self.build(embedding, prefix))
        return self._kept[2]

    @staticmethod
    def build(embedding: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
        """See `of`. The first half of the sines, of the channels that lose, is negated."""
        sin, cos = embedding.chunk(2, -1)
        low, high = sin.chunk(2, -1)
        cos = F.pad(cos, (0, 0, prefix, 0), value=1.0)
        sin = F.pad(torch.cat([-low, high], -1), (0, 0, prefix, 0))
        return cos[:, None, None], sin[:, None, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel i against channel i + D/2: [B, N, P, H, D] by tables of `RotaryTables`.

    Computed in the wider of the two types and rounded once.
    """
    swapped = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)


class RotaryAttention(EvaAttention):
    """timm's `EvaAttention` with the same parameters and results.

    Where anything else than the plain case is asked for (masks, norms of queries and keys, gates,
    interleaved rotation, attention weights), it is timm's that answers.
    """

    tables: RotaryTables

    @classmethod
    def of(cls, base: EvaAttention, tables: RotaryTables) -> RotaryAttention:
        """The same module with this forward; it takes over all of `base`, parameters included."""
        taken = take_over(cls, base)
        taken.tables = tables
        return taken

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """See `EvaAttention.forward`."""
        asked = attn_mask is not None or any(options.values())
        if rope is None or rope.dim() != 2 or asked or not self._plain:
            return super().forward(x, rope=rope, attn_mask=attn_mask, **options)
        if self.q_bias is None:
            packed = self.qkv(x)
        else:
            bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
            packed = F.linear(x, self.qkv.weight, bias)
        packed = packed.unflatten(-1, (3, self.num_heads, -1))  # B, N, 3, H, D
        tables = self.tables.of(rope, self.num_prefix_tokens)
        query, key = (each.transpose(1, 2) for each in rotate(packed[:, :, :2], *tables).unbind(2))
        drop = self.attn_drop.p if self.training else 0.0
        value = packed[:, :, 2].transpose(1, 2)
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=drop)
        return self.proj_drop(self.proj(self.norm(out.transpose(1, 2).flatten(2))))

    @property
    def _plain(self) -> bool:
        return (
            self.fused_attn
            and getattr(self, "rotate_half", False)
            and self.qkv is not None
            and not self.qkv_bias_separate
            and getattr(self, "gate", None) is None
            and isinstance(self.q_norm, nn.Identity)
            and isinstance(self.k_norm, nn.Identity)
        )


def use_rotary_attention(model: nn.Module) -> None:
    """Exchange the attentions of a timm model's blocks that are exactly `EvaAttention`."""
    tables = RotaryTables()
    for block in model.blocks:
        if type(getattr(block, "attn", None)) is EvaAttention:
            block.attn = RotaryAttention.of(block.attn, tables)
