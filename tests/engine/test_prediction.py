from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from rasterio.control import GroundControlPoint
from rasterio.transform import from_origin
from torch import nn
from torch.nn import functional as F

from co2s_fast.data.config import DataConfig
from co2s_fast.engine.inference import EvalConfig
from co2s_fast.engine.prediction import find_images, predict
from co2s_fast.errors import DataError, UsageError

SPEC = SimpleNamespace(num_classes=3, palette=[(0, 0, 255), (128, 128, 128), (255, 0, 0)], crop=32)


class Brightest(nn.Module):
    """Class = the brightest channel, with a weight on each; a pixel's class is its own matter."""

    def __init__(self, *weights: float) -> None:
        super().__init__()
        self.register_buffer("weight", torch.tensor(weights).view(1, 3, 1, 1))

    def forward(self, images):
        return images.float() / 255 * self.weight


STUDENTS = {"clip": Brightest(10.0, 10.0, 10.0), "ssm": Brightest(1.0, 30.0, 1.0)}


def scene(height=41, width=53, seed=0):
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (-(-height // 6), -(-width // 6), 3), np.uint8)
    return coarse.repeat(6, 0).repeat(6, 1)[:height, :width]


def expected(pixels, student="both"):
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    if student == "both":
        probabilities = sum(s(images).softmax(1) for s in STUDENTS.values()) / 2
    else:
        probabilities = STUDENTS[student](images).softmax(1)
    certainty, labels = probabilities[0].max(0)
    return labels.numpy(), certainty.numpy()


def run(images, out, **options):
    options = {"progress": False, **options}
    return predict(STUDENTS, images, out, SPEC, **options)


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


def write_tif(path, pixels, **options):
    profile = {"driver": "GTiff", "dtype": pixels.dtype, "count": pixels.shape[2], **options}
    profile |= {"height": pixels.shape[0], "width": pixels.shape[1]}
    with rasterio.open(path, "w", **profile) as target:
        target.write(pixels.transpose(2, 0, 1))


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


def test_geotiff_keeps_ground_control_points(tmp_path):
    corners = [(0, 0, 10.0, 50.0), (0, 40, 10.4, 50.0), (40, 0, 10.0, 49.6)]
    points = [GroundControlPoint(*corner) for corner in corners]
    write_tif(tmp_path / "s.tif", scene(40, 40), gcps=points, crs="EPSG:4326")
    (path,) = run([tmp_path / "s.tif"], tmp_path / "out")
    with rasterio.open(path) as found:
        kept, crs = found.gcps
    assert [(p.row, p.col, p.x, p.y) for p in kept] == corners
    assert crs.to_epsg() == 4326


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
def test_tiff_without_georeference_and_with_more_bands(tmp_path):
    four = np.concatenate([scene(), scene(seed=1)[..., :1]], 2)
    write_tif(tmp_path / "s.tiff", four, photometric="MINISBLACK")
    (path,) = run([tmp_path / "s.tiff"], tmp_path / "out")
    assert path.name == "s.tif"
    with rasterio.open(path) as found:
        np.testing.assert_array_equal(found.read(1), expected(scene())[0])
    write_tif(tmp_path / "deep.tif", scene().astype(np.uint16))
    with pytest.raises(DataError, match=r"deep\.tif: expected 1 or at least 3 bands of uint8"):
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


def test_finding_images(tmp_path):
    for name in ("b.png", "a.JPG", "notes.txt"):
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


def test_finished_maps_can_be_kept(tmp_path):
    Image.fromarray(scene()).save(tmp_path / "a.png")
    (path,) = run([tmp_path / "a.png"], tmp_path / "out")
    path.write_bytes(b"kept")
    assert run([tmp_path / "a.png"], tmp_path / "out", overwrite=False) == [path]
    assert path.read_bytes() == b"kept"
    run([tmp_path / "a.png"], tmp_path / "out")
    assert path.read_bytes() != b"kept"
