"""Toy descriptions and raw folders for the tests of the data room."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from co2s_fast.data import DatasetSpec, Item
from co2s_fast.data.catalogue import parse_dataset


def two_classes(**changes) -> DatasetSpec:
    """A description with classes land (class 0) and sea (class 1), changed as given."""
    content = {
        "name": "toy",
        "classes": [{"name": "land", "color": [200, 100, 0]},
                    {"name": "sea", "color": [0, 0, 200]}],
        "crop": 32,
        "mask": {"encoding": "color", "ignore": [[0, 0, 0]]},
        "files": {"images": "{scene}/images/{part}.png", "labels": "{scene}/masks/{part}.png",
                  "group": "{scene}/{part}"},
        "tile": {"size": 32},
    }
    return parse_dataset({**content, **changes}, "toy.yaml")


def write_raw(folder: Path, names: list[str], *, size: tuple[int, int] = (64, 96),
              without_mask: tuple[str, ...] = (), seed: int = 0) -> Path:
    """Raw images `<scene>/images/<part>.png`, the left half of each land, the right half sea."""
    rng = np.random.default_rng(seed)
    for name in names:
        scene, part = name.split("/")
        image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        mask = np.zeros((*size, 3), np.uint8)
        mask[:, : size[1] // 2] = (200, 100, 0)
        mask[:, size[1] // 2 :] = (0, 0, 200)
        for kind, pixels in (("images", image), ("masks", mask)):
            path = folder / scene / kind / f"{part}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "images" or name not in without_mask:
                Image.fromarray(pixels).save(path)
    return folder


def truncate(path: Path, share: float = 0.6) -> None:
    """Cut the end of a file off."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def ramps(folder: Path, count: int, side: int = 200) -> tuple[DatasetSpec, list[Item]]:
    """Tiles whose pixels and labels both are their column (even tiles) or their row (odd ones).

    Returns:
        A dataset with `side` classes, and the tiles, which have labels.
    """
    classes = [{"name": f"c{i}", "color": [i, 1, 2]} for i in range(side)]
    spec = two_classes(classes=classes, crop=side, mask={"encoding": "index"}, tile={})
    column = np.broadcast_to(np.arange(side, dtype=np.uint8), (side, side))
    items = []
    for number in range(count):
        values = np.ascontiguousarray(column.T if number % 2 else column)
        item = Item(f"tile{number}", folder / f"tile{number}.png", folder / f"label{number}.png")
        Image.fromarray(np.repeat(values[..., None], 3, 2)).save(item.image)
        Image.fromarray(values).save(item.label)
        items.append(item)
    return spec, items
