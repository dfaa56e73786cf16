"""A first description of a folder of raw files: how they pair up, and what their masks hold.

`co2s-fast data describe` writes it. It is a proposal: a person names the classes.
"""

from __future__ import annotations

import colorsys
import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import yaml
from numpy.typing import NDArray
from tqdm import tqdm

from co2s_fast.data.archives import find_archives
from co2s_fast.data.catalogue import (
    IGNORE,
    NAME,
    RGB,
    Color,
    DatasetSpec,
    FilesSpec,
    parse_dataset,
)
from co2s_fast.data.describe_polygons import PolygonContent, read_polygons
from co2s_fast.data.files import one_band, open_image
from co2s_fast.data.guess import VECTORS, guess_templates
from co2s_fast.data.integrity import header_size
from co2s_fast.data.pairing import Source, fields, find_sources, list_files, prepared_folders
from co2s_fast.data.rasters import is_byte_picture, is_picture, open_source, reading
from co2s_fast.data.tiles import SUFFIXES
from co2s_fast.data.writing import write_text
from co2s_fast.errors import DataError, UsageError

T = TypeVar("T")
SAMPLE = 200
_MOST = 64  # different values of a mask; more are no classes
_TILED = 1024  # pixels of a side from which images are cut into tiles
_CROP, _STEP = 512, 16


@dataclass
class MaskContent:
    """What masks hold.

    Args:
        numbers: pixels of each number, of masks that are not RGB.
        colors: pixels of each colour; numbers have that of their palette, else are grey.
        palette: colour of each number of masks with a palette.
        by_color: some masks are RGB, or one number has several colours: colours tell the classes.
        masks: how many were looked at.
    """

    numbers: Counter = field(default_factory=Counter)
    colors: Counter = field(default_factory=Counter)
    palette: dict[int, Color] = field(default_factory=dict)
    by_color: bool = False
    masks: int = 0

    @property
    def pixels(self) -> Counter:
        """Pixels of each colour, or of each number, by what tells the classes."""
        return self.colors if self.by_color else self.numbers


def describe_folder(raw: Path, out: Path, *, name: str | None = None, images: str | None = None,
                    labels: str | None = None, progress: bool = True) -> str:
    """Write a description of a folder of raw images and masks, for `data prepare`.

    Masks may be polygons (`VECTORS`): the classes are the values of one of their attributes.

    Args:
        raw: the folder.
        out: the YAML file; it must not exist.
        name: of the dataset; None: that of the file.
        images: template of the images (`FilesSpec.images`); None: guessed from folders and names.
        labels: template of the masks; given with `images` only.
        progress: draw a bar while masks are read.

    Returns:
        What was found, and what to do next.

    Raises:
        UsageError: the file exists, or cannot be written; templates that do not go together; masks
            that are polygons, and no fiona.
        DataError: no images, no masks, or masks that hold no classes.
    """
    if out.suffix.lower() not in (".yaml", ".yml"):
        raise UsageError(f"-o {out}: expected a name that ends with .yaml")
    if out.exists():
        raise UsageError(f"-o {out}: exists already; remove it, or give another name")
    if labels is not None and images is None:
        raise UsageError("--labels: give --images as well, since both share their fields")
    name = _checked_name(out, name)
    if not raw.is_dir():
        raise DataError(f"raw folder {raw}: missing")
    if images is None:
        names = [each for each in list_files(raw)
                 if Path(each).suffix.lower() in SUFFIXES + VECTORS]
        if not names and (archives := find_archives(raw)):
            raise DataError(f"{archives[0]}: an archive; `data prepare` looks into it, this "
                            "command does not: unpack it first")
        images, labels = guess_templates(names, raw)
    sources = find_sources(raw, _without_classes(images, labels))
    masked = [source for source in sources if source.label is not None]
    if not masked:
        raise DataError(f"{raw}: none of {len(sources)} images has a mask; say where masks are "
                        "with --images and --labels")
    paths = list(dict.fromkeys(source.label for source in masked))
    notes = [f"note: {path} was made by `data prepare` and is left out"
             for path in prepared_folders(raw)]
    content: MaskContent | PolygonContent
    if paths[0].suffix.lower() in VECTORS:
        content = read_polygons(_spread(paths), _MOST, progress)
        classes, told = _polygon_classes(content), f"by attribute {content.attribute}"
        told += f" of {content.polygons} polygons"
    else:
        content = read_masks(paths, progress)
        if len(content.pixels) < 2:
            only = next(iter(content.pixels), "what is transparent, which has no label")
            raise DataError(f"{raw}: all {content.masks} masks that were read hold nothing but "
                            f"{only}; a dataset needs two classes")
        classes = _mask_classes(content)
        notes += _lossy(paths)
        told = f"by {'colour' if content.by_color else 'number'}"
    text = _render(raw, out, name, images, labels, sources, classes)
    spec = parse_dataset(yaml.safe_load(text), out)
    try:
        write_text(out, text)
    except OSError as error:
        raise UsageError(f"-o {out}: {error.strerror or error}") from error
    return "\n".join([
        f"wrote {out}: {len(sources)} images, {len(masked)} with a mask; {spec.num_classes} "
        f"classes {told} in {content.masks} masks that were read",
        *notes,
        "name the classes in it (text queries are made of the names), then",
        f"  {_command(out, raw, spec.name)}",
    ])


def _command(out: Path, raw: Path, name: str) -> str:
    """What to type next, for a POSIX shell."""
    return shlex.join(["co2s-fast", "data", "prepare", str(out), "--raw", str(raw),
                       "--out", f"data/{name}"])


def _checked_name(out: Path, name: str | None) -> str:
    """The name of the dataset; a UsageError, before anything is read, where it can be none."""
    found = out.stem if name is None else name
    if re.fullmatch(NAME, found) is None:
        given = f"-o {out}: gives the dataset the name" if name is None else "--name"
        raise UsageError(f"{given} {found!r}, expected letters (A to Z), digits, '.', '_' and '-', "
                         "a letter or digit first" + ("; give --name" if name is None else ""))
    return found


def _lossy(masks: Sequence[Path]) -> list[str]:
    """A warning where masks are JPEGs."""
    found = [path for path in masks if path.suffix.lower() in (".jpg", ".jpeg")]
    if not found:
        return []
    return [f"warning: {len(found)} masks are JPEGs, for example {found[0]}: JPEG does not keep "
            "exact values and colours, so some classes may be none; save masks as PNG"]


def _without_classes(images: str, labels: str | None) -> DatasetSpec:
    """As much of a dataset as finding its files takes."""
    pair = [{"name": "a", "color": (0, 0, 0)}, {"name": "b", "color": (0, 0, 1)}]
    return DatasetSpec(name="raw", classes=pair, files=FilesSpec(images=images, labels=labels))


def read_masks(paths: Sequence[Path], progress: bool = True) -> MaskContent:
    """The numbers or colours of masks, of at most `SAMPLE` of them, evenly spread.

    Raises:
        DataError: a mask is damaged, or holds more than a few numbers or colours.
    """
    paths, found = _spread(paths), MaskContent()
    for path in tqdm(paths, desc="reading masks", unit="mask", leave=False,
                     disable=not progress or len(paths) < 8):  # fmt: skip
        _count(path, *read_mask(path), found)
        if len(found.pixels) > _MOST:
            kind = "colours" if found.by_color else "values"
            raise DataError(f"{path}: {len(found.pixels)} different {kind} up to here, too many "
                            "for classes; is it a mask, and saved without loss (PNG, not JPEG)?")
    return found


def _spread(items: Sequence[T]) -> list[T]:
    """At most `SAMPLE` of the items, evenly spread, the first and the last among them."""
    places = np.linspace(0, len(items) - 1, min(len(items), SAMPLE)).round().astype(int)
    return [items[place] for place in places]


def read_mask(path: Path) -> tuple[NDArray, dict[int, Color]]:
    """A mask's numbers [H, W] or colours [H, W, 3], and the colours of its palette.

    Colours that cannot be seen are left out: of those that can there is one row, [1, pixels, 3].
    """
    if is_picture(path):
        image = open_image(path)
        if image.mode == "P":
            flat = image.getpalette() or []
            colors = {i: tuple(flat[3 * i : 3 * i + 3]) for i in range(len(flat) // 3)}
            return np.asarray(image), colors
        if image.mode in ("L", "1", "I", "I;16"):
            return one_band(image, path).astype(np.int64), {}
        pixels = np.asarray(image.convert("RGB"))
        if image.mode in ("RGBA", "LA"):  # what cannot be seen has no label
            return pixels[None, np.asarray(image.getchannel("A")) != 0], {}
        return pixels, {}
    with open_source(path) as source, reading(path):
        if source.count >= 3:
            return source.read([1, 2, 3]).transpose(1, 2, 0), {}
        from rasterio.enums import ColorInterp

        colored = source.colorinterp[0] == ColorInterp.palette
        table = source.colormap(1) if colored else {}
        return source.read(1), {value: color[:3] for value, color in table.items()}


def _count(path: Path, values: NDArray, palette: dict[int, Color], found: MaskContent) -> None:
    """Add a mask's pixels."""
    rgb = values.ndim == 3
    if not rgb and values.dtype.kind == "f":
        raise DataError(f"{path}: a mask of {values.dtype}, expected whole numbers or colours")
    packed = values.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1]) if rgb else values
    found.by_color |= rgb
    found.masks += 1
    numbers, counts = np.unique(packed, return_counts=True)
    for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
        if rgb:
            found.colors[number >> 16, number >> 8 & 255, number & 255] += count
            continue
        color = palette.get(number, (number, number, number))
        found.numbers[number] += count
        found.colors[color] += count
        if number in palette:
            found.by_color |= found.palette.setdefault(number, color) != color


def _polygon_classes(content: PolygonContent) -> list[str]:
    """The parts `classes` and `mask` of a description of polygons."""
    used: set[Color] = set()
    rows = []
    values = sorted(content.values, key=lambda value: (_whole(value), value))
    for number, value in enumerate(values, 1):
        used.add(rgb := _distinct(number, used))
        if _whole(value) < math.inf:
            entry = f"name: class {number}, color: {list(rgb)}, values: [{value}]"
        else:
            entry = f"name: {json.dumps(value, ensure_ascii=False)}, color: {list(rgb)}"
        rows.append(f"  - {{{entry}}}   # {content.values[value]} polygons")
    others = f", or {', '.join(content.others)}?" if content.others else ""
    return [
        f"# As {content.polygons} polygons in {content.masks} files have them.",
        "classes:",
        *rows,
        "",
        "mask:",
        "  encoding: polygons",
        f"  attribute: {json.dumps(content.attribute, ensure_ascii=False)}"
        f"   # the field with the class{others}",
        "  outside: ignore   # what lies in no polygon; or the name of a class",
    ]


def _whole(text: str) -> float:
    """The whole number that a text is, infinity where it is none."""
    return int(text) if re.fullmatch(r"0|-?[1-9]\d{0,8}", text, re.ASCII) else math.inf


def _mask_classes(content: MaskContent) -> list[str]:
    """The parts `classes` and `mask` of a description of masks that are pictures or rasters."""
    color = content.by_color
    total = sum(content.pixels.values())
    values = sorted(content.pixels)
    # Beside several values 255 means no class; masks of two things have 0 and 255.
    ignored = [IGNORE] if not color and IGNORE in values and len(values) > 2 else []
    values = [value for value in values if value not in ignored]
    used: set[Color] = set()
    rows = []
    for number, value in enumerate(values, 1):
        rgb = value if color else content.palette.get(value)
        if rgb is None or rgb in used:
            rgb = _distinct(number, used)
        used.add(rgb)
        entry = f"name: class {number}, color: {list(rgb)}"
        if not color and value != number - 1:
            entry += f", values: [{value}]"
        share = f"{100 * content.pixels[value] / total:.2f} % of the pixels"
        black = "; no class? then it belongs to `ignore`" if value in (0, (0, 0, 0)) else ""
        rows.append(f"  - {{{entry}}}   # {share}{black}")
    what = "colours" if color else "numbers"
    return [
        f"# In label order, as the {what} of {content.masks} masks have them.",
        "classes:",
        *rows,
        "",
        "mask:",
        f"  encoding: {'color' if color else 'index'}",
        f"  ignore: {ignored}   # {what} that mean no class",
    ]


def _render(raw: Path, out: Path, name: str, images: str, labels: str | None,
            sources: Sequence[Source], classes: Sequence[str]) -> str:
    """The description as YAML with comments."""
    size, crop, sides = _sizes(sources)
    lines = [
        "# A proposal of `co2s-fast data describe`. Name the classes; phrases help text queries:",
        "# `concepts: [lake, river]`. examples/datasets of co2s-fast explains all keys.",
        "#",
        f"#   {_command(out, raw, name)}",
        f"#   co2s-fast data split data/{name} --labels 20",
        f"#   co2s-fast train --dataset data/{name}/dataset.yaml --labels 20",
        f"name: {json.dumps(name)}",
        "",
        *classes,
        "",
        "files:",
        f"  images: {json.dumps(images)}",
        *([] if labels is None else [f"  labels: {json.dumps(labels)}"]),
        *([f'  # group: "{{{names[0]}}}"   # what is never in both training and validation']
          if len(names := fields(images)) > 1 else []),
        "",
        f"# Images are {sides}.",
        f"tile: {{size: {size or 'null'}}}",
        f"crop: {crop}",
        *_bands(sources[0].image),
        "val: 0.2   # share of the images that validate, or patterns of their names",
        "",
    ]
    return "\n".join(lines)


def _sizes(sources: Sequence[Source]) -> tuple[int | None, int, str]:
    """Side of tiles (None: images stay whole), side of crops, and the images' sizes in words."""
    sizes = [_size(source.image) for source in _spread(sources)]
    least, most = min(map(min, sizes)), max(map(max, sizes))
    usual = sorted(map(min, sizes))[len(sizes) // 2]  # what is smaller is padded
    crop = min(_CROP, max(usual // _STEP * _STEP, _STEP))
    words = f"{least} to {most} pixels wide and high"
    return (crop if most > _TILED else None), crop, words


def _size(path: Path) -> tuple[int, int]:
    if not is_picture(path):
        with open_source(path) as source:
            return source.width, source.height
    try:
        return header_size(path)
    except (OSError, SyntaxError, ValueError):
        return open_image(path).size  # says in one line what is wrong


def _bands(path: Path) -> list[str]:
    """Lines about the bands of images that are not 8-bit colour or grey."""
    if is_byte_picture(path):
        return []
    with open_source(path) as source:
        names = [kind.name for kind in source.colorinterp]
        kinds = set(source.dtypes)
    numbers = [band for band, name in enumerate(names, 1) if name != "alpha"]
    alpha = [f"# Band {band} is called alpha: where it is 0 there is no data. Is it data? Add it."
             for band in range(1, len(names) + 1) if band not in numbers]
    if len(numbers) <= 3 and kinds == {"uint8"}:
        return [f"# bands: {numbers}", *alpha] if alpha else []
    lines = [*alpha, f"bands: {numbers}   # of {', '.join(sorted(kinds))}"]
    return lines + [f"# band_names: [{', '.join(RGB)}, nir]"] * (len(numbers) >= 4)


def _distinct(number: int, used: set[Color]) -> Color:
    """A colour that is not used yet; hues go round by the golden ratio."""
    while True:
        rgb = colorsys.hsv_to_rgb(number * 0.618034 % 1, 0.65, 0.9)
        color = tuple(round(255 * part) for part in rgb)
        if color not in used:
            return color
        number += 1
