"""From a raster's numbers to the students' [0, 1], by the statistics that the dataset stores."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from co2s_fast.data.imagery import BandStatistics, Imagery
from co2s_fast.errors import DataError


def stretched(values: NDArray, valid: NDArray[np.bool_] | None,
              statistics: BandStatistics | None) -> NDArray:
    """(value - low) / (high - low) of each band, cut off at 0 and 1; 0 where there is no data.

    Args:
        values: [C, H, W] in the dataset's number type.
        valid: where each band has data, bool [C, H, W]; None: everywhere.
        statistics: of the dataset.

    Returns:
        float32 [C, H, W]; uint8 where there is nothing to stretch.
    """
    if statistics is None or statistics.as_bytes:
        return values if valid is None else np.where(valid, values, np.uint8(0))
    low = np.array(statistics.low, np.float32)[:, None, None]
    high = np.array(statistics.high, np.float32)[:, None, None]
    known = values if valid is None else np.where(valid, values, values.dtype.type(0))
    out = known.astype(np.float32)
    out -= low
    out /= high - low
    np.clip(out, 0, 1, out=out)
    if valid is not None:
        out[~valid] = 0
    return out


def as_bytes(pixels: NDArray) -> NDArray[np.uint8]:
    """Pixels in [0, 1] as 0..255; uint8 as it is."""
    if pixels.dtype == np.uint8:
        return pixels
    return (pixels * 255 + 0.5).clip(0, 255).astype(np.uint8)


def check_type(dtype: str, spec: Imagery, path: object) -> None:
    """Raise a DataError where a file is of another number type than the dataset's images."""
    expected = "uint8" if spec.statistics is None else spec.statistics.dtype
    if dtype != expected:
        raise DataError(f"{path}: numbers are {dtype}, expected {expected} like all images of the "
                        "dataset")
