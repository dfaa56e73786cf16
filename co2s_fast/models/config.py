"""What a student is made of: typed, validated, and complete before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from co2s_fast.models.presets import PRESETS

Width = Annotated[int, Field(ge=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class TextConfig(_Strict):
    """Where the class vectors of a text-guided student come from.

    Attributes:
        source: "open_clip" runs a text tower over the concepts; "file" reads a K x d `.npy` array;
            "hash" makes fixed vectors out of hashed letter n-grams, a substitute for tiny students
            trained from scratch, which have no trained text tower; "checkpoint" leaves NaN for the
            state dict that is loaded next to fill.
        path: the `.npy` file of source "file".
        model: open_clip model name, or JSON file, of the text tower (source "open_clip").
        weights: open_clip pretrained tag, name of `co2s-fast weights list` or file of the text
            tower.
        template: the prompt; `{concept}` is replaced by each concept.
    """

    source: Literal["open_clip", "file", "hash", "checkpoint"] = "open_clip"
    path: Path | None = None
    model: str = "ViT-B-16-quickgelu"
    weights: str | None = "openai"
    template: str = "a photo of a {concept}"

    @field_validator("template")
    @classmethod
    def _has_concept(cls, value: str) -> str:
        if "{concept}" not in value:
            raise ValueError(f"template must contain {{concept}}, got {value!r}")
        return value

    @model_validator(mode="after")
    def _path_where_needed(self) -> TextConfig:
        if (self.source == "file") != (self.path is not None):
            raise ValueError(
                "path goes with source 'file' and only with it: "
                f"source {self.source!r}, path {self.path}"
            )
        return self


class DecoderConfig(_Strict):
    """Widths of the query decoder; the defaults are the paper's (2.2 M parameters).

    Attributes:
        channels: width of the per-class maps, from the similarity map to the first upsampling.
        text_channels: width of the projected class vector in the class attention.
        skip_channels: widths of the projected skips, deepest first; one upsampling stage each.
        up_channels: widths after each upsampling stage; one entry for each of skip_channels.
        layers, heads, mlp_ratio: of the attention between classes.
        pool: height and width of the average pooling before that attention.
        kernel: side of the convolution on the similarity map.
        rates: dilations of the ASPP branches; 1 means a 1x1 convolution.
        group_channels: channels in one group of each GroupNorm.
        resize_to: resize the logits to this height and width (bilinear), None to leave them at
            4 times the token grid. The released decoders resize to 224 (CLIP) and 256 (DINOv3).
        gradient_checkpointing: recompute the upsampling stages in the backward pass.
    """

    channels: int = Field(128, ge=8)
    text_channels: int = Field(128, ge=8)
    skip_channels: tuple[Width, ...] = (32, 16)
    up_channels: tuple[Width, ...] = (64, 32)
    layers: int = Field(2, ge=0)
    heads: int = Field(4, ge=1)
    mlp_ratio: float = Field(2.0, gt=0)
    pool: tuple[Width, Width] = (4, 4)
    kernel: int = Field(7, ge=1)
    rates: tuple[Width, ...] = Field((1, 6, 12, 18), min_length=1)
    group_channels: int = Field(16, ge=1)
    resize_to: tuple[Width, Width] | None = None
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _widths_fit(self) -> DecoderConfig:
        if len(self.skip_channels) != len(self.up_channels):
            raise ValueError(
                "skip_channels and up_channels need as many entries as each other, got "
                f"{self.skip_channels} and {self.up_channels}"
            )
        ins = (self.channels, *self.up_channels)[: len(self.skip_channels)]
        for before, skip in zip(ins, self.skip_channels, strict=True):
            if skip >= before:
                raise ValueError(f"a skip of {skip} channels leaves none of {before} to upsample")
        for width in (self.channels, *self.up_channels):
            if width % self.group_channels:
                raise ValueError(
                    f"group_channels {self.group_channels} does not divide the width {width}"
                )
        if (self.channels + self.text_channels) % self.heads:
            raise ValueError(
                f"heads {self.heads} does not divide channels + text_channels "
                f"{self.channels + self.text_channels}"
            )
        if not self.kernel % 2:
            raise ValueError(f"kernel must be odd, got {self.kernel}")
        return self


class LoraConfig(_Strict):
    """Low-rank adapters, where `trainable` is "lora" (Hu et al. 2022).

    Attributes:
        rank: of what is added to each attention weight (the joint query, key and value projection
            counts as one).
        alpha: the adapters' output is multiplied by alpha / rank.
        dropout: on the adapters' input in training.
    """

    rank: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)


class StudentConfig(_Strict):
    """One student: a ViT backbone, class queries and a decoder.

    `StudentConfig(backbone="clip")` is the paper's CLIP student, `StudentConfig(backbone="timm")`
    its DINOv3 student, both from pretrained weights. `model="tiny-clip"` and `model="tiny-ssm"`
    fill in a complete small student for training from scratch on a CPU; whatever else is given
    wins over it.

    Attributes:
        backbone: "clip" (open_clip ViT, value-path maps) or "timm" (any timm ViT, block outputs).
        model: open_clip or timm model name, a JSON file with an open_clip model description, or
            "tiny-clip" / "tiny-ssm".
        weights: None for random ones; a name of `co2s-fast weights list` that goes with `model`;
            an open_clip or timm pretrained tag ("pretrained" is timm's default tag); or a
            `.safetensors`, `.pt`, `.pth` or `.bin` file of a layout known to `weights import`.
        reinitialize: leave `weights` unread and draw a DINOv3 backbone as the authors' release does
            after loading it, by accident; see `reinit`.
        overrides: keyword arguments for the model: timm's constructor, or entries of the open_clip
            model description (nested dictionaries are merged).
        levels: the feature maps, shallow to deep. CLIP: block numbers, and the number of blocks
            for the map in text space. timm: block numbers from 0.
        stem: "patch" keeps the model's patch projection; "conv" puts a stack of stride-2 3x3
            convolutions in its place (Xiao et al. 2021, for training from scratch).
        skips: "levels" feeds the decoder's skips from `levels`; "stem" from the convolutional
            stem's own maps, so that `levels` names the deepest map only.
        queries: "text" (fixed) or "learnable" class vectors.
        trainable: which backbone parameters learn: "attention" only, "full", "frozen", or "lora",
            low-rank adapters beside the frozen attention.
        lora: rank, alpha and dropout of those adapters.
        feature_dropout: probability of dropping a channel in `Student.perturb`.
        activation: replaces the CLIP tower's activation; None keeps the model's own.
        eps: replaces every LayerNorm's epsilon in the backbone; None keeps the model's own.
        rope: "bf16" computes the rotary embedding and rounds queries and keys as the released
            DINOv3 student does; "fp32" is timm's own.
        channels: bands of the images; other than three inflate a pretrained patch projection, see
            `inflate`. Training takes them, their names and their statistics from the dataset.
        bands: the channels' names; "red", "green" and "blue" mean something to the inflation.
        normalization: image mean and standard deviation.
        mean, std: of each channel of an image in [0, 1], in place of the normalisation's.
        odd_sizes: images whose sides are no multiple of the patch are padded at the right and
            bottom ("pad"), or resized to the next multiple ("resize"), which keeps the logits over
            the image where a patch, such as DINOv2's 14, divides no usual crop.
        gradient_checkpointing: recompute the backbone's blocks in the backward pass.
    """

    backbone: Literal["clip", "timm"]
    model: str
    weights: str | None = None
    reinitialize: bool = False
    overrides: dict[str, Any] = Field(default_factory=dict)
    levels: tuple[int, ...]
    stem: Literal["patch", "conv"] = "patch"
    skips: Literal["levels", "stem"] = "levels"
    queries: Literal["text", "learnable"]
    text: TextConfig = Field(default_factory=TextConfig)
    trainable: Literal["attention", "full", "frozen", "lora"] = "attention"
    lora: LoraConfig = Field(default_factory=LoraConfig)
    decoder: DecoderConfig = Field(default_factory=DecoderConfig)
    feature_dropout: float = Field(0.5, ge=0, lt=1)
    activation: Literal["gelu", "quick_gelu"] | None = None
    eps: float | None = Field(None, gt=0)
    rope: Literal["fp32", "bf16"] = "fp32"
    channels: int = Field(3, ge=1)
    bands: tuple[str, ...] | None = None
    normalization: Literal["imagenet", "clip", "satellite", "none"] = "imagenet"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    odd_sizes: Literal["pad", "resize"] = "pad"
    gradient_checkpointing: bool = False

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        preset = PRESETS.get(str(data.get("model")))
        if preset is None:
            preset = PRESETS.get(f"paper-{data.get('backbone')}", {})
        return merge(preset, data)

    @model_validator(mode="after")
    def _parts_fit(self) -> StudentConfig:
        if list(self.levels) != sorted(set(self.levels)) or min(self.levels, default=-1) < 0:
            raise ValueError(f"levels must rise and not be negative, got {self.levels}")
        wanted = 1 if self.skips == "stem" else len(self.decoder.skip_channels) + 1
        if len(self.levels) != wanted:
            raise ValueError(
                f"levels must name {wanted} maps (decoder.skip_channels has "
                f"{len(self.decoder.skip_channels)} entries, skips={self.skips!r}), "
                f"got {self.levels}"
            )
        if self.skips == "stem" and self.stem != "conv":
            raise ValueError("skips='stem' needs stem='conv'")
        if self.stem == "conv" and not (self.weights or ".safetensors").endswith(".safetensors"):
            raise ValueError(
                "stem='conv' has no released weights: expected none, or a .safetensors file of "
                f"`co2s-fast pretrain`, got weights={self.weights!r}"
            )
        self._check_channels()
        if self.backbone == "timm" and self.activation is not None:
            raise ValueError("activation is for backbone 'clip'; a timm model's own is kept")
        if self.reinitialize and (self.backbone == "clip" or self.stem == "conv"):
            raise ValueError("reinitialize is for backbone 'timm' with stem 'patch'")
        if self.backbone == "clip" and self.rope != "fp32":
            raise ValueError("rope is for backbone 'timm'; the CLIP tower has no rotary embedding")
        return self

    def _check_channels(self) -> None:
        for name in ("bands", "mean", "std"):
            value = getattr(self, name)
            if value is not None and len(value) != self.channels:
                raise ValueError(
                    f"{name} needs {self.channels} values, one for each channel, got {value}"
                )
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"mean and std go together, got mean {self.mean}, std {self.std}")
        if any(value <= 0 for value in self.std or ()):
            raise ValueError(f"std must be above 0, got {self.std}")
        if "in_chans" in self.overrides:
            raise ValueError("overrides: in_chans is not for them, give channels instead")


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`: dictionaries are merged, everything else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged
