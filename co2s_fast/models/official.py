"""Names of the released Co2S checkpoints, translated to the ones used here.

Each function takes a state dict with the released names (any `module.` prefix already removed) and
picks out its own part; tensors are renamed and reshaped, never changed.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

State = dict[str, Tensor]

_CLIP_RULES = [
    (r"^cls_token$", "class_embedding"),
    (r"^pos_embed$", "positional_embedding"),
    (r"^patch_embed\.projection\.weight$", "conv1.weight"),
    (r"^ln0\.", "ln_pre."),
    (r"^ln1\.", "ln_post."),
    (r"^proj\.weight$", "proj"),
    (r"^layers\.(\d+)\.ln(\d)\.", r"transformer.resblocks.\1.ln_\2."),
    (r"^layers\.(\d+)\.attn\.attn\.", r"transformer.resblocks.\1.attn."),
    (r"^layers\.(\d+)\.ffn\.layers\.0\.0\.", r"transformer.resblocks.\1.mlp.c_fc."),
    (r"^layers\.(\d+)\.ffn\.layers\.1\.", r"transformer.resblocks.\1.mlp.c_proj."),
]

_DECODER_RULES = [
    (r"^conv1\.", "similarity."),
    (r"^aspp\.aspp_convs\.4\.gap\.1\.", "aspp.pool_conv."),
    (r"^aspp\.aspp_convs\.4\.gap\.2\.", "aspp.pool_norm."),
    (r"^aspp\.aspp_convs\.(\d)\.0\.", r"aspp.convs.\1."),
    (r"^aspp\.aspp_convs\.(\d)\.1\.", r"aspp.norms.\1."),
    (r"^aspp\.project\.0\.", "aspp.project."),
    (r"^aspp\.project\.1\.", "aspp.norm."),
    (r"^layers\.(\d+)\.transformer\.ln(\d)\.", r"layers.\1.norm\2."),
    (r"^layers\.(\d+)\.transformer\.attn\.attn\.", r"layers.\1.attention."),
    (r"^layers\.(\d+)\.transformer\.ffn\.layers\.0\.0\.", r"layers.\1.fc1."),
    (r"^layers\.(\d+)\.transformer\.ffn\.layers\.1\.", r"layers.\1.fc2."),
    (r"^text_proj\.0\.", "text."),
    (r"^skip_proj\.(\d+)\.0\.", r"skips.\1."),
    (r"^up(\d+)\.up\.", lambda m: f"ups.{int(m[1]) - 1}.up."),
    (r"^up(\d+)\.conv\.0\.", lambda m: f"ups.{int(m[1]) - 1}.conv1."),
    (r"^up(\d+)\.conv\.1\.", lambda m: f"ups.{int(m[1]) - 1}.norm1."),
    (r"^up(\d+)\.conv\.3\.", lambda m: f"ups.{int(m[1]) - 1}.conv2."),
    (r"^up(\d+)\.conv\.4\.", lambda m: f"ups.{int(m[1]) - 1}.norm2."),
    (r"^head\.", "head."),
]


def _rename(name: str, rules: list) -> str:
    for pattern, replacement in rules:
        renamed, hits = re.subn(pattern, replacement, name)
        if hits:
            return renamed
    raise KeyError(f"unknown entry in a released checkpoint: {name}")


def _part(state: State, prefix: str) -> State:
    """Entries under `prefix`, or all entries where none has it."""
    part = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return part or dict(state)


def clip_from_official(state: State) -> State:
    """The CLIP tower as open_clip's `VisionTransformer` names it."""
    part = _part(state, "backbone.")
    if "proj.weight" not in part and "proj.weight" in state:
        part["proj.weight"] = state["proj.weight"]  # unprefixed in the pretraining file
    renamed = {_rename(name, _CLIP_RULES): value for name, value in part.items()}
    for name in ("class_embedding", "positional_embedding"):
        renamed[name] = renamed[name].flatten(0, -2).squeeze(0)
    renamed["proj"] = renamed["proj"].flatten(1).T.contiguous()
    return renamed


def dinov3_from_official(state: State) -> State:
    """The DINOv3 backbone as timm's `*_dinov3_qkvb` names it.

    Raises:
        ValueError: a bias mask other than 1, 0, 1 on queries, keys, values: the key bias would
            count, or the pretrained file was never loaded.
    """
    renamed: State = {}
    for name, value in _part(state, "backbone.").items():
        if name in ("mask_token", "rope_embed.periods"):
            continue
        if name.endswith("bias_mask"):
            third = len(value) // 3
            expected = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(third)
            if not torch.equal(value.float(), expected):
                raise ValueError(f"{name} is not 1, 0, 1 on its thirds: not a trained DINOv3 file")
        elif name.endswith("qkv.bias"):
            stem = name.removesuffix("qkv.bias")
            query, _, third_part = value.chunk(3)
            renamed[f"{stem}q_bias"], renamed[f"{stem}v_bias"] = query.clone(), third_part.clone()
        else:
            name = re.sub(r"\.ls(\d)\.gamma$", r".gamma_\1", name)
            renamed[name.replace("storage_tokens", "reg_token")] = value
    return renamed


def decoder_from_official(state: State) -> State:
    """The decoder as `QueryDecoder` names it."""
    part = _part(state, "decode_head.")
    return {_rename(name, _DECODER_RULES): value for name, value in part.items()}


def student_from_official(state: State, backbone: str) -> State:
    """A whole released student, for `Student.load_state_dict`.

    Args:
        state: the `model` entry of `best_clip.pth` or `best_dinov3.pth`.
        backbone: "clip" or "timm".
    """
    if backbone == "clip":
        tower, prefix, queries = clip_from_official(state), "visual", state["_cached_text"]
    else:
        tower, prefix = dinov3_from_official(state), "model"
        queries = state["text_provider.emb.weight"]
    renamed = {f"backbone.{prefix}.{name}": value for name, value in tower.items()}
    renamed |= {f"decoder.{name}": value for name, value in decoder_from_official(state).items()}
    return renamed | {"queries": queries}
