"""A student: images in, class logits out, and the pieces a training step needs in between."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from co2s_fast.errors import DataError, UsageError
from co2s_fast.models.config import StudentConfig, TextConfig
from co2s_fast.models.decoder import QueryDecoder
from co2s_fast.models.inflate import (
    channel_statistics,
    check_channels,
    is_input_layer,
    is_plain_rgb,
    learns_input,
)
from co2s_fast.models.lora import MARK, add_adapters, merge_adapters
from co2s_fast.models.queries import Named, text_queries
from co2s_fast.models.reinit import reinitialize


class Student(nn.Module):
    """One ViT backbone with its class queries and decoder. Built by `build_student`.

    Attributes:
        num_classes: K.
        channels: N, of the images.
        patch_size: side of a token in pixels.
        pads_to: logits cover the image padded to multiples of this; 1 where they cover the image.
        queries: class vectors [K, d], a parameter where they are learnable, else a buffer.
        provenance: what the student started from; see `build_student`.
    """

    def __init__(
        self,
        config: StudentConfig,
        backbone: nn.Module,
        decoder: QueryDecoder,
        queries: Tensor,
        provenance: dict[str, Any],
    ) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.decoder = decoder
        self.provenance = provenance
        self.num_classes = queries.shape[0]
        self.patch_size: int = backbone.patch_size
        self.pads_to = self.patch_size if config.odd_sizes == "pad" else 1
        if config.queries == "learnable":
            self.queries = nn.Parameter(queries)
        else:
            self.register_buffer("queries", queries)
        self.channels = config.channels
        mean, std = channel_statistics(config)
        # Not saved: they follow from the configuration, which every checkpoint carries.
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self._freeze()

    def features(self, images: Tensor) -> tuple[Tensor, ...]:
        """Feature maps, shallow to deep.

        Args:
            images: [B, N, H, W], uint8, or float in [0, 1]. Any size; sides that are no multiple
                of `patch_size` are padded at the right and bottom with the mean colour, so that
                students of one patch see the same grid, or resized; see `odd_sizes`.

        Raises:
            TypeError, ValueError: another dtype or shape.
        """
        if images.dim() != 4 or images.shape[1] != self.channels:
            wanted = f"[B, {self.channels}, H, W]"
            raise ValueError(f"images must be {wanted}, got {tuple(images.shape)}")
        if images.dtype == torch.uint8:
            images = images.to(self.mean.dtype) / 255
        elif not images.is_floating_point():
            raise TypeError(f"images must be uint8, or float in [0, 1], got {images.dtype}")
        images = (images.to(self.mean.dtype) - self.mean) / self.std
        height, width = images.shape[-2:]
        bottom, right = (-side % self.patch_size for side in (height, width))
        if (right or bottom) and self.pads_to > 1:
            images = F.pad(images, (0, right, 0, bottom))
        elif right or bottom:
            images = F.interpolate(images, (height + bottom, width + right), mode="bilinear")
        return self.backbone(images)

    def perturb(
        self,
        features: Sequence[Tensor],
        generator: torch.Generator | None = None,
        keep: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        """Channel dropout on each map: `F.dropout2d(map, feature_dropout, training=True)`.

        Args:
            features: maps [B, C_i, h_i, w_i].
            generator: source of the masks, best on the maps' device; None takes torch's own.
            keep: masks [B, C_i], True where a channel stays, instead of drawing them.

        Raises:
            ValueError: other mask shapes.
        """
        drop = self.config.feature_dropout
        if keep is None:
            if drop == 0:
                return tuple(features)
            keep = [_draw_mask(level, drop, generator) for level in features]
        shapes = [tuple(level.shape[:2]) for level in features]
        if [tuple(mask.shape) for mask in keep] != shapes:
            found = [tuple(mask.shape) for mask in keep]
            raise ValueError(f"keep must have shapes {shapes}, got {found}")
        return tuple(
            level * (mask[..., None, None].to(level.dtype) / (1 - drop))
            for level, mask in zip(features, keep, strict=True)
        )

    def decode(self, features: Sequence[Tensor]) -> Tensor:
        """Logits [B, K, h, w]; with patch 16, h and w are a quarter of the padded image's sides."""
        return self.decoder(features, self.queries)

    def forward(self, images: Tensor) -> Tensor:
        """`decode(features(images))`."""
        return self.decode(self.features(images))

    def checkpoint_gradients(self, backbone: bool, decoder: bool) -> None:
        """From now on, compute the blocks of either again in the backward pass, or keep them."""
        self.backbone.checkpoint_gradients(backbone)
        parts = self.decoder.config.model_copy(update={"gradient_checkpointing": decoder})
        self.decoder.config = parts
        changed = {"gradient_checkpointing": backbone, "decoder": parts}
        self.config = self.config.model_copy(update=changed)

    def parameter_groups(
        self,
        lr: float,
        weight_decay: float,
        backbone_multiplier: float = 0.01,
        decoder_multiplier: float = 10.0,
        adapter_multiplier: float = 1.0,
    ) -> list[dict[str, Any]]:
        """Optimizer groups "backbone", "input", "decoder" and "queries", without what is frozen.

        "input" is the patch projection where it was inflated to other bands and has to learn them.

        With `trainable="lora"` the first is "adapters", at `adapter_multiplier` times the rate:
        they start at zero, and the small rate that spares pretrained weights is not for them.

        The released learning rates are 1e-6, 1e-3 and 1e-4 for base rate 1e-4, with weight decay
        on every tensor, norms and biases included. Tiny students trained from scratch want
        `backbone_multiplier=1, decoder_multiplier=1`.
        """
        named = list(self.backbone.named_parameters())
        inputs = [p for name, p in named if learns_input(self.config) and is_input_layer(name)]
        others = [p for _, p in named if all(p is not each for each in inputs)]
        backbone = ("backbone", others, backbone_multiplier)
        if self.config.trainable == "lora":
            backbone = ("adapters", others, adapter_multiplier)
        parts = [
            backbone,
            ("input", inputs, 1.0),
            ("decoder", self.decoder.parameters(), decoder_multiplier),
            ("queries", [self.queries] if isinstance(self.queries, nn.Parameter) else [], 1.0),
        ]
        groups = []
        for name, parameters, multiplier in parts:
            chosen = [p for p in parameters if p.requires_grad]
            if chosen:
                rate = lr * multiplier
                groups.append(
                    {"name": name, "params": chosen, "lr": rate, "weight_decay": weight_decay}
                )
        return groups

    def trainable_count(self) -> int:
        """Number of parameters that learn."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def merge_adapters(self) -> None:
        """Add low-rank adapters to their weights: the same outputs from a plain backbone.

        The state dict then has the names of a student without adapters. For inference: what is left
        of the backbone is frozen. Nothing happens where there are none.
        """
        if self.config.trainable == "lora":
            merge_adapters(self.backbone)

    def _freeze(self) -> None:
        mark = {"full": "", "attention": ".attn.", "lora": MARK}.get(self.config.trainable)
        unused = _unused_parts(self.backbone)
        for name, parameter in self.backbone.named_parameters():
            learns = mark is not None and mark in name
            learns |= learns_input(self.config) and is_input_layer(name)
            parameter.requires_grad_(learns and not name.startswith(unused))


def _unused_parts(backbone: nn.Module) -> tuple[str, ...]:
    """Prefixes of a timm model's parts past the deepest level, which never see a gradient."""
    blocks = getattr(getattr(backbone, "model", None), "blocks", ())
    past = range(backbone.levels[-1] + 1, len(blocks))
    return (
        "model.head.",
        "model.fc_norm.",
        "model.attn_pool.",
        *(f"model.blocks.{i}." for i in past),
    )


def _draw_mask(level: Tensor, drop: float, generator: torch.Generator | None) -> Tensor:
    device = generator.device if generator is not None else level.device
    draws = torch.rand(level.shape[:2], generator=generator, device=device)
    return (draws >= drop).to(level.device, non_blocking=True)


class RandomBackboneWarning(UserWarning):
    """A backbone that is to stay mostly as it is starts from random weights."""


def build_student(
    config: StudentConfig, classes: Sequence[Named], *, seed: int, load: bool = True
) -> Student:
    """A student with seeded initialisation and, where asked for, loaded weights left as they are.

    `provenance` holds `source` ("random" or the weights' name), `licence`, `model`, `sha256` of the
    backbone's tensors as the finished student has them (without low-rank adapters), `tensors` and
    `parameters` (counts), `channels`, `inflated` (whether a pretrained patch projection was made to
    fit them) and `queries` ("learnable" or where the class vectors come from).
    Nothing is re-initialised after loading; torch's global random state is left as it was.

    Args:
        config: what to build.
        classes: the dataset's classes in label order; `name` and `concepts` are read.
        seed: of every random initial value.
        load: False reads no weights and runs no text tower: a student of the same shape for a
            state dict that follows. Its fixed class vectors are NaN until then.

    Raises:
        UsageError, DataError: a configuration or a file that cannot work.
    """
    from co2s_fast.models.loading import checksum, is_own_backbone, licence_of

    if not load:
        return _without_weights(config, classes, seed)
    if not classes:
        raise UsageError("classes must not be empty")
    fresh = config.weights is None or config.reinitialize
    own = not fresh and is_own_backbone(config.weights)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        backbone, tower = _build_backbone(config, fresh=fresh, own=own)
        loaded = built = checksum(backbone)
        counts = {"tensors": len(backbone.state_dict()),
                  "parameters": sum(p.numel() for p in backbone.parameters())}  # fmt: skip
        width = backbone.widths[-1]
        queries = _queries(config, classes, width, tower)
        decoder = QueryDecoder(backbone.widths, width, config.decoder)
        if config.trainable == "lora":  # last: the decoder starts as it does without them
            add_adapters(backbone, config.lora)
            built = checksum(backbone)
    provenance = {
        "source": "random" if fresh else config.weights,
        "licence": "none: random weights" if fresh else licence_of(config),
        "model": config.model,
        "channels": config.channels,
        "inflated": not (fresh or own or is_plain_rgb(config.channels, config.bands)),
        "sha256": loaded,
        **counts,
        "queries": config.queries if config.queries == "learnable" else _describe(config),
    }
    if fresh and config.trainable != "full":
        warnings.warn(
            f"backbone {config.model!r} starts from random weights, yet trainable="
            f"{config.trainable!r}: most of it will stay random",
            RandomBackboneWarning,
            stacklevel=2,
        )
    student = Student(config, backbone, decoder, queries, provenance)
    if checksum(student.backbone) != built:
        raise RuntimeError("building the student changed the backbone's loaded weights")
    return student


def _without_weights(config: StudentConfig, classes: Sequence[Named], seed: int) -> Student:
    """A student that reads nothing, for a state dict that follows."""
    text = TextConfig(source="checkpoint")
    bare = config.model_copy(update={"weights": None, "text": text})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RandomBackboneWarning)
        student = build_student(bare, classes, seed=seed)
    student.config = config
    return student


def _build_backbone(
    config: StudentConfig, *, fresh: bool, own: bool
) -> tuple[nn.Module, nn.Module | None]:
    """The backbone with its weights, and the text tower where they came with one.

    `fresh`: it keeps its random weights; `own`: they come from a file of `co2s-fast pretrain`.
    """
    from co2s_fast.models.loading import (
        build_clip_backbone,
        build_timm_backbone,
        load_strictly,
        read_state_dict,
    )

    tower = None
    conv = config.stem == "conv"
    bare = config.model_copy(update={"weights": None}) if own or conv or fresh else config
    if config.backbone == "clip":
        backbone, tower = build_clip_backbone(bare)
    else:
        backbone = build_timm_backbone(bare)
        if config.reinitialize:
            reinitialize(backbone.model)
    if conv and config.weights is not None and not own:
        read_state_dict(config.weights)  # says where the file is missing or damaged
        raise DataError(f"weights {config.weights}: expected a file of `co2s-fast pretrain`, "
                        "which alone holds a convolutional stem")
    if own:
        state = read_state_dict(config.weights)
        check_channels(state, config.channels, f"weights {config.weights}")
        load_strictly(backbone, state, config.weights)
    _override_eps(backbone, config.eps)
    return backbone, tower


def _override_eps(backbone: nn.Module, eps: float | None) -> None:
    for module in backbone.modules() if eps is not None else ():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps


def _queries(
    config: StudentConfig, classes: Sequence[Named], width: int, tower: nn.Module | None
) -> Tensor:
    if config.queries == "learnable":
        return torch.randn(len(classes), width) * 0.02
    text = config.text
    same = (text.model, text.weights) == (config.model, config.weights)
    return text_queries(text, classes, width, tower=tower if same else None)


def _describe(config: StudentConfig) -> str:
    text = config.text
    if text.source == "file":
        return f"file {text.path}"
    if text.source == "open_clip":
        return f"open_clip {text.model} {text.weights}"
    return text.source
