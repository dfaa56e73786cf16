"""Which images and which drawn numbers make the batch of a step: what every pipeline shares.

The batch of step t is a pure function of (seed, t). Hence resuming is starting at a step, and two
ranks together see what one process sees.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Collection, Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from co2s_fast.data import draws as D
from co2s_fast.data.catalogue import IGNORE, DatasetSpec
from co2s_fast.data.config import DataConfig
from co2s_fast.data.draws import LABELED, UNLABELED
from co2s_fast.data.files import Item, load_label
from co2s_fast.data.imbalance import ClassSampler, labeled_pixels
from co2s_fast.data.splits import Split
from co2s_fast.data.transforms import crop_label
from co2s_fast.errors import DataError

VIEWS = ("x", "w", "s1", "s2")
STRONG = ("s1", "s2")
PARTNER = "partner"
"""Asks for a second, independent augmentation of the unlabelled images, as B more of them."""


def recipe(config: DataConfig, spec: DatasetSpec) -> D.Recipe:
    """Crop, scale rule and turns of a run: the configuration's where given, else the dataset's."""
    return D.Recipe(config.crop or spec.crop, config.scale or spec.scale,
                    config.scale_range or spec.scale_range, config.rotate90)


def steps_per_epoch(config: DataConfig, split: Split) -> int:
    """Steps of one pass over the unlabelled list, the last partial batch dropped.

    Without unlabelled images: of one pass over the labelled list.
    """
    return max(_filled(len(split.unlabeled or split.labeled), config) // config.batch_size, 1)


def _filled(count: int, config: DataConfig) -> int:
    """Images of a pass with those that fill the shares up; see `DataConfig.epoch_shards`."""
    return -(-count // config.epoch_shards) * config.epoch_shards


class Order:
    """Which image is at a position of the endless stream of passes, each newly shuffled.

    Args:
        count: images in the list.
        used: images of a pass that are used; the rest of that pass is dropped, and of more than
            there are, the first ones come again.
        seed: of the run.
        stream: LABELED or UNLABELED.
    """

    def __init__(self, count: int, used: int, seed: int, stream: int) -> None:
        self.count, self.used, self.seed, self.stream = count, used, seed, stream
        self._latest = -1, np.empty(0, np.int64)

    def __getitem__(self, position: int) -> int:
        number, offset = divmod(position, self.used)
        latest, order = self._latest  # one assignment: threads may be in different passes
        if number != latest:
            entropy = np.random.SeedSequence((self.seed, number, self.stream, 0xE90C4))
            order = np.random.Generator(np.random.Philox(entropy)).permutation(self.count)
            self._latest = number, order
        return int(order[offset % self.count])


class Plan:
    """One rank's share of every batch: its images, and the choices drawn for each.

    Args:
        config: batch size, crop, scale.
        spec: the dataset.
        split: its labelled and unlabelled images.
        views: subset of VIEWS.
        seed: of the run.
        rank: takes positions [rank B / world, (rank + 1) B / world) of each batch.
        world: number of ranks.
    """

    def __init__(self, config: DataConfig, spec: DatasetSpec, split: Split, views: Collection[str],
                 seed: int, rank: int = 0, world: int = 1) -> None:
        size = config.batch_size
        self.spec, self.split, self.views, self.seed = spec, split, frozenset(views), seed
        self.batch_size, self.recipe = size, recipe(config, spec)
        self.max_damaged = config.max_damaged
        self.antialias = self.recipe.scale == "native"
        self.positions = range(rank * size // world, (rank + 1) * size // world)
        self.truth = config.truth and any(item.label for item in split.unlabeled)
        self.sampler = None
        if config.sampling == "class-aware":
            pixels = labeled_pixels(split, spec)
            self.sampler = ClassSampler(pixels, config.sampling_temperature, seed)
        self._labeled = Order(len(split.labeled), len(split.labeled), seed, LABELED)
        count = len(split.unlabeled)
        self._unlabeled = Order(count, _filled(count, config) // size * size, seed, UNLABELED)
        self._warned = False  # of a mask that only measures pseudo-labels

    @property
    def has_unlabeled(self) -> bool:
        """Whether any view of an unlabelled image is asked for."""
        return bool(self.views - {"x"})

    def labeled(self, step: int) -> list[tuple[int, Item]]:
        """This rank's labelled images of a step, each with its position in the global batch."""
        return [(p, next(self.candidates(LABELED, step, p))) for p in self.positions]

    def unlabeled(self, step: int) -> list[tuple[int, Item]]:
        """This rank's unlabelled images of a step; none where no view of them is asked for.

        The second augmentations of `PARTNER` follow, at positions from the batch size on.
        """
        places = [*self.positions] if self.has_unlabeled else []
        if PARTNER in self.views:
            places += [p + self.batch_size for p in self.positions]
        return [(p, next(self.candidates(UNLABELED, step, p))) for p in places]

    def count(self, stream: int) -> int:
        """Images there are of a stream, LABELED or UNLABELED."""
        return len(self.split.labeled if stream == LABELED else self.split.unlabeled)

    def candidates(self, stream: int, step: int, position: int) -> Iterator[Item]:
        """The image of a place, then without end those that take its place where it is damaged.

        They are what the following batches have at that position: never twice the same one within
        a batch, unless a pass ends there. Class-aware, other images of the class come first.
        """
        items, order = self.split.labeled, self._labeled
        if stream == UNLABELED:
            items, order = self.split.unlabeled, self._unlabeled
        elif self.sampler is not None:
            yield from (items[i] for i in self.sampler.images(step, position))
        for later in itertools.count(step):
            yield items[order[later * self.batch_size + position % self.batch_size]]

    def draw(self, step: int, position: int, stream: int, height: int, width: int,
             label: NDArray[np.uint8] | None = None) -> D.Draws:
        """All choices for the image at a position: LABELED its crop, UNLABELED views and boxes.

        Args:
            step: of the batch.
            position: in the global batch.
            stream: LABELED or UNLABELED.
            height: rows of the image.
            width: columns of the image.
            label: of a labelled image [height, width]: class-aware sampling places the crop by it.
        """
        rng = D.generator(self.seed, step, position, stream)
        drawn = D.draw(rng, height, width, self.recipe, strong=stream == UNLABELED)
        if stream == LABELED and self.sampler is not None and label is not None:
            placed = self.sampler.place(drawn.geometry, label, step, position)
            return replace(drawn, geometry=placed)
        return drawn

    def true_crop(self, item: Item, geometry: D.Geometry, height: int, width: int
                  ) -> NDArray[np.uint8]:
        """The crop of an unlabelled image's label, which only measures pseudo-labels.

        All 255 where there is none, and where it cannot be used; one warning tells of such.
        """
        if item.label is not None:
            try:
                return crop_label(self.label(item, height, width), geometry)
            except DataError as error:
                if not self._warned:
                    warnings.warn("masks of unlabelled images cannot be used, so their "
                                  f"pseudo-labels are not measured: {error}", stacklevel=2)
                self._warned = True
        return np.full((geometry.crop, geometry.crop), IGNORE, np.uint8)

    def label(self, item: Item, height: int, width: int) -> NDArray[np.uint8]:
        """The label of an image of that size.

        Raises:
            DataError: none, damaged, an undeclared value, or another size than the image.
        """
        label = load_label(item, self.spec)
        if label.shape != (height, width):
            raise DataError(f"{item.label}: {label.shape[1]} x {label.shape[0]} pixels, its image "
                            f"{item.image} has {width} x {height}")
        return label
