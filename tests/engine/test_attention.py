"""`co2s-fast attention`: figures, raw maps, the part of an image that goes through, errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from untrained import untrained_run

from co2s_fast.cli import main
from co2s_fast.engine.attention import attend, read_view
from co2s_fast.engine.runs import load_run
from co2s_fast.errors import DataError, UsageError
from co2s_fast.models.attention_maps import attention_maps
from co2s_fast.report import draw_attention


@pytest.fixture(scope="module")
def run(stripes, tiny_students, tmp_path_factory):
    deeper = {"overrides": {"vision_cfg": {"layers": 2, "width": 64}, "embed_dim": 64}}
    students = tiny_students | {"clip": tiny_students["clip"] | deeper | {"levels": [2]}}
    return untrained_run({
        "data": {"dataset": str(stripes / "stripes.yaml"), "root": str(stripes)},
        "students": students, "method": {"name": "co2s"}, "train": {"steps": 1},
        "out": str(tmp_path_factory.mktemp("attention") / "run"),
    })  # fmt: skip


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def command(*arguments):
    return CliRunner().invoke(main, ["attention", *map(str, arguments)])


def test_a_figure_and_the_maps_behind_it(run, picture, tmp_path) -> None:
    out = tmp_path / "figures/a.png"
    result = command(run, picture, "-o", out, "--size", 64, "--npz")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(out)
    with Image.open(out) as figure:
        assert figure.width > 1000 and len(np.unique(np.asarray(figure))) > 100
    maps = np.load(out.with_suffix(".npz"))
    assert maps["clip"].shape == (2, 2, 3, 4) and maps["ssm"].shape == (1, 2, 3, 4)
    assert maps["clip_layers_in_use"] == 1 and str(maps["ssm_query"]) == "class token"
    pixels = np.asarray(Image.open(picture)).transpose(2, 0, 1)
    assert np.array_equal(maps["image"], pixels) and maps["box"].tolist() == [0, 0, 56, 40]
    for name, student in load_run(run)[2].items():
        again = attention_maps(student, torch.from_numpy(pixels.copy())[None])
        np.testing.assert_allclose(maps[name], again.maps.numpy(), rtol=1e-5)


@pytest.mark.parametrize("suffix", ["pdf", "svg"])
def test_one_student_the_attention_of_a_patch(run, picture, tmp_path, suffix) -> None:
    out = tmp_path / f"a.{suffix}"
    found = attend(run, picture, out=out, student="clip", layer=1, point=(55, 39))
    assert list(found.students) == ["clip"] and found.layers == {"clip": 1}
    assert found.image.shape == (32, 32, 3) and found.point == (31, 31)  # the run's crop
    assert found.students["clip"].query == "patch (1, 1)"
    draw_attention(found, out)
    first = out.read_bytes()
    draw_attention(found, out)
    assert out.read_bytes()[:64] == first[:64] and len(first) > 5000
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("point", "box", "seen"),
    [(None, (18, 10, 38, 30), None), ((0, 0), (0, 0, 20, 20), (0, 0)),
     ((50, 20), (36, 10, 56, 30), (14, 10))],
)  # fmt: skip
def test_the_part_around_a_point(picture, point, box, seen) -> None:
    view = read_view(picture, 20, point)
    assert view.box == box and view.point == seen
    left, top, right, bottom = box
    pixels = np.asarray(Image.open(picture))[top:bottom, left:right]
    assert np.array_equal(view.pixels.transpose(1, 2, 0), pixels)


def test_a_point_on_a_scaled_image(picture, tmp_path) -> None:
    view = read_view(picture, 30, (40, 20), scale=2)
    assert view.pixels.shape == (3, 30, 30)
    assert view.box == (33, 13, 48, 28) and view.point == (15, 15)
    rasterio = pytest.importorskip("rasterio")
    pixels = np.asarray(Image.open(picture)).transpose(2, 0, 1)
    with rasterio.open(tmp_path / "a.tif", "w", driver="GTiff", dtype="uint8", count=3,
                       height=40, width=56) as file:  # fmt: skip
        file.write(pixels)
    view = read_view(tmp_path / "a.tif", 16, (40, 20))
    assert np.array_equal(view.pixels, pixels[:, 12:28, 32:48]) and view.point == (8, 8)
    assert read_view(tmp_path / "a.tif", 30, (40, 20), scale=2).box == (33, 13, 48, 28)


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["-o", "a.jpg"], 2, "--out a.jpg: expected a file ending in .png, .pdf, .svg"),
        (["--student", "clip2"], 2, "clip2"),
        (["--layer", "7"], 2, "layer 7: student clip has layers 0 to 1"),
        (["--point", "60,1"], 2, "--point 60,1: outside of"),
        (["--point", "six"], 2, "--point six: expected X,Y in pixels, such as 120,64"),
        (["--checkpoint", "last"], 1, "no checkpoint at"),
    ],
)
def test_mistakes(run, picture, tmp_path, options, code, said) -> None:
    result = command(run, picture, "-o", tmp_path / "a.pdf", *options)
    assert result.exit_code == code and result.exception.code == code
    assert result.stderr.splitlines()[-1].startswith("error: ") and said in result.stderr
    assert not (tmp_path / "a.pdf").exists()


def test_files_that_are_none(run, picture, tmp_path) -> None:
    with pytest.raises(DataError, match="missing file"):
        attend(run, tmp_path / "none.png", out=tmp_path / "b.png")
    with pytest.raises(UsageError, match="is not a run folder"):
        attend(tmp_path, picture, out=tmp_path / "b.png")
    with pytest.raises(UsageError, match="cannot be written to"):
        attend(run, picture, out=picture / "b.png")


def test_all_is_both(run, picture, tmp_path) -> None:
    assert list(attend(run, picture, out=tmp_path / "a.png", student="all").students) == [
        "clip", "ssm"]  # fmt: skip
