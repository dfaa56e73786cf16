"""Run folders of students that never trained, made in a moment: what `load_run` needs, no more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from co2s_fast.data.catalogue import load_dataset
from co2s_fast.engine.checkpoint import save_checkpoint
from co2s_fast.engine.config import CONFIG_FILE, RunConfig, dump_config
from co2s_fast.engine.runs import SPEC_FILE, checkpoint_folder, dump_spec, run_state, student_arrays
from co2s_fast.models import build_student

DECODER = {"channels": 16, "text_channels": 16, "skip_channels": [8], "up_channels": [16],
           "pool": [2, 2], "layers": 1, "group_channels": 8, "rates": [1, 3]}  # fmt: skip
# The paper's students at a fraction of their width and depth.
CLIP = {
    "backbone": "clip", "model": "ViT-B-16-quickgelu", "weights": None, "levels": [0, 2],
    "overrides": {
        "embed_dim": 32, "text_cfg": {"width": 32, "heads": 1, "layers": 1},
        "vision_cfg": {"layers": 2, "width": 64, "head_width": 16, "image_size": 64},
    },
    "text": {"source": "hash"}, "decoder": DECODER,
}  # fmt: skip
DINOV3 = {
    "backbone": "timm", "model": "vit_base_patch16_dinov3_qkvb", "weights": None,
    "levels": [0, 1], "decoder": DECODER,
    "overrides": {"embed_dim": 64, "depth": 2, "num_heads": 4, "init_values": 1.0},
}  # fmt: skip


def untrained_run(content: dict[str, Any], seed: int = 0) -> Path:
    """Write the folder `content["out"]` of a run with this configuration.

    Weights are drawn wide enough that probabilities differ from pixel to pixel.
    """
    config = RunConfig.model_validate(content)
    spec = load_dataset(config.data.dataset)
    students = {
        name: build_student(each, spec.classes, seed=seed)
        for name, each in config.students.items()
    }
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for student in students.values():
            for parameter in student.parameters():
                if parameter.dim() > 1:
                    spread = 1.5 * parameter[0].numel() ** -0.5
                    parameter.normal_(0, spread, generator=generator)
            student.decoder.head.weight *= 10
    config.folder.mkdir(parents=True)
    (config.folder / CONFIG_FILE).write_text(dump_config(config))
    (config.folder / SPEC_FILE).write_text(dump_spec(spec))
    state = run_state(config, spec, students) | {"step": 0, "epoch": 0, "score": 0.0}
    save_checkpoint(checkpoint_folder(config.folder, "best"), "step-0", student_arrays(students),
                    state)  # fmt: skip
    return config.folder
