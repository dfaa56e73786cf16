"""Students whose maps can be told by hand, and scenes for them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import rasterio
import torch
from torch import nn

from co2s_fast.engine.prediction import Outputs, predict

NAMES = ["water", "road", "roof"]
PALETTE = [(0, 0, 255), (128, 128, 128), (255, 0, 0)]
SPEC = SimpleNamespace(num_classes=3, class_names=NAMES, palette=PALETTE, crop=32)


class Brightest(nn.Module):
    """Class = the brightest channel, with a weight on each; a pixel's class is its own matter."""

    def __init__(self, *weights: float) -> None:
        super().__init__()
        self.register_buffer("weight", torch.tensor(weights).view(1, 3, 1, 1))

    def forward(self, images):
        return images.float() / 255 * self.weight


STUDENTS = {"clip": Brightest(10.0, 10.0, 10.0), "ssm": Brightest(1.0, 30.0, 1.0)}


def scene(height=41, width=53, seed=0):
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (-(-height // 6), -(-width // 6), 3), np.uint8)
    return coarse.repeat(6, 0).repeat(6, 1)[:height, :width]


def expected(pixels, student="both"):
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    if student == "both":
        probabilities = sum(s(images).softmax(1) for s in STUDENTS.values()) / 2
    else:
        probabilities = STUDENTS[student](images).softmax(1)
    certainty, labels = probabilities[0].max(0)
    return labels.numpy(), certainty.numpy()


def run(images, out, **options):
    kinds = {k: options.pop(k) for k in Outputs.__dataclass_fields__ if k in options}
    options = {"progress": False, "outputs": Outputs(**kinds), **options}
    return predict(STUDENTS, images, out, SPEC, **options)


def write_tif(path, pixels, **options):
    profile = {"driver": "GTiff", "dtype": pixels.dtype, "count": pixels.shape[2], **options}
    profile |= {"height": pixels.shape[0], "width": pixels.shape[1]}
    with rasterio.open(path, "w", **profile) as target:
        target.write(pixels.transpose(2, 0, 1))
