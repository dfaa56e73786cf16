"""A convolutional stem in place of a ViT's patch projection, for training from scratch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from co2s_fast.errors import UsageError
from co2s_fast.models.layers import GroupNorm


class ConvStem(nn.Module):
    """Stride-2 3x3 convolutions with norm and GELU up to the patch size, then a 1x1 projection.

    "Early Convolutions Help Transformers See Better", Xiao et al. 2021: trains faster and more
    stably than a patch x patch convolution. The norm is GroupNorm, which small batches and mixed
    views do not disturb.

    Args:
        width: channels of the tokens.
        patch_size: total stride, a power of two from 4.
        channels: N, of the images.
    """

    def __init__(self, width: int, patch_size: int, channels: int = 3) -> None:
        super().__init__()
        stages = patch_size.bit_length() - 1
        if patch_size != 1 << stages or stages < 2:
            raise UsageError(f"stem='conv' needs a patch size of 4, 8, 16, ..., got {patch_size}")
        # Half the channels for each doubling of the grid, but at least 16.
        self.widths = [max(16, width >> (stages - 1 - i)) for i in range(stages)]
        ins = [channels, *self.widths[:-1]]
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, out, 3, stride=2, padding=1, bias=False),
                GroupNorm(max(1, out // 16), out),
                nn.GELU(),
            )
            for before, out in zip(ins, self.widths, strict=True)
        )
        self.project = nn.Conv2d(self.widths[-1], width, 1)

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """[B, N, H, W] to (maps at strides 2, 4, ..., patch; tokens [B, width, H/p, W/p])."""
        maps = []
        # Channels last makes narrow convolutions two to three times as fast on the CPU.
        x = images if images.is_cuda else images.contiguous(memory_format=torch.channels_last)
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps, self.project(x)

    def skip_maps(self, maps: list[Tensor], count: int) -> list[Tensor]:
        """The `count` maps that lie just above the token grid, shallow to deep."""
        return maps[-1 - count : -1]

    def skip_widths(self, count: int) -> list[int]:
        """Channels of `skip_maps`.

        Raises:
            UsageError: more skips than the stem has stages above the token grid.
        """
        if count > len(self.widths) - 1:
            raise UsageError(
                f"skips='stem' with {count} skips needs a patch size of at least {2 ** (count + 1)}"
            )
        return self.widths[-1 - count : -1]
