"""The CLIP backbone: open_clip's vision transformer, read out along its value paths.

Value-path map of a block with input h (MaskCLIP, Zhou et al. 2022): attention is replaced by
identity mixing, `z = h + W_o(W_v LN1(h) + b_v) + b_o; map = z + MLP(LN2(z))`. It keeps each token's
own content, which the attention output of a CLIP tower does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from co2s_fast.errors import UsageError
from co2s_fast.models.layers import QuickMlp, take_over, use_fast_layer_norms
from co2s_fast.models.lora import LoraAttention
from co2s_fast.models.self_attention import SelfAttention
from co2s_fast.models.stem import ConvStem

Path = Callable[[nn.Module, Tensor], Tensor]


def resize_positions(
    table: Tensor, old: Sequence[int], new: Sequence[int], prefix: int = 1
) -> Tensor:
    """Position table [prefix + h*w, C] on another grid: bicubic, align_corners False.

    The first `prefix` rows, of the class token, are kept.
    """
    if tuple(old) == tuple(new):
        return table
    grid = table[prefix:].unflatten(0, tuple(old)).permute(2, 0, 1)[None]
    grid = F.interpolate(grid, tuple(new), mode="bicubic", align_corners=False)
    return torch.cat([table[:prefix], grid[0].flatten(1).T])


def value_path(block: nn.Module, x: Tensor) -> Tensor:
    """The value-path map of an open_clip residual block: tokens [B, N, C] to the same shape."""
    attention, normed = block.attn, block.ln_1(x)
    if isinstance(attention, LoraAttention):
        value = attention.value(normed)
    else:
        first = 2 * x.shape[-1]
        value = F.linear(normed, attention.in_proj_weight[first:], attention.in_proj_bias[first:])
    x = x + block.ls_1(attention.out_proj(value))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


class ClipBackbone(nn.Module):
    """Feature maps of an open_clip vision tower.

    Level i below the depth is the value-path map of block i; level `depth` is the value-path map
    of the last block through the final norm and the projection into text space, L2-normalised. The
    ordinary path of the last block is never computed, nor are queries and keys of value paths.

    Args:
        visual: an open_clip `VisionTransformer` with the plain residual blocks.
        levels: rising, the last one equal to the depth.
        stem: replaces `visual.conv1`.
        stem_skips: how many of the stem's maps to put before the levels.
    """

    odd_sizes = "pad"
    value_path: Path = staticmethod(value_path)

    def __init__(
        self,
        visual: nn.Module,
        levels: Sequence[int],
        *,
        stem: ConvStem | None = None,
        stem_skips: int = 0,
        gradient_checkpointing: bool = False,
    ) -> None:
        from open_clip import transformer as open_clip

        super().__init__()
        _check_tower(visual, levels)
        self.depth = len(visual.transformer.resblocks)
        self.levels = tuple(levels)
        self.patch_size = int(visual.patch_size[0])
        self.stem_skips = stem_skips
        self.gradient_checkpointing = gradient_checkpointing
        self._resized: tuple[Tensor, tuple, Tensor] | None = None
        # The tower's own attributes are taken over rather than the tower, so that nothing which
        # is never evaluated (pooling, token dropping) stays in the state dict.
        self.visual = visual
        use_fast_layer_norms(visual, {open_clip.LayerNorm})
        for block in visual.transformer.resblocks:
            block.attn = take_over(SelfAttention, block.attn)
            kinds = [type(layer) for layer in block.mlp]
            if kinds == [nn.Linear, open_clip.QuickGELU, nn.Linear]:
                block.mlp = take_over(QuickMlp, block.mlp)
        if stem is not None:
            visual.conv1 = stem
        width = visual.class_embedding.shape[0]
        self.widths = [
            *(stem.skip_widths(stem_skips) if stem_skips and stem is not None else []),
            *(visual.proj.shape[1] if level == self.depth else width for level in levels),
        ]

    @property
    def grid_size(self) -> tuple[int, int]:
        """The grid of the position table."""
        return tuple(self.visual.grid_size)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Normalised images [B, N, H, W] to maps [B, C_i, ceil(H/p), ceil(W/p)], shallow to deep.

        Sides that are no multiple of the patch are padded with zeros at the right and bottom.
        """
        visual, patch = self.visual, self.patch_size
        images = F.pad(images, (0, -images.shape[-1] % patch, 0, -images.shape[-2] % patch))
        maps = []
        if isinstance(visual.conv1, ConvStem):
            stem_maps, x = visual.conv1(images)
            maps = visual.conv1.skip_maps(stem_maps, self.stem_skips) if self.stem_skips else []
        else:
            x = visual.conv1(images)
        grid = x.shape[-2:]
        x = self._tokens(x, self._positions(grid))
        blocks = visual.transformer.resblocks
        for index, block in enumerate(blocks):
            if index in self.levels:
                maps.append(_to_map(self._run(self.value_path, block, x[:, 1:]), grid))
            if index < self.depth - 1:
                x = self._run(_ordinary_path, block, x)
        deep = visual.ln_post(self._run(self.value_path, blocks[-1], x[:, 1:])) @ visual.proj
        maps.append(_to_map(F.normalize(deep, dim=-1), grid))
        return tuple(maps)

    def checkpoint_gradients(self, enabled: bool) -> None:
        """Compute the blocks again in the backward pass, or keep what they computed."""
        self.gradient_checkpointing = enabled

    def _positions(self, grid: Sequence[int]) -> Tensor:
        """The position table on a grid; kept where it is frozen, since resizing takes long."""
        table = self.visual.positional_embedding
        if table.requires_grad or torch.compiler.is_compiling():
            return resize_positions(table, self.grid_size, grid)
        key = (tuple(grid), table.device, table.dtype, table._version)
        if self._resized is None or self._resized[0] is not table or self._resized[1] != key:
            # A tensor made under inference_mode could not take part in a later training step.
            with torch.inference_mode(False), torch.no_grad():
                resized = resize_positions(table, self.grid_size, grid)
            if type(resized) not in (Tensor, nn.Parameter):  # a stand-in of some tracer
                return resized
            self._resized = (table, key, resized)
        return self._resized[2]

    def _tokens(self, x: Tensor, positions: Tensor) -> Tensor:
        visual = self.visual
        cls = visual.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        x = torch.cat([cls, x.flatten(2).transpose(1, 2)], 1) + positions.to(x.dtype)
        return visual.ln_pre(x)

    def _run(self, path: Path, block: nn.Module, x: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(path, block, x, use_reentrant=False)
        return path(block, x)


def _ordinary_path(block: nn.Module, x: Tensor) -> Tensor:
    return block(x)


def _to_map(tokens: Tensor, grid: Sequence[int]) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, tuple(grid))


def _check_tower(visual: nn.Module, levels: Sequence[int]) -> None:
    blocks = getattr(getattr(visual, "transformer", None), "resblocks", None)
    plain = blocks is not None and all(
        isinstance(getattr(block, "attn", None), nn.MultiheadAttention) for block in blocks
    )
    if not plain:
        raise UsageError(
            "backbone 'clip' needs an open_clip VisionTransformer with plain residual blocks, got "
            f"{type(visual).__name__}"
        )
    if visual.attn_pool is not None or not isinstance(visual.patch_dropout, nn.Identity):
        raise UsageError("backbone 'clip' supports neither attentional pooling nor patch dropout")
    if levels[-1] != len(blocks):
        raise UsageError(
            f"levels must end with the map in text space, {len(blocks)} for a tower of "
            f"{len(blocks)} blocks, got {tuple(levels)}"
        )
