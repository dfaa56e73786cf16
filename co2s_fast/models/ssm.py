"""The self-supervised backbone: block outputs of a timm vision transformer (DINOv3 by default)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import timm.layers
import torch
from torch import Tensor, nn

from co2s_fast.errors import UsageError
from co2s_fast.models.layers import use_fast_layer_norms
from co2s_fast.models.relative import free_grid
from co2s_fast.models.rotary import use_rotary_attention
from co2s_fast.models.stem import ConvStem


class CachedRope(nn.Module):
    """Keeps a timm rotary embedding per grid.

    timm builds it on the CPU in every forward pass, and copying it to the GPU would make the host
    wait.
    """

    def __init__(self, rope: nn.Module) -> None:
        super().__init__()
        self.rope = rope
        self._cache: dict[tuple, Tensor] = {}

    def get_embed(self, shape: Sequence[int] | None = None) -> Tensor:
        """[h*w, 2*head_dim], sines then cosines."""
        periods = self.rope.periods
        key = (tuple(shape) if shape is not None else None, periods.device, periods.dtype)
        if key in self._cache:
            return self._cache[key]
        if torch.compiler.is_compiling():
            return self.build(shape)
        # A tensor made under inference_mode could not take part in a later training step.
        with torch.inference_mode(False), torch.no_grad():
            table = self.build(shape)
        if type(table) is Tensor:  # not a stand-in of some tracer
            self._cache[key] = table
        return table

    def build(self, shape: Sequence[int] | None) -> Tensor:
        """The embedding as timm computes it, in float32."""
        return self.rope.get_embed(shape=shape)


class Bfloat16Rope(CachedRope):
    """The rotary embedding of the released DINOv3 student, every step of it in bfloat16."""

    def build(self, shape: Sequence[int] | None) -> Tensor:
        """Same layout as timm's "half" rotation."""
        device, half = self.rope.periods.device, torch.bfloat16
        quarter = self.rope.dim // 4
        exponents = 2 * torch.arange(quarter, dtype=half, device=device) / (2 * quarter)
        periods = self.rope.temperature**exponents
        axes = [(torch.arange(0.5, n, dtype=half, device=device) / n) * 2 - 1 for n in shape]
        coords = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)
        angles = (2 * math.pi * coords[:, :, None] / periods).flatten(1).tile(2)
        return torch.cat([angles.sin(), angles.cos()], -1)


class _ToBfloat16(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.bfloat16)


class TimmBackbone(nn.Module):
    """Outputs of chosen blocks, each through the model's final norm, prefix tokens dropped.

    Args:
        model: a timm ViT with `blocks`, `patch_embed` and `forward_intermediates(norm=True)`,
            built for dynamic image sizes and without a classifier.
        levels: block numbers from 0, rising.
        stem: replaces the patch projection.
        stem_skips: how many of the stem's maps to put before the levels.
        rope: "fp32" for timm's own, "bf16" for the released DINOv3 student's rounding.
    """

    odd_sizes = "floor"

    def __init__(
        self,
        model: nn.Module,
        levels: Sequence[int],
        *,
        stem: ConvStem | None = None,
        stem_skips: int = 0,
        rope: str = "fp32",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        _check_model(model, levels)
        use_fast_layer_norms(model, {nn.LayerNorm, timm.layers.LayerNorm})
        use_rotary_attention(model)
        self.model = model
        self.levels = tuple(levels)
        self.patch_size = int(model.patch_embed.patch_size[0])
        self.stem_skips = stem_skips
        self.stem = stem
        if stem is not None:
            model.patch_embed.proj = nn.Identity()
            # The patch embedding would check the stem's map as if it were an image.
            model.patch_embed.img_size = None
        self.widths = [
            *(stem.skip_widths(stem_skips) if stem_skips and stem is not None else []),
            *[model.embed_dim] * len(levels),
        ]
        _prepare_rope(model, rope)
        self._told_the_grid = free_grid(model)
        self.checkpoint_gradients(gradient_checkpointing)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Normalised images [B, N, H, W] to maps [B, C_i, floor(H/p), floor(W/p)]."""
        patch = self.patch_size
        height, width = (side // patch * patch for side in images.shape[-2:])
        images = images[..., :height, :width]
        grid = (height // patch, width // patch)
        maps = []
        if self.stem is not None:
            stem_maps, images = self.stem(images)
            maps = self.stem.skip_maps(stem_maps, self.stem_skips) if self.stem_skips else []
        tokens = self._on_grid(images, grid) if self._told_the_grid else self._tokens(images)
        return (*maps, *(level.transpose(1, 2).unflatten(2, grid) for level in tokens))

    def checkpoint_gradients(self, enabled: bool) -> None:
        """Compute the blocks again in the backward pass, or keep what they computed."""
        self.model.set_grad_checkpointing(enabled)

    @torch.compiler.disable  # splines of scipy and attributes set on the way: nothing to compile
    def _on_grid(self, images: Tensor, grid: tuple[int, int]) -> list[Tensor]:
        for module in self._told_the_grid:
            module.grid = grid
        return self._tokens(images)

    def _tokens(self, images: Tensor) -> list[Tensor]:
        return self.model.forward_intermediates(
            images,
            indices=list(self.levels),
            norm=True,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )


def _check_model(model: nn.Module, levels: Sequence[int]) -> None:
    name = type(model).__name__
    if not all(hasattr(model, part) for part in ("blocks", "patch_embed", "forward_intermediates")):
        raise UsageError(
            "backbone 'timm' needs a vision transformer with blocks, patch_embed and "
            f"forward_intermediates, got {name}"
        )
    if levels[-1] >= len(model.blocks):
        raise UsageError(
            f"levels must be below the {len(model.blocks)} blocks of {name}, got {tuple(levels)}"
        )


def _prepare_rope(model: nn.Module, rope: str) -> None:
    module = getattr(model, "rope", None)
    is_dinov3 = hasattr(module, "periods") and not getattr(module, "aug_active", False)
    if rope == "bf16":
        if not (is_dinov3 and module.rotate_half and hasattr(model.blocks[0].attn, "q_norm")):
            name = type(model).__name__
            raise UsageError(f"rope='bf16' needs a DINOv3 model of timm, got {name}")
        model.rope = Bfloat16Rope(module)
        # Rounded before the rotation, prefix tokens included; the attention casts back after it.
        for block in model.blocks:
            block.attn.q_norm, block.attn.k_norm = _ToBfloat16(), _ToBfloat16()
    elif is_dinov3:
        model.rope = CachedRope(module)
