"""The torch input pipeline: worker processes, the same batches for any number of them or of ranks.

The batch of step t is a pure function of (seed, t). Hence resuming is starting at a step, and two
ranks together see what one process sees.
"""

from __future__ import annotations

import atexit
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from co2s_fast.data import draws as D
from co2s_fast.data.batch import Batch
from co2s_fast.data.catalogue import IGNORE, DatasetSpec
from co2s_fast.data.config import DataConfig
from co2s_fast.data.draws import LABELED, UNLABELED
from co2s_fast.data.files import Item, load_label, load_rgb
from co2s_fast.data.splits import Split
from co2s_fast.data.transforms import crop_image, crop_label, padding_map, strong_view
from co2s_fast.errors import DataError, UsageError

VIEWS = ("x", "w", "s1", "s2")


def recipe(config: DataConfig, spec: DatasetSpec) -> D.Recipe:
    """Crop and scale rule of a run: the configuration's where given, else the dataset's."""
    return D.Recipe(config.crop or spec.crop, config.scale or spec.scale,
                    config.scale_range or spec.scale_range)


def steps_per_epoch(config: DataConfig, split: Split) -> int:
    """Steps of one pass over the unlabelled list, the last partial batch dropped.

    Without unlabelled images: of one pass over the labelled list.
    """
    return max(len(split.unlabeled or split.labeled) // config.batch_size, 1)


class Order:
    """Which image is at a position of the endless stream of passes, each newly shuffled.

    Args:
        count: images in the list.
        used: images of a pass that are used; the rest of that pass is dropped.
        seed: of the run.
        stream: LABELED or UNLABELED.
    """

    def __init__(self, count: int, used: int, seed: int, stream: int) -> None:
        self.count, self.used, self.seed, self.stream = count, used, seed, stream
        self._pass, self._order = -1, np.empty(0, np.int64)

    def __getitem__(self, position: int) -> int:
        number, offset = divmod(position, self.used)
        if number != self._pass:
            entropy = np.random.SeedSequence((self.seed, number, self.stream, 0xE90C4))
            self._order = np.random.Generator(np.random.Philox(entropy)).permutation(self.count)
            self._pass = number
        return int(self._order[offset])


@dataclass
class _Failure:
    """An error on its way from a worker to the training process, as one line."""

    message: str


class StepDataset(Dataset):
    """Maps a step to this rank's share of its batch."""

    def __init__(self, config: DataConfig, spec: DatasetSpec, split: Split, views: Collection[str],
                 seed: int, rank: int, world: int) -> None:
        size = config.batch_size
        self.spec, self.split, self.views, self.seed = spec, split, frozenset(views), seed
        self.batch_size, self.recipe = size, recipe(config, spec)
        self.antialias = self.recipe.scale == "native"
        self.positions = range(rank * size // world, (rank + 1) * size // world)
        self.truth = config.truth and any(item.label for item in split.unlabeled)
        self.labeled = Order(len(split.labeled), len(split.labeled), seed, LABELED)
        count = len(split.unlabeled)
        self.unlabeled = Order(count, count // size * size, seed, UNLABELED)

    def __getitem__(self, step: int) -> Batch | _Failure:
        try:
            return self.load(step)
        except DataError as error:
            return _Failure(str(error))

    def load(self, step: int) -> Batch:
        """The share of the batch of that step."""
        start = step * self.batch_size
        labeled = [self._labeled(step, p, self.split.labeled[self.labeled[start + p]])
                   for p in self.positions]
        batch = Batch(**_stack(labeled))
        if self.views - {"x"}:
            unlabeled = [self._unlabeled(step, p, self.split.unlabeled[self.unlabeled[start + p]])
                         for p in self.positions]
            batch = replace(batch, **_stack(unlabeled))
        return batch

    def _labeled(self, step: int, position: int, item: Item) -> dict[str, NDArray | str]:
        image, label = load_rgb(item.image), load_label(item, self.spec)
        _same_size(item, image.size, label)
        rng = D.generator(self.seed, step, position, LABELED)
        geometry = D.draw(rng, image.height, image.width, self.recipe, strong=False).geometry
        return {"x": _channels_first(crop_image(image, geometry, self.antialias)),
                "y": crop_label(label, geometry), "labeled_files": item.name}

    def _unlabeled(self, step: int, position: int, item: Item) -> dict[str, NDArray | str]:
        image = load_rgb(item.image)
        rng = D.generator(self.seed, step, position, UNLABELED)
        drawn = D.draw(rng, image.height, image.width, self.recipe, strong=True)
        crop = crop_image(image, drawn.geometry, self.antialias)
        out: dict[str, NDArray | str] = {"ignore": padding_map(drawn.geometry),
                                         "unlabeled_files": item.name}
        pixels = _channels_first(crop)
        if "w" in self.views:
            out["w"] = pixels
        for name, number in (("s1", 0), ("s2", 1)):
            if name in self.views:
                out[name] = strong_view(pixels, drawn.colours[number])
                out[f"boxes{number + 1}"] = np.array(drawn.boxes[number], np.int32)
        if self.truth:
            out["truth"] = self._truth(item, image.size, drawn.geometry)
        return out

    def _truth(self, item: Item, size: tuple[int, int], geometry: D.Geometry) -> NDArray[np.uint8]:
        if item.label is None:
            return np.full((geometry.crop, geometry.crop), IGNORE, np.uint8)
        label = load_label(item, self.spec)
        _same_size(item, size, label)
        return crop_label(label, geometry)


def _same_size(item: Item, size: tuple[int, int], label: NDArray) -> None:
    if label.shape != (size[1], size[0]):
        raise DataError(f"{item.label}: {label.shape[1]} x {label.shape[0]} pixels, its image "
                        f"{item.image} has {size[0]} x {size[1]}")


def _channels_first(image: Image.Image) -> NDArray[np.uint8]:
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _stack(samples: list[dict[str, NDArray | str]]) -> dict[str, Tensor | list[str]]:
    stacked: dict[str, Tensor | list[str]] = {}
    for key, first in samples[0].items():
        values = [sample[key] for sample in samples]
        stacked[key] = values if isinstance(first, str) else torch.from_numpy(np.stack(values))
    return stacked


class TorchLoader:
    """Iterates over the batches of steps start_step .. total_steps - 1."""

    def __init__(self, dataset: StepDataset, start_step: int, total_steps: int, workers: int,
                 pin_memory: bool) -> None:
        self.dataset = dataset
        steps = range(start_step, total_steps)
        self._loader = DataLoader(
            dataset, batch_size=None, sampler=steps, num_workers=workers, pin_memory=pin_memory,
            persistent_workers=workers > 0, prefetch_factor=2 if workers else None,
            worker_init_fn=_one_thread if workers else None,
        )

    def __len__(self) -> int:
        return len(self._loader.sampler)

    def __iter__(self) -> Iterator[Batch]:
        # At exit Python ends workers by SIGTERM and waits for them; a trainer may have made them
        # deaf to it. So they are told to leave before that, however the program ends.
        atexit.register(self.close)
        try:
            for batch in self._loader:
                if isinstance(batch, _Failure):
                    raise DataError(batch.message)
                yield batch
        finally:
            self.close()
            atexit.unregister(self.close)

    def close(self) -> None:
        """End the worker processes. Iterating again starts new ones."""
        workers, self._loader._iterator = self._loader._iterator, None
        if workers is not None:
            workers._shutdown_workers()


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def build_loader(
    config: DataConfig,
    spec: DatasetSpec,
    split: Split,
    *,
    views: Collection[str],
    seed: int,
    start_step: int,
    total_steps: int,
    rank: int = 0,
    world: int = 1,
) -> TorchLoader:
    """The batches of steps start_step .. total_steps - 1 of one rank.

    Args:
        config: batch size, crop, workers, loader.
        spec: the dataset.
        split: from `open_split`.
        views: subset of {"x", "w", "s1", "s2"}; {"x"} loads no unlabelled image.
        seed: of the run; with the step it determines a batch completely.
        start_step: first step; resuming is starting here.
        total_steps: end, exclusive.
        rank: gets positions [rank B / world, (rank + 1) B / world) of each batch.
        world: number of ranks.

    Raises:
        UsageError: unknown views, a batch that ranks cannot share, no unlabelled image to view.
    """
    unknown = set(views) - set(VIEWS)
    if unknown or "x" not in views:
        raise UsageError(f"views {sorted(views)}: expected 'x' and any of 'w', 's1', 's2'")
    if config.batch_size % world:
        raise UsageError(f"batch_size {config.batch_size} is not divisible by {world} ranks")
    if set(views) - {"x"} and len(split.unlabeled) < config.batch_size:
        raise UsageError(f"{len(split.unlabeled)} unlabelled images, fewer than the batch size "
                         f"{config.batch_size}; the method needs unlabelled images")
    if config.loader == "dali":
        raise UsageError("loader 'dali' is not built into this version; use loader 'torch'")
    dataset = StepDataset(config, spec, split, views, seed, rank, world)
    return TorchLoader(dataset, start_step, total_steps, config.workers,
                       pin_memory=torch.cuda.is_available())
