"""Students: ViT backbones through open_clip and timm, class queries, and the query decoder."""

from __future__ import annotations

from co2s_fast.models.config import DecoderConfig, StudentConfig, TextConfig
from co2s_fast.models.presets import tiny_clip_config, tiny_ssm_config
from co2s_fast.models.student import Student, build_student

__all__ = [
    "DecoderConfig",
    "Student",
    "StudentConfig",
    "TextConfig",
    "build_student",
    "tiny_clip_config",
    "tiny_ssm_config",
]
