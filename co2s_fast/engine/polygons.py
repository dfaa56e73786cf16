"""A finished class map as polygons: a GeoPackage with one feature for each patch of a class."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from co2s_fast.data.catalogue import IGNORE
from co2s_fast.data.rasters import open_source
from co2s_fast.data.writing import remove_leftovers, replacing
from co2s_fast.engine.scenes import SIGNATURE, is_raster
from co2s_fast.errors import DataError, UsageError

SUFFIX = ".gpkg"
_BATCH = 10_000  # features handed to the writer at once


def require_fiona() -> None:
    """Raise the UsageError that says what to install, before anything is predicted."""
    try:
        import fiona  # noqa: F401
    except ImportError:
        raise UsageError("--polygons: needs fiona; pip install 'co2s-fast[geo]'") from None


def check_polygons(sources: Sequence[Path]) -> None:
    """Polygons need fiona and images that lie somewhere; a UsageError where they cannot be had."""
    require_fiona()
    for path in sources:
        if not is_raster(path):
            raise UsageError(f"--polygons: {path} is no GeoTIFF, so its classes have no place on "
                             "the ground")
        with open_source(path) as source:
            if source.transform.is_identity and not source.gcps[0]:
                raise UsageError(f"--polygons: {path} has neither a geotransform nor ground "
                                 "control points, so its classes have no place on the ground")


def _ground(source: Any) -> tuple[Any, Any]:
    """Transform and coordinate system of a raster; of control points the transform nearest to all.

    GDAL's least squares: exact for points of a plane grid, else as good as an affine map can be.
    """
    from rasterio.transform import from_gcps

    points, system = source.gcps
    if source.transform.is_identity and points:
        return from_gcps(points), system
    return source.transform, source.crs


def write_polygons(labels: Path, class_names: Sequence[str], signature: str = "") -> Path:
    """Write `a.gpkg` beside the map `a.tif`: layer "classes", fields class_id and class_name.

    GDAL's polygonizer passes over the raster by lines, so patches are whole whatever the raster's
    size; the polygons, not the pixels, are held in memory. Pixels without a class are left out.

    Args:
        labels: a class map as `predict` writes it.
        class_names: in label order.
        signature: of the map, for `read_polygons_signature`.

    Returns:
        The GeoPackage's path.

    Raises:
        DataError: it cannot be written.
    """
    import fiona
    import rasterio

    require_fiona()
    target = labels.with_suffix(SUFFIX)
    remove_leftovers(target)
    schema = {"geometry": "Polygon", "properties": {"class_id": "int", "class_name": "str"}}
    with replacing(target) as temporary, rasterio.open(labels) as source:
        # fiona tells the format of a GeoPackage by its suffix
        scratch = temporary.with_suffix(SUFFIX)
        options = {"driver": "GPKG", "schema": schema, "layer": "classes"}
        transform, system = _ground(source)
        if system:
            options["crs_wkt"] = system.to_wkt()
        try:
            with _writing(target), fiona.open(scratch, "w", **options) as layer:
                layer.update_tags({SIGNATURE: signature})
                batch: list[dict[str, Any]] = []
                for feature in _features(source, transform, class_names):
                    batch.append(feature)
                    if len(batch) == _BATCH:
                        layer.writerecords(batch)
                        batch = []
                layer.writerecords(batch)
            scratch.replace(temporary)
        finally:
            scratch.unlink(missing_ok=True)
    return target


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn what GDAL says of a GeoPackage that cannot be written into a DataError that names it."""
    from fiona._err import CPLE_BaseError
    from fiona.errors import FionaError

    try:
        yield
    except (FionaError, CPLE_BaseError, RuntimeError) as error:  # as fiona lets GDAL's through
        said = error.args[-1] if error.args else error
        text = said.decode() if isinstance(said, bytes) else str(said)
        reason = " ".join(text.partition(" Failed to write record")[0].split())
        raise DataError(f"{path}: cannot be written: {reason} (is the disk full?)") from error


def read_polygons_signature(labels: Path) -> str | None:
    """What `write_polygons` was given for a map; "" of a file of others, None of a broken one.

    None also where there is none. Broken is a GeoPackage whose table of contents cannot be read.
    """
    import fiona
    from fiona.errors import FionaError

    path = labels.with_suffix(SUFFIX)
    if not path.is_file():
        return None
    try:
        with fiona.open(path) as layer:
            return layer.get_tag_item(SIGNATURE) or ""
    except FionaError:
        return "" if _has_contents(path) else None


def _has_contents(path: Path) -> bool:
    """Whether it is no empty file and no GeoPackage that was cut off."""
    with path.open("rb") as file:
        head = file.read(16)
    if not head.startswith(b"SQLite format 3"):
        return bool(head)
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
        try:
            return database.execute("SELECT count(*) FROM gpkg_contents").fetchone()[0] > 0
        except sqlite3.DatabaseError:
            return False


def _features(source: Any, transform: Any, class_names: Sequence[str]
              ) -> Iterator[dict[str, Any]]:
    import rasterio
    from rasterio.features import shapes

    a, b, c, d, e, f = transform[:6]
    moved = transform != source.transform  # of a band, `shapes` knows the file's own only
    for geometry, value in shapes(rasterio.band(source, 1), transform=source.transform):
        number = int(value)
        if number == IGNORE:
            continue
        if moved:
            geometry["coordinates"] = [
                [(a * x + b * y + c, d * x + e * y + f) for x, y in ring]
                for ring in geometry["coordinates"]]
        properties = {"class_id": number, "class_name": class_names[number]}
        yield {"type": "Feature", "geometry": geometry, "properties": properties}
