"""Looking at single image files: whether they are whole, fit their labels, and what is in them."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from co2s_fast.data.catalogue import DatasetSpec
from co2s_fast.data.duplicates import Fingerprint, fingerprint
from co2s_fast.data.files import Item, UndeclaredValueError, load_image, load_label
from co2s_fast.data.orientation import orientation_of, stored_size
from co2s_fast.data.pixels import RasterPixels
from co2s_fast.data.png import png_bits
from co2s_fast.data.rasters import open_source
from co2s_fast.data.stretching import as_bytes
from co2s_fast.errors import DataError

_TAILS = {"PNG": b"IEND", "JPEG": b"\xff\xd9"}
_PLAIN = ("RGB", "L", "P")
_TIFF_PLACES = ((324, 325), (273, 279))  # offsets and byte counts of tiles, of strips
_CHUNK = 8
_SHOW_BAR = 200


@dataclass(frozen=True)
class Finding:
    """Something wrong with a file or a list.

    Args:
        kind: "missing", "unreadable", "size", "undeclared-value", "duplicate", "list",
            "shared-group", "small-batch", "empty-class", "empty-val", "shared-label" or
            "label-without-image".
        message: one line.
        files: the paths it is about.
        severity: "problem" (training would be wrong or impossible) or "warning".
    """

    kind: str
    message: str
    files: tuple[str, ...] = ()
    severity: str = "problem"


@dataclass
class Seen:
    """One image and its label as they were found.

    Args:
        size: (width, height) of the image in pixels.
        counts: pixels of each label value, int64 [256].
        print: what duplicates are found by.
        findings: what is wrong.
    """

    size: tuple[int, int] | None = None
    counts: NDArray[np.int64] | None = None
    print: Fingerprint | None = None
    findings: list[Finding] = field(default_factory=list)


@dataclass(frozen=True)
class Look:
    """How closely to look.

    Args:
        decode: decode every image and label; else headers and endings are read, and the whole file
            only where these do not tell.
        labels: decode labels in any case.
        prints: take fingerprints; needs `decode`.
    """

    decode: bool = False
    labels: bool = True
    prints: bool = False


def inspect(item: Item, spec: DatasetSpec, look: Look) -> Seen:
    """Look at an image and its label."""
    seen = Seen()
    try:
        if spec.statistics is not None:
            _inspect_raster(item, spec, look, seen)
        elif look.decode or not looks_whole(item.image):
            pixels = load_image(item.image)
            seen.size = pixels.shape[1::-1]
            seen.print = fingerprint(pixels) if look.prints else None
        else:
            seen.size = header_size(item.image)
    except DataError as error:
        seen.findings.append(_unusable(item.image, error))
    if item.label is None:
        return seen
    if seen.size and spec.statistics is None and (tag := orientation_of(item.image)) != 1:
        message = (f"{item.image}: has the EXIF orientation {tag}, by which viewers turn it; it is "
                   f"taken as it is stored, and so has {item.label} to lie")
        seen.findings.append(Finding("orientation", message, (str(item.image),), "warning"))
    try:
        if look.decode or look.labels or not looks_whole(item.label):
            label = load_label(item, spec)
            seen.counts = np.bincount(label.ravel(), minlength=256)
            size = label.shape[::-1]
        else:
            size = header_size(item.label)
    except DataError as error:
        seen.findings.append(_unusable(item.label, error))
        return seen
    if seen.size and size != seen.size:
        message = (f"{item.label}: {size[0]} x {size[1]} pixels, its image {item.image} has "
                   f"{seen.size[0]} x {seen.size[1]}")
        seen.findings.append(Finding("size", message, (str(item.label), str(item.image))))
    return seen


def _inspect_raster(item: Item, spec: DatasetSpec, look: Look, seen: Seen) -> None:
    """Size, bands and number type by the header; all pixels where the look is close."""
    image = RasterPixels(item.image, spec)
    seen.size = image.width, image.height
    if look.decode or not looks_whole(item.image, any_mode=True):
        pixels, _ = image.whole()
        seen.print = fingerprint(as_bytes(pixels).transpose(1, 2, 0)) if look.prints else None


def _unusable(path: Path, error: DataError) -> Finding:
    kind = "undeclared-value" if isinstance(error, UndeclaredValueError) else "unreadable"
    return Finding(kind if path.exists() else "missing", str(error), (str(path),))


def header_size(path: Path) -> tuple[int, int]:
    """(width, height) by the header."""
    with Image.open(path) as image:
        return stored_size(image)


def looks_whole(path: Path, any_mode: bool = False) -> bool:
    """Whether header and ending are those of a complete file. False: decode it to be sure.

    With `any_mode`, also of files whose pixels Pillow cannot represent.
    """
    if any_mode:
        return _tiff_whole(path)
    try:
        with Image.open(path) as image, path.open("rb") as file:
            length = file.seek(0, os.SEEK_END)
            if image.mode not in _PLAIN or png_bits(path) > 8:
                return False
            if image.format == "TIFF":
                return _tiff_end(image) <= length
            tail = _TAILS.get(image.format or "")
            file.seek(-min(64, length), os.SEEK_END)
            return tail is not None and tail in file.read()
    except (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError):
        return False


def _tiff_whole(path: Path) -> bool:
    """Whether all blocks that a TIFF's first directory lists lie inside the file."""
    with open_source(path) as source:
        length = path.stat().st_size
        for band in range(1, source.count + 1):
            for place, _ in source.block_windows(band):
                offset = source.get_tag_item(f"BLOCK_OFFSET_{place[1]}_{place[0]}", "TIFF", band)
                size = source.get_tag_item(f"BLOCK_SIZE_{place[1]}_{place[0]}", "TIFF", band)
                if offset is None or size is None or int(offset) + int(size) > length:
                    return False
        return True


def _tiff_end(image: Image.Image) -> float:
    """Where the last strip or tile of a TIFF ends, in bytes; infinity where it does not say."""
    tags = image.tag_v2
    for offsets, counts in _TIFF_PLACES:
        if offsets in tags and counts in tags and len(tags[offsets]) == len(tags[counts]) > 0:
            return max(map(sum, zip(tags[offsets], tags[counts], strict=True)))
    return float("inf")


def inspect_all(items: Sequence[Item], spec: DatasetSpec, look: Look, *, title: str,
                progress: bool = True, workers: int | None = None) -> list[Seen]:
    """`inspect` for many items, in their order, in parallel.

    Headers are read in threads; what is decoded, in processes, so that a decoder that crashes on a
    file is a finding about that file.

    Args:
        items: images with or without labels.
        spec: the dataset.
        look: how closely.
        title: of the progress bar.
        progress: draw one where it takes long.
        workers: threads or processes; None: one a core.
    """
    workers = workers or usable_cores()
    work = partial(inspect, spec=spec, look=look)
    if not look.decode:
        with ThreadPoolExecutor(min(workers, 8)) as pool:
            found = pool.map(work, items)
            return _with_bar(found, len(items), title, progress)
    if workers == 1 or len(items) <= _CHUNK:
        return _with_bar(map(work, items), len(items), title, progress)
    return _with_bar(_in_processes(work, items, workers), len(items), title, progress)


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _with_bar(found: Iterator[Seen], total: int, title: str, progress: bool) -> list[Seen]:
    return list(tqdm(found, total=total, desc=title, unit="image", leave=False,
                     disable=not progress or total < _SHOW_BAR))


def _in_processes(work: Callable[[Item], Seen], items: Sequence[Item],
                  workers: int) -> Iterator[Seen]:
    """Results in order. Where a process dies, its chunk is gone through one image at a time."""
    chunks = [items[i : i + _CHUNK] for i in range(0, len(items), _CHUNK)]
    done = 0
    while done < len(chunks):
        with _pool(min(workers, len(chunks) - done)) as pool:
            running = [pool.submit(_work_on, work, chunk) for chunk in chunks[done:]]
            try:
                for future in running:
                    yield from future.result()
                    done += 1
                continue
            except BrokenProcessPool:
                pass
        for item in chunks[done]:
            yield _alone(work, item)
        done += 1


def _alone(work: Callable[[Item], Seen], item: Item) -> Seen:
    """The result for one item from a process of its own, which may die of it."""
    with _pool(1) as pool:
        try:
            return pool.submit(work, item).result()
        except BrokenProcessPool:
            message = f"{item.image}: decoding it or its label crashed the process"
            return Seen(findings=[Finding("unreadable", message, (str(item.image),))])


def _work_on(work: Callable[[Item], Seen], chunk: Sequence[Item]) -> list[Seen]:
    return [work(item) for item in chunk]


def _pool(workers: int) -> Executor:
    # Not forked: the caller may run threads (torch, a progress bar), whose locks a fork copies.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    return ProcessPoolExecutor(workers, mp_context=context)
