"""Preparing one Potsdam image of 6000 x 6000: its colour mask alone, and the whole of it.

The peers' form, in our words: the mask is compared with one colour after another in NumPy. In the
whole preparation they then cut the same 144 tiles and write them with Pillow, at the setting that
is quickest there. `loop_our_png` is the same loop with our PNG writer. Not part of a plain run,
since the loop takes seconds a pass:

    python benchmarks/throughput.py --section prepare --out benchmarks/results/prepare-NAME.json
"""

from __future__ import annotations

import functools
import shutil
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.harness import Case, Workload

SECTION = "prepare"
TITLE = "Preparing a Potsdam image and its mask"
PROVIDERS = ("loop", "loop_our_png", "ours")
TILE = 512


@functools.cache
def release(side: int) -> tempfile.TemporaryDirectory:
    """A raw release of one image: patches of flat colour, as in masks, and noise, as in images."""
    from co2s_fast.data import load_dataset

    folder = tempfile.TemporaryDirectory(prefix="co2s-bench-")
    rng = np.random.default_rng(0)
    palette = np.array([*load_dataset("potsdam").palette, (0, 0, 0)], np.uint8)
    patches = -(-side // 50)
    labels = rng.integers(0, 7, (patches, patches)).repeat(50, 0).repeat(50, 1)[:side, :side]
    noise = rng.integers(-12, 13, (side, side, 3), np.int16)
    image = (palette[labels] // 2 + 60 + noise).astype(np.uint8)
    for name, pixels in (("2_Ortho_RGB/top_potsdam_2_10_RGB.tif", image),
                         ("5_Labels_all_noBoundary/top_potsdam_2_10_label_noBoundary.tif",
                          palette[labels])):  # fmt: skip
        path = Path(folder.name) / "raw" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


def compare_colours(rgb: NDArray[np.uint8], palette: list[tuple[int, int, int]]) -> NDArray:
    """One comparison of the whole mask for each class."""
    label = np.full(rgb.shape[:2], 255, np.uint8)
    for number, color in enumerate(palette):
        label[(rgb == np.array(color, np.uint8)).all(-1)] = number
    return label


def save_with_pillow(path: Path, pixels: NDArray[np.uint8],
                     palette: list[tuple[int, int, int]] | None = None) -> None:
    """A PNG by Pillow, run lengths only: the quickest of its settings on images and on labels."""
    picture = Image.fromarray(pixels)
    if palette is not None:
        entries = [*palette] + [(0, 0, 0)] * (256 - len(palette))
        picture.putpalette([channel for color in entries for channel in color])
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, format="PNG", compress_level=1, compress_type=zlib.Z_RLE)


def _paths(side: int) -> tuple[Path, Path, Path]:
    raw = Path(release(side).name) / "raw"
    return raw, *sorted(raw.rglob("*.tif"))  # type: ignore[return-value]


def build_mask(provider: str, device: torch.device, side: int) -> Workload:
    from co2s_fast.data import load_dataset
    from co2s_fast.data.files import decode_mask

    spec = load_dataset("potsdam")
    spec = spec.model_copy(update={"mask": spec.layouts[0].mask})
    path = _paths(side)[2]
    if provider == "ours":
        return Workload(lambda: torch.from_numpy(decode_mask(path, spec)), mode="load", items=1)

    def loop() -> torch.Tensor:
        return torch.from_numpy(compare_colours(np.asarray(Image.open(path)), spec.palette))

    return Workload(loop, mode="load", items=1)


def build_whole(provider: str, device: torch.device, side: int) -> Workload:
    from co2s_fast.data import load_dataset, prepare_dataset
    from co2s_fast.data.catalogue import TileSpec
    from co2s_fast.data.files import save_image, save_label
    from co2s_fast.data.prepare import starts

    spec = load_dataset("potsdam")
    raw, image_path, mask_path = _paths(side)
    out = Path(release(side).name) / provider
    corners = starts(side, TileSpec(size=TILE))

    def read_back() -> list[torch.Tensor]:
        return [
            torch.from_numpy(np.stack([np.asarray(Image.open(p)) for p in sorted(part.iterdir())]))
            for part in (out / "images", out / "labels")
        ]

    def ours() -> None:
        shutil.rmtree(out, ignore_errors=True)
        prepare_dataset(spec, raw, out, progress=False)

    def loop() -> None:
        shutil.rmtree(out, ignore_errors=True)
        image = np.asarray(Image.open(image_path))
        label = compare_colours(np.asarray(Image.open(mask_path)), spec.palette)
        for y in corners:
            for x in corners:
                name = f"2_10_{x}_{y}_{x + TILE}_{y + TILE}.png"
                part = np.s_[y : y + TILE, x : x + TILE]
                tile, tile_label = (np.ascontiguousarray(p[part]) for p in (image, label))
                if provider == "loop":
                    save_with_pillow(out / "images" / name, tile)
                    save_with_pillow(out / "labels" / name, tile_label, spec.palette)
                else:
                    save_image(out / "images" / name, tile)
                    save_label(out / "labels" / name, tile_label, spec.palette)

    forward = ours if provider == "ours" else loop
    return Workload(forward, mode="load", items=1, check=read_back)


def cases(device: torch.device, quick: bool) -> list[Case]:
    side = 1500 if quick else 6000
    return [
        Case(f"{name}-{side}", names, functools.partial(build, side=side), tolerance=0.0, memory=())
        for name, build, names in (("mask", build_mask, ("loop", "ours")),
                                   ("whole", build_whole, PROVIDERS))
    ]  # fmt: skip
