"""Which images a prediction is for, and its files: names, shards, what is done already."""

from __future__ import annotations

import glob
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from co2s_fast.engine.scenes import PICTURES, RASTERS, VIRTUAL, is_raster, read_signature
from co2s_fast.errors import DataError, UsageError


def find_images(images: Iterable[str | Path]) -> list[Path]:
    """Files named by paths, folders and glob patterns, without repeats, in the given order.

    Of a folder hidden files are left out, as patterns leave them out.
    """
    found: list[Path] = []
    for entry in images:
        path = Path(entry).expanduser()
        if path.is_dir():
            inside = [p for p in sorted(path.iterdir())
                      if p.suffix.lower() in PICTURES + RASTERS and not p.name.startswith(".")]
            if not inside:
                kinds = " ".join(PICTURES + RASTERS)
                raise DataError(f"{path}: expected images ({kinds}), found none in the folder")
            found += inside
        elif path.exists() or not glob.has_magic(str(path)):
            if not path.is_file():
                raise DataError(f"{path}: missing file")
            if path.suffix.lower() not in PICTURES + RASTERS + VIRTUAL:
                kinds = " ".join(PICTURES + RASTERS + VIRTUAL)
                raise DataError(f"{path}: expected an image ({kinds})")
            found.append(path)
        else:
            matches = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
            matches = [p for p in matches if p.suffix.lower() in PICTURES + RASTERS + VIRTUAL]
            if not matches:
                raise DataError(f"{path}: no image matches the pattern")
            found += matches
    if not found:
        raise UsageError("images: expected at least one file, folder or pattern, got none")
    return list(dict.fromkeys(found))


def beside(target: Path, kind: str) -> Path:
    """`a.overlay.png` for `a.png`."""
    return target.with_name(f"{target.stem}.{kind}{target.suffix}")


def parse_shard(text: str) -> tuple[int, int]:
    """`(i, n)` of "i/n": the i-th of n machines, counted from 1.

    Raises:
        UsageError: not two whole numbers with 1 <= i <= n.
    """
    first, slash, second = text.partition("/")
    if not (slash and first.isdecimal() and second.isdecimal()) or not (
        1 <= int(first) <= int(second)
    ):
        raise UsageError(f"--shard {text!r}: expected i/n with 1 <= i <= n, like 2/8")
    return int(first), int(second)


def take_shard(images: Sequence[Path], shard: tuple[int, int] | None) -> list[Path]:
    """Every n-th image from the i-th on; the shards of 1 to n have each image once."""
    if shard is None:
        return list(images)
    number, count = shard
    return list(images[number - 1 :: count])


def is_done(paths: Iterable[Path], signature: str) -> bool:
    """Whether all of an image's maps are there and were made by the same run and settings."""
    return bool(signature) and all(read_signature(path) == signature for path in paths)


def targets_in(folder: Path, sources: Sequence[Path]) -> list[Path]:
    """The map of each image in `folder`.

    Raises:
        UsageError: two images would have the same map, or a map would replace its image.
    """
    targets: dict[Path, Path] = {}
    for source in sources:
        target = folder / f"{source.stem}{'.tif' if is_raster(source) else '.png'}"
        if target in targets:
            raise UsageError(f"{targets[target]} and {source} would both be written to {target}")
        if target.exists() and target.samefile(source):
            raise UsageError(f"{source}: its map would replace it; choose another output folder")
        targets[target] = source
    return list(targets)


def check_writable(folder: Path) -> None:
    """Make the folder where it is missing; a UsageError where nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(
            f"output folder {folder}: cannot be written to ({error.strerror})"
        ) from None
