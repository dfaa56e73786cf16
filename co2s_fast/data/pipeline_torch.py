"""The torch input pipeline: worker processes, the same batches for any number of them or of ranks.

What is in a batch is `plan`'s business; here it is read, cut and coloured on the CPU.
"""

from __future__ import annotations

import atexit
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from co2s_fast.data.batch import Batch
from co2s_fast.data.damage import Damaged, read_place
from co2s_fast.data.draws import LABELED, UNLABELED
from co2s_fast.data.files import Item
from co2s_fast.data.pixels import open_pixels
from co2s_fast.data.plan import STRONG, Plan
from co2s_fast.data.strong_on_device import pack
from co2s_fast.data.transforms import crop_label, strong_view
from co2s_fast.errors import DataError


@dataclass
class _Failure:
    """An error on its way from a worker to the training process, as one line."""

    message: str


class StepDataset(Dataset):
    """Maps a step to this rank's share of its batch.

    Args:
        plan: what is in it.
        strong: make the strong views; else pass the numbers they are to be made with.
    """

    def __init__(self, plan: Plan, strong: bool = True) -> None:
        self.plan, self.strong = plan, strong

    def __getitem__(self, step: int) -> Batch | _Failure:
        try:
            return self.load(step)
        except DataError as error:
            return _Failure(str(error))

    def load(self, step: int) -> Batch:
        """The share of the batch of that step; other images take the place of damaged ones."""
        damaged: list[Damaged] = []
        stacked: dict[str, Tensor | list[str]] = {}
        for stream, places, read in (
            (LABELED, self.plan.labeled(step), self._labeled),
            (UNLABELED, self.plan.unlabeled(step), self._unlabeled),
        ):
            samples = []
            for position, _ in places:
                reading = read_place(self.plan, stream, step, position,
                                     partial(read, step, position))
                samples.append(reading.content)
                damaged += reading.damaged
            stacked |= _stack(samples)
        return Batch(**stacked, damaged=damaged)

    def _labeled(self, step: int, position: int, item: Item) -> dict[str, NDArray | str]:
        plan, image = self.plan, open_pixels(item.image, self.plan.spec)
        label = plan.label(item, image.height, image.width)
        label = image.seen_of(label)
        geometry = plan.draw(step, position, LABELED, image.height, image.width, label).geometry
        pixels, ignore = image.crop(geometry, plan.antialias)
        return {"x": pixels, "y": np.maximum(crop_label(label, geometry), ignore),
                "labeled_files": item.name}

    def _unlabeled(self, step: int, position: int, item: Item) -> dict[str, NDArray | str]:
        plan, image = self.plan, open_pixels(item.image, self.plan.spec)
        drawn = plan.draw(step, position, UNLABELED, image.height, image.width)
        pixels, ignore = image.crop(drawn.geometry, plan.antialias)
        out: dict[str, NDArray | str] = {"ignore": ignore, "unlabeled_files": item.name}
        strong = [(number, name) for number, name in enumerate(STRONG) if name in plan.views]
        if "w" in plan.views or (strong and not self.strong):
            out["w"] = pixels
        for number, name in strong:
            out[f"boxes{number + 1}"] = np.array(drawn.boxes[number], np.int32)
            if self.strong:
                out[name] = strong_view(pixels, drawn.colours[number])
        if strong and not self.strong:
            rows = [pack(drawn.colours[number]) for number, _ in strong]
            out["colours"] = np.array(rows, np.float32)
        if plan.truth:
            out["truth"] = plan.true_crop(item, drawn.geometry, image.height, image.width)
        return out


def _stack(samples: list[dict[str, NDArray | str]]) -> dict[str, Tensor | list[str]]:
    stacked: dict[str, Tensor | list[str]] = {}
    for key, first in samples[0].items() if samples else ():
        values = [sample[key] for sample in samples]
        stacked[key] = values if isinstance(first, str) else torch.from_numpy(np.stack(values))
    return stacked


class TorchLoader:
    """Iterates over the batches of some steps."""

    def __init__(self, dataset: StepDataset, steps: range, workers: int, pin_memory: bool) -> None:
        self.dataset = dataset
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
            batches = iter(self._loader)
            while (batch := self._next(batches)) is not None:
                if isinstance(batch, _Failure):
                    raise DataError(batch.message)
                yield batch
        finally:
            self.close()
            atexit.unregister(self.close)

    def _next(self, batches: Iterator) -> Batch | _Failure | None:
        """The next batch; None: there is none."""
        try:
            return next(batches, None)
        except (RuntimeError, OSError, EOFError) as error:  # pipes of a process that is gone
            ended = not isinstance(error, RuntimeError) or "DataLoader worker" in str(error)
            if not (self._loader.num_workers and ended):
                raise
            raise DataError(
                "a process that reads images was ended, maybe for lack of memory or of /dev/shm; "
                "--set data.workers=N takes fewer (0: none), --resume goes on"
            ) from error

    def close(self) -> None:
        """End the worker processes. Iterating again starts new ones."""
        workers, self._loader._iterator = self._loader._iterator, None
        if workers is not None:
            workers._shutdown_workers()


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
