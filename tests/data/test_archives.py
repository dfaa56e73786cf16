"""Archives as raw folders: what is taken out, what is refused, what is left behind."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest
from toy_data import two_classes, write_raw

from co2s_fast.data import prepare_dataset
from co2s_fast.data.archives import find_archives, unpacked
from co2s_fast.data.tiles import list_images
from co2s_fast.errors import DataError


def zip_folder(folder: Path, path: Path) -> None:
    with zipfile.ZipFile(path, "w") as package:
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            package.write(file, file.relative_to(folder).as_posix())


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_an_archive_is_a_folder_of_its_name(tmp_path, kind):
    loose = write_raw(tmp_path / "loose", ["a/1", "b/1"])
    (tmp_path / "raw").mkdir()
    if kind == "zip":
        zip_folder(loose / "a", tmp_path / "raw" / "a.zip")
    else:
        with tarfile.open(tmp_path / "raw" / "a.tar.gz", "w:gz") as package:
            package.add(loose / "a", ".")
    (loose / "b").rename(tmp_path / "raw" / "b")
    prepared = prepare_dataset(two_classes(), tmp_path / "raw", tmp_path / "out", progress=False)
    assert prepared.images == 2
    assert {i.name.split("_")[0] for i in list_images(tmp_path / "out")} == {"a", "b"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loose", "out", "raw"]


def test_only_images_and_archives_are_taken_out(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as package:
        for name in ("x/1.png", "read.me", "__MACOSX/x/1.png", "x/._1.png", "run.sh"):
            package.writestr(name, b"")
    with unpacked(find_archives(tmp_path), tmp_path / "out", progress=False) as folder:
        found = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    assert found == ["a/x/1.png"]


@pytest.mark.parametrize(
    "name", ["../evil.png", "/evil.png", "a/../../evil.png", "a\\..\\evil.png"]
)
def test_members_stay_inside(tmp_path, name):
    raw = tmp_path / "raw"
    raw.mkdir()
    with zipfile.ZipFile(raw / "a.zip", "w") as package:
        package.writestr(name, b"x")
    with tarfile.open(raw / "b.tar", "w") as package:
        package.addfile(tarfile.TarInfo(name), io.BytesIO())
    for archive in ("a.zip", "b.tar"):
        with pytest.raises(DataError, match=f"{archive}: member .* outside its folder"):
            with unpacked([raw / archive], tmp_path / "out", progress=False):
                pass
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.zip", "b.tar", "raw"]


def test_links_are_not_followed(tmp_path):
    info = tarfile.TarInfo("link.png")
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(tmp_path / "a.tar", "w") as package:
        package.addfile(info)
    with unpacked([tmp_path / "a.tar"], tmp_path / "out", progress=False) as folder:
        assert list(folder.rglob("*.png")) == []


def test_a_damaged_archive_is_named_and_leaves_nothing(tmp_path):
    raw = write_raw(tmp_path / "loose", ["a/1"])
    (tmp_path / "raw").mkdir()
    zip_folder(raw, tmp_path / "raw" / "a.zip")
    whole = (tmp_path / "raw" / "a.zip").read_bytes()
    (tmp_path / "raw" / "a.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.zip: damaged archive"):
        prepare_dataset(two_classes(), tmp_path / "raw", tmp_path / "out", progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loose", "raw"]
