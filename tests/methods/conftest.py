"""Tiny students and a batch with every difficulty: ignored labels, padding, boxes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from co2s_fast.data import Batch
from co2s_fast.methods import get_method
from co2s_fast.models import StudentConfig, build_student

CLASSES = [SimpleNamespace(name=name, concepts=[name]) for name in ("field", "road", "water")]
SIDE = 64


@pytest.fixture
def students():
    """Two students of one block each, with different weights in every call of the same seed."""

    def build(seed: int = 0):
        clip = StudentConfig(
            backbone="clip",
            model="tiny-clip",
            levels=(1,),
            overrides={"vision_cfg": {"layers": 1, "width": 64}, "embed_dim": 64},
        )
        ssm = StudentConfig(
            backbone="timm",
            model="tiny-ssm",
            levels=(0,),
            overrides={"depth": 1, "embed_dim": 64, "num_heads": 2},
        )
        return {
            "clip": build_student(clip, CLASSES, seed=seed),
            "ssm": build_student(ssm, CLASSES, seed=seed + 1),
        }

    return build


@pytest.fixture
def make_batch():
    """Batches of random pixels; the same seed gives an equal, independent batch."""

    def build(size: int = 4, seed: int = 0) -> Batch:
        generator = torch.Generator().manual_seed(seed)

        def pixels() -> torch.Tensor:
            shape = (size, 3, SIDE, SIDE)
            return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

        labels = torch.randint(0, 3, (2, size, SIDE, SIDE), generator=generator).to(torch.uint8)
        labels[0, 0, :20] = 255
        labels[1, 1, :, 40:] = 255
        ignore = torch.zeros(size, SIDE, SIDE, dtype=torch.uint8)
        ignore[0, 50:] = 255
        ignore[-1, :, 48:] = 255
        boxes1 = torch.zeros(size, 4, dtype=torch.int32)
        boxes1[0] = torch.tensor([5, 10, 40, 60])
        boxes1[1] = torch.tensor([0, 0, 20, 20])
        boxes2 = boxes1.roll(1, 0)
        return Batch(
            x=pixels(), y=labels[0], w=pixels(), s1=pixels(), s2=pixels(), ignore=ignore,
            boxes1=boxes1, boxes2=boxes2, truth=labels[1],
        )  # fmt: skip

    return build


@pytest.fixture
def make_method(students):
    """A method over fresh students; a low threshold, so that untrained students are confident."""

    def build(name: str = "co2s", seed: int = 3, **options):
        method_class = get_method(name)
        if "threshold" in method_class.Config.model_fields:
            options.setdefault("threshold", 0.35)
        return method_class(students(seed), method_class.Config(**options), seed=seed).train()

    return build
