"""Whether raw files are what they were: by size and time, and by content where the time differs."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

from co2s_fast.data.catalogue import DatasetSpec
from co2s_fast.data.pairing import list_files, match_template
from co2s_fast.errors import DataError

# Files beside a raster or a shapefile that are part of it. Statistics and overviews are not.
SIDECARS = (".dbf", ".shx", ".prj", ".tfw", ".wld", ".jgw", ".pgw", ".hdr", ".msk")
_BLOCK = 1 << 20

Stamp = list[int]
"""Size in bytes, time of the last change in ns, and in a stored one the checksum."""


def stamps(raw: Path, archives: Sequence[Path], spec: DatasetSpec, without: Path
           ) -> dict[str, Stamp]:
    """Size and time of all files that a dataset is made from, by path below the raw folder.

    Archives, files that a template matches, and what belongs to these (`SIDECARS`). Sources of a
    VRT elsewhere are not followed.

    Args:
        raw: folder or archive.
        archives: what `find_archives` found.
        spec: the dataset.
        without: a folder whose files do not count.

    Raises:
        DataError: a link leads nowhere.
    """
    if raw.is_file():
        return {raw.name: _stamp(raw)}
    templates = [template for files in spec.layouts
                 for template in (files.images, files.labels) if template]
    names = list_files(raw, without) if raw.is_dir() else []
    wanted = {name for name in names if any(match_template(each, name) for each in templates)}
    stems = {Path(name).with_suffix("") for name in wanted} | {Path(name) for name in wanted}
    wanted |= {name for name in names if Path(name).suffix.lower() in SIDECARS
               and Path(name).with_suffix("") in stems}
    wanted |= {path.relative_to(raw).as_posix() for path in archives}
    return {name: _stamp(raw / name) for name in sorted(wanted)}


def is_unchanged(path: Path, now: Stamp, stored: Stamp | int) -> bool:
    """Whether a file is what a stored stamp says, its time aside.

    Args:
        path: of the file.
        now: its stamp.
        stored: with the checksum; a number is a size alone, of earlier versions.
    """
    if isinstance(stored, int):
        return now[0] == stored
    return now[0] == stored[0] and (now[1] == stored[1] or checksum(path) == stored[2])


def checksum(path: Path) -> int:
    """CRC-32 of a file's content."""
    found = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            found = zlib.crc32(block, found)
    return found


def _stamp(path: Path) -> Stamp:
    try:
        found = path.stat()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    return [found.st_size, found.st_mtime_ns]
