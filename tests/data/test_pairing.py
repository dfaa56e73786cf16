"""Raw images and masks that share a folder, and names that differ in what nobody sees."""

from __future__ import annotations

import shutil
import unicodedata
from pathlib import Path

import pytest
from toy_data import two_classes, write_raw

from co2s_fast.data import describe_folder, prepare_dataset, split_dataset
from co2s_fast.data.pairing import find_sources
from co2s_fast.errors import DataError


def prepare(raw, out, spec):
    return prepare_dataset(spec, raw, out, progress=False)


def together(folder: Path, image: str, mask: str, count: int = 3) -> Path:
    """A folder of images and masks whose names are the given ones with a number in them."""
    raw = write_raw(folder / "raw", [f"a/{n}" for n in range(count)])
    for number in range(count):
        for kind, name in (("images", image), ("masks", mask)):
            (raw / f"a/{kind}/{number}.png").rename(raw / name.format(number))
    shutil.rmtree(raw / "a")
    return raw


def test_a_prepared_folder_in_the_raw_folder_is_no_raw_data(tmp_path):
    raw = write_raw(tmp_path / "raw", ["a/1", "b/2"])
    spec = two_classes(files={"images": "**/{part}.png"})
    assert prepare(raw, raw / "tiles32", spec).images == 4
    other = spec.model_copy(update={"tile": spec.tile.model_copy(update={"size": 16})})
    second = prepare(raw, raw / "tiles16", other)
    assert second.images == 4
    assert [n for n in second.notes if f"{raw / 'tiles32'} was made by" in n] == second.notes[:1]
    assert prepare(raw, raw / "tiles32", spec).already
    said = describe_folder(raw, tmp_path / "raw.yaml", progress=False)
    assert "2 images, 2 with a mask" in said and f"{raw / 'tiles16'} was made by" in said
    nested = two_classes(files={"images": "tiles32/images/{part}.png"})
    with pytest.raises(DataError, match="tiles16 was made by `data prepare` and does not count"):
        find_sources(raw, nested)


def test_a_mask_beside_images_without_its_own_is_no_image(tmp_path):
    raw = together(tmp_path, "s{}.png", "s{}_mask.png")
    spec = two_classes(files={"images": "{name}.png", "labels": "{name}_mask.png"})
    (raw / "s1_mask.png").unlink()
    assert [s.label is None for s in find_sources(raw, spec)] == [False, True, False]
    (raw / "s2.png").unlink()
    with pytest.raises(DataError, match=r"1 masks have no image, for example s2_mask\.png"):
        find_sources(raw, spec)


def test_images_whose_masks_have_the_plainer_name_stay_images(tmp_path):
    raw = together(tmp_path, "s{}_RGB.png", "s{}.png")
    spec = two_classes(files={"images": "{name}_RGB.png", "labels": "{name}.png"})
    (raw / "s2.png").unlink()
    assert [s.label and s.label.name for s in find_sources(raw, spec)] == ["s0.png", "s1.png", None]


def test_the_case_of_endings_does_not_matter(tmp_path):
    raw = write_raw(tmp_path / "raw", ["a/1", "a/2", "a/3"])
    (raw / "a/masks/2.png").rename(raw / "a/masks/2.PNG")
    (raw / "a/images/3.png").rename(raw / "a/images/3.Png")
    sources = find_sources(raw, two_classes())
    assert [s.label.name for s in sources] == ["1.png", "2.PNG", "3.png"]
    described = describe_folder(raw, tmp_path / "raw.yaml", progress=False)
    assert "3 images, 3 with a mask" in described
    files = {"images": "{scene}/images/{file}", "labels": "{scene}/masks/{file}"}
    assert all(s.label is not None for s in find_sources(raw, two_classes(files=files)))
    assert len(prepare(raw, tmp_path / "out", two_classes()).notes) == 0
    shutil.copy(raw / "a/masks/1.png", raw / "a/masks/1.PNG")
    with pytest.raises(DataError, match=r"two masks for one image, a/masks/1\.PNG and a/masks/1"):
        find_sources(raw, two_classes())


def test_accents_of_one_and_of_two_characters_are_the_same(tmp_path):
    name, apart = "área", unicodedata.normalize("NFD", "área")
    raw = write_raw(tmp_path / "raw", [f"a/{apart}1", f"a/{apart}2"])
    for number in "12":
        mask = raw / f"a/masks/{apart}{number}.png"
        mask.rename(mask.with_name(f"{name}{number}.png"))
    said = describe_folder(raw, tmp_path / "raw.yaml", progress=False)
    assert "2 images, 2 with a mask" in said
    files = {"images": f"a/images/{apart}{{part}}.png", "labels": f"a/masks/{name}{{part}}.png"}
    spec = two_classes(files=files, val=[f"*{apart}1"], tile={})
    assert prepare(raw, tmp_path / "out", spec).labeled == 2
    assert split_dataset(tmp_path / "out", labels=1, progress=False).val == 1
    mask = raw / f"a/masks/{name}1.png"
    mask.write_bytes(mask.read_bytes() + b" ")
    with pytest.raises(DataError, match=r"masks/.*1\.png was changed"):
        prepare(raw, tmp_path / "out", spec)
