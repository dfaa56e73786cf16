"""What the pixels of a dataset's images are: which bands, of which type, stretched how."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Stretch = Literal["auto", "percentile", "minmax", "none"]
DTYPES = ("uint8", "uint16", "int16", "float32")
BandNumber = Annotated[int, Field(ge=1)]
"""A band of a raster, counted from 1 as rasterio and GDAL do."""


class RasterSpec(BaseModel):
    """How the numbers of a raster become the students' [0, 1], and which of them are no data.

    Args:
        stretch: "percentile" brings two percentiles of each band to 0 and 1, "minmax" its least
            and largest value, "none" the range of the type (float: [0, 1]); values beyond are cut
            off. "auto" is "none" for uint8 and "percentile" for all else.
        percentiles: the two, in percent.
        nodata: value that means "no data", where files do not say so themselves. Whatever this is,
            a file's own nodata value, its mask and alpha band, NaN and infinite numbers count as
            well; NaN here is the same as None.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    stretch: Stretch = "auto"
    percentiles: tuple[float, float] = (2.0, 98.0)
    nodata: float | None = None

    @field_validator("nodata")
    @classmethod
    def _nodata_is_finite(cls, nodata: float | None) -> float | None:
        if nodata is not None and math.isinf(nodata):
            raise ValueError(f"expected a finite number, found {nodata}; infinite ones and NaN "
                             "always count as no data")
        return None if nodata is None or math.isnan(nodata) else nodata

    @model_validator(mode="after")
    def _percentiles_are_in_order(self) -> RasterSpec:
        low, high = self.percentiles
        if not 0 <= low < high <= 100:
            raise ValueError(f"percentiles {[low, high]} must be 0 <= low < high <= 100")
        return self

    def rule(self, dtype: str) -> str:
        """The stretch for a type, "auto" resolved."""
        if self.stretch == "auto":
            return "none" if dtype == "uint8" else "percentile"
        return self.stretch


PLAIN_RASTER = RasterSpec()


class Imagery(Protocol):
    """What a reader of rasters has to know of a dataset; a `DatasetSpec` is one."""

    name: str
    bands: list[int] | None
    raster: RasterSpec
    statistics: BandStatistics | None

    @property
    def channels(self) -> int:
        """Channels of the images as the students get them."""

    @property
    def display_channels(self) -> tuple[int, int, int]:
        """Channels, counted from 0, that pictures show."""


@dataclass(frozen=True)
class PlainImages:
    """8-bit colour or grey, nothing more being known of the dataset."""

    name: str = "8-bit images"
    bands: None = None
    raster: RasterSpec = PLAIN_RASTER
    statistics: None = None
    channels: int = 3
    display_channels: tuple[int, int, int] = (0, 1, 2)


class BandStatistics(BaseModel):
    """What was found in the training images, a number for each channel.

    Args:
        dtype: number type of the images, one of DTYPES.
        low: raw value that becomes 0.
        high: raw value that becomes 1.
        mean: mean after the stretch to [0, 1].
        std: standard deviation after the stretch.
        pixels: number of pixels with data that were counted.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: Literal["uint8", "uint16", "int16", "float32"]
    low: list[float]
    high: list[float]
    mean: list[float]
    std: list[float]
    pixels: list[int] = []

    @property
    def as_bytes(self) -> bool:
        """Images are uint8 and stay so: there is nothing to stretch."""
        return self.dtype == "uint8" and not any(self.low) and all(h == 255 for h in self.high)

    def __str__(self) -> str:
        lines = [f"{self.dtype} images, by channel:",
                 f"{'channel':>7}{'low':>14}{'high':>14}{'mean':>10}{'std':>10}"]
        rows = enumerate(zip(self.low, self.high, self.mean, self.std, strict=True), 1)
        lines += [f"{number:>7}{low:>14.6g}{high:>14.6g}{mean:>10.4f}{std:>10.4f}"
                  for number, (low, high, mean, std) in rows]
        return "\n".join(lines)

    @model_validator(mode="after")
    def _one_number_a_channel(self) -> BandStatistics:
        lengths = {len(self.low), len(self.high), len(self.mean), len(self.std)}
        if len(lengths) > 1:
            raise ValueError("low, high, mean and std must have one number for each channel")
        wrong = [i + 1 for i, (a, b) in enumerate(zip(self.low, self.high, strict=True)) if a >= b]
        if wrong:
            raise ValueError(f"low must be below high, which fails for channel {wrong[0]}")
        return self
