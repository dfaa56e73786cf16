"""Names of self-supervised checkpoints, translated to those of timm's vision transformers.

Every function takes a state dict as the source names it and leaves out, by name, what only the
pretraining needed (decoders, heads, mask tokens). What it does not know it passes on under its own
name, so that loading lists it as unexpected.
"""

from __future__ import annotations

import re

from co2s_fast.models.official import dinov3_from_official
from co2s_fast.models.weights.clip_layouts import join_qkv
from co2s_fast.models.weights.files import State


def _without(state: State, pattern: str) -> State:
    return {key: value for key, value in state.items() if not re.match(pattern, key)}


def _under(state: State, prefix: str) -> State:
    """The entries below `prefix`, without it; all of them where none has it."""
    part = {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}
    return part or dict(state)


def from_timm(state: State) -> State:
    """Names of timm itself; a classifier is left out."""
    return _without(state, r"head\.|relative_position_index$")


def from_mae(state: State) -> State:
    """MAE: timm's names, and in the full checkpoint a decoder and a mask token."""
    return from_timm(_without(state, r"decoder_|mask_token$"))


def from_ibot(state: State) -> State:
    """Of iBOT and DINO: timm's names, in full checkpoints under `backbone.` beside a head."""
    return _without(_under(state, "backbone."), r"masked_embed$|head\.")


def from_beitv2(state: State) -> State:
    """BEiT and BEiT v2, as pretrained: timm's names, mask token, heads, index buffers."""
    extra = r"mask_token$|lm_head\.|cls_pt_(layers|norm|lm_head)\.|(.*\.)?relative_position_index$"
    return from_timm(_without(state, extra))


def from_simmim(state: State) -> State:
    """SimMIM's ViT: BEiT's names under `encoder.`, beside a decoder of one convolution."""
    return from_beitv2(_without(_under(state, "encoder."), r"decoder\."))


def from_dinov2(state: State) -> State:
    """DINOv2: timm's names and a mask token.

    With registers, timm has the class token's position inside the class token, and no position
    for it in the table.
    """
    renamed = _without(state, r"mask_token$")
    if "register_tokens" in renamed:
        renamed["reg_token"] = renamed.pop("register_tokens")
        positions = renamed["pos_embed"]
        renamed["cls_token"] = renamed["cls_token"] + positions[:, :1]
        renamed["pos_embed"] = positions[:, 1:].clone()
    return renamed


def from_dinov3(state: State) -> State:
    """Meta's DINOv3: joint qkv bias with a mask that takes the keys' away.

    Raises:
        ValueError: another mask.
    """
    return from_timm(dinov3_from_official(state))


_HF_DINOV3_RULES = [
    (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^(?:encoder\.)?layer\.(\d+)\.", r"blocks.\1."),
    (r"^(blocks\.\d+\.)attention\.o_proj\.", r"\1attn.proj."),
    (r"^(blocks\.\d+\.)attention\.([qv])_proj\.bias$", r"\1attn.\2_bias"),
    (r"^(blocks\.\d+\.)layer_scale(\d)\.lambda1$", r"\1gamma_\2"),
    (r"^(blocks\.\d+\.)mlp\.up_proj\.", r"\1mlp.fc1."),
    (r"^(blocks\.\d+\.)mlp\.down_proj\.", r"\1mlp.fc2."),
]


def from_hf_dinov3(state: State) -> State:
    """`DINOv3ViTModel` of transformers: separate q, k, v; no bias of the keys.

    Raises:
        ValueError: a block has some of q, k, v but not all.
    """
    renamed: State = {}
    for name, value in state.items():
        name = name.removeprefix("dinov3_vit.").removeprefix("model.")
        if name == "embeddings.mask_token":
            continue
        for pattern, replacement in _HF_DINOV3_RULES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return join_qkv(renamed, r"(blocks\.\d+\.)attention\.([qkv])_proj\.(weight)$",
                    "{0}attn.qkv.{2}")  # fmt: skip
