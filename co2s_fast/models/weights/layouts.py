"""The layouts of weight files: told by their keys, converted to the library's names."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from co2s_fast.errors import DataError, UsageError
from co2s_fast.models.weights import clip_layouts as clip
from co2s_fast.models.weights import ssm_layouts as ssm
from co2s_fast.models.weights.files import State
from co2s_fast.models.weights.registry import Kind

Keys = Collection[str]


@dataclass(frozen=True)
class Layout:
    """One way of naming the tensors of a backbone.

    Attributes:
        name: as `--layout` takes it.
        kind: "clip" converts to open_clip's names, "ssm" to timm's.
        about: which files have it.
        detect: whether a file with these keys has it; asked in the order of `LAYOUTS`.
        convert: the translation.
    """

    name: str
    kind: Kind
    about: str
    detect: Callable[[Keys], bool]
    convert: Callable[[State], State]


def _any(pattern: str) -> Callable[[Keys], bool]:
    return lambda keys: any(re.match(pattern, key) for key in keys)


def _all(*patterns: str) -> Callable[[Keys], bool]:
    return lambda keys: all(any(re.match(p, key) for key in keys) for p in patterns)


# The first that fits is taken, so the more particular ones come first.
LAYOUTS: tuple[Layout, ...] = (
    Layout("clip-hf", "clip", "CLIPModel of transformers",
           _any(r"vision_model\.embeddings\.class_embedding$"), clip.from_hf),
    Layout("co2s", "clip", "the released Co2S CLIP student's pretrained tower",
           _any(r"(backbone\.)?patch_embed\.projection\.weight$"), clip.from_co2s),
    Layout("openai", "clip", "state dict of OpenAI's own file",
           _all(r"visual\.class_embedding$", r"input_resolution$"), clip.from_openai),
    Layout("open_clip", "clip", "open_clip, RemoteCLIP; a whole model or visual alone",
           _any(r"(visual\.)?class_embedding$"), clip.from_open_clip),
    Layout("dinov3", "ssm", "Meta's DINOv3",
           _any(r"(backbone\.)?storage_tokens$"), ssm.from_dinov3),
    Layout("dinov3-hf", "ssm", "DINOv3ViTModel of transformers",
           _any(r"(.*\.)?embeddings\.register_tokens$"), ssm.from_hf_dinov3),
    Layout("simmim", "ssm", "SimMIM's ViT",
           _any(r"encoder\.(rel_pos_bias|blocks)\."), ssm.from_simmim),
    Layout("beitv2", "ssm", "BEiT and BEiT v2",
           _any(r"(.*\.)?relative_position_bias_table$"), ssm.from_beitv2),
    Layout("dinov2", "ssm", "Meta's DINOv2",
           _all(r"mask_token$", r"blocks\.0\.ls1\.gamma$"), ssm.from_dinov2),
    Layout("mae", "ssm", "MAE with its decoder",
           _all(r"decoder_pos_embed$", r"blocks\.0\."), ssm.from_mae),
    Layout("ibot", "ssm", "iBOT and DINO, of a teacher or a student",
           _any(r"backbone\.blocks\.0\.|masked_embed$"), ssm.from_ibot),
    Layout("timm", "ssm", "timm; also MAE and iBOT without their heads",
           _all(r"patch_embed\.proj\.weight$", r"blocks\.0\."), ssm.from_timm),
)  # fmt: skip


@dataclass(frozen=True)
class Converted:
    """A file's tensors under the names of the library that builds the model.

    Attributes:
        layout: of the file.
        state: the tensors, float32.
        model: open_clip or timm name of the architecture.
        overrides: what in it the shapes say is otherwise, as `StudentConfig.overrides` takes it.
    """

    layout: Layout
    state: State
    model: str
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def depth(self) -> int:
        """Number of blocks of the (vision) transformer."""
        pattern = re.compile(r"(?:visual\.transformer\.res)?blocks\.(\d+)\.")
        return 1 + max(int(found[1]) for found in map(pattern.match, self.state) if found)

    @property
    def patch(self) -> int:
        """Side of a token in pixels."""
        name = "visual.conv1" if self.layout.kind == "clip" else "patch_embed.proj"
        return self.state[f"{name}.weight"].shape[-1]

    @property
    def whole_clip(self) -> bool:
        """Whether the text tower is there, too."""
        return self.layout.kind == "clip" and "token_embedding.weight" in self.state


def layout_named(name: str, kind: Kind | None = None) -> Layout:
    """The layout of a name.

    Raises:
        UsageError: unknown, or of the other kind.
    """
    known = [each for each in LAYOUTS if kind in (None, each.kind)]
    for each in known:
        if each.name == name:
            return each
    raise UsageError(f"layout {name!r}: expected one of {', '.join(each.name for each in known)}")


def detect(keys: Keys, path: str | Path, kind: Kind | None = None) -> Layout:
    """The layout of a file with these keys.

    Raises:
        DataError: none that is known, or one of the other kind.
    """
    if any(key.startswith("decode_head.") for key in keys):
        raise DataError(f"weights {path}: a student with its decoder, as Co2S releases them; "
                        "`co2s-fast import-checkpoint` makes a run of two of them")
    found = next((layout for layout in LAYOUTS if layout.detect(keys)), None)
    if found is None:
        known = ", ".join(layout.name for layout in LAYOUTS)
        shown = ", ".join(sorted(keys))
        raise DataError(f"weights {path}: none of the known layouts ({known}); its keys: {shown}")
    if kind not in (None, found.kind):
        raise DataError(
            f"weights {path}: of kind {found.kind} (layout {found.name}), expected kind {kind}"
        )
    return found


def translate(layout: Layout, state: State, path: str | Path) -> State:
    """`layout.convert` in float32, whose failure names the file.

    Raises:
        DataError: an entry that the layout needs is missing or is not what it should be.
    """
    try:
        converted = layout.convert(state)
    except KeyError as error:
        raise DataError(f"weights {path}, layout {layout.name}: no entry {error}") from error
    except ValueError as error:
        raise DataError(f"weights {path}, layout {layout.name}: {error}") from error
    return {key: value.float().contiguous() if value.is_floating_point() else value
            for key, value in converted.items()}  # fmt: skip
