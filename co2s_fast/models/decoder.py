"""The query decoder: similarity of pixels to class vectors, refined class by class.

Methods of Co2S section "explicit/implicit guidance", built on the decoder of SemiVL (Hoyer et al.
2024) and CAT-Seg (Cho et al. 2024): every class is a map of its own that shares all weights with
the others, and classes see each other only in the attention of `ClassAttention`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from co2s_fast.models.config import DecoderConfig
from co2s_fast.models.layers import GroupNorm, LayerNorm, one_channel
from co2s_fast.models.self_attention import SelfAttention


def _group_norm(channels: int, group_channels: int) -> GroupNorm:
    return GroupNorm(channels // group_channels, channels)


def _fast_layout(x: Tensor) -> Tensor:
    """Channels last on the CPU, where these narrow convolutions run two to three times as fast."""
    return x if x.is_cuda else x.contiguous(memory_format=torch.channels_last)


class DilatedConv(nn.Conv2d):
    """A 3x3 (or, at rate 1, 1x1) convolution that skips taps which can only read padding."""

    def __init__(self, channels: int, rate: int) -> None:
        side = 1 if rate == 1 else 3
        padding = 0 if rate == 1 else rate
        super().__init__(channels, channels, side, padding=padding, dilation=rate, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Same as `nn.Conv2d`: on a map no larger than the rate, only the middle taps meet data."""
        if self.kernel_size == (1, 1):
            return super().forward(x)
        rate, (height, width) = self.dilation[0], x.shape[-2:]
        weight, padding = self.weight, [rate, rate]
        if height <= rate:
            weight, padding[0] = weight[:, :, 1:2], 0
        if width <= rate:
            weight, padding[1] = weight[:, :, :, 1:2], 0
        return F.conv2d(x, weight, padding=padding, dilation=self.dilation)


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling with a residual (Chen et al. 2017)."""

    def __init__(self, channels: int, rates: Sequence[int], group_channels: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(DilatedConv(channels, rate) for rate in rates)
        self.norms = nn.ModuleList(_group_norm(channels, group_channels) for _ in rates)
        self.pool_conv = nn.Conv2d(channels, channels, 1, bias=False)
        self.pool_norm = _group_norm(channels, group_channels)
        self.project = nn.Conv2d(channels * (len(rates) + 1), channels, 1, bias=False)
        self.norm = _group_norm(channels, group_channels)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, h, w] to the same shape."""
        pairs = zip(self.convs, self.norms, strict=True)
        branches = [F.relu_(norm(conv(x))) for conv, norm in pairs]
        pooled = F.relu(self.pool_norm(self.pool_conv(x.mean((2, 3), keepdim=True))))
        # The pooled branch is constant over the map, so its share of the 1x1 projection is too.
        split = self.project.in_channels - self.project.out_channels
        out = F.conv2d(torch.cat(branches, 1), self.project.weight[:, :split])
        out = out + F.conv2d(pooled, self.project.weight[:, split:])
        return x + F.relu_(self.norm(out))


class ClassAttention(nn.Module):
    """A pre-norm transformer layer over the K classes at each pooled position.

    A token is [visual, text]; only the visual half of the result is kept, so the last linear layer
    is evaluated for that half alone.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width = config.channels + config.text_channels
        hidden = int(width * config.mlp_ratio)
        self.pool = config.pool
        self.norm1 = LayerNorm(width)
        self.attention = SelfAttention(width, config.heads, batch_first=True)
        self.norm2 = LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """Args: x [B*K, C, h, w], image-major; text [B or 1, K, T]. Returns the shape of x."""
        channels, height, width = x.shape[1:]
        classes = text.shape[1]
        pooled = F.avg_pool2d(x, (min(self.pool[0], height), min(self.pool[1], width)))
        grid = pooled.shape[-2:]
        visual = pooled.permute(0, 2, 3, 1).reshape(-1, classes, grid[0] * grid[1], channels)
        visual = visual.transpose(1, 2)  # B, P, K, C
        text = text[:, None].expand(*visual.shape[:3], -1)
        tokens = torch.cat([visual, text.to(visual.dtype)], -1).flatten(0, 1)  # B*P, K, C+T
        normed = self.norm1(tokens)
        tokens = tokens + self.attention(normed, normed, normed, need_weights=False)[0]
        hidden = F.gelu(self.fc1(self.norm2(tokens)))
        out = F.linear(hidden, self.fc2.weight[:channels], self.fc2.bias[:channels])
        out = (out + tokens[..., :channels]).view(visual.shape).transpose(1, 2)
        out = out.reshape(-1, *grid, channels).permute(0, 3, 1, 2)
        out = F.interpolate(out, (height, width), mode="bilinear", align_corners=True)
        return x + out


class Upsample(nn.Module):
    """Twice the size (transposed 2x2), then two 3x3 convolutions over [upsampled, skip].

    The first convolution is split by input channels. Its skip half is evaluated once an image and
    added to every class: exact, and K times less work than repeating the skip. Its upsampled half
    directly follows the transposed convolution, without a nonlinearity between them, so the two are
    one transposed convolution with 4x4 taps: half the work, and no upsampled map in memory.
    """

    def __init__(self, channels: int, skip: int, out: int, group_channels: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(channels, channels - skip, 2, stride=2)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1, bias=False)
        self.norm1 = _group_norm(out, group_channels)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norm2 = _group_norm(out, group_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Args: x [B*K, C, h, w], image-major; skip [B, S, ...]. Returns [B*K, out, 2h, 2w]."""
        size = (2 * x.shape[-2], 2 * x.shape[-1])
        if skip.shape[-2:] != size:
            skip = F.interpolate(skip, size, mode="bilinear", align_corners=True)
        weight, skip_weight = self.conv1.weight.tensor_split([self.up.out_channels], 1)
        # Taps of the two in a row: each pair (p, d) of theirs adds up at p - d + 2.
        taps = F.conv2d(self.up.weight, weight, padding=2)
        per_class = F.conv_transpose2d(x, taps, stride=2, padding=1)
        # The bias between the two, which the second one's padding does not have.
        bias = self.up.bias[:, None, None].expand(-1, *size)[None]
        per_image = F.conv2d(skip, skip_weight, padding=1) + F.conv2d(bias, weight, padding=1)
        x = (per_class.unflatten(0, (skip.shape[0], -1)) + per_image[:, None]).flatten(0, 1)
        x = F.relu_(self.norm1(x))
        return F.relu_(self.norm2(self.conv2(x)))


class QueryDecoder(nn.Module):
    """Logits from feature maps and class vectors, `(features, queries) -> [B, K, 4h, 4w]`.

    Args:
        widths: channels of the feature maps, shallow to deep.
        query_width: width of the class vectors; the deepest map must have as many channels.
        config: all other widths.
    """

    def __init__(self, widths: Sequence[int], query_width: int, config: DecoderConfig) -> None:
        super().__init__()
        if len(widths) != len(config.skip_channels) + 1:
            raise ValueError(
                f"decoder with {len(config.skip_channels)} skips needs "
                f"{len(config.skip_channels) + 1} feature maps, got {len(widths)}"
            )
        if widths[-1] != query_width:
            raise ValueError(
                f"the deepest feature map has {widths[-1]} channels but class vectors {query_width}"
            )
        self.config = config
        group = config.group_channels
        self.similarity = nn.Conv2d(1, config.channels, config.kernel, padding=config.kernel // 2)
        self.aspp = ASPP(config.channels, config.rates, group)
        self.text = nn.Linear(query_width, config.text_channels)
        self.layers = nn.ModuleList(ClassAttention(config) for _ in range(config.layers))
        self.skips = nn.ModuleList(
            nn.Conv2d(width, out, 3, padding=1)
            for width, out in zip(reversed(widths[:-1]), config.skip_channels, strict=True)
        )
        ins = (config.channels, *config.up_channels)
        self.ups = nn.ModuleList(
            Upsample(before, skip, out, group)
            for before, skip, out in zip(
                ins[:-1], config.skip_channels, config.up_channels, strict=True
            )
        )
        last = config.up_channels[-1] if config.up_channels else config.channels
        self.head = nn.Conv2d(last, 1, 3, padding=1)

    def forward(self, features: Sequence[Tensor], queries: Tensor) -> Tensor:
        """Logits, twice the deepest grid for each skip.

        Args:
            features: maps [B, C_i, h_i, w_i], shallow to deep; any grids.
            queries: class vectors [K, d], or [B, K, d]; their length does not matter.
        """
        return self.finish(*self.trunk(features, queries), queries.shape[-2])

    def trunk(self, features: Sequence[Tensor], queries: Tensor) -> tuple[Tensor, Tensor | None]:
        """All but the last block, whose inputs it returns: a map and, if there are skips, a skip.

        Args:
            features: as `forward` takes them.
            queries: likewise.

        Returns:
            [B*K, C, h, w], image-major, and [B, S, ...] or None.
        """
        x, queries = self._similarity(features[-1], queries)
        x = self.aspp(_fast_layout(self.similarity(x)))
        text = F.relu(self.text(queries))
        for layer in self.layers:
            x = layer(x, text)
        skip = None
        levels = zip(self.skips, reversed(features[:-1]), strict=True)
        for index, (project, level) in enumerate(levels):
            if skip is not None:
                x = self._maybe_checkpoint(self.ups[index - 1], x, skip)
            skip = F.relu_(project(_fast_layout(level)))
        return x, skip

    def last_block(self) -> list[nn.Module]:
        """What `finish` runs: the last upsampling, if there is any, and the head."""
        return [*list(self.ups)[-1:], self.head]

    def finish(
        self, x: Tensor, skip: Tensor | None, classes: int,
        block: Sequence[nn.Module] | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits from what `trunk` returns, all of its images or some.

        Args:
            x: [B*K, C, h, w], image-major.
            skip: [B, S, ...], of the same images.
            classes: K.
            block: modules like those of `last_block`, in their place; None: these.
        """
        *ups, head = self.last_block() if block is None else block
        for up in ups:
            x = self._maybe_checkpoint(up, x, skip)
        x = one_channel(head, x).squeeze(1).unflatten(0, (-1, classes))
        if self.config.resize_to is not None:
            x = F.interpolate(x, self.config.resize_to, mode="bilinear", align_corners=False)
        return x

    @staticmethod
    def _similarity(deep: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine of every pixel with every class, [B*K, 1, h, w], and unit queries [., K, d]."""
        deep = F.normalize(deep, dim=1)
        queries = F.normalize(queries, dim=-1).to(deep.dtype)
        if queries.dim() == 2:
            queries = queries[None]
        cosine = (queries @ deep.flatten(2)).unflatten(2, deep.shape[-2:])
        return cosine.flatten(0, 1)[:, None], queries

    def _maybe_checkpoint(self, up: nn.Module, x: Tensor, skip: Tensor) -> Tensor:
        if self.config.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(up, x, skip, use_reentrant=False)
        return up(x, skip)
