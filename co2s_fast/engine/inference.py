"""How images go through the students: the configuration, logits at any size, fusion, precision."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from co2s_fast.engine.metrics import AbsentRule
from co2s_fast.engine.sliding_window import padding_of, resize_logits, sliding_window, upsample
from co2s_fast.errors import UsageError

BOTH = "both"
S = TypeVar("S", bound=nn.Module)


class EvalConfig(BaseModel):
    """How images are put through the students and how the result is scored.

    Attributes:
        mode: "whole" takes an image in one piece; "sliding" cuts windows of `crop`; "auto" slides
            where an image is larger than the crop.
        crop: side of a window in pixels; None: the dataset's training crop.
        stride: distance of windows as a share of the crop, rounded down to pixels.
        batch_windows: windows (or whole small images) that go through a student at once.
        student: which prediction `eval` scores: a student's name, "both" (mean of probabilities),
            or "all". Training scores all.
        absent: what a class without ground truth does to the mean, see `Metrics`.
        precision: "bfloat16" runs the students under autocast; "auto" does so on CUDA only, and for
            the maps of `prediction.predict` also on a CPU that computes in it, see `for_maps`.
        panels: number of validation images to draw.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    mode: Literal["auto", "whole", "sliding"] = "auto"
    crop: int | None = Field(default=None, ge=1)
    stride: float = Field(default=5 / 6, gt=0, le=1)
    batch_windows: int = Field(default=8, ge=1)
    student: str = "all"
    absent: AbsentRule = "skip"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    panels: int = Field(default=6, ge=0)

    def stride_px(self, crop: int) -> int:
        """`floor(crop * stride)`: 213 for 256 and 426 for 512 at the default of 5/6."""
        # 5/6 has no exact binary form, and 6 * 5/6 must not come out as 4
        return max(int(crop * self.stride + 1e-9), 1)


def for_maps(config: EvalConfig, device: torch.device) -> EvalConfig:
    """The configuration of `prediction.predict`: "auto" is bfloat16 where the device has it.

    On a GPU it is, see `EvalConfig`; on a CPU it is with AVX-512 BF16 or AMX, where large students
    are much quicker and few pixels change their class. Scores stay in float32 there, so that they
    are the same on every CPU.
    """
    if config.precision != "auto" or device.type != "cpu" or not _cpu_has_bfloat16():
        return config
    return config.model_copy(update={"precision": "bfloat16"})


def _cpu_has_bfloat16() -> bool:
    # Private to torch, so only asked for; without an answer "auto" stays float32.
    checks = (getattr(torch.cpu, name, None)
              for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))  # fmt: skip
    return torch.backends.mkldnn.is_available() and any(check() for check in checks if check)


class Logits:
    """One student's logits of a batch, kept as coarse as they are until more is asked for.

    Args:
        grid: [B,K,h,w], from the whole image on the decoder's grid, or from windows at image size.
        size: (H, W) of the image.
        patch: the student padded its input to multiples of this.
    """

    def __init__(self, grid: Tensor, size: tuple[int, int], patch: int = 1) -> None:
        self.grid, self.size, self.patch = grid, size, patch

    def at(self, height: int, width: int) -> Tensor:
        """Logits at label size: upsampled to the image, then resized (align_corners=True)."""
        return resize_logits(upsample(self.grid, *self.size, self.patch), height, width)

    def coarse(self, height: int, width: int) -> Tensor:
        """Logits that an op with virtual upsampling can take, else those at label size."""
        padded = any(side % self.patch for side in self.size)
        if self.size == (height, width) and not padded:
            return self.grid
        return self.at(height, width)


def image_logits(
    network: nn.Module, images: Tensor, config: EvalConfig, crop: int | None
) -> Logits:
    """Logits of equal-sized images [B,C,H,W], whole or by windows as the configuration says."""
    height, width = images.shape[-2:]
    patch = padding_of(network)
    if config.mode == "sliding" and crop is None:
        raise UsageError("eval.crop: sliding windows need a size in pixels, found none")
    fits = crop is None or max(height, width) <= crop
    if config.mode == "whole" or fits:
        parts = [network(part) for part in images.split(config.batch_windows)]
        return Logits(torch.cat(parts).float(), (height, width), patch)
    grid = sliding_window(
        network,
        images,
        crop=crop,
        stride=config.stride_px(crop),
        batch_windows=config.batch_windows,
    )
    return Logits(grid, (height, width))


def fuse(logits: Iterable[Tensor]) -> Tensor:
    """Mean of the probabilities of several students, [B,K,H,W]."""
    probabilities = [each.softmax(1) for each in logits]
    return torch.stack(probabilities).mean(0)


def wanted_predictions(students: Mapping[str, nn.Module], student: str) -> list[str]:
    """Names of the predictions that `student` ("all", "both" or a name) asks for."""
    names = list(students)
    if student == "all":
        return [*names, BOTH] if len(names) > 1 else names
    if student == BOTH and len(names) > 1:
        return [BOTH]
    if student not in names:
        there = ", ".join(names)
        raise UsageError(f"student {student!r}: this run's students are {there}")
    return [student]


def chosen_students(students: Mapping[str, S], student: str) -> dict[str, S]:
    """The students that one prediction takes: of "both" and "all" every one, else the named."""
    if student in (BOTH, "all"):
        return dict(students)
    (name,) = wanted_predictions(students, student)
    return {name: students[name]}


@contextmanager
def evaluating(
    students: Mapping[str, nn.Module], config: EvalConfig, device: torch.device
) -> Iterator[None]:
    """Evaluation mode, no gradients, the configured precision; training modes come back after."""
    modes = [(m, m.training) for student in students.values() for m in student.modules()]
    half = config.precision == "bfloat16" or (config.precision == "auto" and device.type == "cuda")
    for student in students.values():
        student.eval()
    try:
        with (
            torch.inference_mode(),
            torch.autocast(device.type, dtype=torch.bfloat16, enabled=half),
        ):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
