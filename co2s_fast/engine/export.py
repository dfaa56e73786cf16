"""`co2s-fast export`: a run's students in one file that needs nothing of this package."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from co2s_fast.data.catalogue import DatasetSpec
from co2s_fast.engine import export_formats as formats
from co2s_fast.engine.config import RunConfig
from co2s_fast.engine.export_check import compare, sample_tiles
from co2s_fast.engine.inference import BOTH, chosen_students
from co2s_fast.engine.log import say
from co2s_fast.engine.runs import checkpoint_step, load_run
from co2s_fast.errors import DataError, UsageError
from co2s_fast.models import Student
from co2s_fast.models.loading import checksum
from co2s_fast.version import __version__

FOLDER = "export"
TOLERANCE = 1e-4


def export_run(
    run: Path,
    *,
    format: Literal["onnx", "pt2"] = "onnx",
    student: str = BOTH,
    output: str = "probabilities",
    tile: int | None = None,
    opset: int = formats.OPSET,
    checkpoint: Literal["best", "last"] = "best",
    out: Path | None = None,
    tolerance: float = TOLERANCE,
) -> str:
    """Write one student, or both fused, as one graph and compare it with the run.

    The graph takes images as they are (normalisation, upsampling and fusion are inside; the stretch
    of rasters, too, whose numbers it takes as float32), of one size and in any number. It is
    written under a temporary name, run on tiles of validation images beside the run itself, and
    takes its name only if both say the same.

    Args:
        run: the run folder.
        format: "onnx" (checked with onnxruntime on the CPU) or "pt2" (`torch.export.load`).
        student: a student's name, or "both" for the mean of probabilities.
        output: "probabilities", or "labels" for classes and confidences.
        tile: side of the images in pixels; None: the run's evaluation crop.
        opset: ONNX operator set.
        checkpoint: which of the run's checkpoints.
        out: the file; None: RUN/export/<student>.<format>.
        tolerance: largest difference of a probability that passes.

    Returns:
        What was written and how it compares, for a person to read.

    Raises:
        UsageError: an option that cannot work, or a package is missing.
        DataError: the exported file and the run disagree; the file is not kept.
    """
    if format == "onnx":
        formats.require_onnx()
    config, spec, students = load_run(run, checkpoint)
    students = chosen_students(students, student)
    tile = tile or config.eval.crop or spec.crop
    _check_options(students, format, tile)
    target = _target(run, out, format, "-".join(students) if len(students) == 1 else BOTH)
    metadata = describe(run, config, spec, students, checkpoint, tile, output)
    if format == "onnx":
        metadata["opset"] = opset
    stretch = stretch_of(spec)
    like = example(students, tile, spec)
    tiles, source = sample_tiles(config.data, spec, like, tile)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=target.parent) as folder:
        temporary = Path(folder) / target.name
        say(f"export: tracing {' and '.join(students)} at {tile} x {tile}")
        fused = formats.FusedStudents(students, tile, output, stretch).eval().requires_grad_(False)
        program = formats.trace(fused, like)
        say(f"export: writing {format}")
        if format == "onnx":
            formats.write_onnx(program, temporary, output, metadata, opset)
            runner = formats.run_onnx(temporary)
        else:
            formats.write_pt2(program, temporary, metadata)
            runner = formats.run_pt2(temporary)
        found = compare(runner, students, tiles, source, tolerance, stretch)
        if not found.passed:
            raise DataError(f"export: {target} is not written, it would differ from the run: "
                            f"{found}")  # fmt: skip
        # Weights in a file of their own come first: the graph without them is no model.
        for path in sorted(Path(folder).iterdir(), key=lambda p: p == temporary):
            path.replace(target.with_name(path.name))
    return f"{found}\n{_summary(target, metadata)}"


def stretch_of(spec: DatasetSpec) -> formats.Stretch | None:
    """What the file does to raw numbers; None where the dataset's images are bytes and stay so."""
    if spec.statistics is None or spec.statistics.as_bytes:
        return None
    return formats.Stretch(spec.statistics.low, spec.statistics.high)


def example(students: Mapping[str, Student], tile: int, spec: DatasetSpec) -> Tensor:
    """A batch of two images of the channels and dtype that the file takes."""
    channels = next(iter(students.values())).channels
    dtype = torch.uint8 if stretch_of(spec) is None else torch.float32
    return torch.zeros(2, channels, tile, tile, dtype=dtype)


def describe(
    run: Path,
    config: RunConfig,
    spec: DatasetSpec,
    students: Mapping[str, Student],
    checkpoint: Literal["best", "last"],
    tile: int,
    output: str,
) -> dict[str, Any]:
    """What someone who finds the file must know to use it, JSON-able.

    `scale` and `short_side` say how a raw image becomes the one that tiles are cut from: resized
    so that its short side has `short_side` pixels, or else by the factor `scale`.
    """
    rule = config.data.scale or spec.scale
    any_student = next(iter(students.values()))
    stretch = stretch_of(spec)
    return {
        "producer": f"co2s-fast {__version__}",
        "dataset": spec.name,
        "classes": spec.class_names,
        "palette": [list(color) for color in spec.palette],
        "students": list(students),
        "outputs": list(formats.OUTPUTS[output]),
        "tile": tile,
        "channels": any_student.channels,
        "bands": spec.bands or [1, 2, 3],
        "dtype": "uint8" if stretch is None else "float32",
        "stretch": None if stretch is None else {
            "inside": True, "of": spec.statistics.dtype, "low": spec.statistics.low,
            "high": spec.statistics.high, "nodata": "NaN",
        },
        "scale": spec.tile.scale,
        "short_side": None if rule == "native" else min(rule),
        "normalisation": {
            name: {"inside": True, "mean": s.mean.flatten().tolist(),
                   "std": s.std.flatten().tolist()}
            for name, s in students.items()
        },
        "run": run.resolve().name,
        "checkpoint": checkpoint,
        "step": checkpoint_step(run, checkpoint)["step"],
        "weights_sha256": {name: checksum(s) for name, s in students.items()},
        "licence": {
            "data": spec.info.licence,
            "weights": {name: _licence(s.provenance) for name, s in students.items()},
        },
    }  # fmt: skip


def _licence(provenance: Mapping[str, Any]) -> str:
    """Of the weights that a student started from."""
    source = provenance.get("source", "unknown")
    if source == "random":
        return "none: trained from random weights"
    return f"{provenance.get('licence', 'unknown')} (started from {source})"


def _check_options(students: Mapping[str, Student], format: str, tile: int) -> None:
    patch = max(student.patch_size for student in students.values())
    if tile < patch:
        raise UsageError(f"--tile {tile}: expected at least the patch size, {patch} pixels")
    if format == "onnx" and any(s.config.rope == "bf16" for s in students.values()):
        raise UsageError(
            "export --format onnx: a student whose rotary embedding is in bfloat16 cannot run in "
            "onnxruntime on the CPU; --format pt2 can hold it"
        )


def _target(run: Path, out: Path | None, format: str, name: str) -> Path:
    target = out or run / FOLDER / f"{name}.{format}"
    if target.suffix != f".{format}" or target.is_dir():
        raise UsageError(f"--out {target}: expected the name of a file ending in .{format}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=target.parent).close()
    except OSError as error:
        raise UsageError(
            f"--out {target}: its folder cannot be written to ({error.strerror})"
        ) from None
    return target


def _summary(target: Path, metadata: Mapping[str, Any]) -> str:
    parts = [target, *target.parent.glob(f"{target.name}.data")]
    size = sum(part.stat().st_size for part in parts) / 1e6
    tile, channels = metadata["tile"], metadata["channels"]
    opset = f", opset {metadata['opset']}" if "opset" in metadata else ""
    return (
        f"images {metadata['dtype']} [batch, {channels}, {tile}, {tile}] -> "
        f"{', '.join(metadata['outputs'])}; {len(metadata['classes'])} classes{opset}, "
        f"{size:.1f} MB\n{target}"
    )
