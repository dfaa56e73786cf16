"""From a raw folder to the layout that training reads: `images/`, `labels/`, `dataset.yaml`.

Tiles are named `<group>_<y>_<x>` with the position in the scaled image; `tiles.csv` says which
group and which raw file each comes from. The folder appears complete or not at all.
"""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from co2s_fast.data.catalogue import IGNORE, DatasetSpec, TileSpec
from co2s_fast.data.files import (
    decode_mask,
    load_rgb,
    save_image,
    save_label,
    write_description,
    write_text,
)
from co2s_fast.data.pairing import Source, find_sources
from co2s_fast.data.splits import summary
from co2s_fast.data.tiles import TILES
from co2s_fast.errors import DataError, UsageError

RECORD = "prepared.json"


@dataclass
class Prepared:
    """What preparing found and wrote. `pixels` counts by class name, "ignored" last."""

    root: Path
    images: int = 0
    tiles: int = 0
    labeled: int = 0
    pixels: dict[str, int] = field(default_factory=dict)
    already: bool = False

    def __str__(self) -> str:
        if self.already:
            return f"{self.root}: already prepared, {self.tiles} tiles"
        return (f"{self.root}: {self.tiles} tiles ({self.labeled} with a label) "
                f"from {self.images} images")


def prepare_dataset(spec: DatasetSpec, raw: Path | None, out: Path, *, overwrite: bool = False,
                    progress: bool = True) -> Prepared:
    """Cut the raw images of a dataset into tiles and decode their masks.

    Doing it again changes nothing; doing it with another description needs `overwrite`.

    Args:
        spec: the description.
        raw: folder that its templates are relative to; None for a generated dataset.
        out: the folder to make.
        overwrite: replace a folder made from something else, its splits included.
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
        source = f"; fetch them from {spec.info.source}" if spec.info.source else ""
        raise UsageError(f"dataset {spec.name!r} is made from raw files: give their folder with "
                         f"--raw{source}")
    raw = Path(raw)
    sources = find_sources(raw, spec)
    record = _record(raw, sources, spec)
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        if (done := _same(out, record)) and not overwrite:
            return done
        if not overwrite:
            raise DataError(f"{out}: exists and was not prepared from {raw} with this description; "
                            "remove it, choose another folder, or overwrite it")
    temporary = out.with_name(f".{out.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    for name in ("images", "labels"):
        (temporary / name).mkdir(parents=True)
    prepared = _write_tiles(sources, temporary, spec, progress)
    prepared.root = out
    write_description(temporary, spec)
    totals = {"images": prepared.images, "tiles": prepared.tiles, "labeled": prepared.labeled,
              "pixels": prepared.pixels}
    write_text(temporary / RECORD, json.dumps({**record, **totals}, indent=1))
    if out.exists():
        shutil.rmtree(out)
    temporary.rename(out)
    return prepared


def _generate(spec: DatasetSpec, out: Path, progress: bool) -> Prepared:
    from co2s_fast.data.demo import generate_demo

    already = (out / "images").is_dir()
    if not already:
        if out.exists() and any(out.iterdir()):
            raise DataError(f"{out}: exists and holds no prepared dataset; choose another folder")
        generate_demo(out, spec, progress=progress)
    count = len(list((out / "images").iterdir()))
    return Prepared(out, images=count, tiles=count, labeled=count, already=already)


def _record(raw: Path, sources: list[Source], spec: DatasetSpec) -> dict:
    """What decides whether a prepared folder is up to date."""
    files = [p for s in sources for p in (s.image, s.label) if p is not None]
    return {"description": spec.model_dump(mode="json"),
            "files": {p.relative_to(raw).as_posix(): p.stat().st_size for p in files}}


def _same(out: Path, record: dict) -> Prepared | None:
    try:
        found = json.loads((out / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if any(found.get(key) != value for key, value in record.items()):
        return None
    return Prepared(out, found["images"], found["tiles"], found["labeled"], found["pixels"], True)


def _write_tiles(sources: list[Source], root: Path, spec: DatasetSpec,
                 progress: bool) -> Prepared:
    names = _names(sources)
    prepared, pixels = Prepared(root, images=len(sources)), np.zeros(256, np.int64)
    problems, rows = [], []
    for source in tqdm(sources, desc=f"preparing {spec.name}", unit="image", disable=not progress):
        try:
            image, label = _read(source, spec)
        except DataError as error:
            problems.append(str(error))
            continue
        for y, x, part, mask in _cut(image, label, spec.tile):
            name = f"{names[source]}_{y}_{x}.png" if spec.tile.size else f"{names[source]}.png"
            rows.append((name, source.group, source.image.name, y, x))
            save_image(root / "images" / name, part)
            if mask is not None:
                save_label(root / "labels" / name, mask, spec.palette)
                pixels += np.bincount(mask.ravel(), minlength=256)
                prepared.labeled += 1
    if problems:
        shutil.rmtree(root)
        raise DataError(summary(problems))
    if not rows:
        shutil.rmtree(root)
        raise DataError(f"no image is as large as a tile of {spec.tile.size} pixels")
    prepared.tiles = len(rows)
    prepared.pixels = {n: int(c) for n, c in zip(spec.class_names, pixels, strict=False)}
    prepared.pixels["ignored"] = int(pixels[IGNORE])
    _write_index(root / TILES, rows)
    return prepared


def _names(sources: list[Source]) -> dict[Source, str]:
    """The start of the tiles' names: the group, or group and image where a group has several."""
    groups = Counter(source.group for source in sources)
    names = {s: _slug(s.group if groups[s.group] == 1 else f"{s.group}_{s.image.stem}")
             for s in sources}
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    if twice:
        same = [str(s.image) for s in sources if names[s] == twice[0]]
        raise DataError(f"{' and '.join(same[:2])} would both be named {twice[0]}; add fields to "
                        "files.group that tell them apart")
    return names


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("_.")


def _read(source: Source, spec: DatasetSpec) -> tuple[Image.Image, NDArray[np.uint8] | None]:
    image = load_rgb(source.image)
    label = decode_mask(source.label, spec) if source.label is not None else None
    if label is not None and label.shape != (image.height, image.width):
        raise DataError(f"{source.label}: {label.shape[1]} x {label.shape[0]} pixels, its image "
                        f"{source.image} has {image.width} x {image.height}")
    scale = spec.tile.scale
    if scale != 1:
        size = max(round(image.width * scale), 1), max(round(image.height * scale), 1)
        image = image.resize(size, Image.Resampling.BILINEAR)  # antialiased when shrinking
        if label is not None:
            label = np.asarray(Image.fromarray(label).resize(size, Image.Resampling.NEAREST))
    return image, label


def starts(length: int, tile: TileSpec) -> list[int]:
    """First pixels of the tiles along one side of an image."""
    size, stride = tile.size or length, tile.stride or tile.size or length
    if length <= size:
        return [] if tile.edge == "drop" and length < size else [0]
    whole = list(range(0, length - size + 1, stride))
    if whole[-1] + size < length and tile.edge != "drop":
        whole.append(length - size if tile.edge == "shift" else whole[-1] + stride)
    return whole


def _cut(
    image: Image.Image, label: NDArray[np.uint8] | None, tile: TileSpec
) -> Iterator[tuple[int, int, NDArray[np.uint8], NDArray[np.uint8] | None]]:
    """The tiles of an image: y, x, pixels (0 where padded), label (255 where padded)."""
    pixels = np.asarray(image)
    for y in starts(image.height, tile):
        for x in starts(image.width, tile):
            window = np.s_[y : y + (tile.size or image.height), x : x + (tile.size or image.width)]
            part = _padded(pixels[window], tile.size, 0)
            yield y, x, part, None if label is None else _padded(label[window], tile.size, IGNORE)


def _padded(part: NDArray[np.uint8], size: int | None, value: int) -> NDArray[np.uint8]:
    if size is None or part.shape[:2] == (size, size):
        return np.ascontiguousarray(part)
    out = np.full((size, size, *part.shape[2:]), value, np.uint8)
    out[: part.shape[0], : part.shape[1]] = part
    return out


def _write_index(path: Path, rows: list[tuple]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([("tile", "group", "source", "y", "x"), *rows])
    write_text(path, text.getvalue())
