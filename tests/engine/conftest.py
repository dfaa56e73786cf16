"""A tiny dataset on disk and a run over it that takes a second or two."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from co2s_fast.engine.config import RunConfig
from co2s_fast.engine.interrupt import Interrupted
from co2s_fast.engine.trainer import Trainer, train

SPEC = {
    "name": "stripes",
    "crop": 32,
    "classes": [
        {"name": "field", "color": [200, 180, 60]},
        {"name": "road", "color": [90, 90, 90]},
        {"name": "water", "color": [40, 80, 200]},
    ],
}
STUDENTS = {
    "clip": {
        "backbone": "clip",
        "model": "tiny-clip",
        "levels": [1],
        "overrides": {"vision_cfg": {"layers": 1, "width": 64}, "embed_dim": 64},
    },
    "ssm": {
        "backbone": "timm",
        "model": "tiny-ssm",
        "levels": [0],
        "overrides": {"depth": 1, "embed_dim": 64, "num_heads": 2},
    },
}


def paint(rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """A noisy image of two-pixel-wide to half-image stripes, and its label."""
    label = np.zeros((32, 32), np.uint8)
    first, second = sorted(rng.integers(4, 28, 2))
    label[first:second] = 1
    label[second:] = 2
    label[0, :4] = 255
    colors = np.array([c["color"] for c in SPEC["classes"]], np.float64)
    pixels = colors[np.minimum(label, 2)] + rng.normal(0, 20, (32, 32, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), Image.fromarray(label)


@pytest.fixture(scope="session")
def stripes(tmp_path_factory) -> Path:
    """Folder with stripes.yaml, images/, labels/ and a split: 4 labelled, 8 unlabelled, 4 val."""
    root = tmp_path_factory.mktemp("stripes")
    (root / "stripes.yaml").write_text(yaml.safe_dump(SPEC))
    for folder in ("images", "labels", "split"):
        (root / folder).mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for index in range(16):
        image, label = paint(rng)
        image.save(root / f"images/{index:02}.png")
        label.save(root / f"labels/{index:02}.png")
        lines.append(f"images/{index:02}.png labels/{index:02}.png\n")
    for name, part in (("labeled", lines[:4]), ("unlabeled", lines[4:12]), ("val", lines[12:])):
        (root / f"split/{name}.txt").write_text("".join(part))
    return root


@pytest.fixture(scope="session")
def tiny_students() -> dict:
    """Two students of one block each, as a configuration has them."""
    return STUDENTS


@pytest.fixture
def run_content(stripes, tmp_path):
    """Content of a whole configuration for a run of six steps, as nested dictionaries."""

    def build(**train) -> dict:
        return {
            "data": {
                "dataset": str(stripes / "stripes.yaml"),
                "root": str(stripes),
                "split": str(stripes / "split"),
                "batch_size": 4,
                "workers": 0,
            },
            "students": STUDENTS,
            "method": {"name": "co2s", "threshold": 0.4, "cutmix_shards": 2},
            "train": {
                "steps": 6, "lr": 1e-3, "backbone_multiplier": 1, "decoder_multiplier": 1,
                "device": "cpu", "log_every": 2, "eval_every": 3, "tensorboard": False, **train,
            },
            "eval": {"panels": 0},
            "out": str(tmp_path / "run"),
        }  # fmt: skip

    return build


@pytest.fixture
def stop_after(monkeypatch):
    """Start a run and stop it after so many steps, as SIGTERM does."""

    def start(steps: int, config: RunConfig) -> None:
        make_step = Trainer._make_step

        def make_step_then(self, batch) -> None:
            make_step(self, batch)
            if self.step == steps:
                self.stop.received = signal.SIGTERM

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_make_step", make_step_then)
            with pytest.raises(Interrupted):
                train(config, progress=False)

    return start
