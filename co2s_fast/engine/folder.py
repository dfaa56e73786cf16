"""The run folder before anything is trained: what is in it, and who may write to it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from co2s_fast.engine.checkpoint import STATE_FILE
from co2s_fast.engine.config import CONFIG_FILE
from co2s_fast.engine.log import METRICS_FILE, say
from co2s_fast.engine.runs import checkpoint_folder
from co2s_fast.errors import UsageError

EVALUATION_FILE = "eval.json"
"""Scores of the best checkpoint, once training has ended."""

RUN_LOCK = ".train.lock"
"""Stays in the run folder; what counts is whether a process holds it."""


def holds_run(folder: Path) -> bool:
    """Whether a folder holds a run, begun or finished.

    Raises:
        UsageError: it holds what a run has made, but not its configuration.
    """
    if (folder / CONFIG_FILE).is_file():
        return True
    states = [checkpoint_folder(folder, which) / STATE_FILE for which in ("last", "best")]
    left = "checkpoints" if any(state.is_file() for state in states) else METRICS_FILE
    if left == METRICS_FILE and not (folder / METRICS_FILE).is_file():
        return False
    raise UsageError(f"{folder} holds {left} but no {CONFIG_FILE}; restore it, or give another "
                     "--out")


def check_run_folder(folder: Path) -> None:
    """See that a run folder is there or can be made, and can be written to; nothing is left of it.

    Raises:
        UsageError: it cannot.
    """
    try:
        place = next(each for each in (folder, *folder.absolute().parents) if each.exists())
        if not place.is_dir():
            raise UsageError(f"run folder {folder}: {place} is a file, expected a folder")
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise UsageError(f"run folder {folder}: {error.strerror or error}") from None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within the block no other process gets into the block for the same run folder.

    The system lets go of the lock when the process ends, however it ends.

    Raises:
        UsageError: another process is in it.
    """
    lock = FileLock(folder / RUN_LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UsageError(f"another process trains in {folder} (it holds {RUN_LOCK})") from None
    except (OSError, NotImplementedError) as error:  # some network file systems have no locks
        reason = getattr(error, "strerror", None) or error
        say(f"warning: {folder} cannot be locked ({reason}): let no other process train in it")
        yield
        return
    try:
        yield
    finally:
        lock.release()
