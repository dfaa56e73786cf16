"""Names of CLIP checkpoints, translated to those of open_clip's `CLIP`.

Every function takes a state dict as the source names it. What it does not know it passes on under
its own name, so that loading lists it as unexpected.
"""

from __future__ import annotations

import re

import torch

from co2s_fast.models.official import clip_from_official
from co2s_fast.models.weights.files import State

# Sizes that OpenAI's module carries as buffers; they follow from the shapes.
_OPENAI_SIZES = ("input_resolution", "context_length", "vocab_size")

_HF_RULES = [
    (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    # The misspelling is transformers' own.
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"^visual_projection\.weight$", "visual.proj"),
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"^text_projection\.weight$", "text_projection"),
]
_HF_BLOCK_RULES = [
    (r"(resblocks\.\d+)\.layer_norm(\d)\.", r"\1.ln_\2."),
    (r"(resblocks\.\d+)\.self_attn\.out_proj\.", r"\1.attn.out_proj."),
    (r"(resblocks\.\d+)\.mlp\.fc1\.", r"\1.mlp.c_fc."),
    (r"(resblocks\.\d+)\.mlp\.fc2\.", r"\1.mlp.c_proj."),
]


def from_open_clip(state: State) -> State:
    """open_clip's own names, of a whole model or of the vision tower alone."""
    if any(key.startswith("visual.") for key in state):
        return dict(state)
    return {f"visual.{key}": value for key, value in state.items()}


def from_openai(state: State) -> State:
    """OpenAI's state dict: open_clip's names, and three sizes."""
    return {key: value for key, value in state.items() if key not in _OPENAI_SIZES}


def from_hf(state: State) -> State:
    """`CLIPModel` of transformers: separate q, k, v; projections as linear layers.

    Raises:
        ValueError: a block has some of q, k, v but not all.
    """
    renamed: State = {}
    for name, value in state.items():
        if name.endswith(".position_ids"):
            continue
        for rules in (_HF_RULES, _HF_BLOCK_RULES):
            for pattern, replacement in rules:
                name = re.sub(pattern, replacement, name)
        renamed[name] = value
    for name in ("visual.proj", "text_projection"):
        if name in renamed:
            renamed[name] = renamed[name].T.contiguous()
    return join_qkv(renamed, r"(.*resblocks\.\d+\.)self_attn\.([qkv])_proj\.(weight|bias)$",
                    r"{0}attn.in_proj_{2}")  # fmt: skip


def join_qkv(state: State, pattern: str, target: str) -> State:
    """Concatenate separate query, key and value tensors.

    Args:
        state: any state dict.
        pattern: groups: prefix, letter q, k or v, kind of tensor.
        target: format of the joined name from those groups.

    Raises:
        ValueError: one of the three is missing.
    """
    parts: dict[str, State] = {}
    joined: State = {}
    for name, value in state.items():
        found = re.match(pattern, name)
        if found is None:
            joined[name] = value
        else:
            parts.setdefault(target.format(*found.groups()), {})[found[2]] = value
    for name, three in parts.items():
        if sorted(three) != ["k", "q", "v"]:
            raise ValueError(f"{name}: expected q, k and v, found {', '.join(sorted(three))}")
        joined[name] = torch.cat([three["q"], three["k"], three["v"]])
    return joined


def from_co2s(state: State) -> State:
    """The vision tower as the Co2S release names it."""
    return {f"visual.{key}": value for key, value in clip_from_official(state).items()}
