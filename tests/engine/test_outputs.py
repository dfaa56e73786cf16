"""Which files `predict` reads, writes, keeps and refuses to touch."""

from __future__ import annotations

import numpy as np
import pytest
import rasterio
from brightest import NAMES, expected, run, scene, write_tif
from PIL import Image
from rasterio.control import GroundControlPoint
from rasterio.transform import from_origin

from co2s_fast.data.config import DataConfig
from co2s_fast.engine import polygons
from co2s_fast.engine.inference import EvalConfig
from co2s_fast.engine.outputs import find_images, parse_shard
from co2s_fast.errors import DataError, UsageError


def test_finding_images(tmp_path):
    for name in ("b.png", "a.JPG", "notes.txt", "._b.png"):
        (tmp_path / name).touch()
    assert [p.name for p in find_images([tmp_path])] == ["a.JPG", "b.png"]
    assert [p.name for p in find_images([f"{tmp_path}/*.png", tmp_path / "b.png"])] == ["b.png"]
    (tmp_path / "odd[1].png").touch()
    assert find_images([tmp_path / "odd[1].png"]) == [tmp_path / "odd[1].png"]
    (tmp_path / "empty").mkdir()
    for wrong, said in [
        (tmp_path / "c.png", "c.png: missing file"),
        (tmp_path / "empty", "found none in the folder"),
        (tmp_path / "notes.txt", "expected an image"),
        (tmp_path / "*.bmp", "no image matches"),
    ]:
        with pytest.raises(DataError, match=said):
            find_images([wrong])
    with pytest.raises(UsageError, match="at least one"):
        find_images([])


def test_outputs_that_cannot_be_are_refused_before_work(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        Image.fromarray(scene()).save(tmp_path / folder / "a.png")
    with pytest.raises(UsageError, match="would both be written"):
        run([tmp_path / "x", tmp_path / "y"], tmp_path / "out")
    with pytest.raises(UsageError, match="would replace it"):
        run([tmp_path / "x"], tmp_path / "x")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be written to"):
        run([tmp_path / "x"], tmp_path / "file" / "out")
    with pytest.raises(UsageError, match="students are clip, ssm"):
        run([tmp_path / "x"], tmp_path / "out", student="teacher")


def test_finished_maps_are_kept_and_only_the_missing_ones_made(tmp_path):
    for name in ("a.png", "b.png", "c.tif"):
        if name.endswith("png"):
            Image.fromarray(scene()).save(tmp_path / name)
        else:
            write_tif(tmp_path / name, scene(), crs="EPSG:32640", transform=from_origin(0, 9, 1, 1))
    a, b, c = run([tmp_path], tmp_path / "out", signature="run 1")

    def times():
        return [path.stat().st_mtime_ns for path in (a, b, c)]

    first = times()
    b.write_bytes(b.read_bytes()[:40])  # not one of ours any more
    assert run([tmp_path], tmp_path / "out", signature="run 1") == [a, b, c]
    second = times()
    assert [x == y for x, y in zip(first, second, strict=True)] == [True, False, True]
    np.testing.assert_array_equal(np.asarray(Image.open(b)), expected(scene())[0])
    for changed in ({"signature": "run 2"}, {"signature": "run 2", "student": "ssm"},
                    {"signature": "run 2", "student": "ssm", "overwrite": True}):  # fmt: skip
        before = times()
        run([tmp_path], tmp_path / "out", **changed)
        assert all(x != y for x, y in zip(before, times(), strict=True)), changed
    # what goes beside a map is missing: both are made
    run([tmp_path], tmp_path / "out", signature="run 2", student="ssm", confidence=True)
    assert (tmp_path / "out/a.confidence.png").is_file()


def test_other_settings_make_the_map_again(tmp_path):
    Image.fromarray(scene()).save(tmp_path / "a.png")

    def made(**options):
        (path,) = run([tmp_path / "a.png"], tmp_path / "out", signature="run 1", **options)
        return path.stat().st_mtime_ns

    for changed in ({"scale": 0.5}, {"config": EvalConfig(crop=24)}, {"blend": "uniform"},
                    {"data": DataConfig(scale=(64, 48))}, {"student": "ssm"}):  # fmt: skip
        first = made()
        assert made() == first
        assert made(**changed) != first, changed


def test_shards_share_the_images(tmp_path):
    for number in range(5):
        Image.fromarray(scene(8, 8)).save(tmp_path / f"{number}.png")
    parts = [run([tmp_path], tmp_path / "out", shard=(i, 2)) for i in (1, 2)]
    assert [len(part) for part in parts] == [3, 2]
    assert {p.name for part in parts for p in part} == {f"{n}.png" for n in range(5)}
    assert parse_shard("2/8") == (2, 8)
    for wrong in ("0/2", "3/2", "2", "a/b", "-1/2"):
        with pytest.raises(UsageError, match=r"--shard .*expected i/n"):
            parse_shard(wrong)


def test_polygons_cover_the_map(tmp_path):
    fiona = pytest.importorskip("fiona")
    from rasterio.features import rasterize

    pixels = scene(60, 80)
    pixels[:12, :24] = 0
    where = from_origin(5e5, 2e6, 0.5, 0.5)
    write_tif(tmp_path / "s.tif", pixels, crs="EPSG:32640", transform=where, nodata=0)
    (path,) = run([tmp_path / "s.tif"], tmp_path / "out", polygons=True)
    with rasterio.open(path) as found:
        labels = found.read(1)
    with fiona.open(path.with_suffix(".gpkg"), layer="classes") as layer:
        assert layer.crs.to_epsg() == 32640
        features = list(layer)
    burned = rasterize([(f.geometry, f.properties["class_id"]) for f in features], labels.shape,
                       fill=255, transform=where, dtype="uint8")  # fmt: skip
    np.testing.assert_array_equal(burned, labels)
    assert all(f.properties["class_name"] == NAMES[f.properties["class_id"]] for f in features)
    assert sorted(p.suffix for p in (tmp_path / "out").iterdir()) == [".gpkg", ".tif"]
    Image.fromarray(scene()).save(tmp_path / "a.png")
    with pytest.raises(UsageError, match=r"a\.png is no GeoTIFF"):
        run([tmp_path / "a.png"], tmp_path / "other", polygons=True)
    assert not (tmp_path / "other").exists()


def test_each_polygon_is_written_once_in_however_many_batches(tmp_path, monkeypatch):
    fiona = pytest.importorskip("fiona")
    monkeypatch.setattr(polygons, "_BATCH", 4)
    write_tif(tmp_path / "s.tif", scene(), crs="EPSG:32640", transform=from_origin(0, 60, 1, 1))
    (path,) = run([tmp_path / "s.tif"], tmp_path / "out", polygons=True)
    with fiona.open(path.with_suffix(".gpkg")) as layer:
        shapes = [str(feature.geometry.coordinates) for feature in layer]
    assert len(shapes) == len(set(shapes)) > 8


def test_polygons_that_a_finished_map_lacks_are_added(tmp_path):
    fiona = pytest.importorskip("fiona")
    write_tif(tmp_path / "s.tif", scene(), crs="EPSG:32640", transform=from_origin(0, 9, 1, 1))

    def again(**options):
        (path,) = run([tmp_path / "s.tif"], tmp_path / "out", **options)
        found = path.with_suffix(".gpkg")
        made = found.stat().st_mtime_ns if found.is_file() else None
        return path.stat().st_mtime_ns, made, found

    first, none, polygons = again(signature="run 1")
    assert none is None
    kept, made, _ = again(signature="run 1", polygons=True)
    assert kept == first
    assert again(signature="run 1", polygons=True)[:2] == (first, made)  # nothing is missing now
    with fiona.open(polygons) as layer:
        count = len(layer)
    assert count > 0
    polygons.write_bytes(polygons.read_bytes()[:500])
    kept, repaired, _ = again(signature="run 1", polygons=True)
    assert kept == first and repaired != made
    with fiona.open(polygons) as layer:
        assert len(layer) == count
    # another run's map: the polygons beside it were of the former one
    changed, stale, _ = again(signature="run 2")
    assert changed != first and stale == repaired
    kept, fresh, _ = again(signature="run 2", polygons=True)
    assert kept == changed and fresh != stale
    with fiona.open(polygons, "w", driver="GPKG", layer="classes", schema={
            "geometry": "Polygon", "properties": {}}):  # fmt: skip
        pass  # somebody's own, without a word of where it is from
    with pytest.raises(UsageError, match=r"s\.gpkg: is there, and `predict` has not made it"):
        again(signature="run 2", polygons=True)
    assert again(signature="run 2", polygons=True, overwrite=True)[1] != fresh


@pytest.mark.parametrize("name", ["a.png", "a.overlay.png", "a.confidence.png"])
def test_files_of_others_are_not_replaced(tmp_path, name):
    Image.fromarray(scene()).save(tmp_path / "a.jpg")
    mask = tmp_path / name
    Image.fromarray(scene()[..., 0]).save(mask)
    before = mask.read_bytes()
    options = {"overlay": True, "confidence": True}
    with pytest.raises(UsageError, match=f"{name}: is there, and `predict` has not made it"):
        run([tmp_path / "a.jpg"], tmp_path, **options)
    assert mask.read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["a.jpg", name])
    run([tmp_path / "a.jpg"], tmp_path, overwrite=True, **options)
    assert mask.read_bytes() != before
    run([tmp_path / "a.jpg"], tmp_path, **options)  # without a signature: made again


def test_what_cannot_be_opened_is_not_ours(tmp_path):
    Image.fromarray(scene()).save(tmp_path / "a.jpg")
    pointer = tmp_path / "a.png"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UsageError, match=r"a\.png: is there"):
        run([tmp_path / "a.jpg"], tmp_path)
    assert pointer.read_text().startswith("version")
    pointer.write_bytes(b"")  # after a power cut
    assert run([tmp_path / "a.jpg"], tmp_path) == [pointer]


def test_the_map_of_one_image_is_not_the_overlay_of_another(tmp_path):
    for name in ("a", "a.overlay"):
        Image.fromarray(scene()).save(tmp_path / f"{name}.png")
    with pytest.raises(UsageError, match=r"would both be written to .*a\.overlay\.png"):
        run([tmp_path], tmp_path / "out", overlay=True)
    assert len(run([tmp_path], tmp_path / "out")) == 2


def test_a_map_of_a_given_name(tmp_path):
    Image.fromarray(scene()).save(tmp_path / "a.png")
    write_tif(tmp_path / "s.tif", scene(), crs="EPSG:32640", transform=from_origin(0, 9, 1, 1))
    target = tmp_path / "maps/mine.tif"
    assert run([tmp_path / "s.tif"], target, confidence=True) == [target]
    assert sorted(p.name for p in target.parent.iterdir()) == ["mine.confidence.tif", "mine.tif"]
    with pytest.raises(UsageError, match=r"mine\.tif: the map of .*a\.png is a \.png file"):
        run([tmp_path / "a.png"], target)
    with pytest.raises(UsageError, match=r"mine\.tif: the name of one map, but there are 2 images"):
        run([tmp_path], target)


def test_polygons_lie_where_control_points_say(tmp_path):
    fiona = pytest.importorskip("fiona")
    points = [GroundControlPoint(row, col, 10 + 0.001 * col, 50 - 0.001 * row)
              for row in (0, 41) for col in (0, 53)]
    write_tif(tmp_path / "s.tif", scene(), gcps=points, crs="EPSG:4326")
    (path,) = run([tmp_path / "s.tif"], tmp_path / "out", polygons=True)
    with fiona.open(path.with_suffix(".gpkg")) as layer:
        assert layer.crs.to_epsg() == 4326
        np.testing.assert_allclose(layer.bounds, (10, 50 - 0.041, 10 + 0.053, 50), atol=1e-6)
    write_tif(tmp_path / "nowhere.tif", scene())
    with pytest.raises(UsageError, match=r"nowhere\.tif has neither a geotransform nor ground"):
        run([tmp_path / "nowhere.tif"], tmp_path / "out", polygons=True)
