"""Four bands of 16 bits through everything: prepare, pretrain, train, eval, predict, attention."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

from co2s_fast.cli import main
from co2s_fast.engine.config import RunConfig, read_run_config
from co2s_fast.engine.pretrain import pretrain
from co2s_fast.engine.runs import load_run
from co2s_fast.engine.trainer import train
from co2s_fast.errors import DataError
from co2s_fast.models.inflate import inflate

rasterio = pytest.importorskip("rasterio")

CLASSES = [{"name": "land", "color": [200, 100, 0]}, {"name": "sea", "color": [0, 0, 200]}]
DESCRIPTION = {
    "name": "four", "classes": CLASSES, "crop": 32, "bands": [1, 2, 3, 4], "display": [3, 2, 1],
    "files": {"images": "images/{scene}.tif", "labels": "masks/{scene}.png", "group": "{scene}"},
    "tile": {"size": 32}, "val": ["v*"],
}  # fmt: skip


def write_scene(folder: Path, name: str, seed: int) -> None:
    """Land and sea differ in the fourth band alone."""
    generator = np.random.default_rng(seed)
    pixels = generator.normal(2000, 200, (4, 64, 64))
    border = int(generator.integers(16, 48))
    pixels[3, :, border:] += 4000
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with rasterio.open(folder / f"images/{name}.tif", "w", driver="GTiff", dtype="uint16", count=4,
                       height=64, width=64, crs="EPSG:32640",
                       transform=rasterio.Affine(10, 0, 4e5, 0, -10, 2.7e6)) as file:  # fmt: skip
        file.write(pixels.astype("uint16"))
    mask = np.zeros((64, 64), np.uint8)
    mask[:, border:] = 1
    (folder / "masks").mkdir(exist_ok=True)
    Image.fromarray(mask).save(folder / f"masks/{name}.png")


def call(*arguments: object) -> str:
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("four")
    for seed, name in enumerate(("a", "b", "c", "v")):
        write_scene(folder / "raw", name, seed)
    (folder / "four.yaml").write_text(yaml.safe_dump(DESCRIPTION))
    call("data", "prepare", folder / "four.yaml", "--raw", folder / "raw", "--out", folder / "data")
    return folder


def configuration(prepared: Path, tiny_students: dict, out: Path, **changes) -> RunConfig:
    return RunConfig.model_validate({
        "data": {"dataset": str(prepared / "four.yaml"), "root": str(prepared / "data"),
                 "labels": 4, "batch_size": 4, "workers": 0},
        "students": tiny_students, "method": {"name": "co2s", "cutmix_shards": 2},
        "train": {"steps": 30, "lr": 2e-3, "backbone_multiplier": 1, "decoder_multiplier": 1,
                  "device": "cpu", "eval_every": 30, "tensorboard": False},
        "pretrain": {"steps": 4, "batch_size": 4, "warmup_steps": 1},
        "eval": {"panels": 1}, "out": str(out), **changes,
    })  # fmt: skip


@pytest.mark.slow
def test_a_run_on_four_bands(prepared, tiny_students, tmp_path) -> None:
    config = configuration(prepared, tiny_students, tmp_path / "run")
    weights = pretrain(config, tmp_path / "weights", progress=False)
    students = {
        path.stem: {**tiny_students[path.stem], "weights": str(path)} for path in weights
    }
    run = train(configuration(prepared, students, tmp_path / "run"), progress=False)
    stored = read_run_config(run).students["clip"]
    assert stored.channels == 4 and stored.bands == ("blue", "green", "red", "band 4")
    statistics = yaml.safe_load((run / "dataset.yaml").read_text())["statistics"]
    assert stored.mean == tuple(statistics["mean"]) and len(stored.mean) == 4
    assert load_run(run)[2]["ssm"].channels == 4
    table = call("eval", run)
    fused = next(line for line in table.splitlines() if line.startswith("overall")).split()[-1]
    assert float(fused) > 75  # only the fourth band tells the classes apart
    image = prepared / "raw/images/v.tif"
    made = Path(call("predict", run, image, "-o", tmp_path / "maps").split()[-1])
    with rasterio.open(made) as file:
        found = file.read(1)
    assert (found == np.asarray(Image.open(prepared / "raw/masks/v.png"))).mean() > 0.75
    call("attention", run, image, "-o", tmp_path / "a.png", "--npz")
    maps = np.load(tmp_path / "a.npz")
    assert maps["image"].shape == (4, 32, 32) and maps["image"].dtype == np.float32
    call("report", run)
    picture = next((run / "panels").glob("00-*.image.png"))
    assert np.asarray(Image.open(picture)).shape == (32, 32, 3)


def test_an_inflated_projection_trains_and_resumes(prepared, tmp_path, capsys) -> None:
    import timm

    sizes = {"embed_dim": 64, "depth": 1, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_dinov3_qkvb", num_classes=0, **sizes)
    save_file(model.state_dict(), tmp_path / "dino.safetensors")
    student = {"backbone": "timm", "model": "vit_tiny_patch16_dinov3_qkvb", "overrides": sizes,
               "weights": str(tmp_path / "dino.safetensors"), "levels": [0],
               "decoder": {"skip_channels": [], "up_channels": [], "channels": 16, "layers": 1,
                           "text_channels": 16, "pool": [2, 2], "rates": [1]}}  # fmt: skip
    train_options = {"steps": 2, "lr": 1e-3, "device": "cpu", "eval_every": 2, "tensorboard": False}
    config = configuration(prepared, {"ssm": student}, tmp_path / "run", train=train_options,
                           method={"name": "onlysup"})  # fmt: skip
    run = train(config, progress=False)
    said = capsys.readouterr().err
    assert "patch projection inflated to 4 channels: blue, green, red, band 4" in said
    learnt = load_run(run, "last")[2]["ssm"].backbone.model.patch_embed.proj.weight
    before = inflate(model.patch_embed.proj.weight, 4, ("blue", "green", "red", "band 4"))
    moved = (learnt - before).abs().amax((0, 2, 3))
    assert (moved > 0).all() and (moved < 1e-2).all()
    resumed = train(config, resume=True, progress=False)
    again = load_run(resumed, "last")[2]["ssm"].backbone.model.patch_embed.proj.weight
    assert torch.equal(again, learnt)


def test_what_is_for_three_bands_is_refused(prepared, tiny_students, tmp_path, stripes) -> None:
    three = configuration(prepared, tiny_students, tmp_path / "three").model_dump()
    three["data"] |= {"dataset": str(stripes / "stripes.yaml"), "root": str(stripes),
                      "labels": None, "split": str(stripes / "split")}  # fmt: skip
    paths = pretrain(RunConfig.model_validate(three), tmp_path / "weights", progress=False)
    students = {path.stem: {**tiny_students[path.stem], "weights": str(path)} for path in paths}
    with pytest.raises(DataError, match=r"clip.safetensors is for .* 3 channels, expected 4"):
        train(configuration(prepared, students, tmp_path / "run"), progress=False)
    result = CliRunner().invoke(
        main, ["import-checkpoint", "best_clip.pth", "--dataset", str(prepared / "four.yaml"),
               "-o", str(tmp_path / "released")],
    )  # fmt: skip
    assert result.exit_code == 1
    assert "are for images of 3 channels, dataset 'four' has 4" in result.stderr
