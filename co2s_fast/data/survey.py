"""A look at the headers of all raw images before any is cut: they must agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from co2s_fast.data.catalogue import RGB, DatasetSpec
from co2s_fast.data.orientation import orientation_of
from co2s_fast.data.pairing import Source
from co2s_fast.data.rasters import is_byte_picture, open_raster, open_source
from co2s_fast.data.splits import summary
from co2s_fast.errors import DataError


def survey(sources: Sequence[Source], spec: DatasetSpec) -> tuple[str | None, list[str]]:
    """The number type of the tiles, or None where they are pictures of 8-bit colour; and notes.

    Tiles are pictures where images are of uint8, three channels (or one, as grey) are taken and
    none is stretched. A note tells of the first images that name their bands in another order, than
    each other or than `band_names`.

    Raises:
        DataError: rasters that cannot be read, have fewer bands than are asked for, or number
            types that differ.
    """
    kinds: dict[str, str] = {}
    problems: list[str] = []
    notes: list[str] = []
    named: tuple[Path, dict[str, int]] | None = None
    turned: list[Path] = []
    for source in sources:
        if is_byte_picture(source.image) and spec.bands is None:
            kinds.setdefault("uint8", str(source.image))
            if source.label is not None and orientation_of(source.image) != 1:
                turned.append(source.image)
            continue
        try:
            with open_raster(source.image, spec) as raster:
                kinds.setdefault(raster.dtype, str(source.image))
                names = _names(raster.source)
                if names and not notes:
                    named = named or (source.image, names)
                    notes = (_other_order(*named, source.image, names, raster.bands)
                             or _misnamed(source.image, raster.source, spec))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError(summary(problems))
    if len(kinds) > 1:
        raise DataError("images must all have one number type, found "
                        + " and ".join(f"{kind} ({path})" for kind, path in kinds.items()))
    if turned:
        notes.append(f"note: {len(turned)} labelled images have an EXIF orientation, by which "
                     f"viewers turn them ({turned[0]}); they are taken as they are stored, and so "
                     "have their masks to lie")
    dtype = next(iter(kinds))
    plain = dtype == "uint8" and spec.channels == 3 and spec.raster.rule(dtype) == "none"
    return None if plain else dtype, notes


def misnamed(path: Path, spec: DatasetSpec) -> str | None:
    """A note about a raster that describes its bands in another order than `band_names` does."""
    with open_source(path) as source:
        return next(iter(_misnamed(path, source, spec)), None)


def _misnamed(path: Path, source: Any, spec: DatasetSpec) -> list[str]:
    bands = spec.bands or (1, 2, 3)
    wanted = dict(zip(map(str.lower, spec.band_names or ()), bands, strict=False))
    # What bands of 8 bits are called by default is no claim against `band_names`.
    names = _names(source) if any(source.descriptions) else {}
    return _other_order("band_names", wanted, path, names, bands)


def _other_order(one: Path | str, names: Mapping[str, int], other: Path, others: Mapping[str, int],
                 bands: Sequence[int]) -> list[str]:
    """A note where a name that both have is that of different bands, one of `bands` among them."""
    return [f"note: bands are taken by their numbers, yet {name!r} is band {band} of {one} and "
            f"band {others[name]} of {other}" for name, band in names.items()
            if others.get(name, band) != band and {band, others[name]} & set(bands)][:1]


def _names(source: Any) -> dict[str, int]:
    """The band of each name that a raster has but once: descriptions, else red, green and blue."""
    names = [(text or "").strip().lower() for text in source.descriptions]
    if not any(names):
        names = [kind.name if kind.name in RGB else "" for kind in source.colorinterp]
    return {name: band for band, name in enumerate(names, 1) if name and names.count(name) == 1}
