"""Channel attention of a student's features to its teacher's (CTSA of MUCA, Wang et al. 2025)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from co2s_fast.models.layers import LayerNorm

HEADS = 3  # merged: they are the width of queries, keys and values, and no dimension of their own


class CrossAttention(nn.Module):
    """Each channel of a student image attends to all channels of all of the teacher's images.

    Queries are the 3 C channels of a student image, keys and values those of the teacher's B images
    (of this process's part of the batch) beside each other, B · 3 C; a channel's vector is its map,
    so that positions have to agree. A score matrix is 3 C x B · 3 C, 42 million numbers for C = 768
    and B = 8. So one image's is there at a time, in the forward pass and, computed again, in the
    backward pass. All B take 2 (3 C)² B² n multiplications, 0.7e12 for n = 32 x 32 positions.

    Dropout falls on whole channels of the values and of the result: masks are drawn for a step, and
    one for every score would be far too much to draw.

    Args:
        channels: C, of both feature maps.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = HEADS * channels
        self.enter = nn.Conv2d(channels, channels, 1)
        self.norm = LayerNorm(channels)
        self.query = nn.Linear(channels, wide, bias=False)
        self.key = nn.Linear(channels, wide, bias=False)
        self.value = nn.Linear(channels, wide, bias=False)
        self.merge = nn.Linear(wide, channels)
        self.norm_out = LayerNorm(channels)
        self.leave = nn.Conv2d(channels, channels, 1)

    def forward(
        self, student: Tensor, teacher: Tensor, value_scale: Tensor, result_scale: Tensor
    ) -> Tensor:
        """The attended features of the student.

        Args:
            student: [B, C, h, w].
            teacher: of the same images at the same positions, [B, C, h, w].
            value_scale: factor of each channel of the values, [B, 3 C]; 0 where it is dropped.
            result_scale: the same of the result, [B, C].

        Returns:
            [B, C, h, w].
        """
        own, other = self.tokens(student), self.tokens(teacher)
        values = self.value(other)
        values = values * value_scale[:, None].to(values.dtype)
        # [n, B · 3 C]: the channels of all images beside each other.
        keys, values = (each.transpose(0, 1).flatten(1) for each in (self.key(other), values))
        attended = []
        for query in self.query(own).unbind(0):
            if torch.is_grad_enabled():
                attended.append(checkpoint(attend_channels, query, keys, values,
                                           use_reentrant=False, preserve_rng_state=False))
            else:
                attended.append(attend_channels(query, keys, values))
        found = self.merge(torch.stack(attended))
        found = self.norm_out(own + found * result_scale[:, None].to(found.dtype))
        found = found.transpose(1, 2).unflatten(2, student.shape[-2:])
        return F.gelu(self.leave(found))

    def tokens(self, features: Tensor) -> Tensor:
        """[B, C, h, w] projected, to tokens [B, n, C]."""
        return self.norm(F.gelu(self.enter(features)).flatten(2).transpose(1, 2))


def attend_channels(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Channel attention of one image: instance norm of the scores, softmax over the keys.

    Args:
        query: [n, Q].
        keys: [n, M].
        values: [n, M].

    Returns:
        [n, Q], of the values' type.
    """
    scores = query.transpose(0, 1) @ keys
    scores = scores if scores.dtype == torch.float64 else scores.float()
    # The mean that the norm takes away is the same for all keys: the softmax does not see it.
    scale = (scores.var(correction=0) + 1e-5).rsqrt()
    weights = (scores * scale).softmax(1).to(values.dtype)
    return values @ weights.transpose(0, 1)
