"""Which files `predict` reads, writes, keeps and refuses to touch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import rasterio
from brightest import NAMES, expected, run, scene, write_tif
from PIL import Image
from rasterio.control import GroundControlPoint
from rasterio.transform import from_origin

from co2s_fast.data.config import DataConfig
from co2s_fast.data.writing import temporary_for
from co2s_fast.engine import polygons
from co2s_fast.engine.inference import EvalConfig
from co2s_fast.engine.outputs import find_images, identity, parse_shard
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


def test_a_map_of_another_image_is_made_again(tmp_path, capsys):
    fiona = pytest.importorskip("fiona")
    for year in (2023, 2024):
        (tmp_path / f"{year}").mkdir()
        write_tif(tmp_path / f"{year}/s.tif", scene(seed=year), crs="EPSG:32640",
                  transform=from_origin(year, 9, 1, 1))  # fmt: skip

    def made(folder):
        (path,) = run([tmp_path / folder / "s.tif"], tmp_path / "out", signature="run 1",
                      polygons=True)  # fmt: skip
        with rasterio.open(path) as found, fiona.open(path.with_suffix(".gpkg")) as layer:
            labels = expected(rasterio.open(tmp_path / folder / "s.tif").read().transpose(1, 2, 0))
            np.testing.assert_array_equal(found.read(1), labels[0])
            assert layer.bounds == found.bounds
        return path.stat().st_mtime_ns

    first = made("2023")
    second = made("2024")
    assert first != second and "maps:" not in capsys.readouterr().err
    # the same image seen elsewhere, its time another one
    shutil.copytree(tmp_path / "2024", tmp_path / "moved", copy_function=shutil.copyfile)
    os.utime(tmp_path / "moved/s.tif", (0, 0))
    assert made("moved") == second
    assert "maps: 1 of 1 were there already and are kept (--overwrite" in capsys.readouterr().err
    # edited in place, of the same size and time
    with rasterio.open(tmp_path / "moved/s.tif", "r+") as target:
        target.write(scene(seed=5).transpose(2, 0, 1))
    os.utime(tmp_path / "moved/s.tif", (0, 0))
    assert made("moved") != second


def test_what_tells_images_apart(tmp_path):
    large = tmp_path / "large.png"
    content = bytearray(np.random.default_rng(0).bytes(5 << 20))
    large.write_bytes(content)
    first = identity(large)
    for at in (0, len(content) // 7 * 3, len(content) - 1):
        content[at] ^= 1
        large.write_bytes(content)
        assert identity(large) != first
        content[at] ^= 1
    large.write_bytes(content + b"1")
    assert identity(large) != first
    for name in ("a", "b"):
        write_tif(tmp_path / f"{name}.tif", scene(), transform=from_origin(3, 9, 1, 1))
    for name, part in (("inner", "a.tif"), ("outer", "inner.vrt")):
        bands = "".join(
            f'<VRTRasterBand dataType="Byte" band="{band}"><SimpleSource><SourceFilename '
            f'relativeToVRT="1">{part}</SourceFilename><SourceBand>{band}</SourceBand>'
            "</SimpleSource></VRTRasterBand>" for band in (1, 2, 3))  # fmt: skip
        (tmp_path / f"{name}.vrt").write_text(
            f'<VRTDataset rasterXSize="53" rasterYSize="41">{bands}</VRTDataset>')
    before = {name: identity(tmp_path / name) for name in ("a.tif", "b.tif", "outer.vrt")}
    assert before["a.tif"] == before["b.tif"] != before["outer.vrt"]
    (tmp_path / "a.tif.aux.xml").write_text("<PAMDataset><Metadata/></PAMDataset>")
    (tmp_path / "a.tif.ovr").write_bytes(b"")
    assert {name: identity(tmp_path / name) for name in before} == before
    write_tif(tmp_path / "a.tif", scene(seed=1), transform=from_origin(3, 9, 1, 1))
    assert identity(tmp_path / "outer.vrt") != before["outer.vrt"]
    write_tif(tmp_path / "b.tif", scene())
    plain = identity(tmp_path / "b.tif")
    (tmp_path / "b.tfw").write_text("1\n0\n0\n-1\n3.5\n8.5\n")
    assert identity(tmp_path / "b.tif") != plain


def test_maps_in_the_folder_of_the_images_are_no_images(tmp_path):
    Image.fromarray(scene()).save(tmp_path / "a.jpg")
    write_tif(tmp_path / "s.tiff", scene(), crs="EPSG:32640", transform=from_origin(0, 9, 1, 1))
    options = {"signature": "run 1", "confidence": True, "overlay": True}
    made = run([tmp_path], tmp_path, **options)
    times = [path.stat().st_mtime_ns for path in made]
    assert run([tmp_path], tmp_path, **options) == made
    assert [path.stat().st_mtime_ns for path in made] == times
    assert find_images([tmp_path / "a.png"]) == [tmp_path / "a.png"]  # one that is named is meant
    for path in (tmp_path / "a.jpg", tmp_path / "s.tiff"):
        path.unlink()
    with pytest.raises(DataError, match="found nothing but what `predict` has made in the folder"):
        find_images([tmp_path])


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


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, no_room):
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    write_tif(tmp_path / "s.tif", noise, crs="EPSG:32640", transform=from_origin(0, 200, 1, 1))
    Image.fromarray(noise).save(tmp_path / "a.png")
    out = tmp_path / "out"
    for kinds in ({}, {"confidence": True}):
        with no_room(4000), pytest.raises(DataError, match=r"/out/s(\.confidence)?\.tif: cannot be "
                                          r"written: .*\(is the disk full\?\)$"):
            run([tmp_path / "s.tif"], out, **kinds)
        with no_room(4000), pytest.raises(OSError) as found:
            run([tmp_path / "a.png"], out, **kinds)
        assert found.value.filename == str(out / ("a.confidence.png" if kinds else "a.png"))
    assert list(out.iterdir()) == []


def test_polygons_on_a_full_disk(tmp_path, no_room):
    pytest.importorskip("fiona")
    write_tif(tmp_path / "s.tif", scene(), crs="EPSG:32640", transform=from_origin(0, 60, 1, 1))
    (path,) = run([tmp_path / "s.tif"], tmp_path / "out")
    said = r"/out/s\.gpkg: cannot be written: .*\(is the disk full\?\)$"
    for size in (50_000, 100_000):
        with no_room(size), pytest.raises(DataError, match=said):
            polygons.write_polygons(path, NAMES)
    assert [each.name for each in path.parent.iterdir()] == ["s.tif"]


@pytest.mark.skipif(os.name != "posix", reason="processes cannot be asked for")
def test_what_killed_processes_left_goes_when_the_map_is_made(tmp_path):
    write_tif(tmp_path / "s.tif", scene(), crs="EPSG:32640", transform=from_origin(0, 9, 1, 1))
    target = tmp_path / "out/s.tif"
    target.parent.mkdir()
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    here = temporary_for(target, "x").name.split(".")[-3]

    def left(name: str, process: int, machine: str = here):
        path = target.with_name(f".{name}.{machine}.{process}.parts")
        path.touch()
        return path

    gone = [left("s.tif", ended.pid), left("s.confidence.tif", ended.pid)]
    kept = [left("s.tif", os.getppid()), left("s.tif", ended.pid, "00000000"),
            left("t.tif", ended.pid), left("s.tif.b", ended.pid)]
    run([tmp_path / "s.tif"], target.parent, confidence=True)
    assert not any(path.exists() for path in gone) and all(path.exists() for path in kept)
