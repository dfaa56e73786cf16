"""`co2s-fast attention`: where the heads of a run's students look in one image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from co2s_fast.data.imagery import Imagery
from co2s_fast.data.validation import val_size
from co2s_fast.data.writing import replacing
from co2s_fast.engine.inference import BOTH, chosen_students
from co2s_fast.engine.launch import device_of
from co2s_fast.engine.log import say
from co2s_fast.engine.outputs import check_writable
from co2s_fast.engine.panels import as_rgb
from co2s_fast.engine.runs import checkpoint_step, load_run
from co2s_fast.engine.scenes import PLAIN, Picture, open_scene, size_of
from co2s_fast.engine.sliding_window import Window
from co2s_fast.errors import DataError, UsageError
from co2s_fast.models.attention_maps import AttentionMaps, attention_maps

FIGURES = (".png", ".pdf", ".svg")


@dataclass(frozen=True)
class View:
    """The part of an image that goes through the students.

    Attributes:
        pixels: [C, h, w] as the students take them, uint8 or float32 in [0, 1].
        box: left, top, right, bottom in the file's own pixels.
        point: (x, y) in `pixels`, None where none was asked for.
    """

    pixels: NDArray[Any]
    box: tuple[float, float, float, float]
    point: tuple[int, int] | None


@dataclass(frozen=True)
class Attention:
    """What the figure shows.

    Attributes:
        title: of image, run and checkpoint.
        image: the view's picture, uint8 [h, w, 3].
        point: (x, y) of the query in the view, or None.
        students: name -> attention of all layers.
        layers: name -> the layer to draw.
    """

    title: str
    image: NDArray[np.uint8]
    point: tuple[int, int] | None
    students: dict[str, AttentionMaps]
    layers: dict[str, int]


def attend(
    run: Path,
    image: Path,
    *,
    out: Path,
    student: str = BOTH,
    layer: int = -1,
    point: tuple[int, int] | None = None,
    size: int | None = None,
    scale: float | None = None,
    checkpoint: str = "best",
    npz: bool = False,
) -> Attention:
    """Put an image, or a part of a large one, through the students and take their attention.

    The image is read as `predict` reads it.

    Args:
        run: the run folder.
        image: picture or GeoTIFF.
        out: the figure to come; its name is checked before anything is read.
        student: a student's name, or "both" for each of them.
        layer: number of the block; negative ones count back from the last whose attention the
            student uses.
        point: (x, y) in the image's pixels: the attention of the patch there.
        size: largest side of the part that goes through, in pixels as the students see them; None:
            the run's crop. It lies around the point, or else in the middle.
        scale: as of `predict`.
        checkpoint: "best" or "last".
        npz: also write the maps of all layers beside the figure.

    Raises:
        UsageError, DataError: an option or a file that cannot work.
    """
    if out.suffix.lower() not in FIGURES or out.is_dir():
        raise UsageError(f"--out {out}: expected a file ending in {', '.join(FIGURES)}")
    if not image.is_file():
        raise DataError(f"{image}: missing file")
    device = device_of(run)
    config, spec, students = load_run(run, checkpoint, device=device)
    chosen = chosen_students(students, student)
    check_writable(out.parent)
    if scale is None:
        scale = spec.tile.scale
        if scale != 1:
            say(f"the image goes through at {scale} of its size, as the tiles of {spec.name} were "
                "cut; --scale 1 takes it as it is")  # fmt: skip
    view = read_view(image, size or config.eval.crop or spec.crop, point,
                     scale=scale, rule=config.data.scale or spec.scale, spec=spec)  # fmt: skip
    pixels = torch.from_numpy(np.ascontiguousarray(view.pixels))[None].to(device)
    maps = {name: attention_maps(each, pixels, view.point) for name, each in chosen.items()}
    layers = {name: each.layer(layer, f"student {name}") for name, each in maps.items()}
    if npz:
        write_npz(out.with_suffix(".npz"), view, maps)
    step = checkpoint_step(run, checkpoint)["step"]
    return Attention(
        f"{image.name} · {run.resolve().name}, {checkpoint} checkpoint (step {step})",
        as_rgb(view.pixels.transpose(1, 2, 0), spec.display_channels),
        view.point, maps, layers,
    )  # fmt: skip


def read_view(
    path: Path,
    size: int,
    point: tuple[int, int] | None,
    *,
    scale: float = 1.0,
    rule: Any = "native",
    spec: Imagery = PLAIN,
) -> View:
    """An image at the scale at which the students see it, cut to `size` where it is larger.

    Args:
        path: picture or GeoTIFF; of the latter only the part is read.
        size: largest side in pixels.
        point: (x, y) in the file's pixels that the part has in its middle, as far as it can.
        scale: factor on the image's size.
        rule: the dataset's scale, which pictures are brought to as validation images are.
        spec: the run's dataset: bands, number type and stretch of rasters.

    Raises:
        DataError: the image cannot be read, or is not of the dataset's bands and number type.
        UsageError: the point is outside of it.
    """
    height, width = size_of(path, spec)
    if point is not None and not (0 <= point[0] < width and 0 <= point[1] < height):
        x, y = point
        raise UsageError(f"--point {x},{y}: outside of {path}, {width} x {height} pixels")
    with open_scene(path, scale, spec) as scene:
        full = scene.height, scene.width
        if isinstance(scene, Picture):
            full = val_size(*(max(round(scale * n), 1) for n in full), rule)
        down, across = height / full[0], width / full[1]
        seen = None
        if point is not None:  # a pixel's centre, on the other grid
            seen = int((point[0] + 0.5) / across), int((point[1] + 0.5) / down)
        middle = seen or (full[1] // 2, full[0] // 2)
        (left, w), (top, h) = (_cut(m, n, size) for m, n in zip(middle, full[::-1], strict=True))
        if isinstance(scene, Picture) and full != (scene.height, scene.width):
            pixels = scene.resized(*full)[:, top : top + h, left : left + w]
        else:
            pixels = scene.read(Window(top, left, h, w))
    if (h, w) != full:
        place = "its middle" if point is None else f"{point[0]},{point[1]}"
        say(f"{path.name}: {full[1]} x {full[0]} pixels; the {w} x {h} around {place} go through "
            "(--size takes more, --point another part)")  # fmt: skip
    box = (left * across, top * down, (left + w) * across, (top + h) * down)
    return View(pixels, box, None if seen is None else (seen[0] - left, seen[1] - top))


def _cut(middle: int, length: int, size: int) -> tuple[int, int]:
    """First pixel and number of pixels of a part around `middle`, inside of `length`."""
    count = min(size, length)
    return min(max(middle - count // 2, 0), length - count), count


def write_npz(path: Path, view: View, students: dict[str, AttentionMaps]) -> None:
    """The maps of all layers: `<student>` float32 [layers, heads, h, w], and what they belong to.

    Also `<student>_layers_in_use`, `<student>_query` and `<student>_covers` (see `AttentionMaps`),
    the view's `image` [C, H, W] and its `box` (left, top, right, bottom in the file's pixels).
    """
    arrays: dict[str, Any] = {"image": view.pixels, "box": np.array(view.box)}
    for name, each in students.items():
        arrays[name] = each.maps.cpu().numpy()
        arrays[f"{name}_layers_in_use"] = np.array(each.used)
        arrays[f"{name}_query"] = np.array(each.query)
        arrays[f"{name}_covers"] = np.array(each.covers)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)


def parse_point(text: str | None) -> tuple[int, int] | None:
    """`"120,64"` as (120, 64).

    Raises:
        UsageError: not two whole numbers.
    """
    if text is None:
        return None
    parts: Sequence[str] = text.split(",")
    try:
        x, y = (int(part) for part in parts)
    except ValueError:
        raise UsageError(f"--point {text}: expected X,Y in pixels, such as 120,64") from None
    return x, y
