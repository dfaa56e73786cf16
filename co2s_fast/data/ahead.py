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

from co2s_fast.data.batch import Batch

if TYPE_CHECKING:
    from co2s_fast.data.loader import Loader

DEPTH = 2
_POLL_S = 0.1
_LONGEST_BATCH_S = 60.0


class Ahead:
    """The batches of another loader, in order, up to DEPTH of them ready.

    Args:
        loader: whose batches are in host memory.
        pin: put them into page-locked memory, for copies to a GPU.
    """

    def __init__(self, loader: Loader, pin: bool = False) -> None:
        self.loader, self.pin = loader, pin

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        taker = _Taker(iter(self.loader), self.pin)
        thread = threading.Thread(target=taker.run, name="co2s-ahead", daemon=True)

        def finish() -> None:
            taker.stop.set()
            thread.join(_LONGEST_BATCH_S)

        atexit.register(finish)  # a program may end without closing its iterators
        thread.start()
        try:
            while (batch := taker.ready.get()) is not None:
                yield batch
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
    ready: queue.Queue[Batch | None] = field(default_factory=lambda: queue.Queue(DEPTH))
    stop: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None

    def run(self) -> None:
        try:
            for batch in self.batches:
                if not self._put(batch.pin_memory() if self.pin else batch):
                    break
        except BaseException as error:  # raised again where the batches are used
            self.error = error
        finally:
            self.batches.close()  # ends its workers in the thread that started them
            self._put(None)

    def _put(self, batch: Batch | None) -> bool:
        while not self.stop.is_set():
            try:
                self.ready.put(batch, timeout=_POLL_S)
            except queue.Full:
                continue
            return True
        return False
