"""What a run asks of the data: which dataset, which split, how many images a step."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class DataConfig(BaseModel):
    """The `data` section of a run's configuration.

    Args:
        dataset: name in the catalogue, or the path of a YAML description.
        root: folder that holds `images/` and `labels/`; None: found (see `find_root`).
        split: split folder in the authors' format. At most one of split, ratio, labels.
        ratio: share of training images that are labelled, "1/16" or "0.0625".
        labels: number of training images that are labelled.
        split_seed: seed of a split made from a ratio or a number.
        crop: side of training crops in pixels; None: the dataset's.
        scale: overrides the dataset's scale rule; scale_range: its range.
        rotate90: turn training crops by 0, 90, 180 or 270 degrees, each as likely; with the flip
            that is every orientation of a view from straight above. The paper does not turn them.
        batch_size: labelled images a step, and unlabelled images a step, over all ranks.
        epoch_shards: a pass over the unlabelled images is as long as so many processes make it,
            each of which fills its share of them up to the same length; 1: the images, each once.
        workers: a rank's loader processes (torch; 0 loads in the training process) or threads
            (DALI). The batches are the same.
        loader: input pipeline; "auto" is DALI where it is installed and the run is on a GPU, else
            torch.
        dali_placement: where the DALI graph has its images; "auto" is the GPU of a run on one.
        strong_on_device: the torch pipeline leaves the strong views to the training device, in
            batch; None: where that is a GPU.
        truth: read the labels of unlabelled images where there are any, to measure pseudo-labels.
        missing_classes: what to do about a class that no labelled image shows.
        sampling: how labelled images and crops are chosen: "uniform" (in shuffled passes), or
            "class-aware" (rare classes more often, see `imbalance.ClassSampler`).
        sampling_temperature: of class-aware sampling; the smaller, the more often rare classes.
        max_damaged: training images that may turn out damaged before the run ends; until then each
            is named in the log and another takes its place (see `damage`).
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    dataset: str = "demo"
    root: Path | None = None
    split: Path | None = None
    ratio: str | None = None
    labels: int | None = Field(default=None, ge=1)
    split_seed: int = Field(default=0, ge=0)
    crop: int | None = Field(default=None, ge=16, le=16384)
    scale: Literal["native"] | tuple[int, int] | None = None
    scale_range: tuple[float, float] | None = None
    rotate90: bool = False
    batch_size: int = Field(default=4, ge=1)
    epoch_shards: int = Field(default=1, ge=1)
    workers: int = Field(default=2, ge=0, le=256)
    loader: Literal["auto", "torch", "dali"] = "auto"
    dali_placement: Literal["auto", "gpu", "cpu"] = "auto"
    strong_on_device: bool | None = None
    truth: bool = True
    missing_classes: Literal["error", "warn"] = "error"
    sampling: Literal["uniform", "class-aware"] = "uniform"
    sampling_temperature: float = Field(default=0.25, gt=0)
    max_damaged: int = Field(default=10, ge=0)

    @field_validator("ratio")
    @classmethod
    def _ratio_is_a_share(cls, ratio: str | None) -> str | None:
        if ratio is not None:
            parse_ratio(ratio)
        return ratio

    @field_validator("scale")
    @classmethod
    def _scale_is_a_size(cls, scale: str | tuple[int, int] | None) -> str | tuple[int, int] | None:
        if isinstance(scale, tuple) and min(scale) < 1:
            raise ValueError(f"expected native, or two sides of at least 1, found {list(scale)}")
        return scale

    @field_validator("scale_range")
    @classmethod
    def _range_rises(cls, bounds: tuple[float, float] | None) -> tuple[float, float] | None:
        if bounds is not None and not 0 < bounds[0] <= bounds[1]:
            raise ValueError(f"expected 0 < low <= high, found {list(bounds)}")
        return bounds

    @model_validator(mode="after")
    def _one_way_to_split(self) -> DataConfig:
        given = [k for k in ("split", "ratio", "labels") if getattr(self, k) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given, at most one of them can be")
        return self


def parse_ratio(ratio: str) -> Fraction:
    """The share that "1/16" or "0.25" means.

    Raises:
        ValueError: not a number in (0, 1].
    """
    try:
        share = Fraction(str(ratio).strip())
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    if not 0 < share <= 1:
        raise ValueError(f"ratio {ratio!r}: expected a share in (0, 1], like 1/16 or 0.25")
    return share
