"""Polygons as labels: GeoPackage, GeoJSON and all else that GDAL reads, burned into a raster.

Coordinates are brought to the raster's system. Where polygons overlap, the later feature wins.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from co2s_fast.data.catalogue import IGNORE, DatasetSpec, class_values
from co2s_fast.data.rasters import ground, placed
from co2s_fast.errors import DataError, UsageError

_KINDS = ("Polygon", "MultiPolygon")


def require_fiona() -> None:
    """Raise the UsageError that says what to install."""
    try:
        import fiona  # noqa: F401
    except ImportError:
        raise UsageError("masks that are polygons need fiona: pip install 'co2s-fast[geo]'"
                         ) from None


@dataclass(frozen=True)
class Shape:
    """A polygon in the raster's coordinates, the label it burns, and its bounds."""

    geometry: dict[str, Any]
    label: int
    bounds: tuple[float, float, float, float]


class PolygonMask:
    """The polygons over one raster; `part` burns those that a window shows.

    Args:
        path: file of the polygons.
        spec: the dataset, its `mask` being that of the polygons.
        crs: coordinate system of the raster.
        transform: of the grid that labels are wanted on (affine, pixel to ground).
        width: columns of that grid.
        height: rows.
        image: the raster's path, for errors.

    Raises:
        UsageError: fiona is not installed.
        DataError: either has no coordinate system, the file is damaged, has no such layer or
            attribute, or a feature is no polygon or of an undeclared class.
    """

    def __init__(self, path: Path, spec: DatasetSpec, crs: Any, transform: Any, width: int,
                 height: int, image: Path) -> None:
        require_fiona()
        if not crs or transform.is_identity:
            raise DataError(f"{image}: has no coordinate system, so the polygons of {path} have no "
                            "place on it")
        self.path, self.spec, self.transform = path, spec, transform
        mask = spec.mask
        self._fill = IGNORE
        if mask.outside != "ignore":
            self._fill = spec.class_names.index(mask.outside)
        self._shapes = list(_read(path, spec, crs, ground(transform, 0, 0, height, width)))
        self._bounds = np.array([s.bounds for s in self._shapes]).reshape(-1, 4)

    def part(self, row: int, column: int, height: int, width: int) -> NDArray[np.uint8]:
        """Labels [height, width] of a window: the class of the last polygon, else `outside`."""
        from rasterio.features import rasterize

        left, bottom, right, top = ground(self.transform, row, column, height, width)
        x0, y0, x1, y1 = self._bounds.T
        near = np.flatnonzero((x0 <= right) & (x1 >= left) & (y0 <= top) & (y1 >= bottom))
        out = np.full((height, width), self._fill, np.uint8)
        if len(near):
            shapes = [(self._shapes[i].geometry, self._shapes[i].label) for i in near]
            rasterize(shapes, out=out, transform=placed(self.transform, row, column),
                      all_touched=self.spec.mask.all_touched)
        return out


def _read(path: Path, spec: DatasetSpec, crs: Any,
          bounds: tuple[float, ...]) -> Iterator[Shape]:
    """The polygons that may lie within bounds, in the raster's system."""
    import fiona

    with reading_polygons(path):
        if spec.mask.layer is not None and spec.mask.layer not in (names := fiona.listlayers(path)):
            raise DataError(f"{path}: no layer {spec.mask.layer!r}, found {', '.join(names)}")
        with fiona.open(path, layer=spec.mask.layer) as layer:
            yield from _shapes(path, layer, spec, crs, bounds)


@contextmanager
def reading_polygons(path: Path) -> Iterator[None]:
    """Turn an error of GDAL into a DataError that names the file."""
    from fiona.errors import FionaError
    from rasterio.errors import RasterioError

    try:
        yield
    except (FionaError, RasterioError) as error:
        reason = " ".join(str(error).split()).replace(f"'{path}' ", "")
        raise DataError(f"{path}: cannot be read as polygons ({reason})") from error


@contextmanager
def one_kind(path: Path, layer: Any) -> Iterator[None]:
    """Raise a DataError where an attribute is text in one feature and a number in another.

    GDAL calls such ones JSON, and fiona cannot parse them.
    """
    try:
        yield
    except json.JSONDecodeError as error:
        mixed = [name for name, kind in layer.schema["properties"].items() if kind == "json"]
        raise DataError(f"{path}: attribute {', '.join(mixed)} is text in some features and "
                        "something else in others, expected one kind") from error


def _shapes(path: Path, layer: Any, spec: DatasetSpec, crs: Any,
            bounds: tuple[float, ...]) -> Iterator[Shape]:
    from rasterio.crs import CRS
    from rasterio.features import bounds as bounds_of
    from rasterio.warp import transform_bounds, transform_geom

    if not layer.crs_wkt:
        raise DataError(f"{path}: has no coordinate system, expected one")
    attribute, fields = spec.mask.attribute, list(layer.schema["properties"])
    if attribute not in fields:
        raise DataError(f"{path}: no attribute {attribute!r}, found {', '.join(fields) or 'none'}")
    own, same = CRS.from_wkt(layer.crs_wkt), CRS.from_wkt(layer.crs_wkt) == crs
    # A rectangle's sides are curves in another system: more points, and a margin beyond them.
    around = bounds if same else transform_bounds(crs, own, *bounds, densify_pts=21)
    labels = _labels(spec)
    # GDAL answers in the order of its index; which polygon lies above another is that of the file.
    # Across the antimeridian west is larger than east: no rectangle of degrees, so all are read.
    near = layer.filter(bbox=tuple(around)) if around[0] <= around[2] else layer.filter()
    with one_kind(path, layer):
        features = sorted(near, key=lambda found: int(found.id))
    for feature in features:
        name = f"{path}: feature {feature.id}"
        geometry = feature.geometry
        if geometry is None or geometry.type not in _KINDS:
            raise DataError(f"{name}: expected a polygon, found "
                            f"{'no geometry' if geometry is None else geometry.type}")
        value = feature.properties[attribute]
        label = labels.get(as_key(value))
        if label is None:
            raise DataError(f"{name}: {attribute} is {value!r}, expected one of {_known(spec)}")
        shape = {"type": geometry.type, "coordinates": geometry.coordinates}
        if not same:
            shape = transform_geom(own, crs, shape)
        yield Shape(shape, label, tuple(bounds_of(shape)))


def _labels(spec: DatasetSpec) -> dict[str, int]:
    """Label of each name and value that an attribute may have."""
    labels = {as_key(value): IGNORE for value in spec.mask.ignore}
    for index in range(spec.num_classes):
        labels |= {as_key(value): index for value in class_values(spec, index)}
    return labels | {each.name: index for index, each in enumerate(spec.classes)}


def as_key(value: object) -> str:
    """A value as text: 1, 1.0 and "1" are one."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def _known(spec: DatasetSpec) -> str:
    names = [f"{c.name} ({'/'.join(map(str, class_values(spec, i)))})"
             for i, c in enumerate(spec.classes)]
    return ", ".join([*names, f"ignored {', '.join(map(str, spec.mask.ignore))}"])
