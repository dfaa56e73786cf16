"""What the loss examples share: a small segmenter, random images, and a loop that trains it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

CLASSES, SIDE, IGNORE = 5, 32, 255


class Segmenter(nn.Module):
    """An encoder and a head; logits come at a quarter of the image's side, as from decoders."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Sequential(nn.GroupNorm(4, 16), nn.Conv2d(16, CLASSES, 1))

    def forward(self, images: Tensor, drop_features: bool = False) -> Tensor:
        features = self.encoder(images)
        if drop_features:
            features = nn.functional.dropout2d(features, 0.5)
        return 8 * self.head(features)  # sharp enough that some pixels are confident


@dataclass
class Batch:
    x: Tensor  # labelled images [B,3,H,W]
    y: Tensor  # their labels [B,H,W], IGNORE where there is none
    weak: Tensor  # unlabelled images, weakly augmented
    strong1: Tensor  # the same, strongly augmented
    strong2: Tensor
    ignore: Tensor  # uint8 [B,H,W], IGNORE where the unlabelled images are padding
    boxes1: Tensor  # int32 [B,4], CutMix boxes of the strong views: x1, y1, x2, y2
    boxes2: Tensor


def random_batch(step: int) -> Batch:
    g = torch.Generator().manual_seed(step)
    x, weak = (torch.rand(4, 3, SIDE, SIDE, generator=g) for _ in range(2))
    y = torch.randint(0, CLASSES, (4, SIDE // 8, SIDE // 8), generator=g)
    y = y.repeat_interleave(8, 1).repeat_interleave(8, 2)
    y[:, :2] = IGNORE
    ignore = torch.zeros(4, SIDE, SIDE, dtype=torch.uint8)
    ignore[1, -5:] = IGNORE
    strong1, strong2 = (weak * torch.rand(4, 1, 1, 1, generator=g) for _ in range(2))
    corner = torch.randint(0, SIDE // 2, (2, 4, 2), generator=g)
    boxes1, boxes2 = torch.cat([corner, corner + SIDE // 2], 2).int()
    boxes2[0] = 0  # an empty box
    return Batch(x, y, weak, strong1, strong2, ignore, boxes1, boxes2)


def train(losses: Callable[[nn.Module, Batch], Tensor], steps: int = 5) -> list[float]:
    """Losses of a few steps from fixed weights, with `losses` as the loop's loss lines."""
    torch.manual_seed(0)
    model = Segmenter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    history = []
    for step in range(steps):
        loss = losses(model, random_batch(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    return history


def show(before: Callable, after: Callable) -> None:
    """Train with both and print the losses side by side."""
    for name, losses in (("before", before), ("after", after)):
        print(f"{name:<6}", "  ".join(f"{loss:.6f}" for loss in train(losses)))
