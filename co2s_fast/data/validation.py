"""Validation images as the evaluation wants them: image at test size, label at native size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from co2s_fast.data.catalogue import IGNORE, DatasetSpec
from co2s_fast.data.config import DataConfig
from co2s_fast.data.damage import Damaged
from co2s_fast.data.files import Item, load_label
from co2s_fast.data.pixels import open_pixels, resized_planes
from co2s_fast.errors import DataError


class ValDataset(Dataset):
    """Yields (image [C, H, W], label uint8 [H', W'] or None, name), item by item.

    Images are uint8, or float32 in [0, 1] where the dataset's are stretched.

    Args:
        items: in their order.
        spec: the dataset.
        config: scale and workers.
        skipped: where damaged images are noted, which then come empty and without a label, as do,
            without a note, images whose label cannot be used; None: both are errors.
    """

    def __init__(self, items: Sequence[Item], spec: DatasetSpec,
                 config: DataConfig | None = None, skipped: list[Damaged] | None = None) -> None:
        self.skipped = skipped
        self.items, self.spec = list(items), spec
        self.scale = (config.scale if config else None) or spec.scale
        self.workers = config.workers if config else 0

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor | None, str]:
        item = self.items[index]
        try:
            return self._read(item)
        except DataError as error:
            if self.skipped is None:
                raise
            self.skipped.append(Damaged.of(item, error))
            return torch.empty(0, 0, 0, dtype=torch.uint8), None, item.name

    def _read(self, item: Item) -> tuple[Tensor, Tensor | None, str]:
        image = open_pixels(item.image, self.spec)
        try:
            label = self._label(item, image.height, image.width)
        except DataError:
            if self.skipped is None:
                raise
            return torch.empty(0, 0, 0, dtype=torch.uint8), None, item.name
        pixels, missing = image.whole()
        if label is not None and missing is not None:
            label[torch.from_numpy(missing)] = IGNORE
        size = val_size(image.height, image.width, self.scale)
        if size != (image.height, image.width):
            pixels = resized_planes(pixels, size)
        return torch.from_numpy(pixels), label, item.name

    def _label(self, item: Item, height: int, width: int) -> Tensor | None:
        if item.label is None:
            return None
        label = load_label(item, self.spec)
        if label.shape != (height, width):
            raise DataError(f"{item.label}: {label.shape[1]} x {label.shape[0]} pixels, its image "
                            f"{item.image} has {width} x {height}")
        return torch.from_numpy(np.array(label))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None, str]]:
        return (self[index] for index in range(len(self)))

    def loader(self, workers: int | None = None) -> DataLoader:
        """The same items in the same order, read ahead by worker processes."""
        workers = self.workers if workers is None else workers
        return DataLoader(self, batch_size=None, num_workers=workers)


def val_size(height: int, width: int, scale: object) -> tuple[int, int]:
    """Size at which an image is evaluated: its own, or its short side brought to the reference.

    For a reference (long, short) the short side becomes min(long, short), as mmseg's `min_size`.
    """
    if scale == "native":
        return height, width
    ratio = min(scale) / min(height, width)  # type: ignore[call-overload]
    return int(height * ratio + 0.5), int(width * ratio + 0.5)


def resize_plain(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Bilinear without antialias, pixel centres aligned, as mmcv resizes."""
    height, width = size
    coefficients = (image.width / width, 0, 0, 0, image.height / height, 0)
    return image.transform((width, height), Image.Transform.AFFINE, coefficients,
                           Image.Resampling.BILINEAR)


def val_dataset(items: Sequence[Item], spec: DatasetSpec, config: DataConfig | None = None,
                skipped: list[Damaged] | None = None) -> ValDataset:
    """Validation items, in order. Iterate it, index it, or ask it for a `.loader()`."""
    return ValDataset(items, spec, config, skipped)
