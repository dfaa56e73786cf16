"""The input pipeline on one CPU thread: decode, rescale, crop, flip, a weak and two strong views.

The peers' form, in our words: Pillow resizes the whole image, then crops; torchvision's jitter,
grey and Pillow's blur; each view becomes a normalised float tensor. `pil_mix` also feeds the
second loader that released code takes CutMix partners from. One thread each, no worker processes,
so that nobody is served from a queue that filled while another was timed.
"""

from __future__ import annotations

import functools
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.eager import IGNORE
from benchmarks.harness import Case, NotMeasured, Workload
from benchmarks.inputs import BATCH, CLASSES, CROP

SECTION = "input"
TITLE = "Input pipeline, one thread"
PROVIDERS = ("pil", "pil_mix", "torch", "dali")
SIDE, FILES = 512, 8
SCALE, SCALE_RANGE = (2048, 512), (0.5, 2.0)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MANY_STEPS = 1_000_000
POLL_S = 0.005
Arrays = dict[str, Any]


@functools.cache
def image_folder() -> tempfile.TemporaryDirectory:
    """PNG images and labels of 512², with texture, since flat images decode faster than real."""
    folder = tempfile.TemporaryDirectory(prefix="co2s-bench-")
    rng = np.random.default_rng(0)
    for number in range(FILES):
        coarse = rng.integers(40, 215, (24, 24, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        noisy = np.asarray(smooth, np.int16) + rng.integers(-12, 13, (SIDE, SIDE, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(
            Path(folder.name) / f"image{number}.png"
        )
        label = rng.integers(CLASSES, size=(16, 16), dtype=np.uint8)
        Image.fromarray(label).resize((SIDE, SIDE), Image.Resampling.NEAREST).save(
            Path(folder.name) / f"label{number}.png"
        )
    return folder


def path_of(kind: str, number: int) -> Path:
    return Path(image_folder().name) / f"{kind}{number % FILES}.png"


class PeerDataset(Dataset):
    """Labelled and unlabelled sample of a step, written as the peers write theirs."""

    def __init__(self, with_mix: bool) -> None:
        from torchvision import transforms

        self.with_mix = with_mix
        self.jitter = transforms.ColorJitter(0.5, 0.5, 0.5, 0.25)
        self.gray = transforms.RandomGrayscale(p=0.2)
        self.to_tensor = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        )

    def __len__(self) -> int:
        return MANY_STEPS

    def __getitem__(self, index: int) -> Arrays:
        image, label = self.weak(index)
        sample = {"x": self.to_tensor(image), "y": torch.from_numpy(np.array(label)).long()}
        sample |= self.unlabeled(index + 1)
        if self.with_mix:
            other = self.unlabeled(index + 2)
            sample |= {f"{name}_other": value for name, value in other.items()}
        return sample

    def weak(self, index: int) -> tuple[Image.Image, Image.Image]:
        """Rescaled, padded, cropped and flipped image and label."""
        image = Image.open(path_of("image", index)).convert("RGB")
        label = Image.open(path_of("label", index))
        factor = random.uniform(*SCALE_RANGE)
        long_side, short_side = (int(side * factor) for side in SCALE)
        scale = min(long_side / max(image.size), short_side / min(image.size))
        size = tuple(int(side * scale + 0.5) for side in image.size)
        image = image.resize(size, Image.Resampling.BILINEAR)
        label = label.resize(size, Image.Resampling.NEAREST)
        side = tuple(max(s, CROP) for s in size)
        if side != size:
            padded, padded_label = Image.new("RGB", side), Image.new("L", side, IGNORE)
            padded.paste(image)
            padded_label.paste(label)
            image, label = padded, padded_label
        left, top = (random.randint(0, s - CROP) for s in side)
        box = (left, top, left + CROP, top + CROP)
        image, label = image.crop(box), label.crop(box)
        if random.random() < 0.5:
            flip = Image.Transpose.FLIP_LEFT_RIGHT
            image, label = image.transpose(flip), label.transpose(flip)
        return image, label

    def strong(self, image: Image.Image) -> Tensor:
        if random.random() < 0.8:
            image = self.jitter(image)
        image = self.gray(image)
        if random.random() < 0.5:
            image = image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))
        return self.to_tensor(image)

    def box(self) -> Tensor:
        """CutMix box as a map, with probability one half."""
        inside = torch.zeros(CROP, CROP)
        if random.random() > 0.5:
            return inside
        area = random.uniform(0.02, 0.4) * CROP * CROP
        while True:
            ratio = random.uniform(0.3, 1 / 0.3)
            width, height = int((area / ratio) ** 0.5), int((area * ratio) ** 0.5)
            x, y = random.randint(0, CROP), random.randint(0, CROP)
            if x + width <= CROP and y + height <= CROP:
                inside[y : y + height, x : x + width] = 1
                return inside

    def unlabeled(self, index: int) -> dict[str, Tensor]:
        image, label = self.weak(index)
        padding = torch.from_numpy(np.array(label)) == IGNORE
        return {
            "w": self.to_tensor(image),
            "s1": self.strong(image),
            "s2": self.strong(image),
            "ignore": padding.long() * IGNORE,
            "box1": self.box(),
            "box2": self.box(),
        }


def our_batches(loader: str) -> Iterator[Any]:
    """The package's loader over the same files, views and augmentation."""
    from co2s_fast.data import DataConfig, Item, Split, build_loader, load_dataset
    from co2s_fast.errors import UsageError

    items = [Item(f"image{i}", path_of("image", i), path_of("label", i)) for i in range(FILES)]
    spec = load_dataset("demo")
    config = DataConfig(
        dataset="demo", crop=CROP, scale=SCALE, scale_range=SCALE_RANGE, batch_size=BATCH,
        workers=0, loader=loader, truth=False,
    )  # fmt: skip
    try:
        batches = build_loader(
            config, spec, Split(items, items, []), views=("x", "w", "s1", "s2"), seed=0,
            start_step=0, total_steps=MANY_STEPS,
        )  # fmt: skip
        return iter(batches)
    except (UsageError, ImportError) as error:
        raise NotMeasured(str(error)) from error


def wait_until_idle() -> None:
    """Return when no thread of this process is at work any more."""
    while True:
        before = time.process_time()
        time.sleep(POLL_S)
        if time.process_time() - before < 0.1 * POLL_S:
            return


def on_one_thread(batches: Iterator[Any]) -> Callable[[], None]:
    """A step's load: a batch taken, and the one made that takes its place.

    DALI works ahead. Without the wait, a batch would come from its queue for nothing, and the next
    one be made in the time of another provider.
    """

    def load() -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            next(batches)
            wait_until_idle()
        finally:
            torch.set_num_threads(threads)

    return load


def build(provider: str, device: torch.device) -> Workload:
    if provider in ("pil", "pil_mix"):
        random.seed(0)
        torch.manual_seed(0)
        dataset = PeerDataset(with_mix=provider == "pil_mix")
        batches = iter(DataLoader(dataset, batch_size=BATCH, sampler=range(MANY_STEPS)))
    else:
        batches = our_batches(provider)
    # A labelled and an unlabelled image each; partners of the second loader are not counted.
    return Workload(on_one_thread(batches), mode="load", items=2 * BATCH)


def cases(device: torch.device, quick: bool) -> list[Case]:
    return [Case("512", PROVIDERS, build, tolerance=None, memory=())]
