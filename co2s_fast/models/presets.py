"""Complete settings by name: the paper's two students and two tiny ones to train from scratch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from co2s_fast.models.config import StudentConfig

# Patch 16 gives an 8 x 8 token grid at 128 pixels; the convolutional stem supplies the fine detail
# through the decoder's skips, at strides 8 and 4, where the decoder needs it.
_TINY_DECODER: dict[str, Any] = {
    "channels": 48,
    "text_channels": 48,
    "skip_channels": (16, 8),
    "up_channels": (24, 8),
    "layers": 1,
    "pool": (2, 2),
    "rates": (1, 3),
    "group_channels": 8,
}

_TINY: dict[str, Any] = {
    "stem": "conv",
    "skips": "stem",
    "trainable": "full",
    "decoder": _TINY_DECODER,
}

# The description open_clip builds the tower from. The text part is never trained or used.
TINY_CLIP_MODEL: dict[str, Any] = {
    "embed_dim": 128,
    "quick_gelu": False,
    "vision_cfg": {
        "image_size": 128,
        "layers": 4,
        "width": 128,
        "head_width": 32,
        "patch_size": 16,
    },
    "text_cfg": {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 1, "layers": 1},
}

TINY_SSM_MODEL = "vit_tiny_patch16_dinov3_qkvb"

PRESETS: dict[str, dict[str, Any]] = {
    "paper-clip": {
        "model": "ViT-B-16-quickgelu",
        "weights": "openai",
        "levels": (0, 4, 12),
        "queries": "text",
    },
    "paper-timm": {
        "model": "vit_base_patch16_dinov3_qkvb",
        "weights": "pretrained",
        "levels": (2, 7, 11),
        "queries": "learnable",
    },
    "tiny-clip": {
        **_TINY,
        "backbone": "clip",
        "levels": (4,),
        "queries": "text",
        "text": {"source": "hash"},
    },
    "tiny-ssm": {
        **_TINY,
        "backbone": "timm",
        "overrides": {
            "embed_dim": 128,
            "depth": 4,
            "num_heads": 4,
            # LayerScale starts at 1e-5 in DINOv3, which suits its long pretraining, not ours. (timm
            # leaves a None out, so that it would stay 1e-5.)
            "init_values": 1.0,
        },
        "levels": (3,),
        "queries": "learnable",
    },
}


def tiny_clip_config(**changes: Any) -> StudentConfig:
    """A CLIP-style student of about 1.1 M parameters, to train from scratch on a CPU."""
    from co2s_fast.models.config import StudentConfig

    return StudentConfig(model="tiny-clip", **changes)


def tiny_ssm_config(**changes: Any) -> StudentConfig:
    """A DINOv3-style student of about 1.1 M parameters, to train from scratch on a CPU."""
    from co2s_fast.models.config import StudentConfig

    return StudentConfig(model="tiny-ssm", **changes)
