"""Which images a prediction is for, and its files: names, shards, what is done already."""

from __future__ import annotations

import glob
import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from co2s_fast.data.rasters import open_source
from co2s_fast.engine.polygons import SUFFIX, read_polygons_signature
from co2s_fast.engine.scenes import PICTURES, RASTERS, VIRTUAL, is_raster, read_signature
from co2s_fast.errors import DataError, UsageError

_SAMPLES, _SAMPLE = 8, 64 << 10  # how many of a file, and of how many bytes
_WRITTEN_BY_VIEWERS = (".aux.xml", ".ovr")  # statistics and overviews beside an image


def find_images(images: Iterable[str | Path]) -> list[Path]:
    """Files named by paths, folders and glob patterns, without repeats, in the given order.

    Of a folder hidden files are left out, as patterns leave them out, and so are maps and what
    else `predict` has written there.
    """
    found: list[Path] = []
    for entry in images:
        path = Path(entry).expanduser()
        if path.is_dir():
            inside = [p for p in sorted(path.iterdir())
                      if p.suffix.lower() in PICTURES + RASTERS and not p.name.startswith(".")]
            made = {p for p in inside if p.suffix.lower() in (".png", ".tif") and read_signature(p)}
            inside = [p for p in inside if p not in made]
            if not inside:
                kinds = " ".join(PICTURES + RASTERS)
                found_there = "nothing but what `predict` has made" if made else "none"
                raise DataError(f"{path}: expected images ({kinds}), found {found_there} in the "
                                "folder")
            found += inside
        elif path.exists() or not glob.has_magic(str(path)):
            if not path.is_file():
                raise DataError(f"{path}: missing file")
            if path.suffix.lower() not in PICTURES + RASTERS + VIRTUAL:
                kinds = " ".join(PICTURES + RASTERS + VIRTUAL)
                raise DataError(f"{path}: expected an image ({kinds})")
            found.append(path)
        else:
            matches = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
            matches = [p for p in matches if p.suffix.lower() in PICTURES + RASTERS + VIRTUAL]
            if not matches:
                raise DataError(f"{path}: no image matches the pattern")
            found += matches
    if not found:
        raise UsageError("images: expected at least one file, folder or pattern, got none")
    return list(dict.fromkeys(found))


def beside(target: Path, kind: str) -> Path:
    """`a.overlay.png` for `a.png`."""
    return target.with_name(f"{target.stem}.{kind}{target.suffix}")


def parse_shard(text: str) -> tuple[int, int]:
    """`(i, n)` of "i/n": the i-th of n machines, counted from 1.

    Raises:
        UsageError: not two whole numbers with 1 <= i <= n.
    """
    first, slash, second = text.partition("/")
    if not (slash and first.isdecimal() and second.isdecimal()) or not (
        1 <= int(first) <= int(second)
    ):
        raise UsageError(f"--shard {text!r}: expected i/n with 1 <= i <= n, like 2/8")
    return int(first), int(second)


def take_shard(images: Sequence[Path], shard: tuple[int, int] | None) -> list[Path]:
    """Every n-th image from the i-th on; the shards of 1 to n have each image once."""
    if shard is None:
        return list(images)
    number, count = shard
    return list(images[number - 1 :: count])


def targets_in(out: Path, sources: Sequence[Path], kinds: Sequence[str] = ()) -> list[Path]:
    """The map of each image.

    Args:
        out: folder of the maps; of a single image also the map's own name, .tif or .png.
        sources: the images.
        kinds: of the rasters beside each map, see `files_of`.

    Raises:
        UsageError: two images would have the same file, a file would replace its image, or `out`
            is the name of a file that cannot be.
    """
    owners: dict[Path, Path] = {}
    targets = []
    named = names_file(out)
    if named and len(sources) > 1:
        raise UsageError(f"{out}: the name of one map, but there are {len(sources)} images; give a "
                         "folder")
    for source in sources:
        suffix = ".tif" if is_raster(source) else ".png"
        if named and out.suffix.lower() != suffix:
            raise UsageError(f"{out}: the map of {source} is a {suffix} file")
        targets.append(out if named else out / f"{source.stem}{suffix}")
        for path in files_of(targets[-1], kinds):
            if path in owners:
                raise UsageError(f"{owners[path]} and {source} would both be written to {path}")
            if path.exists() and path.samefile(source):
                raise UsageError(f"{source}: its map would replace it; choose another output "
                                 "folder")
            owners[path] = source
    return targets


def names_file(out: Path) -> bool:
    """Whether `out` is the name of a map, not of a folder."""
    return out.suffix.lower() in PICTURES + RASTERS and not out.is_dir()


def files_of(target: Path, kinds: Sequence[str]) -> list[Path]:
    """The map of an image, and the rasters beside it: "confidence", "overlay"."""
    return [target, *(beside(target, kind) for kind in kinds)]


def identity(image: Path) -> str:
    """A short name for what an image shows and where, the same wherever the file lies.

    Times do not count, as copies have others. Files of any size are not read as a whole: their
    sizes count and eight parts of each, the first and the last among them. A raster's are all that
    it consists of (sources of a VRT, world files, masks); its place and nodata count, too.
    """
    found = hashlib.sha256()
    for part in _parts_of_raster(image) if is_raster(image) else _samples(image):
        found.update(part)
    return found.hexdigest()[:32]


def _parts_of_raster(image: Path) -> Iterator[bytes]:
    with open_source(image) as source:
        header = source.transform[:6], str(source.crs), source.nodatavals
        files = [path for path in map(Path, source.files) if path.is_file()]
    yield repr(header).encode()
    for path in files:
        if path.suffix.lower() in VIRTUAL and not path.samefile(image):
            yield from _parts_of_raster(path)
        elif not path.name.lower().endswith(_WRITTEN_BY_VIEWERS):
            yield from _samples(path)


def _samples(path: Path) -> Iterator[bytes]:
    """Size and content of a file, of a large one `_SAMPLES` parts at equal distances."""
    size = path.stat().st_size
    yield f"{size} ".encode()
    with path.open("rb") as file:
        if size <= _SAMPLES * _SAMPLE:
            yield file.read()
            return
        for number in range(_SAMPLES):
            file.seek((size - _SAMPLE) * number // (_SAMPLES - 1))
            yield file.read(_SAMPLE)


def finished(owners: Mapping[Path, Path], kinds: Sequence[str], signature: Callable[[Path], str], *,
             overwrite: bool, polygons: bool) -> set[Path]:
    """The maps that are there with all that goes beside them, made as they would be made now.

    Args:
        owners: the image of each map, see `targets_in`.
        kinds: of the rasters beside each map.
        signature: of the run, the settings and an image.
        overwrite: whatever is there is replaced.
        polygons: GeoPackages are written, too; a map that lacks its own is finished nonetheless.

    Raises:
        UsageError: a file is there that `predict` has not made, a mask for example.
    """
    if overwrite:
        return set()
    done = set()
    for target, source in owners.items():
        found = {path: read_signature(path) for path in files_of(target, kinds)}
        if polygons:
            package = target.with_suffix(SUFFIX)
            found[package] = read_polygons_signature(target)
        foreign = [path for path, made in found.items() if made == ""]
        if foreign:
            raise UsageError(f"{foreign[0]}: is there, and `predict` has not made it; choose "
                             "another output folder, or replace it (--overwrite)")
        made = {found[path] for path in files_of(target, kinds)}
        if None not in made and made == {signature(source)}:
            done.add(target)
    return done


def check_writable(folder: Path) -> None:
    """Make the folder where it is missing; a UsageError where nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(
            f"output folder {folder}: cannot be written to ({error.strerror})"
        ) from None
