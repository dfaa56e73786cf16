"""torch.compile for a student, region by region."""

from __future__ import annotations

import torch

from co2s_fast.models.clip import ClipBackbone
from co2s_fast.models.student import Student


def compile_student(student: Student) -> None:
    """Compile a backbone's blocks and the decoder, in place; names of the parameters stay.

    Blocks are alike, so that one is compiled and serves all: a twelfth of the code of a ViT-B/16.
    Nothing is compiled before the first call.
    """
    backbone = student.backbone
    if isinstance(backbone, ClipBackbone):
        blocks = backbone.visual.transformer.resblocks
        backbone.value_path = torch.compile(backbone.value_path)
    else:
        blocks = backbone.model.blocks
    for block in blocks:
        block.compile()
    student.decode = torch.compile(student.decode)
