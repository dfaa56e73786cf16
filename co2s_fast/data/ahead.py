"""A thread that takes batches from a pipeline before training asks for them.

Taking one costs its thread some milliseconds even where it is ready (memory handed over between
processes, inputs handed to DALI). Here they pass while a step is made.
"""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from co2s_fast.data.batch import Batch

if TYPE_CHECKING:
    from co2s_fast.data.loader import Loader

DEPTH = 3
_LONGEST_BATCH_S = 60.0


class Ahead:
    """The batches of another loader on the device, in order, up to DEPTH of them ready before.

    The thread goes on to the next one only when the copies of the one that was taken are under way:
    Python lets one thread run at a time, and these copies are what training waits for.

    Args:
        loader: whose batches are in host memory.
        device: that they are brought to when they are taken.
        pin: put them into page-locked memory, for copies to a GPU.
    """

    def __init__(self, loader: Loader, device: torch.device, pin: bool = False) -> None:
        self.loader, self.device, self.pin = loader, device, pin

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        taker = _Taker(iter(self.loader), self.pin)
        thread = threading.Thread(target=taker.run, name="co2s-ahead", daemon=True)

        def take() -> Batch | None:
            if (batch := taker.ready.get()) is not None:
                batch = batch.to(self.device, non_blocking=True)
                taker.free.release()
            return batch

        def finish() -> None:
            taker.stop.set()
            taker.free.release()
            thread.join(_LONGEST_BATCH_S)

        atexit.register(finish)  # a program may end without closing its iterators
        thread.start()
        try:
            yield from iter(take, None)  # which keeps no batch that was taken
            if taker.error is not None:
                raise taker.error
        finally:
            finish()
            atexit.unregister(finish)


@dataclass
class _Taker:
    """What the thread does: takes until the end, an error, or `stop`; then puts None."""

    batches: Iterator[Batch]
    pin: bool
    ready: queue.SimpleQueue[Batch | None] = field(default_factory=queue.SimpleQueue)
    free: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(DEPTH))
    stop: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None

    def run(self) -> None:
        try:
            while self._may_go_on() and (batch := next(self.batches, None)) is not None:
                self.ready.put(batch.pin_memory() if self.pin else batch)
        except BaseException as error:  # raised again where the batches are used
            self.error = error
        finally:
            self.batches.close()  # ends its workers in the thread that started them
            self.ready.put(None)

    def _may_go_on(self) -> bool:
        """Once there is room for one more: whether it is still wanted."""
        self.free.acquire()
        return not self.stop.is_set()
