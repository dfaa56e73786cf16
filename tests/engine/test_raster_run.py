"""From scenes of four 16-bit bands and polygons to a georeferenced map."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
import yaml
from click.testing import CliRunner
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from toy_rasters import POLYGONS, raster_spec, rectangle, scene, write_geojson, write_tif

from co2s_fast.cli import main

pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")


def command(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Raw scenes of five bands, a third without polygons, columns 0-7 without data."""
    root = tmp_path_factory.mktemp("end-to-end")
    for number, name in enumerate(["a", "b", "c", "v"]):
        pixels = scene(5, 64, 64, "uint16", number)
        pixels[:, :, :8] = 0
        write_tif(root / f"raw/images/{name}.tif", pixels, nodata=0)
        shapes = [(rectangle((0, 60), (0, 32)), {"class": "land"}),
                  (rectangle((0, 60), (32, 64)), {"class": "sea"})]
        if name != "c":
            write_geojson(root / f"raw/polygons/{name}.geojson", shapes)
    spec = raster_spec(**POLYGONS, scale_range=[0.8, 1.2], band_names=["nir", "red", "green",
                                                                      "blue"], bands=[4, 3, 2, 1])
    (root / "toy.yaml").write_text(yaml.safe_dump(spec.model_dump(mode="json", exclude_defaults=True
                                                                  )))
    return root


@pytest.mark.slow
def test_prepare_split_check_train_eval_predict(folder, tiny_students):
    out, run, description = folder / "toy", folder / "run", folder / "toy.yaml"
    prepared = command("data", "prepare", description, "--raw", folder / "raw", "--out", out)
    assert "16 tiles (12 with a label) from 4 images" in prepared
    assert "uint16 images, by channel" in prepared
    command("data", "split", out, "--labels", 4)
    assert "no problems" in command("data", "check", out, "--deep")
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({
        "students": tiny_students, "method": {"name": "co2s"},
        "train": {"steps": 2, "device": "cpu", "eval_every": 2, "tensorboard": False},
        "data": {"batch_size": 2, "workers": 0},
        "eval": {"panels": 1},
    }))
    # The description by hand: the folder's statistics go with it.
    command("train", "--dataset", description, "--data-root", out, "--labels", 4,
            "--recipe", recipe, "--out", run)
    stored = yaml.safe_load((run / "dataset.yaml").read_text())
    assert stored["statistics"]["dtype"] == "uint16" and len(stored["statistics"]["mean"]) == 4
    config = yaml.safe_load((run / "config.yaml").read_text())
    for student in config["students"].values():
        assert student["channels"] == 4
        np.testing.assert_allclose(student["mean"], stored["statistics"]["mean"])
    assert json.loads((run / "eval.json").read_text())["students"]["both"]
    panel = next((run / "panels").glob("*.image.png"))
    assert np.asarray(Image.open(panel)).std() > 1
    assert (run / "report.html").is_file()
    assert "both" in command("eval", run)

    command("predict", run, folder / "raw/images/v.tif", "-o", folder / "maps", "--overlay")
    with (rasterio.open(folder / "maps/v.tif") as found,
          rasterio.open(folder / "raw/images/v.tif") as source):
        assert found.crs == source.crs and found.transform == source.transform
        assert found.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG" and found.nodata == 255
        labels = found.read(1)
    assert (labels[:, :8] == 255).all() and (labels[:, 8:] < 2).all()
    # A tile of the scene is read as it is: its bands are chosen already.
    command("predict", run, "--val", 1, "-o", folder / "tile")
    (tile,) = (folder / "tile").glob("*.tif")
    assert rasterio.open(tile).read(1).max() <= 255


@pytest.mark.slow
def test_predict_refuses_what_the_run_does_not_take(folder, tmp_path):
    run = folder / "run"
    if not (run / "checkpoints/best").is_dir():
        pytest.skip("the run of the test before is not there")
    write_tif(tmp_path / "three.tif", scene(3, 64, 64))
    write_tif(tmp_path / "bytes.tif", scene(4, 64, 64, "uint8"))
    Image.fromarray(scene(3, 64, 64, "uint8").transpose(1, 2, 0)).save(tmp_path / "picture.png")
    for name, text in (
        ("three.tif", "three.tif: has 3 bands, expected at least 4 for bands 4, 3, 2, 1"),
        ("bytes.tif", "bytes.tif: numbers are uint8, expected uint16 like all images"),
        ("picture.png", "picture.png: a picture of 8-bit colour; the run takes rasters of 4 bands"),
    ):
        result = CliRunner().invoke(main, ["predict", str(run), str(tmp_path / name), "-o",
                                           str(tmp_path / "out")])
        assert result.exit_code == 1 and text in result.output
