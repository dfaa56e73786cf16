"""Statistics of the bands over the training images, gathered tile by tile.

Whole numbers: one pass, a histogram of all values. Float: percentiles are exact, too, by radix
selection: a pass counts the upper half of each number's bits, a second one the lower half where the
wanted ranks lie; a third sums up. Memory is a few histograms, whatever the number of images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from co2s_fast.data.catalogue import DatasetSpec
from co2s_fast.data.imagery import BandStatistics
from co2s_fast.data.rasters import open_raster
from co2s_fast.errors import DataError

HALF = 1 << 16
LEAST_STD = 1 / 255
"""Of a band that hardly varies: students divide by it."""

Bands = list[NDArray]
"""The valid values of each band of one image, flat."""

Images = Callable[[], Iterable[Bands]]
"""Starts a pass over all images."""


def band_statistics(paths: Sequence[Path], spec: DatasetSpec, *, threads: int = 2,
                    progress: bool = False) -> BandStatistics:
    """Stretch, mean and deviation of the bands of some tiles.

    Args:
        paths: of the tiles, as `data prepare` writes them.
        spec: the dataset; `raster` says how it is stretched.
        threads: that read tiles.
        progress: show a bar.

    Raises:
        DataError: no tile, a damaged one, or a band without data.
    """
    if not paths:
        raise DataError(f"dataset {spec.name!r}: no training image to take statistics of")
    with open_raster(paths[0], spec) as first:
        dtype = first.dtype

    def images() -> Iterator[Bands]:
        with ThreadPoolExecutor(threads) as pool:
            # In chunks, so that only a few tiles are in memory.
            for start in tqdm(range(0, len(paths), threads), desc="band statistics",
                              leave=False, disable=not progress or len(paths) < 200):
                yield from pool.map(lambda p: _values(p, spec), paths[start : start + threads])

    rule = spec.raster.rule(dtype)
    percentiles = spec.raster.percentiles if rule == "percentile" else (0.0, 100.0)
    summarise = _of_floats if dtype == "float32" else _of_integers
    return summarise(images, dtype, None if rule == "none" else percentiles, spec)


def _values(path: Path, spec: DatasetSpec) -> Bands:
    with open_raster(path, spec) as raster:
        values, valid = raster.read(0, 0, raster.height, raster.width)
    if valid is None:
        return [band.ravel() for band in values]
    return [band[known] for band, known in zip(values, valid, strict=True)]


def _of_integers(images: Images, dtype: str, percentiles: tuple[float, float] | None,
                 spec: DatasetSpec) -> BandStatistics:
    limits = np.iinfo(dtype)
    size = int(limits.max) - int(limits.min) + 1
    counts = np.zeros((spec.channels, size), np.int64)
    for bands in images():
        for row, band in zip(counts, bands, strict=True):
            row += np.bincount(band.astype(np.int64) - limits.min, minlength=size)
    values = np.arange(limits.min, limits.max + 1, dtype=np.float64)
    out = []
    for number, row in enumerate(counts):
        total = _at_least_one(int(row.sum()), number, spec)
        low, high = float(limits.min), float(limits.max)
        if percentiles is not None:
            upto = np.cumsum(row)
            low, high = (float(values[np.searchsorted(upto, _rank(p, total), side="right")])
                         for p in percentiles)
        high = high if high > low else low + 1
        scaled = ((values - low) / (high - low)).clip(0, 1)
        mean = float(row @ scaled) / total
        out.append((low, high, mean, float(row @ (scaled - mean) ** 2) / total, total))
    return _statistics(dtype, out)


def _of_floats(images: Images, dtype: str, percentiles: tuple[float, float] | None,
               spec: DatasetSpec) -> BandStatistics:
    bounds = [(0.0, 1.0)] * spec.channels
    if percentiles is not None:
        bounds = [(low, high if high > low else low + 1)
                  for low, high in _selected(images, percentiles, spec)]
    sums = np.zeros((spec.channels, 3))  # number, sum, sum of squares
    for bands in images():
        for row, band, (low, high) in zip(sums, bands, bounds, strict=True):
            scaled = ((band.astype(np.float64) - low) / (high - low)).clip(0, 1)
            row += scaled.size, scaled.sum(), np.square(scaled).sum()
    out = []
    for number, ((total, first, second), (low, high)) in enumerate(zip(sums, bounds, strict=True)):
        total = _at_least_one(int(total), number, spec)
        mean = first / total
        out.append((low, high, float(mean), max(float(second / total - mean**2), 0.0), total))
    return _statistics(dtype, out)


def _selected(images: Images, percentiles: tuple[float, float],
              spec: DatasetSpec) -> list[tuple[float, float]]:
    """Two percentiles of each band of float32 images, exact."""
    upper = np.zeros((spec.channels, HALF), np.int64)
    for bands in images():
        for row, band in zip(upper, bands, strict=True):
            row += np.bincount(_keys(band) >> 16, minlength=HALF)
    ranks, places = [], []
    for number, row in enumerate(upper):
        total, upto = _at_least_one(int(row.sum()), number, spec), np.cumsum(row)
        found = [_rank(p, total) for p in percentiles]
        bins = [int(np.searchsorted(upto, rank, side="right")) for rank in found]
        places.append(bins)
        ranks.append([rank - int(upto[b] - row[b]) for rank, b in zip(found, bins, strict=True)])
    lower = np.zeros((spec.channels, len(percentiles), HALF), np.int64)
    for bands in images():
        for rows, band, bins in zip(lower, bands, places, strict=True):
            keys = _keys(band)
            for row, wanted in zip(rows, bins, strict=True):
                row += np.bincount(keys[keys >> 16 == wanted] & (HALF - 1), minlength=HALF)
    return [tuple(_value(b << 16 | int(np.searchsorted(np.cumsum(row), rank, side="right")))
                  for b, row, rank in zip(bins, rows, wanted, strict=True))
            for bins, rows, wanted in zip(places, lower, ranks, strict=True)]


def _keys(values: NDArray[np.float32]) -> NDArray[np.int64]:
    """Whole numbers in the order of the floats: the sign bit flipped, negative ones inverted."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)).astype(np.int64)


def _value(key: int) -> float:
    """The float of a key."""
    bits = key & 0x7FFFFFFF if key >> 31 else ~key & 0xFFFFFFFF
    return float(np.array(bits, np.uint32).view(np.float32))


def _rank(percentile: float, total: int) -> int:
    """Position, counted from 0, of a percentile among sorted values: the one at or below it."""
    return int(percentile / 100 * (total - 1))


def _at_least_one(total: int, number: int, spec: DatasetSpec) -> int:
    if total == 0:
        raise DataError(f"dataset {spec.name!r}: channel {number + 1} has no data in any training "
                        "image")
    return total


def _statistics(dtype: str, rows: list[tuple[float, float, float, float, int]]) -> BandStatistics:
    low, high, mean, variance, pixels = (list(column) for column in zip(*rows, strict=True))
    return BandStatistics(
        dtype=dtype, low=low, high=high, mean=[round(m, 6) for m in mean],
        std=[round(max(v**0.5, LEAST_STD), 6) for v in variance], pixels=pixels)
