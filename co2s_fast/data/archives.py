"""Raw releases as they are downloaded: zip and tar archives, also archives inside archives."""

from __future__ import annotations

import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath, PurePosixPath
from typing import IO

from tqdm import tqdm

from co2s_fast.data.tiles import SUFFIXES
from co2s_fast.data.writing import naming
from co2s_fast.errors import DataError

ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_DEPTH = 3  # Potsdam is a zip of zips


def ending(path: Path) -> str | None:
    """The archive ending of a file name, else None."""
    name = path.name.lower()
    return next((e for e in sorted(ENDINGS, key=len, reverse=True) if name.endswith(e)), None)


def find_archives(folder: Path) -> list[Path]:
    """The archives below a folder, sorted; the file itself where an archive is given."""
    if folder.is_file():
        return [folder] if ending(folder) else []
    return sorted(p for p in folder.rglob("*")
                  if ending(p) and p.is_file() and not is_hidden(p.relative_to(folder)))


def is_hidden(path: PurePath) -> bool:
    """Whether a relative path has a part that begins with a dot, or is of a Mac's archives.

    Drives that a Mac wrote to hold a `._a.jpg`, which is no image, beside each `a.jpg`.
    """
    names = set(path.parts) - {".", ".."}
    return any(name.startswith(".") or name == "__MACOSX" for name in names)


@contextmanager
def unpacked(archives: list[Path], beside: Path, progress: bool = True) -> Iterator[Path | None]:
    """A temporary folder with the images of the archives; None where there is no archive.

    `a/b.zip` becomes the folder `b/`. Only images and further archives are taken out.

    Args:
        archives: what `find_archives` found.
        beside: the folder is made beside this path, so that it lies on the same disk.
        progress: draw a bar for each archive.

    Raises:
        DataError: an archive is damaged, or a member would land outside the folder.
    """
    if not archives:
        yield None
        return
    beside.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{beside.name}.", dir=beside.parent) as made:
        root = Path(made)
        for archive in archives:
            _unpack(archive, root / _stem(archive), progress, _DEPTH)
        yield root


def _stem(archive: Path) -> str:
    return archive.name[: -len(ending(archive) or "")]


def _unpack(archive: Path, target: Path, progress: bool, depth: int) -> None:
    if depth == 0:
        raise DataError(f"{archive}: archives nested more than {_DEPTH} deep")
    inner: list[Path] = []
    try:
        members = _members(archive)
        for name, open_member in tqdm(members, desc=archive.name, unit="file", leave=False,
                                      disable=not progress):  # fmt: skip
            path = target / _inside(archive, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            with naming(path), open_member() as source, path.open("wb") as written:
                shutil.copyfileobj(source, written, 1 << 20)
            if ending(path):
                inner.append(path)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, RuntimeError) as error:
        raise DataError(f"{archive}: damaged archive ({error})") from error
    for path in inner:
        _unpack(path, path.parent / _stem(path), progress, depth - 1)
        path.unlink()


def _members(archive: Path) -> Iterator[tuple[str, object]]:
    """(name, function that opens it) of each image and archive in an archive, in its order."""
    if ending(archive) == ".zip":
        with zipfile.ZipFile(archive) as package:
            for info in package.infolist():
                if not info.is_dir() and _wanted(info.filename):
                    yield info.filename, lambda info=info: package.open(info)
    else:
        with tarfile.open(archive) as package:
            for info in package:
                if info.isfile() and _wanted(info.name):  # no links, no devices
                    yield info.name, lambda info=info: _tar_member(package, info)


def _tar_member(package: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    member = package.extractfile(info)
    assert member is not None  # `isfile` was asked before
    return member


def _wanted(name: str) -> bool:
    path = PurePosixPath(name)
    kind = path.suffix.lower() in SUFFIXES or ending(Path(path.name)) is not None
    return kind and not is_hidden(path)


def _inside(archive: Path, name: str) -> PurePosixPath:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
        raise DataError(f"{archive}: member {name!r} would be written outside its folder")
    return path
