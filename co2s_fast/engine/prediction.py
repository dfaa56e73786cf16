"""Class maps of images of any size, written beside optional confidences and overlays."""

from __future__ import annotations

import glob
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from co2s_fast.data.catalogue import IGNORE
from co2s_fast.data.config import DataConfig
from co2s_fast.data.validation import val_size
from co2s_fast.engine.inference import (
    EvalConfig,
    evaluating,
    fuse,
    image_logits,
    wanted_predictions,
)
from co2s_fast.engine.scenes import (
    PICTURES,
    RASTERS,
    Picture,
    Scene,
    is_raster,
    open_scene,
    size_of,
)
from co2s_fast.engine.sliding_window import Blend, Window, stream
from co2s_fast.errors import DataError, UsageError

OVERLAY_SHARE = 0.45


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
    overlay: bool = False,
    confidence: bool = False,
    blend: Blend = "hann",
    scale: float = 1.0,
    overwrite: bool = True,
    progress: bool = True,
) -> list[Path]:
    """Write one class map for every image: `a.png` for a.png or a.jpg, `b.tif` for b.tif.

    A map is an indexed PNG, or a GeoTIFF with the colour table and the georeference of its image
    and 255 where that has no data. Images larger than the crop go through in overlapping windows,
    a row of windows at a time, so memory does not grow with a GeoTIFF's height. A map takes its
    name only when it is complete.

    Args:
        students: name -> network, uint8 [B,3,H,W] in, logits [B,K,h,w] out.
        images: files, folders (their images, not their subfolders) and glob patterns.
        out_dir: folder for the maps; made where missing.
        spec: the dataset: `num_classes`, `palette`, `crop`.
        student: a student's name, or "both" for the mean of probabilities.
        config: windows and precision, see `EvalConfig`.
        data: the run's data configuration. PNG and JPEG are resized as its validation images are
            (a reference size in `scale`), and their maps brought back to their size; a GeoTIFF
            always goes through at its own resolution.
        device: where the students are.
        overlay: also write `a.overlay.png`, the map's colours over the image.
        confidence: also write `a.confidence.png`, the largest probability times 255.
        blend: weight of a pixel inside its window.
        scale: factor on a picture's size before it goes through, as the dataset's tiles had on
            theirs; its map keeps the picture's own size.
        overwrite: False passes over images whose maps are there already.
        progress: draw a bar, in megapixels.

    Returns:
        The maps' paths, in the order of the images.

    Raises:
        DataError: an image is missing, damaged or of another kind than 8-bit colour or grey.
        UsageError: two images would give the same map, a map would replace its image, the folder
            cannot be written to, or a GeoTIFF is to be scaled.
    """
    config = config or EvalConfig()
    device = torch.device(device)
    one = "both" if len(students) > 1 else next(iter(students), "")
    (wanted,) = wanted_predictions(students, one if student in ("all", "both") else student)
    running = dict(students) if wanted == "both" else {wanted: students[wanted]}
    sources = find_images(images)
    targets = _targets(sources, Path(out_dir))
    if scale != 1 and any(map(is_raster, sources)):
        raise UsageError(
            f"scale {scale}: GeoTIFFs go through at their own resolution; resample them and give 1"
        )
    _check_writable(Path(out_dir))
    left = [
        pair for pair in zip(sources, targets, strict=True) if overwrite or not pair[1].exists()
    ]
    sizes = [size_of(source) for source, _ in left]  # finds missing files before the first map
    total = sum(height * width for height, width in sizes) / 1e6
    bar = tqdm(
        total=total,
        desc="predict",
        unit="MP",
        disable=not progress,
        bar_format="{l_bar}{bar}| {n:.2f}/{total:.2f} MP [{elapsed}<{remaining}, {rate_noinv_fmt}]",
    )
    with bar, evaluating(running, config, device):
        for source, target in left:
            bar.set_postfix_str(source.name, refresh=False)
            with open_scene(source) as scene, ExitStack() as files:
                write = files.enter_context(scene.create(target, 1, spec.palette))
                extra = {
                    kind: files.enter_context(scene.create(beside(target, kind), bands))
                    for kind, bands, asked in (
                        ("confidence", 1, confidence),
                        ("overlay", 3, overlay),
                    )
                    if asked
                }
                rule = (data and data.scale) or getattr(spec, "scale", "native")
                height, width = (max(round(scale * n), 1) for n in (scene.height, scene.width))
                size = val_size(height, width, rule)
                if is_raster(source) or size == (scene.height, scene.width):
                    maps = scene_maps(running, scene, config, spec, device, blend)
                else:
                    maps = rescaled_maps(running, scene, size, config, spec, device)
                for top, labels, certainty in maps:
                    write(top, labels[None])
                    if confidence:
                        extra["confidence"](top, certainty[None])
                    if overlay:
                        window = Window(top, 0, len(labels), scene.width)
                        mixed = blend_colors(scene.read(window), labels, spec.palette)
                        extra["overlay"](top, mixed)
                    bar.update(labels.size / 1e6)
    return targets


def scene_maps(
    students: Mapping[str, nn.Module],
    scene: Scene,
    config: EvalConfig,
    spec: Any,
    device: torch.device,
    blend: Blend = "uniform",
) -> Iterator[tuple[int, NDArray[np.uint8], NDArray[np.uint8]]]:
    """Finished bands of a scene, top to bottom: first row, classes and confidences [rows, W].

    Classes are 255 and confidences 0 where the scene has no data.
    """
    crop = config.crop or getattr(spec, "crop", None)
    if config.mode == "sliding" and crop is None:
        raise UsageError("eval.crop: sliding windows need a size in pixels, found none")
    if config.mode == "whole" or crop is None:
        crop = max(scene.height, scene.width)

    def read(window: Window) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(scene.read(window)))[None].to(device)

    bands = [
        stream(
            student,
            read,
            scene.height,
            scene.width,
            crop=crop,
            stride=config.stride_px(crop),
            batch_windows=config.batch_windows,
            blend=blend,
        )
        for student in students.values()
    ]
    for parts in zip(*bands, strict=True):
        top = parts[0][0]
        classes, shares = _to_bytes(fuse(logits for _, logits in parts))
        valid = scene.valid(Window(top, 0, len(classes), scene.width))
        if valid is not None:
            classes[~valid], shares[~valid] = IGNORE, 0
        yield top, classes, shares


def rescaled_maps(
    students: Mapping[str, nn.Module],
    picture: Picture,
    size: tuple[int, int],
    config: EvalConfig,
    spec: Any,
    device: torch.device,
) -> Iterator[tuple[int, NDArray[np.uint8], NDArray[np.uint8]]]:
    """`scene_maps` of a picture that goes through the students at another size, as one band."""
    crop = config.crop or getattr(spec, "crop", None)
    pixels = torch.from_numpy(np.ascontiguousarray(picture.resized(*size)))[None].to(device)
    logits = [image_logits(student, pixels, config, crop) for student in students.values()]
    yield 0, *_to_bytes(fuse(each.at(picture.height, picture.width) for each in logits))


def _to_bytes(probabilities: torch.Tensor) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Classes and confidences times 255 of probabilities [1,K,H,W]."""
    certainty, labels = probabilities[0].max(0)
    shares = (certainty * 255).round()
    return labels.to(torch.uint8).cpu().numpy(), shares.to(torch.uint8).cpu().numpy()


def find_images(images: Iterable[str | Path]) -> list[Path]:
    """Files named by paths, folders and glob patterns, without repeats, in the given order."""
    found: list[Path] = []
    for entry in images:
        path = Path(entry).expanduser()
        if path.is_dir():
            inside = [p for p in sorted(path.iterdir()) if p.suffix.lower() in PICTURES + RASTERS]
            if not inside:
                kinds = " ".join(PICTURES + RASTERS)
                raise DataError(f"{path}: expected images ({kinds}), found none in the folder")
            found += inside
        elif path.exists() or not glob.has_magic(str(path)):
            if not path.is_file():
                raise DataError(f"{path}: missing file")
            if path.suffix.lower() not in PICTURES + RASTERS:
                kinds = " ".join(PICTURES + RASTERS)
                raise DataError(f"{path}: expected an image ({kinds})")
            found.append(path)
        else:
            matches = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
            matches = [p for p in matches if p.suffix.lower() in PICTURES + RASTERS]
            if not matches:
                raise DataError(f"{path}: no image matches the pattern")
            found += matches
    if not found:
        raise UsageError("images: expected at least one file, folder or pattern, got none")
    return list(dict.fromkeys(found))


def beside(target: Path, kind: str) -> Path:
    """`a.overlay.png` for `a.png`."""
    return target.with_name(f"{target.stem}.{kind}{target.suffix}")


def blend_colors(
    image: NDArray[np.uint8], labels: NDArray[np.uint8], palette: Sequence[tuple[int, int, int]]
) -> NDArray[np.uint8]:
    """The classes' colours laid over pixels [3, h, w]; pixels without a class stay as they are."""
    table = np.zeros((256, 3), np.float32)
    table[: len(palette)] = palette
    mixed = (1 - OVERLAY_SHARE) * image + OVERLAY_SHARE * table[labels].transpose(2, 0, 1)
    return np.where(labels == IGNORE, image, mixed.round().astype(np.uint8))


def _targets(sources: list[Path], folder: Path) -> list[Path]:
    targets: dict[Path, Path] = {}
    for source in sources:
        target = folder / f"{source.stem}{'.tif' if is_raster(source) else '.png'}"
        if target in targets:
            raise UsageError(f"{targets[target]} and {source} would both be written to {target}")
        if target.exists() and target.samefile(source):
            raise UsageError(f"{source}: its map would replace it; choose another output folder")
        targets[target] = source
    return list(targets)


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(
            f"output folder {folder}: cannot be written to ({error.strerror})"
        ) from None
