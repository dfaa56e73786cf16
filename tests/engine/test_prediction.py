"""What the maps of `predict` hold."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import rasterio
import torch
from brightest import SPEC, STUDENTS, Brightest, expected, run, scene, write_tif
from PIL import Image
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.rpc import RPC
from rasterio.transform import RPCTransformer, from_origin
from torch import nn
from torch.nn import functional as F

from co2s_fast.data.config import DataConfig
from co2s_fast.engine.inference import EvalConfig, for_maps
from co2s_fast.engine.prediction import Outputs, predict, scene_maps, strips
from co2s_fast.engine.scenes import open_scene
from co2s_fast.engine.sliding_window import Window
from co2s_fast.errors import DataError, UsageError


@pytest.mark.parametrize("student", ["clip", "ssm", "both"])
def test_png_gives_an_indexed_png(tmp_path, student):
    Image.fromarray(scene()).save(tmp_path / "a.png")
    (path,) = run([tmp_path / "a.png"], tmp_path / "out", student=student)
    assert path == tmp_path / "out" / "a.png"
    image = Image.open(path)
    assert image.mode == "P"
    assert image.getpalette()[:9] == [0, 0, 255, 128, 128, 128, 255, 0, 0]
    np.testing.assert_array_equal(np.asarray(image), expected(scene(), student)[0])


def test_jpeg_grey_and_small_images(tmp_path):
    Image.fromarray(scene()).save(tmp_path / "a.jpg", quality=90)
    Image.fromarray(scene()[..., 0]).save(tmp_path / "b.png")
    Image.fromarray(scene(3, 5)).save(tmp_path / "c.png")
    paths = run([tmp_path], tmp_path / "out")
    assert [p.name for p in paths] == ["a.png", "b.png", "c.png"]
    decoded = np.asarray(Image.open(tmp_path / "a.jpg"))
    np.testing.assert_array_equal(np.asarray(Image.open(paths[0])), expected(decoded)[0])
    assert Image.open(paths[2]).size == (5, 3)


def test_confidence_and_overlay(tmp_path):
    Image.fromarray(scene()).save(tmp_path / "a.png")
    run([tmp_path / "a.png"], tmp_path / "out", confidence=True, overlay=True)
    labels, certainty = expected(scene())
    stored = np.asarray(Image.open(tmp_path / "out" / "a.confidence.png"))
    # windows overlap and are averaged, which may move a rounding by one
    assert np.abs(stored - certainty * 255).max() <= 1
    over = np.asarray(Image.open(tmp_path / "out" / "a.overlay.png"))
    mixed = 0.55 * scene() + 0.45 * np.array(SPEC.palette)[labels]
    assert np.abs(over - mixed).max() <= 0.51


def test_geotiff_keeps_its_place_and_nodata(tmp_path):
    pixels = scene(90, 70)
    pixels[:10, :20] = 0
    where = from_origin(500_000, 2_780_000, 0.5, 0.5)
    write_tif(tmp_path / "s.tif", pixels, crs="EPSG:32640", transform=where, nodata=0)
    (path,) = run([tmp_path / "s.tif"], tmp_path / "out", confidence=True, overlay=True)
    with rasterio.open(path) as found:
        assert found.crs.to_epsg() == 32640
        assert found.transform == where
        assert found.nodata == 255
        assert found.dtypes == ("uint8",)
        assert found.colormap(1)[2] == (255, 0, 0, 255)
        labels = found.read(1)
    assert (labels[:10, :20] == 255).all()
    valid = (pixels != 0).any(2)
    np.testing.assert_array_equal(labels[valid], expected(pixels)[0][valid])
    for kind in ("confidence", "overlay"):
        with rasterio.open(tmp_path / "out" / f"s.{kind}.tif") as found:
            assert found.crs.to_epsg() == 32640
            assert not found.read()[:, :10, :20].any()


@pytest.mark.parametrize("resized", [False, True])
def test_transparent_pixels_have_no_class_no_confidence_and_keep_their_colour(tmp_path, resized):
    pixels = np.dstack([scene(16, 24) | 1, np.full((16, 24), 255, np.uint8)])
    pixels[:, :6, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "a.png")
    data = DataConfig(scale=(128, 32)) if resized else None
    (path,) = run([tmp_path / "a.png"], tmp_path / "out", data=data, confidence=True, overlay=True)
    labels, certainty, over = (np.asarray(Image.open(path.with_name(f"a{kind}.png")))
                               for kind in ("", ".confidence", ".overlay"))  # fmt: skip
    assert (labels[:, :6] == 255).all() and (labels[:, 6:] != 255).all()
    assert not certainty[:, :6].any() and certainty[:, 6:].all()
    with open_scene(path.with_name("a.overlay.png")) as found, open_scene(tmp_path / "a.png") as a:
        left = Window(0, 0, 16, 6)
        np.testing.assert_array_equal(found.colours(left), a.colours(left))
    assert (over[:, 6:] != pixels[:, 6:, :3]).any()


def test_geotiff_keeps_ground_control_points(tmp_path):
    corners = [(0, 0, 10.0, 50.0), (0, 40, 10.4, 50.0), (40, 0, 10.0, 49.6)]
    points = [GroundControlPoint(*corner) for corner in corners]
    write_tif(tmp_path / "s.tif", scene(40, 40), gcps=points, crs="EPSG:4326")
    (path,) = run([tmp_path / "s.tif"], tmp_path / "out")
    with rasterio.open(path) as found:
        kept, crs = found.gcps
    assert [(p.row, p.col, p.x, p.y) for p in kept] == corners
    assert crs.to_epsg() == 4326


@pytest.mark.parametrize("scale", [1, 0.5])
@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
def test_geotiff_keeps_rational_polynomials(tmp_path, scale):
    plain = [1.0, *[0.0] * 19]
    across, down = [0.0, 1.0, *plain[2:]], [0.0, 0.0, 1.0, *plain[3:]]
    model = RPC(height_off=10, height_scale=500, lat_off=25, lat_scale=0.1, long_off=55,
                long_scale=0.1, line_off=19.5, line_scale=20, samp_off=30, samp_scale=31,
                line_den_coeff=plain, samp_den_coeff=plain, line_num_coeff=down,
                samp_num_coeff=across)  # fmt: skip
    write_tif(tmp_path / "s.tif", scene(40, 60), rpcs=model)
    (path,) = run([tmp_path / "s.tif"], tmp_path / "out", scale=scale)
    places = [(55, 25, 10), (55.05, 25.02, 30)]
    with rasterio.open(path) as found, RPCTransformer(found.rpcs) as after, \
            RPCTransformer(model) as before:
        for x, y, z in places:
            old = before.rowcol(x, y, z, op=float)
            new = after.rowcol(x, y, z, op=float)
            np.testing.assert_allclose(new, np.multiply(old, scale), atol=1e-6)


def test_a_system_that_geotiff_cannot_hold_goes_beside_the_map(tmp_path):
    pole = CRS.from_proj4("+proj=ob_tran +o_proj=longlat +o_lon_p=-162 +o_lat_p=39.25 +lon_0=180 "
                          "+to_meter=0.0174532925199433")
    write_tif(tmp_path / "s.tif", scene(), crs=pole, transform=from_origin(5, 5, 0.01, 0.01))
    (path,) = run([tmp_path / "s.tif"], tmp_path / "out")
    with rasterio.open(path) as found:
        assert found.crs == pole
    assert sorted(p.name for p in path.parent.iterdir()) == ["s.tif", "s.tif.aux.xml"]
    # Another map of that name does not inherit it.
    write_tif(tmp_path / "s.tif", scene(), crs="EPSG:32640", transform=from_origin(0, 9, 1, 1))
    run([tmp_path / "s.tif"], tmp_path / "out")
    with rasterio.open(path) as found:
        assert found.crs.to_epsg() == 32640
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
def test_tiff_without_georeference_and_with_more_bands(tmp_path):
    four = np.concatenate([scene(), scene(seed=1)[..., :1]], 2)
    write_tif(tmp_path / "s.tiff", four, photometric="MINISBLACK")
    (path,) = run([tmp_path / "s.tiff"], tmp_path / "out")
    assert path.name == "s.tif"
    with rasterio.open(path) as found:
        np.testing.assert_array_equal(found.read(1), expected(scene())[0])
    write_tif(tmp_path / "deep.tif", scene().astype(np.uint16))
    with pytest.raises(DataError, match=r"deep\.tif: numbers are uint16, expected uint8"):
        run([tmp_path / "deep.tif"], tmp_path / "out")


def test_whole_equals_windows_for_a_network_without_context(tmp_path):
    Image.fromarray(scene(100, 80)).save(tmp_path / "a.png")
    (tiled,) = run([tmp_path / "a.png"], tmp_path / "tiled")
    (whole,) = run([tmp_path / "a.png"], tmp_path / "whole", config=EvalConfig(mode="whole"))
    np.testing.assert_array_equal(np.asarray(Image.open(tiled)), np.asarray(Image.open(whole)))


def test_pictures_go_through_at_the_size_of_validation_images(tmp_path):
    seen = []

    class Watching(Brightest):
        def forward(self, images):
            seen.append((len(images), *images.shape[-2:]))
            return super().forward(images)

    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:, :12, 0], pixels[:, 12:, 1] = 200, 200
    Image.fromarray(pixels).save(tmp_path / "a.png")
    spec = SimpleNamespace(**vars(SPEC), scale=(128, 32))
    students = {"clip": Watching(9, 9, 9)}
    (path,) = predict(students, [tmp_path / "a.png"], tmp_path / "out", spec, progress=False)
    assert seen == [(2, 32, 32)]  # 32 x 48 in two windows
    np.testing.assert_array_equal(np.asarray(Image.open(path))[3], [0] * 12 + [1] * 12)
    seen.clear()
    native = DataConfig(scale="native")
    predict(students, [tmp_path / "a.png"], tmp_path / "out", spec, data=native, progress=False)
    assert seen == [(1, 16, 24)]


def test_a_picture_goes_through_at_the_scale_of_the_tiles_and_keeps_its_size(tmp_path):
    seen = []

    class Watching(Brightest):
        def forward(self, images):
            seen.append(tuple(images.shape[-2:]))
            return super().forward(images)

    Image.fromarray(scene(20, 28)).save(tmp_path / "a.png")
    (path,) = predict({"clip": Watching(9, 9, 9)}, [tmp_path / "a.png"], tmp_path / "out", SPEC,
                      scale=0.5, progress=False)  # fmt: skip
    assert seen == [(10, 14)] and Image.open(path).size == (28, 20)


def test_the_map_of_a_padding_student_is_not_stretched(tmp_path):
    class Padding(Brightest):
        patch_size = 16

        def forward(self, images):
            height, width = images.shape[-2:]
            images = F.pad(images.float(), (0, -width % 16, 0, -height % 16))
            return F.avg_pool2d(super().forward(images), 2)

    pixels = np.zeros((20, 20, 3), np.uint8)
    pixels[:, :10, 0], pixels[:, 10:, 1] = 200, 200
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (path,) = predict({"clip": Padding(9, 9, 9)}, [tmp_path / "a.png"], tmp_path / "out", SPEC,
                      progress=False)  # fmt: skip
    np.testing.assert_array_equal(np.asarray(Image.open(path))[0], [0] * 10 + [1] * 10)


def test_damaged_images_are_named(tmp_path):
    Image.fromarray(scene()).save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "text.tif").write_text("no image")
    for name in ("cut.png", "text.png", "text.tif"):
        with pytest.raises(DataError, match=f"{name}: damaged") as error:
            run([tmp_path / name], tmp_path / "out")
        assert "\n" not in str(error.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_truncated_geotiff_is_named_and_leaves_nothing(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    write_tif(tmp_path / "s.tif", noise, crs="EPSG:32640", transform=from_origin(0, 0, 1, 1))
    whole = (tmp_path / "s.tif").read_bytes()
    (tmp_path / "s.tif").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"s\.tif: damaged"):
        run([tmp_path / "s.tif"], tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_maps_are_cloud_optimised(tmp_path):
    write_tif(tmp_path / "s.tif", scene(700, 900), crs="EPSG:32640",
              transform=from_origin(5e5, 2e6, 0.5, 0.5))  # fmt: skip
    (path,) = run([tmp_path / "s.tif"], tmp_path / "out")
    with rasterio.open(path) as found:
        assert found.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert found.overviews(1) == [2]
        assert found.colormap(1)[2] == (255, 0, 0, 255)
        np.testing.assert_array_equal(found.read(1), expected(scene(700, 900))[0])
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["s.tif"]


def test_strips_side_by_side_equal_the_whole(tmp_path):
    class Neighbours(Brightest):
        def forward(self, images):
            return super().forward(F.avg_pool2d(images.float(), 5, 1, 2))

    pixels = scene(70, 900)
    write_tif(tmp_path / "s.tif", pixels, crs="EPSG:32640", transform=from_origin(0, 9, 1, 1))
    students = {"clip": Neighbours(9, 8, 7)}
    results = []
    for budget in (1 << 30, 1):
        labels, certainty = np.full((70, 900), 99, np.uint8), np.zeros((70, 900), np.uint8)
        with open_scene(tmp_path / "s.tif") as opened:
            for top, left, part, shares in scene_maps(students, opened, EvalConfig(), SPEC,
                                                      torch.device("cpu"), "hann", budget):
                inside = np.s_[top : top + part.shape[0], left : left + part.shape[1]]
                assert (labels[inside] == 99).all()
                labels[inside], certainty[inside] = part, shares
        results.append((labels, certainty))
    assert len(strips(900, 32, 3, 1)) == 4 and len(strips(900, 32, 3)) == 1
    np.testing.assert_array_equal(results[0][0], results[1][0])
    assert np.abs(results[0][1].astype(int) - results[1][1]).max() <= 1


def test_windows_without_data_are_not_put_through(tmp_path):
    seen = []

    class Watching(Brightest):
        def forward(self, images):
            seen.append(len(images))
            return super().forward(images)

    pixels = scene(128, 128) | 1
    pixels[:64] = 0
    write_tif(tmp_path / "s.tif", pixels, nodata=0, crs="EPSG:32640",
              transform=from_origin(0, 9, 1, 1))  # fmt: skip
    (path,) = predict({"clip": Watching(9, 9, 9)}, [tmp_path / "s.tif"], tmp_path / "out", SPEC,
                      progress=False)  # fmt: skip
    windows_below = [y for y in (0, 26, 52, 78, 96) if y + 32 > 64]
    assert sum(seen) == 5 * len(windows_below)
    with rasterio.open(path) as found:
        labels = found.read(1)
    assert (labels[:64] == 255).all() and (labels[64:] != 255).all()


def test_a_geotiff_goes_through_at_the_scale_of_the_tiles(tmp_path):
    pixels = scene(80, 120)
    where = from_origin(5e5, 2e6, 0.5, 0.5)
    write_tif(tmp_path / "s.tif", pixels, crs="EPSG:32640", transform=where)
    (path,) = run([tmp_path / "s.tif"], tmp_path / "out", scale=0.5)
    halved = pixels.reshape(40, 2, 60, 2, 3).mean((1, 3))
    with rasterio.open(path) as found, rasterio.open(tmp_path / "s.tif") as source:
        assert found.shape == (40, 60)
        assert found.transform.a == 1.0
        assert found.bounds == source.bounds
        np.testing.assert_array_equal(found.read(1), expected(np.rint(halved).astype(np.uint8))[0])


@pytest.mark.parametrize("able", [True, False])
def test_maps_are_made_in_the_precision_that_the_device_computes_in(monkeypatch, able):
    cpu = torch.device("cpu")
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: able, raising=False)
    assert for_maps(EvalConfig(), cpu).precision == ("bfloat16" if able else "auto")
    assert for_maps(EvalConfig(), torch.device("cuda")).precision == "auto"  # bfloat16 there
    for asked in ("float32", "bfloat16"):
        assert for_maps(EvalConfig(precision=asked), cpu).precision == asked
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name)
    assert for_maps(EvalConfig(), cpu).precision == "auto", "a torch that cannot tell"


@pytest.mark.parametrize("scale", [0, -1, float("nan"), float("inf")])
def test_a_scale_that_cannot_be(tmp_path, scale):
    Image.fromarray(scene()).save(tmp_path / "a.png")
    with pytest.raises(UsageError, match="scale: expected a number above 0"):
        run([tmp_path / "a.png"], tmp_path / "out", scale=scale)


class Large(nn.Module):
    """Runs out of memory with more than so many windows at once."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.calls = most, []

    def forward(self, images):
        self.calls.append(len(images))
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return STUDENTS["clip"](images)


def test_fewer_windows_where_memory_is_short(tmp_path, capsys):
    pixels = scene(100, 100)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    student = Large(2)
    options = {"progress": False, "outputs": Outputs(), "config": EvalConfig(batch_windows=8)}
    (path,) = predict({"clip": student}, [tmp_path / "a.png"], tmp_path / "out", SPEC, **options)
    assert max(student.calls[-3:]) <= 2 < max(student.calls)
    assert "8 windows at once; going on with 4" in capsys.readouterr().err
    np.testing.assert_array_equal(np.asarray(Image.open(path)), expected(pixels, "clip")[0])
    with pytest.raises(UsageError, match=r"out of GPU memory with one window at a time \(CUDA"):
        predict({"clip": Large(0)}, [tmp_path / "a.png"], tmp_path / "none", SPEC, **options)
    assert list((tmp_path / "none").iterdir()) == []
