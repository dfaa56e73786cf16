"""Multi-head attention of one sequence with itself, batch first."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class SelfAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` for tokens [B, N, C] among themselves: same parameters and results.

    Torch's own forward turns the sequence first, copies queries, keys and values, and in half types
    on the CPU multiplies token by token, which takes minutes. Where anything else than the plain
    case is asked for (masks, weights, other keys, dropout), it is torch's forward that answers.
    """

    @classmethod
    def of(cls, base: nn.MultiheadAttention) -> SelfAttention:
        """The same module with this forward; it takes over the parameters of `base`."""
        plain = nn.utils.skip_init(
            cls, base.embed_dim, base.num_heads, dropout=base.dropout,
            bias=base.in_proj_bias is not None, add_bias_kv=base.bias_k is not None,
            add_zero_attn=base.add_zero_attn, kdim=base.kdim, vdim=base.vdim,
            batch_first=base.batch_first, device="cpu",
        )  # fmt: skip
        plain._parameters, plain._modules = base._parameters, base._modules
        return plain.train(base.training)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = True, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """See `nn.MultiheadAttention.forward`."""
        packed = self.in_proj_weight is not None and self.bias_k is None and not self.add_zero_attn
        alone = key is query and value is query and query.dim() == 3 and self.batch_first
        asked = need_weights or self.dropout or any(v is not None for v in options.values())
        if not (packed and alone) or asked:
            return super().forward(query, key, value, need_weights=need_weights, **options)
        mixed = F.linear(query, self.in_proj_weight, self.in_proj_bias)
        heads = mixed.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        out = F.scaled_dot_product_attention(*heads)
        return self.out_proj(out.transpose(1, 2).flatten(2)), None
