"""Masks of rasters: numbers, palettes, colours, and polygons burned in."""

from __future__ import annotations

import numpy as np
import pytest
import rasterio
from rasterio.warp import transform_geom
from toy_rasters import (
    CRS,
    POLYGONS,
    WEST,
    raster_spec,
    rectangle,
    scene,
    write_geojson,
    write_tif,
)

from co2s_fast.data import load_dataset, load_label, prepare_dataset
from co2s_fast.data.tiles import list_images
from co2s_fast.errors import DataError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")


def labels(raw, out, spec):
    """Prepare, and the label of every tile that has one."""
    prepare_dataset(spec, raw, out, progress=False)
    prepared = load_dataset(out / "dataset.yaml")
    return {i.name: load_label(i, prepared) for i in list_images(out) if i.label is not None}


def images(raw, names="av", size=(48, 64)):
    for number, name in enumerate(names):
        write_tif(raw / f"images/{name}.tif", scene(3, *size, "uint8", number))
    return raw


def classes(seed=0, size=(48, 64)):
    return np.random.default_rng(seed).integers(0, 2, size, np.uint8)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "float32"])
def test_numbers_of_any_type(tmp_path, dtype):
    raw = images(tmp_path / "raw")
    known = classes()
    values = np.array([300, 20] if dtype != "uint8" else [30, 20])[known].astype(dtype)
    values[:4] = 7
    for name in "av":
        write_tif(raw / f"masks/{name}.tif", values[None], nodata=7)
    spec = raster_spec(classes=[
        {"name": "land", "color": [200, 100, 0], "values": [30, 300]},
        {"name": "sea", "color": [0, 0, 200], "values": [20]}])
    known[:4] = 255
    np.testing.assert_array_equal(labels(raw, tmp_path / "out", spec)["a_0_32"], known[:32, 32:])


def test_palettes_as_numbers_and_as_colours(tmp_path):
    raw = images(tmp_path / "raw")
    for name in "av":
        path = write_tif(raw / f"masks/{name}.tif", classes()[None], photometric="PALETTE")
        with rasterio.open(path, "r+") as target:
            target.write_colormap(1, {0: (0, 0, 200, 255), 1: (200, 100, 0, 255)})
    found = labels(raw, tmp_path / "index", raster_spec())["a_16_0"]
    np.testing.assert_array_equal(found, classes()[16:, :32])
    spec = raster_spec(mask={"encoding": "color", "ignore": [[0, 0, 0]]})
    found = labels(raw, tmp_path / "color", spec)["a_16_0"]
    np.testing.assert_array_equal(found, 1 - classes()[16:, :32])


def test_colours_and_their_errors(tmp_path):
    raw = images(tmp_path / "raw")
    table = np.array([[200, 100, 0], [0, 0, 200]], np.uint8)
    colors = table[classes()]
    for name in "av":
        write_tif(raw / f"masks/{name}.tif", colors.transpose(2, 0, 1))
    spec = raster_spec(mask={"encoding": "color", "ignore": [[0, 0, 0]]})
    found = labels(raw, tmp_path / "out", spec)["a_0_0"]
    np.testing.assert_array_equal(found, classes()[:32, :32])
    colors[0, 0] = colors[47, 63] = 1, 2, 3
    write_tif(raw / "masks/a.tif", colors.transpose(2, 0, 1))
    with pytest.raises(DataError, match=r"masks/a\.tif: undeclared colour \(1, 2, 3\) in 2 pixels"):
        labels(raw, tmp_path / "bad", spec)
    with pytest.raises(DataError, match=r"a\.tif: has 3 bands, expected one of class numbers"):
        labels(raw, tmp_path / "bad", raster_spec())


def test_a_mask_must_lie_on_its_image(tmp_path):
    raw = images(tmp_path / "raw")
    for name in "av":
        write_tif(raw / f"masks/{name}.tif", classes()[None], west=WEST + 20)
    with pytest.raises(DataError, match=r"masks/a\.tif: lies 2\.0 pixels off its image .*a\.tif"):
        labels(raw, tmp_path / "out", raster_spec())
    write_tif(raw / "masks/a.tif", classes()[None], crs="EPSG:32639")
    with pytest.raises(DataError, match=r"a\.tif: coordinate system EPSG:32639, its image"):
        labels(raw, tmp_path / "out", raster_spec())
    write_tif(raw / "masks/a.tif", classes(size=(48, 60))[None])
    with pytest.raises(DataError, match=r"a\.tif: 60 x 48 pixels, its image .* has 64 x 48"):
        labels(raw, tmp_path / "out", raster_spec())


def polygons(raw, shapes, names="av", crs=CRS):
    for name in names:
        write_geojson(raw / f"polygons/{name}.geojson", shapes, crs)
    return raw


SHAPES = [(rectangle((4, 30), (2, 40)), {"class": "land"}),
          (rectangle((10, 20), (30, 50)), {"class": "sea"})]


def burned(outside=255, size=(48, 64)):
    out = np.full(size, outside, np.uint8)
    out[4:30, 2:40] = 0
    out[10:20, 30:50] = 1  # later features win
    return out


def test_polygons_are_burned_in(tmp_path):
    raw = polygons(images(tmp_path / "raw", "abv"), SHAPES)
    found = labels(raw, tmp_path / "out", raster_spec(**POLYGONS))
    for y, x in ((0, 0), (0, 32), (16, 0), (16, 32)):
        np.testing.assert_array_equal(found[f"a_{y}_{x}"], burned()[y : y + 32, x : x + 32])
    assert not any(name.startswith("b") for name in found)  # has no polygons


def test_tiles_that_nobody_has_drawn_on_are_unlabelled(tmp_path):
    raw = polygons(images(tmp_path / "raw"), [(rectangle((0, 8), (0, 8)), {"class": "sea"})])
    assert set(labels(raw, tmp_path / "out", raster_spec(**POLYGONS))) == {"a_0_0", "v_0_0"}
    spec = raster_spec(**{**POLYGONS, "mask": {**POLYGONS["mask"], "outside": "land"}})
    found = labels(raw, tmp_path / "outside", spec)
    assert len(found) == 8 and (found["a_16_32"] == 0).all() and found["a_0_0"][0, 0] == 1


def test_values_and_other_systems_and_formats(tmp_path):
    fiona = pytest.importorskip("fiona")
    from fiona.crs import CRS as FionaCRS

    raw = images(tmp_path / "raw")
    shapes = [(transform_geom(CRS, "EPSG:4326", {"type": "Polygon", "coordinates": c})
               ["coordinates"], {"class": 5 if p["class"] == "sea" else 2}) for c, p in SHAPES]
    polygons(raw, shapes, crs="EPSG:4326")
    spec = raster_spec(**POLYGONS, classes=[
        {"name": "land", "color": [200, 100, 0], "values": [1, 2]},
        {"name": "sea", "color": [0, 0, 200], "values": [5]}])
    np.testing.assert_array_equal(labels(raw, tmp_path / "out", spec)["a_0_32"], burned()[:32, 32:])
    # One GeoPackage for all scenes, its layer by name.
    schema = {"geometry": "Polygon", "properties": {"class": "str"}}
    with fiona.open(raw / "all.gpkg", "w", driver="GPKG", schema=schema, layer="drawn",
                    crs=FionaCRS.from_user_input("EPSG:4326")) as layer:
        names = {5: "sea", 2: "land"}
        layer.writerecords([
            {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": c},
             "properties": {"class": names[p["class"]]}} for c, p in shapes])
    spec = raster_spec(mask={"encoding": "polygons", "attribute": "class", "layer": "drawn"},
                       files={"images": "images/{scene}.tif", "labels": "all.gpkg",
                              "group": "{scene}"})
    found = labels(raw, tmp_path / "gpkg", spec)
    for name in "av":
        np.testing.assert_array_equal(found[f"{name}_16_0"], burned()[16:, :32])


@pytest.mark.parametrize("values", [[0, "sea"], ["land", 1], [True, "sea"]])
def test_an_attribute_of_several_kinds_is_named(tmp_path, values):
    raw = images(tmp_path / "raw")
    polygons(raw, [(shape, {"class": v}) for (shape, _), v in zip(SHAPES, values, strict=True)])
    with pytest.raises(DataError, match=r"a\.geojson: attribute class is text in some features"):
        labels(raw, tmp_path / "out", raster_spec(**POLYGONS))


def test_nan_in_a_mask_is_no_label(tmp_path):
    raw = images(tmp_path / "raw")
    values = classes().astype(np.float32)
    values[:4] = np.nan
    for name in "av":
        write_tif(raw / f"masks/{name}.tif", values[None])
    known = classes()
    known[:4] = 255
    found = labels(raw, tmp_path / "out", raster_spec())["a_0_0"]
    np.testing.assert_array_equal(found, known[:32, :32])


def test_all_touched_and_scale(tmp_path):
    raw = polygons(images(tmp_path / "raw"), [(rectangle((4, 8), (4.6, 12.4)), {"class": "sea"})])
    found = labels(raw, tmp_path / "centre", raster_spec(**POLYGONS))["a_0_0"]
    assert found[4:8, 5:12].all() and (found != 255).sum() == 4 * 7
    touched = {**POLYGONS, "mask": {**POLYGONS["mask"], "all_touched": True}}
    found = labels(raw, tmp_path / "touched", raster_spec(**touched))["a_0_0"]
    assert (found[4:8, 4:13] == 1).all()
    spec = raster_spec(**POLYGONS, tile={"size": 16, "scale": 0.5})
    found = labels(raw, tmp_path / "scaled", spec)["a_0_0"]
    assert (found != 255).sum() == 2 * 4 and (found[2:4, 2:6] == 1).all()


def test_what_is_wrong_with_polygons_is_named(tmp_path):
    raw = polygons(images(tmp_path / "raw"), SHAPES)
    path = raw / "polygons/a.geojson"

    def refused(text, spec=None):
        with pytest.raises(DataError, match=text):
            labels(raw, tmp_path / "out", spec or raster_spec(**POLYGONS))
        assert not (tmp_path / "out").exists()

    write_geojson(path, [SHAPES[0], (SHAPES[1][0], {"class": "lake"})])
    refused(r"a\.geojson: feature 1: class is 'lake', expected one of land \(0\), sea \(1\)")
    write_geojson(path, [(SHAPES[0][0], {"class": None})])
    refused(r"a\.geojson: feature 0: class is None, expected one of")
    write_geojson(path, [(SHAPES[0][0], {"kind": "sea"})])
    refused(r"a\.geojson: no attribute 'class', found kind")
    write_geojson(path, SHAPES)
    path.write_text(path.read_text().replace("Polygon", "MultiPoint").replace("[[[", "[[").replace(
        "]]]", "]]"))
    refused(r"a\.geojson: feature 0: expected a polygon, found MultiPoint")
    path.write_text("not json")
    refused(r"a\.geojson: cannot be read as polygons")
    write_geojson(path, SHAPES)
    write_tif(raw / "images/a.tif", scene(3, 48, 64, "uint8"), crs=None)
    refused(r"images/a\.tif: has no coordinate system, so the polygons of .*a\.geojson have no pl")
    with pytest.raises(UsageError, match="needs `attribute`"):
        raster_spec(mask={"encoding": "polygons"})
    with pytest.raises(UsageError, match=r"mask\.outside 'lake': expected 'ignore' or the name"):
        raster_spec(mask={"encoding": "polygons", "attribute": "class", "outside": "lake"})
