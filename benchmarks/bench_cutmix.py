"""Pasting CutMix boxes into a batch of images, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.harness import Case, Workload
from benchmarks.inputs import BATCH, CROP, make_batch

SECTION = "cutmix"
TITLE = "CutMix.mix_ on images"
PROVIDERS = ("eager", "reference", "cpp", "triton", "cuda")


def eager_mix(images: Tensor, inside: Tensor, partner: Tensor) -> Tensor:
    """The peers' way: boolean assignment from a copy of the partners' images."""
    other = images[partner]
    everywhere = inside.unsqueeze(1).expand(images.shape) == 1
    images[everywhere] = other[everywhere]
    return images


def build(provider: str, device: torch.device, dtype: torch.dtype) -> Workload:
    """Mixing in place goes on from sample to sample: the same bytes move each time."""
    batch = make_batch(device)
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(256, (BATCH, 3, CROP, CROP), generator=generator).to(device, dtype)
    if provider == "eager":
        return Workload(lambda: eager_mix(images, batch.box_maps[0], batch.partner))
    from co2s_fast.losses import CutMix

    mix = CutMix(batch.boxes[0], batch.partner)

    def call() -> Tensor:
        mix.mix_(images)
        return images

    return Workload(call)


def cases(device: torch.device, quick: bool) -> list[Case]:
    def builder(dtype: torch.dtype) -> Case:
        name = str(dtype).removeprefix("torch.")
        return Case(name, PROVIDERS, lambda provider, where: build(provider, where, dtype))

    return [builder(torch.float32), builder(torch.uint8)]
