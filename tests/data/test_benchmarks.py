"""Every line of the authors' lists against trees made from synthetic raw releases.

The raw files have the releases' names, folders and encodings; their sizes are shrunk by a factor
that leaves the number of tiles, and so the names, as they are.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from co2s_fast.data import DataConfig, load_dataset, open_split, prepare_dataset, read_split
from co2s_fast.data.catalogue import DatasetSpec
from co2s_fast.data.files import Item, load_label
from co2s_fast.data.plan import steps_per_epoch
from co2s_fast.data.splits import Split
from co2s_fast.data.tiles import list_images
from co2s_fast.engine.config import load_config

FOLDERS = {"whdld": "whdld", "loveda": "loveda", "potsdam": "potsdam", "gid15": "gid",
           "mer": "mer", "msl": "msl"}  # fmt: skip
SHRUNK = {"potsdam": 8, "gid15": 16}  # 6000 -> 750 with tiles of 64; 6800 x 7200 -> 425 x 450 of 32


@pytest.fixture
def lists(shared_dir: Path) -> Path:
    folder = shared_dir / "data" / "splits"
    if not folder.is_dir():
        pytest.skip(f"the authors' lists are not at {folder}")
    return folder


RELEASED_STEPS = {
    "whdld": {"1_24": 533, "1_16": 521, "1_8": 486, "1_4": 417},
    "loveda": {"1_40": 920, "1_16": 884, "1_8": 825, "1_4": 708},
    "potsdam": {"1_32": 1193, "1_16": 1155, "1_8": 1078, "1_4": 924},
    "gid15": {"1_8": 599, "1_4": 513},
    "mer": {"1_8": 187, "1_4": 160},
    "msl": {"1_8": 688, "1_4": 589},
}


@pytest.mark.parametrize("name", RELEASED_STEPS)
def test_a_pass_has_as_many_steps_as_in_the_release(lists, name):
    config = load_config(name, compat="official-train").data
    for ratio, steps in RELEASED_STEPS[name].items():
        lines = (lists / FOLDERS[name] / ratio / "unlabeled.txt").read_text().splitlines()
        images = [Item(line, Path(line), None) for line in lines if line.strip()]
        assert steps_per_epoch(config, Split([], images, [])) == steps, ratio


def names_in(folder: Path) -> list[str]:
    """Image names of all lists of a dataset, each once."""
    lines = {line.split()[0] for path in folder.rglob("*.txt") for line in path.open()
             if path.name != "pred.txt"}  # fmt: skip
    return sorted(Path(line).name for line in lines)


def shrunk(name: str) -> DatasetSpec:
    """The dataset with tiles as much smaller as the raw images are."""
    spec = load_dataset(name)
    factor = SHRUNK.get(name, 1)
    if factor == 1:
        return spec
    tile = spec.tile
    smaller = tile.model_copy(
        update={"size": tile.size // factor,
                "stride": tile.stride and tile.stride // factor})  # fmt: skip
    return spec.model_copy(update={"tile": smaller})


def write(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def write_release(name: str, names: list[str], raw: Path, spec: DatasetSpec) -> None:
    """Raw files of the release, as many as the lists need."""
    rng = np.random.default_rng(0)
    palette = np.array([*spec.palette, (0, 0, 0)], np.uint8)
    if name == "potsdam":
        for scene in sorted({tuple(n.split("_")[:2]) for n in names}):
            stem = f"top_potsdam_{scene[0]}_{scene[1]}"
            labels = rng.integers(0, 7, (15, 15)).repeat(50, 0).repeat(50, 1)
            write(raw / f"2_Ortho_RGB/{stem}_RGB.tif", palette[labels] // 2)
            write(raw / f"5_Labels_all_noBoundary/{stem}_label_noBoundary.tif", palette[labels])
    elif name == "gid15":
        for scene in sorted({re.sub(r"_\d+_\d+\.tif$", "", n) for n in names}):
            labels = rng.integers(0, 16, (17, 18)).repeat(25, 0).repeat(25, 1)
            write(raw / f"image_RGB/{scene}.tif", palette[labels] // 2)
            write(raw / f"label_15classes/{scene}_label.tif", palette[labels])
    elif name == "whdld":
        for n in names:
            labels = rng.integers(0, 6, (4, 4))
            write(raw / "Images" / n, palette[labels] // 2)
            write(raw / "ImagesPNG" / f"{Path(n).stem}.png", palette[labels])
    elif name == "loveda":
        for n in names:
            part = "Train" if int(Path(n).stem) < 2522 else "Val"
            area = ("Rural", "Urban")[int(Path(n).stem) % 2]
            write(raw / part / area / "images_png" / n, np.zeros((4, 4, 3), np.uint8))
            write(raw / part / area / "masks_png" / n, rng.integers(0, 8, (4, 4)).astype(np.uint8))
    else:
        for n in names:
            write(raw / "images" / n, np.zeros((4, 4, 3), np.uint8))
            labels = rng.integers(0, 9, (4, 4)).astype(np.uint8)
            write(raw / "labels" / f"{Path(n).stem}.png", labels)


def listed_name(name: str, tile: str) -> str:
    """The authors' name of a tile: corners of the shrunken Potsdam tiles are those of an eighth."""
    if name != "potsdam":
        return tile
    i, j, *corners = Path(tile).stem.split("_")
    return "_".join([i, j, *(str(8 * int(c)) for c in corners)]) + Path(tile).suffix


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLDERS)
def test_the_authors_lists_fit_the_prepared_tree(name, lists, tmp_path, monkeypatch) -> None:
    spec, folder = shrunk(name), lists / FOLDERS[name]
    names = names_in(folder)
    raw, root = tmp_path / "raw", tmp_path / "data" / name
    write_release(name, names, raw, spec)
    prepared = prepare_dataset(spec, raw, root, progress=False)
    assert prepared.tiles == prepared.labeled == spec.info.total
    if name in SHRUNK:  # under the authors' names, which stand for the full size
        for part in ("images", "labels"):
            for path in sorted((root / part).iterdir()):
                path.rename(path.with_name("new-" + listed_name(name, path.name)))
            for path in sorted((root / part).iterdir()):
                path.rename(path.with_name(path.name.removeprefix("new-")))
    ratios = sorted(p.parent for p in folder.rglob("labeled.txt"))
    train = set()
    for ratio in ratios:
        split = read_split(root, ratio)  # every file named in a list is there
        assert len(split.val) == spec.info.val
        train |= {item.name for item in (*split.labeled, *split.unlabeled)}
        wanted = spec.info.labeled.get(ratio.name.replace("_", "/"))
        assert wanted is None or len(split.labeled) == wanted
    assert len(train) == spec.info.train
    assert {item.name for item in list_images(root)} >= train
    monkeypatch.setenv("CO2S_DATA", str(tmp_path / "data"))
    split = open_split(DataConfig(dataset=name, split=ratios[0], missing_classes="warn"), spec)
    values = np.unique(np.concatenate([load_label(i, spec).ravel() for i in split.val[:200]]))
    assert set(values) <= {*range(spec.num_classes), 255} and len(values) >= spec.num_classes


def test_potsdam_at_its_own_size(tmp_path) -> None:
    """One image of 6000 x 6000 from archives in an archive; names and border as in the lists."""
    labels = np.full((6000, 6000, 3), (0, 0, 255), np.uint8)
    labels[5990:] = 0
    write(tmp_path / "top_potsdam_2_10_label_noBoundary.tif", labels)
    write(tmp_path / "top_potsdam_2_10_RGB.tif", labels // 2)
    with zipfile.ZipFile(tmp_path / "5_Labels_all_noBoundary.zip", "w") as inner:
        inner.write(tmp_path / "top_potsdam_2_10_label_noBoundary.tif",
                    "top_potsdam_2_10_label_noBoundary.tif")  # fmt: skip
    with zipfile.ZipFile(tmp_path / "2_Ortho_RGB.zip", "w") as inner:
        inner.write(tmp_path / "top_potsdam_2_10_RGB.tif", "2_Ortho_RGB/top_potsdam_2_10_RGB.tif")
    with zipfile.ZipFile(tmp_path / "Potsdam.zip", "w", zipfile.ZIP_DEFLATED) as outer:
        for inner in ("5_Labels_all_noBoundary.zip", "2_Ortho_RGB.zip"):
            outer.write(tmp_path / inner, f"Potsdam/{inner}")
    spec, root = load_dataset("potsdam"), tmp_path / "potsdam"
    prepared = prepare_dataset(spec, tmp_path / "Potsdam.zip", root, progress=False)
    assert prepared.tiles == 144
    names = {item.name for item in list_images(root)}
    assert {"2_10_0_0_512_512", "2_10_5488_5120_6000_5632", "2_10_5488_5488_6000_6000"} <= names
    item = next(i for i in list_images(root) if i.name == "2_10_0_5488_512_6000")
    label = load_label(item, spec)
    assert (label[:502] == 1).all() and (label[502:] == 255).all()
    assert prepare_dataset(spec, tmp_path / "Potsdam.zip", root, progress=False).already
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
