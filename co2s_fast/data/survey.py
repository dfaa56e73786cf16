"""A look at the headers of all raw images before any is cut: they must agree."""

from __future__ import annotations

from collections.abc import Sequence

from co2s_fast.data.catalogue import DatasetSpec
from co2s_fast.data.pairing import Source
from co2s_fast.data.rasters import is_byte_picture, open_raster
from co2s_fast.data.splits import summary
from co2s_fast.errors import DataError


def survey(sources: Sequence[Source], spec: DatasetSpec) -> str | None:
    """The number type of the tiles, or None where they are pictures of 8-bit colour.

    Tiles are pictures where images are of uint8, three channels (or one, as grey) are taken and
    none is stretched.

    Raises:
        DataError: rasters that cannot be read, have fewer bands than are asked for, or number
            types that differ.
    """
    kinds: dict[str, str] = {}
    problems = []
    for source in sources:
        if is_byte_picture(source.image) and spec.bands is None:
            kinds.setdefault("uint8", str(source.image))
            continue
        try:
            with open_raster(source.image, spec) as raster:
                kinds.setdefault(raster.dtype, str(source.image))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError(summary(problems))
    if len(kinds) > 1:
        raise DataError("images must all have one number type, found "
                        + " and ".join(f"{kind} ({path})" for kind, path in kinds.items()))
    dtype = next(iter(kinds))
    plain = dtype == "uint8" and spec.channels == 3 and spec.raster.rule(dtype) == "none"
    return None if plain else dtype
