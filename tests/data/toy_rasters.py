"""Toy scenes for the tests of rasters: any number of bands and number type, and polygons."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import rasterio
from rasterio.transform import from_origin

from co2s_fast.data import DatasetSpec
from co2s_fast.data.catalogue import parse_dataset

CRS = "EPSG:32640"
WEST, NORTH, PIXEL = 400_000.0, 2_700_000.0, 10.0


def write_tif(path: Path, pixels: np.ndarray, *, mask: np.ndarray | None = None, west: float = WEST,
              **profile) -> Path:
    """Write [C, H, W] as a GeoTIFF; `mask` (bool [H, W], where there is data) goes inside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    bands, height, width = pixels.shape
    profile = {"crs": CRS, "transform": from_origin(west, NORTH, PIXEL, PIXEL),
               "photometric": "MINISBLACK", **profile}
    with (rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
          rasterio.open(path, "w", driver="GTiff", dtype=pixels.dtype.name, count=bands,
                        height=height, width=width, **profile) as target):
        target.write(pixels)
        if mask is not None:
            target.write_mask(mask)
    return path


def scene(bands: int, height: int, width: int, dtype: str = "uint16", seed: int = 0) -> np.ndarray:
    """[C, H, W] in which band c is around 1000 (c + 1), brighter in the right half (the "sea")."""
    generator = np.random.default_rng(seed)
    base = 1000 * np.arange(1, bands + 1)[:, None, None] * np.ones((bands, height, width))
    base[:, :, width // 2 :] *= 1.5
    noisy = base + generator.normal(0, 50, base.shape)
    return (noisy / 40 if dtype == "uint8" else noisy).astype(dtype)


def rectangle(rows: tuple[int, int], columns: tuple[int, int], west: float = WEST) -> list:
    """A polygon's coordinates around pixels [rows) x [columns)."""
    top, bottom = (NORTH - PIXEL * row for row in rows)
    left, right = (west + PIXEL * column for column in columns)
    return [[[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]]


def write_geojson(path: Path, shapes: list[tuple[list, dict]], crs: str = CRS) -> Path:
    """Polygons with their properties; `crs` as the old, still common "crs" member."""
    name = f"urn:ogc:def:crs:{crs.replace(':', '::')}"
    features = [{"type": "Feature", "properties": properties,
                 "geometry": {"type": "Polygon", "coordinates": coordinates}}
                for coordinates, properties in shapes]
    content = {"type": "FeatureCollection", "features": features,
               "crs": {"type": "name", "properties": {"name": name}}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def raster_spec(**changes) -> DatasetSpec:
    """A description of scenes `<scene>.tif` with index masks `<scene>_mask.tif`."""
    content = {
        "name": "toy",
        "classes": [{"name": "land", "color": [200, 100, 0]},
                    {"name": "sea", "color": [0, 0, 200]}],
        "crop": 32,
        "files": {"images": "images/{scene}.tif", "labels": "masks/{scene}.tif",
                  "group": "{scene}"},
        "tile": {"size": 32},
        "val": ["v*"],
    }
    return parse_dataset({**content, **changes}, "toy.yaml")


POLYGONS = {
    "mask": {"encoding": "polygons", "attribute": "class"},
    "files": {"images": "images/{scene}.tif", "labels": "polygons/{scene}.geojson",
              "group": "{scene}"},
}
