"""Multi-head attention of one sequence with itself, batch first."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def attend(packed: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Attention [B, N, C] from queries, keys and values beside each other, [B, N, 3 C]."""
    parts = packed.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind()
    out = F.scaled_dot_product_attention(*parts, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


class SelfAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` for tokens [B, N, C] among themselves: same parameters and results.

    Torch's own forward turns the sequence first, copies queries, keys and values, and in half types
    on the CPU multiplies token by token, each with a copy of the weight. Where anything else than
    the plain case is asked for (masks, weights, other keys, dropout), it is torch's that answers.
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = True, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """See `nn.MultiheadAttention.forward`."""
        plain = self.in_proj_weight is not None and self.bias_k is None and not self.add_zero_attn
        alone = key is query and value is query and query.dim() == 3 and self.batch_first
        asked = need_weights or self.dropout or any(v is not None for v in options.values())
        if not (plain and alone) or asked:
            return super().forward(query, key, value, need_weights=need_weights, **options)
        packed = F.linear(query, self.in_proj_weight, self.in_proj_bias)
        return self.out_proj(attend(packed, self.num_heads)), None
