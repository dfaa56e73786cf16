"""Students out of the released Co2S checkpoints, with the settings they were trained under."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from co2s_fast.errors import DataError
from co2s_fast.models.config import StudentConfig
from co2s_fast.models.loading import checksum, load_strictly, read_state_dict, translate
from co2s_fast.models.official import State, student_from_official
from co2s_fast.models.queries import Named
from co2s_fast.models.student import Student, build_student


def released_config(backbone: str) -> StudentConfig:
    """The settings under which a released checkpoint gives its released scores.

    The CLIP student: exact GELU although its weights come from QuickGELU, logits through 224 x 224.
    The DINOv3 student: rotary embedding in bfloat16, logits through 256 x 256. Both: LayerNorm
    epsilon 1e-6.

    Args:
        backbone: "clip" or "timm".
    """
    side = 224 if backbone == "clip" else 256
    changes = {"clip": {"activation": "gelu", "text": {"source": "checkpoint"}}}
    return StudentConfig(
        backbone=backbone,
        weights=None,
        eps=1e-6,
        decoder={"resize_to": (side, side)},
        **changes.get(backbone, {"rope": "bf16"}),
    )


def load_released(path: str | Path, classes: Sequence[Named]) -> Student:
    """A student from `best_clip.pth` or `best_dinov3.pth`; which one is told by its keys.

    `provenance["reinitialised"]` is True where a DINOv3 backbone carries the signature of never
    having seen its pretrained weights (every LayerScale exactly 1e-5).

    Raises:
        DataError: not such a checkpoint, or one for another number of classes.
    """
    state = read_state_dict(path)
    if "_cached_text" in state:
        backbone, queries = "clip", state["_cached_text"]
    elif "text_provider.emb.weight" in state:
        backbone, queries = "timm", state["text_provider.emb.weight"]
    else:
        raise DataError(f"weights {path}: neither a released CLIP nor a released DINOv3 student")
    if len(queries) != len(classes):
        raise DataError(
            f"weights {path}: trained for {len(queries)} classes, the dataset has {len(classes)}"
        )
    renamed: State = translate(lambda s: student_from_official(s, backbone), state, path)
    student = build_student(released_config(backbone), classes, seed=0, load=False)
    load_strictly(student, renamed, path)
    gammas = [value for name, value in renamed.items() if ".gamma_" in name]
    student.provenance |= {
        "source": str(path),
        "licence": "unknown",
        "sha256": checksum(student.backbone),
        "reinitialised": bool(gammas) and all(torch.all(g == 1e-5).item() for g in gammas),
        "queries": "learnable" if backbone == "timm" else f"file {path}",
    }
    return student
