"""Building backbones through open_clip and timm, and reading weights into them."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from co2s_fast.errors import DataError, UsageError
from co2s_fast.models.clip import ClipBackbone, resize_positions
from co2s_fast.models.config import StudentConfig, merge
from co2s_fast.models.inflate import input_conv
from co2s_fast.models.presets import TINY_CLIP_MODEL, TINY_SSM_MODEL
from co2s_fast.models.ssm import TimmBackbone
from co2s_fast.models.stem import ConvStem
from co2s_fast.models.weights.files import (
    OWN_BACKBONE,
    State,
    is_file_name,
    load_strictly,
    metadata,
    read_state_dict,
    state_sha256,
)
from co2s_fast.models.weights.layouts import detect
from co2s_fast.models.weights.layouts import translate as translate_layout
from co2s_fast.models.weights.registry import entry_for
from co2s_fast.models.weights.store import first_line, from_hub, resolve

# Of a library about options that it was given. Where it reads weights, the rest concerns those.
REFUSALS = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError)
OWN_REFUSALS = (*REFUSALS, RuntimeError, ValueError)


def is_own_backbone(path: str | Path) -> bool:
    """Whether a file was written by `co2s-fast pretrain`: a whole backbone, its stem included."""
    return metadata(path).get("format") == OWN_BACKBONE["format"]


def licence_of(config: StudentConfig) -> str:
    """Of the weights that a student starts from: as the registry or the file itself says."""
    if config.weights is None:
        return "none: random weights"
    kind = "clip" if config.backbone == "clip" else "ssm"
    if entry := entry_for(kind, config.model, config.weights):
        return entry.licence
    if is_own_backbone(config.weights):
        return "none: pretrained here from random weights"
    return metadata(config.weights).get("licence") or "unknown"


def checksum(module: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a module's state dict, in order of name."""
    return state_sha256(module.state_dict())


def clip_description(model: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """The dictionary open_clip builds a model from, by name or from a JSON file."""
    import open_clip

    if model == "tiny-clip":
        found = deepcopy(TINY_CLIP_MODEL)
    elif model.endswith(".json"):
        try:
            found = json.loads(Path(model).read_text())
        except (OSError, ValueError) as error:
            raise DataError(f"model {model}: not a readable JSON file ({error})") from error
        if not isinstance(found, dict):
            raise DataError(f"model {model}: expected keys and values, found {found!r:.40}")
        found = found.get("model_cfg", found)
    else:
        found = open_clip.get_model_config(model)
    if found is None or not {"embed_dim", "vision_cfg", "text_cfg"} <= found.keys():
        raise UsageError(
            f"model {model!r}: expected an open_clip model such as 'ViT-B-16-quickgelu', a JSON "
            "file with embed_dim, vision_cfg and text_cfg, or 'tiny-clip'"
        )
    return merge(found, overrides)


def load_clip(
    model: str, weights: str | None, overrides: dict[str, Any] | None = None
) -> nn.Module:
    """An open_clip CLIP model with both towers, in eval mode and float32."""
    import open_clip

    description = clip_description(model, overrides or {})
    found = resolve("clip", model, weights)
    if found is not None and not is_file_name(found):
        if overrides or open_clip.pretrained.get_pretrained_cfg(model, found) is None:
            known = open_clip.list_pretrained_tags_by_model(model)
            raise UsageError(
                f"weights {weights!r}: expected a name of `co2s-fast weights list`, a file or, "
                f"without overrides, one of {known} for model {model!r}"
            )
        with from_hub("clip", model, found):
            return open_clip.create_model(model, pretrained=found, require_pretrained=True).eval()
    try:
        clip = open_clip.CLIP(**description)
    except OWN_REFUSALS as error:
        raise UsageError(f"model {model!r}: open_clip refuses its description: "
                         f"{first_line(error)}") from error
    if found is not None:
        _load_clip_file(clip, found)
    return clip.eval()


def _load_clip_file(clip: nn.Module, path: str) -> None:
    """Both towers from a whole CLIP model, or the vision tower alone; which is told by the keys."""
    state = read_state_dict(path)
    state = translate_layout(detect(state, path, "clip"), state, path)
    name = "visual.positional_embedding"
    grid = clip.visual.grid_size
    if name in state and len(state[name]) != grid[0] * grid[1] + 1:
        state[name] = resize_positions(state[name], _square(len(state[name]) - 1, path), grid)
    whole = any(not key.startswith("visual.") for key in state)
    if whole:
        load_strictly(clip, state, path)
    else:
        visual = {key.removeprefix("visual."): value for key, value in state.items()}
        load_strictly(clip.visual, visual, path)
    clip.has_text_weights = whole


def _square(count: int, path: str) -> tuple[int, int]:
    side = round(count**0.5)
    if side * side != count:
        raise DataError(f"weights {path}: a table of {count} positions, which is no square grid")
    return side, side


def translate(rule: Callable[[State], State], state: State, path: str | Path) -> State:
    """`rule(state)` whose failure names the file."""
    try:
        return rule(state)
    except (KeyError, ValueError) as error:
        raise DataError(f"weights {path}: {error}") from error


def tokenizer_for(model: str, tower: nn.Module) -> Callable[[list[str]], Tensor]:
    """The tokenizer that belongs to an open_clip model."""
    import open_clip

    if open_clip.get_model_config(model) is not None:
        return open_clip.get_tokenizer(model, context_length=tower.context_length)
    return open_clip.SimpleTokenizer(context_length=tower.context_length)


def build_clip_backbone(config: StudentConfig) -> tuple[ClipBackbone, nn.Module]:
    """The backbone, and the whole CLIP model it came from (for its text tower)."""
    clip = load_clip(config.model, config.weights, config.overrides)
    visual = clip.visual
    _check_levels_exist(config, visual)
    if config.activation is not None:
        from open_clip.transformer import QuickGELU

        for block in visual.transformer.resblocks:
            block.mlp.gelu = nn.GELU() if config.activation == "gelu" else QuickGELU()
    stem = None
    if config.stem == "conv":
        stem = ConvStem(visual.class_embedding.shape[0], visual.patch_size[0], config.channels)
    else:
        visual.conv1 = input_conv(visual.conv1, config.channels, config.bands,
                                  pretrained=config.weights is not None)  # fmt: skip
    backbone = ClipBackbone(
        visual,
        config.levels,
        stem=stem,
        stem_skips=_stem_skips(config),
        gradient_checkpointing=config.gradient_checkpointing,
    )
    return backbone, clip


def _check_levels_exist(config: StudentConfig, visual: nn.Module) -> None:
    if not hasattr(visual, "transformer"):
        raise UsageError(
            f"model {config.model!r}: its vision tower is a {type(visual).__name__}; backbone "
            "'clip' needs open_clip's own VisionTransformer"
        )


def build_timm_backbone(config: StudentConfig) -> TimmBackbone:
    """A timm vision transformer without classifier, any image size."""
    import timm

    name = TINY_SSM_MODEL if config.model == "tiny-ssm" else config.model
    weights = resolve("ssm", name, config.weights)
    tag = weights if weights and not is_file_name(weights) else None
    if tag not in (None, "pretrained"):
        name = f"{name.split('.')[0]}.{tag}"
    if not timm.is_model(name) or (tag is not None and not timm.is_model_pretrained(name)):
        raise UsageError(
            f"model {config.model!r} with weights {config.weights!r}: timm knows no such model; "
            f"tags: {timm.list_pretrained(name.split('.')[0] + '*')[:8]}"
        )
    # timm's BEiT has no such option; TimmBackbone lets it take any size.
    dynamic = {} if name.startswith("beit") else {"dynamic_img_size": True}
    options = {**dynamic, "num_classes": 0, **config.overrides}
    refusals = REFUSALS if tag else OWN_REFUSALS
    with from_hub("ssm", name, tag):
        try:
            model = timm.create_model(name, pretrained=tag is not None, **options)
        except refusals as error:
            raise UsageError(f"model {name!r} with {options}: timm refuses: "
                             f"{first_line(error)}") from error
    if weights is not None and tag is None:
        _load_timm_file(model, weights)
    stem = None
    if config.stem == "conv":
        stem = ConvStem(model.embed_dim, model.patch_embed.patch_size[0], config.channels)
    else:
        model.patch_embed.proj = input_conv(model.patch_embed.proj, config.channels, config.bands,
                                            pretrained=config.weights is not None)  # fmt: skip
    return TimmBackbone(
        model,
        config.levels,
        stem=stem,
        stem_skips=_stem_skips(config),
        rope=config.rope,
        gradient_checkpointing=config.gradient_checkpointing,
    )


def _load_timm_file(model: nn.Module, path: str) -> None:
    """Any known layout; a square table of positions is brought to the model's grid."""
    state = read_state_dict(path)
    state = translate_layout(detect(state, path, "ssm"), state, path)
    own, table = getattr(model, "pos_embed", None), state.get("pos_embed")
    if own is not None and table is not None and table.shape[1] != own.shape[1]:
        grid = model.patch_embed.grid_size
        prefix = own.shape[1] - grid[0] * grid[1]
        state["pos_embed"] = resize_positions(
            table[0], _square(table.shape[1] - prefix, path), grid, prefix=prefix
        )[None]
    load_strictly(model, state, path)


def _stem_skips(config: StudentConfig) -> int:
    return len(config.decoder.skip_channels) if config.skips == "stem" else 0
