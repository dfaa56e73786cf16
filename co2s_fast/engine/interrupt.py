"""SIGTERM and Ctrl-C as a wish to stop after the step in progress."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(SystemExit):
    """The run was asked to stop and has saved its state. Exit code 128 + signal: 143 or 130."""


class StopSignal:
    """Context in which SIGTERM and SIGINT set a flag; a second one acts as it did before."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        # Python lets the main thread alone change handlers; elsewhere signals act as usual.
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


@contextmanager
def deaf_children() -> Iterator[None]:
    """Processes started inside never see SIGTERM and SIGINT; this one sees them afterwards.

    `timeout`, batch systems and Ctrl-C signal a whole process group. Loader workers must outlive
    that: their death would reach this process as an exception in the middle of a step. They leave
    when this process tells them to, or is gone.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows has no process groups to signal
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
