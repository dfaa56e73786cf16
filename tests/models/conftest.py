"""Small students and classes for the tests of models."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

NAMES = ["building", "land", "road", "vegetation", "water"]


@pytest.fixture
def classes() -> list[SimpleNamespace]:
    concepts = {"building": ["residential building", "high-rise"], "water": ["water", "lake"]}
    return [SimpleNamespace(name=n, concepts=concepts.get(n, [])) for n in NAMES]


@pytest.fixture(scope="session")
def clip_files(tmp_path_factory) -> tuple[str, str]:
    """A tiny open_clip model with the real vocabulary: (description.json, weights.safetensors)."""
    import open_clip
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("clip")
    description = {
        "embed_dim": 48,
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": 64,
            "layers": 3,
            "width": 64,
            "head_width": 32,
            "patch_size": 16,
        },
        "text_cfg": {
            "context_length": 20,
            "vocab_size": 49408,
            "width": 32,
            "heads": 2,
            "layers": 2,
        },
    }
    (folder / "clip.json").write_text(json.dumps(description))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = open_clip.CLIP(**description)
        state = {k: torch.randn_like(v) * 0.1 for k, v in model.state_dict().items()}
    save_file(state, folder / "clip.safetensors")
    return str(folder / "clip.json"), str(folder / "clip.safetensors")


@pytest.fixture
def small_decoder() -> dict:
    return {
        "channels": 32,
        "text_channels": 32,
        "skip_channels": (16, 8),
        "up_channels": (32, 16),
        "pool": (2, 2),
    }
