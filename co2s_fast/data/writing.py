"""Files appear whole or not at all: temporary names, errors that name the file, leftovers."""

from __future__ import annotations

import errno
import glob
import os
import platform
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, moved onto it when the block succeeds, removed otherwise.

    So is what GDAL keeps of a raster in a file beside it; that of a former raster is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_for(path, "tmp")
    try:
        with naming(path):
            yield temporary
            if gdal_sidecar(temporary).exists():
                os.replace(gdal_sidecar(temporary), gdal_sidecar(path))
            else:
                gdal_sidecar(path).unlink(missing_ok=True)
            os.replace(temporary, path)
    finally:
        for each in (temporary, gdal_sidecar(temporary)):
            each.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError about a full disk name the file that is written."""
    try:
        yield
    except OSError as error:
        # Writing to an open file names none, copying the source and the target.
        unnamed = error.filename is None or error.filename2 is not None
        if error.errno in _NO_ROOM and unnamed:
            error.filename, error.filename2 = str(path), None
        raise


def gdal_sidecar(path: Path) -> Path:
    """Where GDAL keeps what the format of a raster has no place for, as some coordinate systems."""
    return path.with_name(f"{path.name}.aux.xml")


def temporary_for(path: Path, suffix: str) -> Path:
    """A hidden path beside `path`, of this process alone."""
    return path.with_name(f"{_begins(path)}{os.getpid()}.{suffix}")


def remove_leftovers(path: Path) -> None:
    """Remove temporary files of `path` whose processes were killed on this machine."""
    if os.name != "posix":  # elsewhere a process cannot be asked for without ending it
        return
    for found in path.parent.glob(f"{glob.escape(_begins(path))}*"):
        number = found.name.removeprefix(_begins(path)).partition(".")[0]
        if number.isdecimal() and not _lives(int(number)):
            found.unlink(missing_ok=True)


def _begins(path: Path) -> str:
    return f".{path.name}.{_machine()}."


@lru_cache(maxsize=1)
def _machine() -> str:
    """Digits for what numbers of processes are unique in: a machine, or a container on it."""
    numbers = ""
    with suppress(OSError):  # Linux alone tells
        numbers = os.readlink("/proc/self/ns/pid")
    return f"{zlib.crc32(f'{platform.node()} {numbers}'.encode()):08x}"


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # of somebody else; no number of a process
        return True
    return True


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
