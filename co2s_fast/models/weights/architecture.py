"""Which model of open_clip or timm a state dict belongs to, read off its names and shapes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from co2s_fast.errors import DataError
from co2s_fast.models.weights.files import State

HEAD_WIDTH = 64
"""Of every published model up to a width of 1024; no shape tells it."""

# Of the larger ones, by width of the transformer: open_clip's H, g, bigG and e; MAE's huge (timm's
# vit_huge and giant); DINOv2's giant; DINOv3's huge plus and 7B. Source: the libraries' registries.
_WIDE_HEADS = {
    "clip": {1280: 80, 1408: 88, 1664: 104, 1792: 112},
    "vit": {1280: 80, 1408: 88},
    "dinov2": {1536: 64},
    "dinov3": {1280: 64, 4096: 128},
}

_LARGE = {"embed_dim": 1024, "depth": 24, "num_heads": 16}
_CLIP_NAMES = {(16, 768, 12): "ViT-B-16", (32, 768, 12): "ViT-B-32", (14, 1024, 24): "ViT-L-14"}


def clip_architecture(state: State, path: str | Path, *, quick: bool) -> tuple[str, dict[str, Any]]:
    """Model name and overrides of open_clip for a state dict in its own names.

    Args:
        state: a whole CLIP model, or its entries under `visual.`.
        path: for the message.
        quick: the activation is QuickGELU, which no tensor tells.

    Raises:
        DataError: no vision transformer.
    """
    try:
        width, _, patch, _ = state["visual.conv1.weight"].shape
        embed = state["visual.proj"].shape[1]
        grid = round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
        layers = _depth(state, r"visual\.transformer\.resblocks\.(\d+)\.")
    except (KeyError, ValueError) as error:
        raise DataError(f"weights {path}: no CLIP vision transformer, {error} is missing") from None
    suffix = "-quickgelu" if quick else ""
    name = _CLIP_NAMES.get((patch, width, layers))
    if name is not None and grid * patch == 224 and _usual_text(state, name):
        return name + suffix, {}
    vision = {"layers": layers, "width": width, "patch_size": patch, "image_size": grid * patch,
              "head_width": _head_width("clip", width, path)}  # fmt: skip
    overrides: dict[str, Any] = {"embed_dim": embed, "vision_cfg": vision}
    if "token_embedding.weight" in state:
        vocabulary, text_width = state["token_embedding.weight"].shape
        overrides["text_cfg"] = {
            "context_length": len(state["positional_embedding"]),
            "vocab_size": vocabulary,
            "width": text_width,
            "heads": max(1, text_width // HEAD_WIDTH),
            "layers": _depth(state, r"transformer\.resblocks\.(\d+)\."),
        }
    return "ViT-B-16" + suffix, overrides


def _usual_text(state: State, name: str) -> bool:
    width = 768 if name == "ViT-L-14" else 512
    tokens = state.get("token_embedding.weight")
    return tokens is None or tuple(tokens.shape) == (49408, width)


def _depth(state: State, pattern: str) -> int:
    return 1 + max((int(found[1]) for found in map(re.compile(pattern).match, state) if found),
                   default=-1)  # fmt: skip


def ssm_architecture(state: State, path: str | Path) -> tuple[str, dict[str, Any]]:
    """Model name and overrides of timm for a state dict in its own names.

    Raises:
        DataError: no vision transformer.
    """
    try:
        width, _, patch, _ = state["patch_embed.proj.weight"].shape
        hidden = len(state["blocks.0.mlp.fc1.weight"])
    except (KeyError, ValueError) as error:
        raise DataError(f"weights {path}: no vision transformer, no entry {error}") from None
    name, overrides, usual = _family(state)
    size = {"embed_dim": width, "depth": _depth(state, r"blocks\.(\d+)\."),
            "num_heads": _heads(state, width, name, path)}  # fmt: skip
    if size == _LARGE:
        name, usual = name.replace("base", "large"), usual | _LARGE
    overrides |= _different(
        usual,
        **size,
        patch_size=patch,
        mlp_ratio=hidden / width,
        img_size=_image_size(state, patch, usual["img_size"]),
    )
    return name, overrides


def _different(usual: dict[str, Any], **found: Any) -> dict[str, Any]:
    return {key: value for key, value in found.items() if value != usual[key]}


def _family(state: State) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The base model in timm of a family, what its structure needs, and the base's sizes."""
    usual = {"embed_dim": 768, "depth": 12, "num_heads": 12, "patch_size": 16, "mlp_ratio": 4.0,
             "img_size": 224}  # fmt: skip
    if any(key.endswith("relative_position_bias_table") for key in state):
        return "beitv2_base_patch16_224", _beit(state), usual
    if "blocks.0.ls1.gamma" in state:
        registers = "_reg4" if "reg_token" in state else ""
        return f"vit_base_patch14{registers}_dinov2", {}, usual | {"patch_size": 14,
                                                                   "img_size": 518}
    if "reg_token" in state and "pos_embed" not in state:
        bias = "_qkvb" if "blocks.0.attn.q_bias" in state else ""
        return f"vit_base_patch16_dinov3{bias}", {}, usual
    return "vit_base_patch16_224", {}, usual


def _beit(state: State) -> dict[str, Any]:
    shared = "rel_pos_bias.relative_position_bias_table" in state
    changes: dict[str, Any] = {}
    if shared:
        changes |= {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}
    if "norm.weight" in state:
        changes["use_fc_norm"] = False
    if "blocks.0.gamma_1" not in state:
        changes["init_values"] = 0.0  # no LayerScale; timm leaves a None out and keeps its own
    if "blocks.0.attn.q_bias" not in state:
        changes["qkv_bias"] = False
    return changes


def _head_width(family: str, width: int, path: str | Path) -> int:
    """Channels of an attention head of a model of that width.

    Raises:
        DataError: no published model of the family is as wide.
    """
    if width <= 1024:
        return HEAD_WIDTH
    if width not in _WIDE_HEADS[family]:
        known = ", ".join(map(str, _WIDE_HEADS[family]))
        raise DataError(f"weights {path}: {width} channels wide, and no tensor tells how many "
                        f"heads share them; known are widths up to 1024 and {known}")
    return _WIDE_HEADS[family][width]


def _heads(state: State, width: int, model: str, path: str | Path) -> int:
    for key, value in state.items():
        if key.endswith("relative_position_bias_table"):
            return value.shape[1]
    family = next((each for each in ("dinov2", "dinov3") if each in model), "vit")
    return max(1, width // _head_width(family, width, path))


def _image_size(state: State, patch: int, usual: int) -> int:
    """Side of the square images that the file's tables of positions are for."""
    for key, value in state.items():
        if key.endswith("relative_position_bias_table"):
            side = round((len(value) - 3) ** 0.5)  # (2w - 1)^2 and three of the class token
            return (side + 1) // 2 * patch
    if "pos_embed" in state:
        count = state["pos_embed"].shape[1]
        side = int(count**0.5)  # with a class row or without, the root rounds down to the side
        return side * patch
    return usual
