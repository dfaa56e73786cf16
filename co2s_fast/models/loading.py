"""Building backbones through open_clip and timm, and reading weights into them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from co2s_fast.errors import DataError, UsageError
from co2s_fast.models.clip import ClipBackbone, resize_positions
from co2s_fast.models.config import StudentConfig, merge
from co2s_fast.models.inflate import input_conv
from co2s_fast.models.official import State, clip_from_official, dinov3_from_official
from co2s_fast.models.presets import TINY_CLIP_MODEL, TINY_SSM_MODEL
from co2s_fast.models.ssm import TimmBackbone
from co2s_fast.models.stem import ConvStem

OWN_BACKBONE = {"format": "co2s-fast backbone"}
"""Metadata of a safetensors file that holds a whole backbone under this package's own names."""

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


def is_file_name(weights: str) -> bool:
    """Whether `weights` names a checkpoint file rather than a pretrained tag."""
    return weights.endswith(WEIGHT_SUFFIXES) or os.sep in weights


def read_state_dict(path: str | Path) -> State:
    """A flat state dict from a safetensors file or a torch file, without unpickling objects.

    Nesting under `model`, `state_dict` or `state` and the prefix `module.` are taken away.

    Raises:
        DataError: missing, unreadable, or not a dictionary of tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"weights {path}: no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # any of torch's, pickle's, zip's or safetensors' own errors
        raise DataError(f"weights {path}: cannot be read ({error})") from error
    for key in ("model", "state_dict", "state"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state:
        raise DataError(f"weights {path}: expected a dictionary of tensors, found {type(state)}")
    state = {key.removeprefix("module."): value for key, value in state.items()}
    other = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if other:
        raise DataError(f"weights {path}: entries that are no tensors: {other[:5]}")
    return state


def is_own_backbone(path: str | Path) -> bool:
    """Whether a file was written by `co2s-fast pretrain`: a whole backbone, its stem included."""
    from safetensors import SafetensorError, safe_open

    if not str(path).endswith(".safetensors") or not Path(path).is_file():
        return False
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("format") == OWN_BACKBONE["format"]
    except SafetensorError:
        return False  # reading the tensors says what is wrong


def checksum(module: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a module's state dict, in order of name."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
    if weights is not None and not is_file_name(weights):
        if overrides or open_clip.pretrained.get_pretrained_cfg(model, weights) is None:
            known = open_clip.list_pretrained_tags_by_model(model)
            raise UsageError(
                f"weights {weights!r}: expected a file or, without overrides, one of {known} for "
                f"model {model!r}"
            )
        return open_clip.create_model(model, pretrained=weights, require_pretrained=True).eval()
    try:
        clip = open_clip.CLIP(**description)
    except TypeError as error:
        raise UsageError(f"model {model!r}: open_clip refuses its description: {error}") from error
    if weights is not None:
        _load_clip_file(clip, weights)
    return clip.eval()


def _load_clip_file(clip: nn.Module, path: str) -> None:
    """Both towers from a whole CLIP model, or the vision tower alone; which is told by the keys."""
    state = read_state_dict(path)
    if any(key.endswith("patch_embed.projection.weight") for key in state):
        state = translate(clip_from_official, state, path)
        state = {f"visual.{key}": value for key, value in state.items()}
    elif not any(key.startswith("visual.") for key in state):
        state = {f"visual.{key}": value for key, value in state.items()}
    state = {key: value.float() if value.is_floating_point() else value
             for key, value in state.items()}  # fmt: skip
    name = "visual.positional_embedding"
    grid = clip.visual.grid_size
    if name in state and len(state[name]) != grid[0] * grid[1] + 1:
        side = round((len(state[name]) - 1) ** 0.5)
        state[name] = resize_positions(state[name], (side, side), grid)
    whole = any(not key.startswith("visual.") for key in state)
    if whole:
        load_strictly(clip, state, path)
    else:
        visual = {key.removeprefix("visual."): value for key, value in state.items()}
        load_strictly(clip.visual, visual, path)
    clip.has_text_weights = whole


def translate(rule: Callable[[State], State], state: State, path: str | Path) -> State:
    """`rule(state)` whose failure names the file."""
    try:
        return rule(state)
    except (KeyError, ValueError) as error:
        raise DataError(f"weights {path}: {error}") from error


def load_strictly(module: nn.Module, state: State, path: str | Path) -> None:
    """`load_state_dict` whose failure is one line that names the file and the first keys.

    Raises:
        DataError: missing or unexpected keys, or other shapes.
    """
    own = module.state_dict()
    missing = sorted(own.keys() - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    shapes = [
        f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
        for key in sorted(own.keys() & state.keys())
        if own[key].shape != state[key].shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "other shapes": shapes}
    told = "; ".join(f"{k}: {len(v)}, e.g. {v[:3]}" for k, v in problems.items() if v)
    if told:
        raise DataError(f"weights {path} do not fit {type(module).__name__}: {told}")
    module.load_state_dict(state)


def tokenizer_for(model: str, tower: nn.Module) -> Callable[[list[str]], Tensor]:
    """The tokenizer that belongs to an open_clip model."""
    import open_clip

    if open_clip.get_model_config(model) is not None:
        return open_clip.get_tokenizer(model)
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
    tag = config.weights if config.weights and not is_file_name(config.weights) else None
    if tag not in (None, "pretrained"):
        name = f"{name.split('.')[0]}.{tag}"
    if not timm.is_model(name) or (tag is not None and not timm.is_model_pretrained(name)):
        raise UsageError(
            f"model {config.model!r} with weights {config.weights!r}: timm knows no such model; "
            f"tags: {timm.list_pretrained(name.split('.')[0] + '*')[:8]}"
        )
    options = {"dynamic_img_size": True, "num_classes": 0, **config.overrides}
    try:
        model = timm.create_model(name, pretrained=tag is not None, **options)
    except TypeError as error:
        raise UsageError(f"model {name!r} with {options}: timm refuses: {error}") from error
    if config.weights is not None and tag is None:
        state = read_state_dict(config.weights)
        if any(key.endswith("storage_tokens") for key in state):
            state = translate(dinov3_from_official, state, config.weights)
        state = {key: value for key, value in state.items() if not key.startswith("head.")}
        load_strictly(model, state, config.weights)
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


def _stem_skips(config: StudentConfig) -> int:
    return len(config.decoder.skip_channels) if config.skips == "stem" else 0
