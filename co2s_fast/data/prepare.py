"""From a raw folder to the layout that training reads: `images/`, `labels/`, `dataset.yaml`.

Tiles are named by `tile.name`, else `<group>_<y>_<x>` with the position in the scaled image;
`tiles.csv` says which group and which raw file each comes from. The folder appears complete or not
at all.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import threading
import unicodedata
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from co2s_fast.data.archives import find_archives, unpacked
from co2s_fast.data.catalogue import IGNORE, DatasetSpec, TileSpec
from co2s_fast.data.files import save_label, write_description
from co2s_fast.data.imagery import BandStatistics
from co2s_fast.data.pairing import (
    Source,
    find_sources,
    list_files,
    overlooked,
    prepared_folders,
)
from co2s_fast.data.rasters import writing
from co2s_fast.data.raw import Piece, RawImage, open_raw
from co2s_fast.data.splits import summary
from co2s_fast.data.stamps import Stamp, checksum, is_unchanged, stamps
from co2s_fast.data.survey import survey
from co2s_fast.data.tile_writer import Place, TileWriter
from co2s_fast.data.tiles import RECORD, TILES
from co2s_fast.data.writing import write_text
from co2s_fast.errors import DataError, UsageError

_WAITING = 4  # files of one image that wait to be written


@dataclass
class Prepared:
    """What preparing found and wrote.

    Args:
        root: the prepared folder.
        images: raw images.
        tiles: written.
        labeled: tiles with a label.
        pixels: of each class by name, "ignored" last ("(no class)" where a class has that name).
        empty: tiles that were left out because they have no data at all.
        statistics: of the bands, where images are not 8-bit colour or grey.
        already: it was all there.
        notes: what was decided on the way.
    """

    root: Path
    images: int = 0
    tiles: int = 0
    labeled: int = 0
    pixels: dict[str, int] = field(default_factory=dict)
    already: bool = False
    empty: int = 0
    statistics: BandStatistics | None = None
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if self.already:
            return f"{self.root}: already prepared, {self.tiles} tiles"
        empty = f"; {self.empty} without data are left out" if self.empty else ""
        lines = [f"{self.root}: {self.tiles} tiles ({self.labeled} with a label) "
                 f"from {self.images} images{empty}", *self.notes]
        return "\n".join(lines + ([str(self.statistics)] if self.statistics else []))


def prepare_dataset(spec: DatasetSpec, raw: Path | None, out: Path, *, overwrite: bool = False,
                    progress: bool = True) -> Prepared:
    """Cut the raw images of a dataset into tiles and decode their masks.

    Doing it again changes nothing; with another description, or after a raw file was edited, it
    needs `overwrite`.

    Args:
        spec: the description.
        raw: folder that its templates are relative to, archives in it included, or an archive;
            None for a generated dataset.
        out: the folder to make.
        overwrite: replace a folder prepared from something else, its splits included.
        progress: show a bar.

    Raises:
        DataError: any raw file is missing, damaged, of a size unlike its mask's, or shows an
            undeclared value; all such files are collected, and nothing is written.
        UsageError: the description does not say how files pair up, or no raw folder is given.
    """
    out = Path(out)
    if spec.generated:
        return _generate(spec, out, progress)
    if raw is None:
        what = spec.info.needs or "them"
        source = f"; fetch {what} from {spec.info.source}" if spec.info.source else ""
        raise UsageError(f"dataset {spec.name!r} is made from raw files: give their folder with "
                         f"--raw{source}")
    raw = Path(raw)
    out = out.resolve() if out.is_symlink() else out  # the link stays, its folder is replaced
    archives = find_archives(raw)
    record = {"description": spec.model_dump(mode="json"),
              "files": stamps(raw, archives, spec, out.resolve())}
    former = _former(out, raw, record, overwrite=overwrite)
    if former is not None:
        return former
    temporary = out.with_name(f".{out.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    with unpacked(archives, out, progress) as more:
        sources = find_sources(raw, spec, more, out.resolve())
        dtype, notes = survey(sources, spec)
        for name in ("images", "labels"):
            (temporary / name).mkdir(parents=True)
        try:
            prepared = _write_tiles(sources, temporary, spec, TileWriter(spec, dtype), progress)
            prepared.root = out
            prepared.notes += notes
            prepared.notes += _overlooked(sources, raw, more, out.resolve())
            if dtype is not None:
                _take_statistics(prepared, temporary, spec, progress)
            write_description(temporary, spec, prepared.statistics)
            totals = {"images": prepared.images, "tiles": prepared.tiles,
                      "labeled": prepared.labeled, "pixels": prepared.pixels}
            content = {**record, "files": _with_checksums(record["files"], raw, progress), **totals}
            write_text(temporary / RECORD, json.dumps(content, indent=1))
        except DataError as error:
            shutil.rmtree(temporary)
            raise DataError(str(error).replace(str(temporary), str(out))) from error
        except BaseException:
            shutil.rmtree(temporary)
            raise
    _put(temporary, out)
    return prepared


def _former(out: Path, raw: Path, record: dict, *, overwrite: bool) -> Prepared | None:
    """What `out` holds, where it was prepared from the same; None where it is to be made.

    Raises:
        DataError: it holds something else, or cannot be replaced.
    """
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        if not (out / RECORD).is_file() or raw.resolve().is_relative_to(out.resolve()):
            raise DataError(f"{out}: exists and is no prepared folder; choose another one")
        found = _read_record(out)
        change = _difference(found, record, raw)
        if found is not None and change is None and not overwrite:
            return Prepared(out, found["images"], found["tiles"], found["labeled"],
                            found["pixels"], True)
        if not overwrite:
            raise DataError(f"{out}: exists and was not prepared from {raw} with this description: "
                            f"{change}; choose another folder, or overwrite it (--overwrite)")
    if os.path.ismount(out):
        raise DataError(f"{out}: a mount point, which cannot be replaced; choose a folder in it")
    return None


def _take_statistics(prepared: Prepared, root: Path, spec: DatasetSpec, progress: bool) -> None:
    """Add the bands' statistics over the training images of the tiles below `root`."""
    from co2s_fast.data.split_maker import training_images
    from co2s_fast.data.statistics import band_statistics

    write_description(root, spec)
    items, notes = training_images(root, spec)
    prepared.notes += [note.replace(str(root), str(prepared.root)) for note in notes]
    prepared.statistics = band_statistics([item.image for item in items], spec,
                                          threads=os.cpu_count() or 1, progress=progress)


def _overlooked(sources: list[Source], raw: Path, more: Path | None, out: Path) -> list[str]:
    """Notes about images that match no template, and about prepared folders in the raw one."""
    roots = [root for root in (raw, more) if root is not None and root.is_dir()]
    notes = [f"note: {path} was made by `data prepare` and is left out"
             for root in roots for path in prepared_folders(root) if path.resolve() != out]
    found = overlooked(sources, [name for root in roots for name in list_files(root, out)])
    if found:
        notes.append(f"note: {len(found)} image files beside these match no template and are left "
                     f"out, for example {found[0]}")
    return notes


def _put(made: Path, out: Path) -> None:
    """Give a finished folder its name; the former one goes last, so that one is always whole."""
    former = out.with_name(f".{out.name}.former")
    shutil.rmtree(former, ignore_errors=True)
    if out.exists():
        out.rename(former)
    try:
        made.rename(out)
    except OSError:
        if former.exists():
            former.rename(out)
        raise
    shutil.rmtree(former, ignore_errors=True)


def _generate(spec: DatasetSpec, out: Path, progress: bool) -> Prepared:
    from co2s_fast.data.demo import generate_demo

    already = (out / "images").is_dir()
    if not already:
        if out.exists() and any(out.iterdir()):
            raise DataError(f"{out}: exists and holds no prepared dataset; choose another folder")
        generate_demo(out, spec, progress=progress)
    count = len(list((out / "images").iterdir()))
    return Prepared(out, images=count, tiles=count, labeled=count, already=already)


def _read_record(out: Path) -> dict | None:
    """The record of a prepared folder; None where it is damaged."""
    try:
        found = json.loads((out / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    known = isinstance(found, dict) and isinstance(found.get("files"), dict)
    return found if known and {"images", "tiles", "labeled", "pixels"} <= found.keys() else None


def _difference(found: dict | None, record: dict, raw: Path) -> str | None:
    """What has changed since a folder was prepared; None: nothing."""
    if found is None:
        return f"{RECORD} is damaged"
    if found.get("description") != record["description"]:
        return "the description is another one"
    old, new = found["files"], record["files"]
    changed = sorted(name for name in old.keys() | new.keys()
                     if name not in old or name not in new
                     or not is_unchanged(_below(raw, name), new[name], old[name]))
    if not changed:
        return None
    how = {(True, False): "is gone", (False, True): "is new"}.get(
        (changed[0] in old, changed[0] in new), "was changed")
    more = f", and {len(changed) - 1} more differ" if len(changed) > 1 else ""
    return f"{changed[0]} {how}{more}"


def _with_checksums(found: dict[str, Stamp], raw: Path, progress: bool) -> dict[str, Stamp]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sums = pool.map(lambda name: checksum(_below(raw, name)), found)
        bar = tqdm(zip(found.items(), sums, strict=True), total=len(found), desc="checksums",
                   unit="file", disable=not progress, leave=False)
        return {name: [*stamp, each] for (name, stamp), each in bar}


def _below(raw: Path, name: str) -> Path:
    """A file of a raw folder; the archive itself where that is what was given."""
    return raw if raw.is_file() else raw / name


@dataclass
class _Written:
    """What came of one raw image: lines of `tiles.csv`, labels written, pixels of each value."""

    rows: list[tuple] = field(default_factory=list)
    labeled: int = 0
    empty: int = 0
    pixels: NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))
    problem: str | None = None


class _Claims:
    """Which raw image each tile's name is taken by; threads ask before they write."""

    def __init__(self) -> None:
        self._owners: dict[str, Path] = {}
        self._lock = threading.Lock()

    def claim(self, name: str, image: Path) -> None:
        """Take a name; a DataError where it is taken."""
        with self._lock:
            other = self._owners.get(name)
            self._owners[name] = image
        if other is not None:
            one, two = sorted([str(other), str(image)])
            raise DataError(f"{one} and {two} would both give the tile {name}; add fields to "
                            "tile.name that tell them apart")


def _write_tiles(sources: list[Source], root: Path, spec: DatasetSpec, writer: TileWriter,
                 progress: bool) -> Prepared:
    names = _names(sources, spec)
    total, problems, claims = _Written(), [], _Claims()
    bar = tqdm(total=len(sources), desc=f"preparing {spec.name}", unit="image",
               disable=not progress)
    threads = os.cpu_count()
    # Two pools: images wait for their tiles, which must not wait for images.
    with bar, ThreadPoolExecutor(threads) as pool, ThreadPoolExecutor(threads) as writers:
        for found in _in_order(
            pool, lambda s: _write_source(s, names[s], root, spec, claims, writer, writers), sources
        ):
            bar.update()
            if found.problem is not None:
                problems.append(found.problem)
            total.rows += found.rows
            total.labeled += found.labeled
            total.empty += found.empty
            total.pixels += found.pixels
    if problems:
        raise DataError(summary(problems))
    if not total.rows and total.empty:
        raise DataError(f"none of {len(sources)} images has any data, nodata being left out")
    if not total.rows:
        raise DataError(f"no image is as large as a tile of {spec.tile.size} pixels")
    pixels = {n: int(c) for n, c in zip(spec.class_names, total.pixels, strict=False)}
    pixels["(no class)" if "ignored" in pixels else "ignored"] = int(total.pixels[IGNORE])
    _write_index(root / TILES, total.rows)
    return Prepared(root, len(sources), len(total.rows), total.labeled, pixels, empty=total.empty)


def _in_order(pool: ThreadPoolExecutor, function: Callable[[Source], _Written],
              sources: list[Source]) -> Iterator[_Written]:
    """`pool.map` that has only as many images in memory as there are threads, and one."""
    waiting: deque[Future[_Written]] = deque()
    for source in sources:
        waiting.append(pool.submit(function, source))
        if len(waiting) > (os.cpu_count() or 1):
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _write_source(
    source: Source, base: str, root: Path, spec: DatasetSpec, claims: _Claims, writer: TileWriter,
    writers: ThreadPoolExecutor,
) -> _Written:  # fmt: skip
    """The tiles of one raw image; a file that cannot be used becomes the result's problem."""
    tile = source.files.tile or spec.tile
    # Lists that name tiles count on the labels of all of them.
    polygons = (source.files.mask or spec.mask).encoding == "polygons"
    may_lack = polygons or tile.name is None
    found, jobs = _Written(), deque[Future[None]]()
    try:
        with open_raw(source, spec, tile) as image:
            copied = writer.is_copied(image, tile)
            suffix = writer.suffix(source, tile, copied)
            for place in _places(image, tile):
                piece = image.part(place.y, place.x, place.height, place.width)
                if piece.empty:
                    found.empty += 1
                    continue
                if may_lack and piece.label is not None and (piece.label == IGNORE).all():
                    piece = Piece(piece.pixels, piece.valid, None)  # nobody has labelled it
                name = _tile_name(source, base, tile, place)
                claims.claim(name, source.image)
                row = (f"{name}{suffix}", source.group, source.image.name, place.y, place.x)
                found.rows.append(row)
                path = root / "images" / f"{name}{suffix}"
                write = (writer.copy(path, source) if copied
                         else writer.image(path, piece, image, place, tile))
                jobs.append(writers.submit(_named, path, write))
                if piece.label is not None:
                    label = _padded(piece.label, tile.size)
                    as_image = writer.dtype is None and suffix == ".tif"
                    label_suffix = suffix if as_image else ".png"
                    path = root / "labels" / f"{name}{label_suffix}"
                    jobs.append(writers.submit(save_label, path, label, spec.palette))
                    found.pixels += np.bincount(label.ravel(), minlength=256)
                    found.labeled += 1
                while len(jobs) > _WAITING:  # reading must not run ahead of writing
                    jobs.popleft().result()
            image.finish()
    except DataError as error:
        found.problem = str(error)
    for job in jobs:
        job.result()  # raises what writing raised
    return found


def _named(path: Path, write: Callable[[], None]) -> None:
    """Write a tile; an error of GDAL says which."""
    with writing(path):
        write()


def _tile_name(source: Source, base: str, tile: TileSpec, place: Place) -> str:
    if tile.name is None:
        return f"{base}_{place.y}_{place.x}" if tile.size else base
    height, width = (tile.size or place.height), (tile.size or place.width)
    corners = {"x1": place.x, "y1": place.y, "x2": place.x + width, "y2": place.y + height,
               "row": place.row, "column": place.column}
    return _slug(tile.name.format_map({**dict(source.fields), **corners}))


def _names(sources: list[Source], spec: DatasetSpec) -> dict[Source, str]:
    """The start of the tiles' names: the group, or group and image where a group has several."""
    groups = Counter(source.group for source in sources)
    names = {s: _slug(s.group if groups[s.group] == 1 else f"{s.group}_{s.image.stem}")
             for s in sources}
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    named = all((s.files.tile or spec.tile).name for s in sources)
    if twice and not named:
        same = [str(s.image) for s in sources if names[s] == twice[0]]
        raise DataError(f"{' and '.join(same[:2])} would both be named {twice[0]}; add fields to "
                        "files.group that tell them apart")
    return names


def _slug(text: str) -> str:
    """A file name of letters and digits of any language; of none at all, a number in its place."""
    name = re.sub(r"[^\w.-]+", "_", unicodedata.normalize("NFC", text)).strip("_.")
    return name or f"image-{zlib.crc32(text.encode()):08x}"


def starts(length: int, tile: TileSpec) -> list[int]:
    """First pixels of the tiles along one side of an image."""
    size, stride = tile.size or length, tile.stride or tile.size or length
    if length <= size:
        return [] if tile.edge == "drop" and length < size else [0]
    whole = list(range(0, length - size + 1, stride))
    if whole[-1] + size < length and tile.edge == "shift":
        whole.append(length - size)
    elif whole[-1] + size < length and tile.edge == "pad" and whole[-1] + stride < length:
        whole.append(whole[-1] + stride)
    return whole


def _places(image: RawImage, tile: TileSpec) -> Iterator[Place]:
    """Where the tiles of an image lie, row by row."""
    for row, y in enumerate(starts(image.height, tile)):
        for column, x in enumerate(starts(image.width, tile)):
            yield Place(y, x, row, column, min(tile.size or image.height, image.height - y),
                        min(tile.size or image.width, image.width - x))


def _padded(label: NDArray[np.uint8], size: int | None) -> NDArray[np.uint8]:
    if size is None or label.shape == (size, size):
        return np.ascontiguousarray(label)
    out = np.full((size, size), IGNORE, np.uint8)
    out[: label.shape[0], : label.shape[1]] = label
    return out


def _write_index(path: Path, rows: list[tuple]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([("tile", "group", "source", "y", "x"), *rows])
    write_text(path, text.getvalue())
