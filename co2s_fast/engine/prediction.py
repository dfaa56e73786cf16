"""Class maps of images of any size, written beside optional confidences, overlays and polygons."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from co2s_fast.data.catalogue import IGNORE, DatasetSpec
from co2s_fast.data.config import DataConfig
from co2s_fast.data.survey import misnamed
from co2s_fast.data.validation import val_size
from co2s_fast.engine.inference import (
    EvalConfig,
    chosen_students,
    evaluating,
    for_maps,
    fuse,
    image_logits,
)
from co2s_fast.engine.log import say
from co2s_fast.engine.memory import with_fewer_windows
from co2s_fast.engine.outputs import (
    beside,
    check_writable,
    find_images,
    finished,
    identity,
    names_file,
    take_shard,
    targets_in,
)
from co2s_fast.engine.polygons import check_polygons, read_polygons_signature, write_polygons
from co2s_fast.engine.scenes import PLAIN, Picture, Scene, is_raster, open_scene, size_of
from co2s_fast.engine.sliding_window import Blend, Window, stream
from co2s_fast.errors import UsageError

OVERLAY_SHARE = 0.45
STRIP_BYTES = 128 << 20  # of one student's summed logits
UNSIGNED = "unsigned"
BAR = ("{l_bar}{bar}| {n:.2f}/{total:.2f} MP [{elapsed}<{remaining}, {rate_noinv_fmt}]"
       "{postfix}")  # fmt: skip

Part = tuple[int, int, NDArray[np.uint8], NDArray[np.uint8]]


@dataclass(frozen=True)
class Outputs:
    """What `predict` writes beside the class maps, and which images it takes.

    Attributes:
        overlay: `a.overlay.png`, the map's colours over the image.
        confidence: `a.confidence.png`, the largest probability times 255.
        polygons: `a.gpkg` for a GeoTIFF, see `write_polygons`.
        shard: (i, n) takes the i-th of n shares of the images, for several machines.
        overwrite: True does again what is there already, and replaces files of others.
        signature: of the run and its weights; with the settings and the image it tells whether a
            map that is there is the one asked for. Empty: nothing there counts as done.
    """

    overlay: bool = False
    confidence: bool = False
    polygons: bool = False
    shard: tuple[int, int] | None = None
    overwrite: bool = False
    signature: str = ""

    @property
    def kinds(self) -> list[str]:
        """Of the rasters beside each map."""
        return [kind for kind in ("confidence", "overlay") if getattr(self, kind)]


def predict(
    students: Mapping[str, nn.Module],
    images: Iterable[str | Path],
    out_dir: str | Path,
    spec: Any,
    student: str = "both",
    *,
    config: EvalConfig | None = None,
    data: DataConfig | None = None,
    device: torch.device | str = "cpu",
    outputs: Outputs | None = None,
    blend: Blend = "hann",
    scale: float = 1.0,
    progress: bool = True,
) -> list[Path]:
    """Write one class map for every image: `a.png` for a.png or a.jpg, `b.tif` for b.tif.

    A map is an indexed PNG, or a cloud-optimised GeoTIFF with the colour table and the georeference
    of its image and 255 where that has no data. Images larger than the crop go through in
    overlapping windows, a row of windows at a time and wide ones in strips, so memory grows with
    neither height nor width of a GeoTIFF. A map takes its name only when it is complete; given
    again, the call passes over the maps that are, but for polygons that they lack. A map of another
    image, or of what the image was before it was edited, is made again.

    Args:
        students: name -> network, [B,C,H,W] in, logits [B,K,h,w] out.
        images: files, folders (their images, not their subfolders) and glob patterns.
        out_dir: folder for the maps, made where missing; of a single image also the map's name.
        spec: the dataset: classes and crop; bands, number type and stretch of rasters.
        student: a student's name, or "both" for the mean of probabilities.
        config: windows and precision, see `EvalConfig`.
        data: the run's data configuration. PNG and JPEG are resized as its validation images are
            (a reference size in `scale`), and their maps brought back to their size; a GeoTIFF
            goes through at its own resolution times `scale`.
        device: where the students are.
        outputs: see `Outputs`.
        blend: weight of a pixel inside its window.
        scale: factor on an image's size before it goes through, as the dataset's tiles had on
            theirs. The map of a picture keeps the picture's size, that of a GeoTIFF has the scaled
            grid over the same ground.
        progress: draw a bar, in megapixels.

    Returns:
        The maps' paths, in the order of the images.

    Raises:
        DataError: an image is missing, damaged, or not of the dataset's bands and number type.
        UsageError: two images would give the same map, a map would replace its image or a file
            that is no map, the folder cannot be written to, `scale` is not above 0, or polygons are
            asked for and cannot be had.
    """
    device, outputs = torch.device(device), outputs or Outputs()
    if not 0 < scale < math.inf:
        raise UsageError(f"scale: expected a number above 0, found {scale}")
    config = for_maps(config or EvalConfig(), device)
    running = chosen_students(students, student)
    work = _plan(images, Path(out_dir), outputs,
                 [list(running), scale, blend, config.model_dump(), data and data.scale])
    imagery = spec if isinstance(spec, DatasetSpec) else PLAIN
    sizes = [size_of(source, imagery) for source, _ in work.left]  # tells what is missing now
    megapixels = [height * width / 1e6 for height, width in sizes]
    if isinstance(spec, DatasetSpec) and spec.band_names is not None:
        notes = (misnamed(source, spec) for source, _ in work.left if is_raster(source))
        if note := next(filter(None, notes), None):
            say(note)
    if kept := len(work.targets) - len(work.left):
        say(f"maps: {kept} of {len(work.targets)} were there already and are kept (--overwrite "
            "makes them again)")  # fmt: skip
    bar = tqdm(total=sum(megapixels), desc="predict", unit="MP", disable=not progress,
               bar_format=BAR)  # fmt: skip

    def make_map(
        source: Path, target: Path, size: float, done: float, config: EvalConfig
    ) -> None:
        bar.n = done  # a second attempt begins where the first did
        with open_scene(source, scale, imagery) as scene:
            maps = maps_of(running, scene, config, spec, data, device, blend, scale)
            share = size / (scene.height * scene.width)
            for pixels in _write(scene, maps, target, spec, outputs, work.signature(source)):
                bar.update(min(pixels * share, bar.total - bar.n))  # sums of floats

    def make_polygons(source: Path, target: Path) -> None:
        bar.set_postfix_str(f"{target.name}: polygons")
        write_polygons(target, spec.class_names, work.signature(source))

    with bar, evaluating(running, config, device):
        for source, target in work.without_polygons:
            make_polygons(source, target)
        for (source, target), size in zip(work.left, megapixels, strict=True):
            bar.set_postfix_str(source.name, refresh=False)
            make = partial(make_map, source, target, size, bar.n)
            _, config = with_fewer_windows(make, config)
            if outputs.polygons:
                make_polygons(source, target)
    return work.targets


@dataclass(frozen=True)
class _Work:
    """What one call of `predict` is to make.

    Attributes:
        targets: every map of this machine's share of the images, in their order.
        left: images and the maps that they still lack.
        without_polygons: images whose maps are there, yet not their polygons.
        signature: what is written into the map of an image.
    """

    targets: list[Path]
    left: list[tuple[Path, Path]]
    without_polygons: list[tuple[Path, Path]]
    signature: Callable[[Path], str]


def _plan(images: Iterable[str | Path], out_dir: Path, outputs: Outputs, settings: Any) -> _Work:
    """Find the images, and which maps of them are there; raises what `predict` tells of these."""
    sources = find_images(images)
    targets_in(out_dir, sources, outputs.kinds)  # names must be unique over all shards
    sources = take_shard(sources, outputs.shard)
    targets = targets_in(out_dir, sources, outputs.kinds)
    if outputs.polygons:
        check_polygons(sources)
    check_writable(out_dir.parent if names_file(out_dir) else out_dir)

    @cache
    def signature(source: Path) -> str:
        if not outputs.signature:
            return UNSIGNED
        return digest(outputs.signature, [settings, identity(source)])

    owners = dict(zip(targets, sources, strict=True))
    kept = finished(owners, outputs.kinds, signature, overwrite=outputs.overwrite,
                    polygons=outputs.polygons)  # fmt: skip
    kept = kept if outputs.signature else set()
    bare = [(owners[target], target) for target in sorted(kept) if outputs.polygons
            and read_polygons_signature(target) != signature(owners[target])]  # fmt: skip
    left = [(s, t) for s, t in zip(sources, targets, strict=True) if t not in kept]
    return _Work(targets, left, bare, signature)


def digest(signature: str, settings: Any) -> str:
    """A short name for a run's signature together with everything that changes a map."""
    text = json.dumps([signature, settings], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _write(
    scene: Scene, maps: Iterator[Part], target: Path, spec: Any, outputs: Outputs, signature: str
) -> Iterator[int]:
    """Write the parts of a map and what goes beside it; yields the pixels of each part.

    The map itself is closed last: where it is complete, the files beside it are, too.
    """
    with ExitStack() as files:
        write = files.enter_context(scene.create(target, 1, spec.palette, signature))
        extra = {
            kind: files.enter_context(
                scene.create(beside(target, kind), bands, signature=signature)
            )
            for kind, bands in (("confidence", 1), ("overlay", 3))
            if kind in outputs.kinds
        }
        for top, left, labels, certainty in maps:
            write(top, left, labels[None])
            if "confidence" in extra:
                extra["confidence"](top, left, certainty[None])
            if "overlay" in extra:
                pixels = scene.colours(Window(top, left, *labels.shape))
                extra["overlay"](top, left, blend_colors(pixels, labels, spec.palette))
            yield labels.size


def maps_of(
    students: Mapping[str, nn.Module],
    scene: Scene,
    config: EvalConfig,
    spec: Any,
    data: DataConfig | None,
    device: torch.device,
    blend: Blend,
    scale: float,
) -> Iterator[Part]:
    """The parts of one image's map, at its own size or rescaled as validation images are."""
    if isinstance(scene, Picture):
        rule = (data and data.scale) or getattr(spec, "scale", "native")
        height, width = (max(round(scale * n), 1) for n in (scene.height, scene.width))
        size = val_size(height, width, rule)
        if size != (scene.height, scene.width):
            return rescaled_maps(students, scene, size, config, spec, device)
    return scene_maps(students, scene, config, spec, device, blend)


def scene_maps(
    students: Mapping[str, nn.Module],
    scene: Scene,
    config: EvalConfig,
    spec: Any,
    device: torch.device,
    blend: Blend = "uniform",
    strip_bytes: int = STRIP_BYTES,
) -> Iterator[Part]:
    """Finished parts of a scene: first row, first column, classes and confidences [rows, columns].

    Strips from left to right, each in bands from top to bottom. Classes are 255 and confidences 0
    where the scene has no data; windows without any are not put through the students.
    """
    crop = config.crop or getattr(spec, "crop", None)
    if config.mode == "sliding" and crop is None:
        raise UsageError("eval.crop: sliding windows need a size in pixels, found none")
    if config.mode == "whole" or crop is None:
        crop = max(scene.height, scene.width)

    def read(window: Window) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(scene.read(window)))[None].to(device)

    @lru_cache(maxsize=4096)  # asked for by each student
    def empty(window: Window) -> bool:
        valid = scene.valid(window)
        return valid is not None and not valid.any()

    for columns in strips(scene.width, crop, spec.num_classes, strip_bytes):
        bands = [
            stream(
                student, read, scene.height, scene.width, crop=crop, stride=config.stride_px(crop),
                batch_windows=config.batch_windows, blend=blend, columns=columns, empty=empty,
                classes=spec.num_classes,
            )
            for student in students.values()
        ]  # fmt: skip
        for parts in zip(*bands, strict=True):
            top = parts[0][0]
            classes, shares = _to_bytes(fuse(logits for _, logits in parts))
            valid = scene.valid(Window(top, columns[0], *classes.shape))
            if valid is not None:
                classes[~valid], shares[~valid] = IGNORE, 0
            yield top, columns[0], classes, shares


def strips(
    width: int, crop: int, classes: int, strip_bytes: int = STRIP_BYTES
) -> list[tuple[int, int]]:
    """Columns of a scene that go through together: a row of windows' sums take `strip_bytes`.

    Windows across a border of strips go through twice, so a strip is never under eight crops.
    """
    widest = max(strip_bytes // (4 * classes * crop), 8 * crop)
    count = -(-width // widest)
    edges = [round(i * width / count) for i in range(count + 1)]
    return list(pairwise(edges))


def rescaled_maps(
    students: Mapping[str, nn.Module],
    picture: Picture,
    size: tuple[int, int],
    config: EvalConfig,
    spec: Any,
    device: torch.device,
) -> Iterator[Part]:
    """`scene_maps` of a picture that goes through the students at another size, as one band."""
    crop = config.crop or getattr(spec, "crop", None)
    pixels = torch.from_numpy(np.ascontiguousarray(picture.resized(*size)))[None].to(device)
    logits = [image_logits(student, pixels, config, crop) for student in students.values()]
    classes, shares = _to_bytes(fuse(each.at(picture.height, picture.width) for each in logits))
    valid = picture.valid(Window(0, 0, picture.height, picture.width))
    if valid is not None:
        classes[~valid], shares[~valid] = IGNORE, 0
    yield 0, 0, classes, shares


def _to_bytes(probabilities: torch.Tensor) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Classes and confidences times 255 of probabilities [1,K,H,W]."""
    certainty, labels = probabilities[0].max(0)
    shares = (certainty * 255).round()
    return labels.to(torch.uint8).cpu().numpy(), shares.to(torch.uint8).cpu().numpy()


def blend_colors(
    image: NDArray[np.uint8], labels: NDArray[np.uint8], palette: Sequence[tuple[int, int, int]]
) -> NDArray[np.uint8]:
    """The classes' colours laid over pixels [3, h, w]; pixels without a class stay as they are."""
    table = np.zeros((256, 3), np.float32)
    table[: len(palette)] = palette
    mixed = (1 - OVERLAY_SHARE) * image + OVERLAY_SHARE * table[labels].transpose(2, 0, 1)
    return np.where(labels == IGNORE, image, mixed.round().astype(np.uint8))
