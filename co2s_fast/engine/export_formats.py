"""Exported students in the two file formats: tracing, writing, and running what was written."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from co2s_fast.data.writing import naming
from co2s_fast.engine.sliding_window import upsample
from co2s_fast.errors import UsageError

Output = str  # "probabilities" or "labels"
Runner = Callable[[NDArray], list[NDArray]]

INPUT = "images"
OUTPUTS = {"probabilities": ("probabilities",), "labels": ("labels", "confidence")}
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
EXTRA_FILE = "co2s_fast.json"
OPSET = 18


class Stretch(nn.Module):
    """Raw numbers of rasters to the students' [0, 1]: `(x - low) / (high - low)`, cut off.

    Args:
        low: raw value of each channel that becomes 0.
        high: that becomes 1.
    """

    def __init__(self, low: Sequence[float], high: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("low", torch.tensor(low).view(-1, 1, 1))
        self.register_buffer("range", torch.tensor(high).view(-1, 1, 1) - self.low)

    def forward(self, images: Tensor) -> Tensor:
        """float32 [B, C, H, W]; NaN, which means no data, becomes 0 as in training."""
        shares = (images - self.low) / self.range
        return torch.where(shares.isnan(), 0.0, shares.clamp(0, 1))

    def undo(self, shares: Tensor) -> Tensor:
        """Raw numbers of images in [0, 1]."""
        return shares * self.range + self.low


class FusedStudents(nn.Module):
    """Students, normalisation, upsampling and fusion in one graph of a fixed size.

    Args:
        students: name -> student; the mean of their probabilities is taken.
        tile: height and width of the images in pixels.
        output: "probabilities" gives float32 [B, K, tile, tile]; "labels" gives classes uint8 and
            their probabilities float32, each [B, tile, tile].
        stretch: goes first; None: the students take the images as they are.
    """

    def __init__(
        self,
        students: Mapping[str, nn.Module],
        tile: int,
        output: Output,
        stretch: Stretch | None = None,
    ) -> None:
        super().__init__()
        self.stretch = stretch
        self.students = nn.ModuleDict(students)
        self.tile = tile
        self.output = output

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images [B, C, tile, tile]: uint8, or with a stretch the rasters' numbers as float32."""
        tile = self.tile
        images = images if self.stretch is None else self.stretch(images)
        logits = [
            upsample(student(images), tile, tile, student.pads_to)
            for student in self.students.values()
        ]
        probabilities = torch.stack([each.softmax(1) for each in logits]).mean(0)
        if self.output == "probabilities":
            return (probabilities,)
        confidence, labels = probabilities.max(1)
        return labels.to(torch.uint8), confidence


def trace(module: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """The module as a graph with a free batch size and every other size fixed.

    Args:
        module: takes one tensor whose first dimension is the batch.
        example: an input of at least two images: a batch of one would be taken for a constant.
    """
    with torch.no_grad():
        module(example)  # fills tables that depend on the size, so that they become constants
        batch = torch.export.Dim("batch", min=1)
        return torch.export.export(module, (example,), dynamic_shapes={INPUT: {0: batch}})


def write_onnx(
    program: torch.export.ExportedProgram,
    path: Path,
    output: Output,
    metadata: Mapping[str, Any],
    opset: int = OPSET,
    external_data: bool | None = None,
) -> None:
    """An ONNX file with `metadata` in its `metadata_props`.

    Weights go to `<path>.data` beside it where they exceed ONNX's limit of 2 GB, or always or
    never with `external_data`.

    Raises:
        UsageError: a package is missing.
    """
    require_onnx()
    with _quiet_exporter():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            input_names=[INPUT],
            output_names=list(OUTPUTS[output]),
            dynamic_shapes={INPUT: {0: "batch"}},
            verbose=False,
        )
    exported.model.metadata_props.update(as_strings(metadata))
    exported.model.doc_string = None
    exported.save(path, external_data=external_data)


def write_pt2(
    program: torch.export.ExportedProgram, path: Path, metadata: Mapping[str, Any]
) -> None:
    """A file for `torch.export.load`, with `metadata` as the extra file `co2s_fast.json`."""
    content = io.BytesIO()  # on a full disk torch's own writer would abort the process
    torch.export.save(program, content, extra_files={EXTRA_FILE: json.dumps(metadata, indent=1)})
    with naming(path):
        path.write_bytes(content.getbuffer())


def run_onnx(path: Path) -> Runner:
    """A function that runs the file with onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {INPUT: images})


def run_pt2(path: Path) -> Runner:
    """A function that runs the file with torch on the CPU."""
    module = torch.export.load(path).module()

    def run(images: NDArray) -> list[NDArray]:
        with torch.no_grad():
            return [np.asarray(each) for each in module(torch.from_numpy(images))]

    return run


def require_onnx() -> None:
    """Raises UsageError with the command that installs what is missing."""
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"export --format onnx needs {', '.join(missing)}: pip install {' '.join(missing)}"
        )


def as_strings(metadata: Mapping[str, Any]) -> dict[str, str]:
    """What is no string yet as JSON."""
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """The optimizer of onnxscript logs a warning for each node that it leaves as it is."""
    logger = logging.getLogger("onnxscript")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
