"""Sliding-window prediction: megapixels a second and peak memory beside a plain loop.

\b
python benchmarks/predict.py                        both, into results/predict-<device>.json
python benchmarks/predict.py --speed-only --quick   few repetitions, only printed

The plain loop is what an evaluation script does: one window at a time, its logits at full
resolution, summed in a [K, H, W] array of the whole image. Ours is what `co2s-fast predict` runs.
Both see the same windows and weights, and their maps are compared before anything is timed.

Memory is the rise of the resident high-water mark of a fresh process over what it holds before the
raster is opened, with one student that costs next to nothing, so that a raster of 20,000 x 20,000
pixels takes minutes. The plain loop's array alone takes 4 K H W bytes there: it is run up to
--plain-side only.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # last: the installed package goes first

from benchmarks import results, tables  # noqa: E402 - needs the path above
from benchmarks.memory import _resident  # noqa: E402

SECTION = "predict"
CPU = torch.device("cpu")
CLASSES = 6
SPEC = SimpleNamespace(
    num_classes=CLASSES,
    class_names=[f"class {k}" for k in range(CLASSES)],
    palette=[(40 * k, 255 - 40 * k, 20 * k) for k in range(CLASSES)],
    crop=512,
)
# case -> (crop, height, width) of the scene
SCENES = {"tiny": (128, 1024, 1024), "vit_b16": (512, 512, 938)}
# Share of equal pixels, by precision: overlaps are summed in another order. In bfloat16 random
# students' logits, which are close to each other, change places more often than trained ones' do.
AGREE = {"auto": 0.9999, "float32": 0.9999, "bfloat16": 0.9}
MEMORY_SIDES = (5_000, 20_000)


class Cheap(nn.Module):
    """Logits on a quarter of the grid for hardly any work: what is left is the prediction's own."""

    patch_size = 16

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("mix", torch.randn(CLASSES, 3, 1, 1, generator=generator))

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        images = F.pad(images.float() / 255, (0, -width % 16, 0, -height % 16))
        return F.conv2d(F.avg_pool2d(images, 4), self.mix)


class ArrayScene:
    """An image in memory as `scene_maps` reads it."""

    def __init__(self, pixels: NDArray[np.uint8]) -> None:
        self.pixels = pixels
        self.height, self.width = pixels.shape[1:]

    def read(self, window: Any) -> NDArray[np.uint8]:
        rows = slice(window.y, window.y + window.height)
        return self.pixels[:, rows, window.x : window.x + window.width]

    def valid(self, window: Any) -> None:
        return None


def make_students(kind: str) -> dict[str, nn.Module]:
    """Both students with random weights: speed does not depend on their values."""
    from benchmarks import bench_step

    return bench_step.make_students(torch.device("cpu"), tiny=kind == "tiny")


@torch.inference_mode()
def plain(
    students: Mapping[str, nn.Module], scene: ArrayScene, crop: int, stride: int
) -> NDArray[np.uint8]:
    """One window after another, full-resolution logits summed over the whole image."""
    from co2s_fast.engine.sliding_window import _hann, window_rows

    mixed = None
    for student in students.values():
        total = torch.zeros(CLASSES, scene.height, scene.width)
        weight = torch.zeros(1, scene.height, scene.width)
        for window in (w for row in window_rows(scene.height, scene.width, crop, stride)
                       for w in row):  # fmt: skip
            image = torch.from_numpy(np.ascontiguousarray(scene.read(window)))[None]
            logits = student(image)
            logits = F.interpolate(logits, image.shape[-2:], mode="bilinear", align_corners=False)
            ramp = _hann(window, logits)
            inside = (slice(None), slice(window.y, window.y + window.height),
                      slice(window.x, window.x + window.width))  # fmt: skip
            total[inside] += logits[0] * ramp
            weight[inside] += ramp
        probabilities = torch.softmax(total.div_(weight), 0, out=total)  # no second array
        mixed = probabilities if mixed is None else mixed.add_(probabilities)
    assert mixed is not None
    return mixed.argmax(0).to(torch.uint8).numpy()


def ours(
    students: Mapping[str, nn.Module], scene: ArrayScene, crop: int, stride: int,
    precision: str = "auto",
) -> NDArray[np.uint8]:  # fmt: skip
    """As `co2s-fast predict` does, without the files."""
    from co2s_fast.engine.inference import EvalConfig, evaluating, for_maps
    from co2s_fast.engine.prediction import scene_maps

    config, device = EvalConfig(crop=crop, stride=stride / crop, precision=precision), CPU
    config = for_maps(config, device)
    labels = np.empty((scene.height, scene.width), np.uint8)
    with evaluating(students, config, device):
        for top, left, part, _ in scene_maps(students, scene, config, SPEC, device, "hann"):
            labels[top : top + part.shape[0], left : left + part.shape[1]] = part
    return labels


PROVIDERS: dict[str, Callable[..., NDArray[np.uint8]]] = {
    "plain": plain,
    "ours": ours,
    "ours_float32": functools.partial(ours, precision="float32"),
}


def speed_rows(kind: str, repeats: int) -> tuple[list[results.Row], list[dict[str, str]]]:
    """Rows of one case, and an entry for each provider whose map differs."""
    from co2s_fast.engine.inference import EvalConfig, for_maps

    crop, height, width = SCENES[kind]
    stride = crop * 5 // 6
    generator = np.random.default_rng(0)
    scene = ArrayScene(generator.integers(0, 256, (3, height, width), np.uint8))
    students = {name: student.eval() for name, student in make_students(kind).items()}
    found = {name: f(students, scene, crop, stride) for name, f in PROVIDERS.items()}
    case = f"{kind}-{height}x{width}"
    default = for_maps(EvalConfig(), CPU).precision
    wrong = []
    for name, least in (("ours", AGREE[default]), ("ours_float32", AGREE["float32"])):
        agree = float((found["plain"] == found[name]).mean())
        click.echo(f"  {case}, {name}: {100 * agree:.4g} % as the plain loop's", err=True)
        if agree < least:
            reason = f"{100 * (1 - agree):.3g} % of the pixels differ from the plain loop's"
            wrong.append({"section": SECTION, "case": case, "provider": name, "reason": reason})
            del found[name]
    samples: dict[str, list[float]] = {name: [] for name in found}
    for number in range(repeats):
        for name in [*samples, *samples][number % len(samples) :][: len(samples)]:
            begin = time.perf_counter()
            PROVIDERS[name](students, scene, crop, stride)
            samples[name].append(time.perf_counter() - begin)
    rows = []
    for name, times in samples.items():
        where = (SECTION, case, name)
        rows.append(results.row(where, "predict", "time", "s", times))
        rates = [height * width / 1e6 / t for t in times]
        rows.append(results.row(where, "predict", "megapixels_per_s", "1/s", rates))
    return rows, wrong


def write_raster(path: Path, side: int) -> None:
    """A GeoTIFF of side x side pixels, written in blocks, one block repeated."""
    import rasterio
    from rasterio.transform import from_origin
    from rasterio.windows import Window

    block = np.random.default_rng(1).integers(0, 256, (3, 512, 512), np.uint8)
    profile = {
        "driver": "GTiff", "dtype": "uint8", "count": 3, "height": side, "width": side,
        "tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "lzw",
        "crs": "EPSG:32640", "transform": from_origin(5e5, 2e6, 0.5, 0.5),
    }  # fmt: skip
    with rasterio.open(path, "w", **profile) as target:
        for y in range(0, side, 512):
            for x in range(0, side, 512):
                height, width = min(512, side - y), min(512, side - x)
                target.write(block[:, :height, :width], window=Window(x, y, width, height))


def memory_child(provider: str, raster: Path) -> int:
    """Peak bytes of predicting a raster in this process, beyond what it holds before."""
    from co2s_fast.engine.inference import EvalConfig
    from co2s_fast.engine.prediction import predict
    from co2s_fast.engine.scenes import open_scene

    students = {"clip": Cheap().eval()}
    with torch.inference_mode():
        students["clip"](torch.zeros(8, 3, 512, 512, dtype=torch.uint8))
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    if provider == "ours":
        with tempfile.TemporaryDirectory(dir=raster.parent) as folder:
            predict(students, [raster], folder, SPEC, config=EvalConfig(crop=512), progress=False)
    else:
        with open_scene(raster) as scene:
            plain(students, scene, 512, 426)
    return _resident("VmHWM") - before


def memory_rows(sides: tuple[int, ...], plain_side: int) -> Iterator[results.Row]:
    """Peak memory at each side, ours always, the plain loop's up to `plain_side`."""
    paths = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "PYTHONPATH": paths}
    for side in sides:
        with tempfile.TemporaryDirectory() as folder:
            raster = Path(folder) / "raster.tif"
            write_raster(raster, side)
            for provider in ("plain", "ours"):
                if provider == "plain" and side > plain_side:
                    continue
                command = [sys.executable, __file__, "--memory-child", provider, str(raster)]
                begin = time.perf_counter()
                done = subprocess.run(command, capture_output=True, text=True, env=environment)
                if done.returncode:
                    raise click.ClickException(f"{provider} at {side}: {done.stderr[-500:]}")
                seconds = time.perf_counter() - begin
                click.echo(f"  memory, {provider} at {side}: {seconds:.0f} s", err=True)
                where = (SECTION, f"raster-{side}x{side}", provider)
                yield results.row(where, "predict", "peak_memory", "B", [float(done.stdout)])


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, help=__doc__)
@click.option("--repeats", type=click.IntRange(1), default=7, show_default=True)
@click.option("--case", "kinds", multiple=True, type=click.Choice(list(SCENES)),
              default=list(SCENES), show_default=True)  # fmt: skip
@click.option("--quick", is_flag=True, help="3 rounds, tiny students and a raster of 2,000 only.")
@click.option("--speed-only", is_flag=True, help="No memory.")
@click.option("--plain-side", type=int, default=5_000, show_default=True,
              help="Largest raster the plain loop is given.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Result file.")
@click.option("--memory-child", nargs=2, type=str, hidden=True)
def main(repeats: int, kinds: tuple[str, ...], quick: bool, speed_only: bool, plain_side: int,
         out: Path | None, memory_child: tuple[str, str] | None) -> None:  # fmt: skip
    if memory_child is not None:
        click.echo(globals()["memory_child"](memory_child[0], Path(memory_child[1])))
        return
    device = torch.device("cpu")
    begin = time.perf_counter()
    repeats, kinds = (3, ("tiny",)) if quick else (repeats, kinds)
    header = results.make_header(device, repeats, quick)
    content: dict[str, Any] = {"schema_version": results.SCHEMA_VERSION, "header": header,
                               "rows": [], "not_measured": [], "wrong": []}  # fmt: skip
    for kind in kinds:
        rows, wrong = speed_rows(kind, repeats)
        content["rows"] += rows
        content["wrong"] += wrong
    if not speed_only:
        sides = (2_000,) if quick else MEMORY_SIDES
        content["rows"] += memory_rows(sides, plain_side)
        content["not_measured"] += [
            {"section": SECTION, "case": f"raster-{s}x{s}", "provider": "plain",
             "reason": f"its sums alone take {4e-9 * CLASSES * s * s:.1f} GB; --plain-side {s}"}
            for s in sides if s > plain_side
        ]  # fmt: skip
    header["load_after"] = [round(x, 2) for x in os.getloadavg()]
    header["seconds"] = round(time.perf_counter() - begin, 1)
    click.echo(tables.report(content))
    if out is None and not quick and not speed_only:
        out = results.FOLDER / f"predict-{results.slug(device, header['threads'])}.json"
    if out is not None:
        results.save(out, content)
        click.echo(f"wrote {out}")
    if content["wrong"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
