"""Finding raw files by templates with named fields, and pairing images with masks."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from co2s_fast.data.archives import is_hidden
from co2s_fast.data.catalogue import DatasetSpec, FilesSpec, TileSpec
from co2s_fast.data.tiles import RECORD, SUFFIXES, composed
from co2s_fast.errors import DataError, UsageError

_FIELD = re.compile(r"\{(\w+)\}")
ANYWHERE = "**/"
TILE_FIELDS = ("x1", "y1", "x2", "y2", "row", "column")


@dataclass(frozen=True, eq=False)
class Source:
    """One raw image, its mask if it has one, and what its layout says of it.

    Args:
        name: path of the image below the raw folder.
        image: where it is.
        label: where its mask is.
        group: the unit that is never in both training and validation.
        files: the layout that it matched.
        fields: the fields of `files.images` and what they matched.
    """

    name: str
    image: Path
    label: Path | None
    group: str
    files: FilesSpec
    fields: tuple[tuple[str, str], ...] = ()


def fields(template: str) -> list[str]:
    """Names of the fields of a template, in order."""
    return _FIELD.findall(template)


def match_template(template: str, name: str) -> re.Match[str] | None:
    """Whether a path below the raw folder is one of a template, and what its fields match.

    A field matches anything but a slash. The case of the ending does not matter, nor how accented
    letters are composed.
    """
    return pattern(composed(template)).fullmatch(composed(name))


@lru_cache(maxsize=64)
def pattern(template: str) -> re.Pattern[str]:
    """The regular expression of a template."""
    out, seen, end = "", set(), 0
    if template.startswith(ANYWHERE):
        out, end = "(?:.*/)?", len(ANYWHERE)
    for match in _FIELD.finditer(template):
        name = match[1]
        out += re.escape(template[end : match.start()])
        out += f"(?P={name})" if name in seen else f"(?P<{name}>[^/]+)"
        seen.add(name)
        end = match.end()
    rest, ending = posixpath.splitext(f"{{}}{template[end:]}")
    return re.compile(f"{out}{re.escape(rest[2:])}(?i:{re.escape(ending)})")


def check_templates(files: FilesSpec, tile: TileSpec) -> None:
    """Raise UsageError where another template has fields that `images` has not."""
    known = set(fields(files.images))
    problems = [f"files.{key}: field {{{name}}} is not in files.images {files.images!r}"
                for key in ("labels", "group") for name in fields(getattr(files, key) or "")
                if name not in known]
    problems += [f"tile.name: field {{{name}}} is not in files.images {files.images!r}, nor one of "
                 f"{', '.join(TILE_FIELDS)}"
                 for name in fields(tile.name or "") if name not in known | set(TILE_FIELDS)]
    if not known:
        problems.append(f"files.images {files.images!r}: has no field like {{name}}")
    if problems:
        raise UsageError("; ".join(problems))


def list_files(root: Path, without: Path | None = None) -> list[str]:
    """All files below a folder, as sorted relative paths with forward slashes.

    Hidden ones are left out, and folders in it that `data prepare` made.

    Args:
        root: the folder.
        without: what lies below this one is left out.
    """
    paths = []
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not _is_prepared(Path(folder, name))
                      and (without is None or Path(folder, name).resolve() != without)]
        paths += [Path(folder, name).relative_to(root) for name in files]
    return sorted(path.as_posix() for path in paths if not is_hidden(path))


def prepared_folders(root: Path) -> list[Path]:
    """The folders below one that `data prepare` made, and that `list_files` leaves out."""
    found = []
    for folder, folders, _ in os.walk(root, followlinks=True):
        made = [name for name in folders if _is_prepared(Path(folder, name))]
        folders[:] = [name for name in folders if name not in made]
        found += [Path(folder, name) for name in made]
    return sorted(found)


def _is_prepared(folder: Path) -> bool:
    return (folder / RECORD).is_file()


def find_sources(raw: Path, spec: DatasetSpec, more: Path | None = None,
                 without: Path | None = None) -> list[Source]:
    """All images below raw that match one of the dataset's layouts, sorted, with their masks.

    Args:
        raw: folder of the raw files.
        spec: its layouts are tried in order; the first that any image matches is taken.
        more: a second folder that counts as part of the first, for unpacked archives.
        without: a folder below raw whose files do not count.

    Raises:
        UsageError: the dataset declares no templates, or wrong ones.
        DataError: no such folder, no match, two masks of one image, or masks without an image.
    """
    if not spec.layouts:
        raise UsageError(f"dataset {spec.name!r} does not say how its raw files pair up: add "
                         "`files: {images: ..., labels: ...}` to its description")
    for files in spec.layouts:
        check_templates(files, files.tile or spec.tile)
    if not raw.exists():
        raise DataError(f"raw folder {raw}: missing")
    paths = {name: root / name for root in (more, raw) if root is not None and root.is_dir()
             for name in list_files(root, without)}
    for files in spec.layouts:
        if sources := _layout(raw, paths, files):
            return sources
    names = sorted(paths)
    found = f"found {', '.join(names[:3])}, ..." if names else "found no files"
    wanted = " or ".join(repr(files.images) for files in spec.layouts)
    made = [path for path in prepared_folders(raw) if path.resolve() != without]
    if made:
        found += f"; {made[0]} was made by `data prepare` and does not count"
    raise DataError(f"{raw}: no file matches {wanted}; {found}")


def overlooked(sources: Sequence[Source], names: Iterable[str]) -> list[str]:
    """Files that lie beside images and end as images do, yet match no template.

    Args:
        sources: what `find_sources` returned.
        names: all files below the raw folder, relative to it.
    """
    folders = {posixpath.dirname(source.name) for source in sources}
    endings = {*SUFFIXES, *(posixpath.splitext(source.name)[1].lower() for source in sources)}
    files = sources[0].files
    templates = [template for template in (files.images, files.labels) if template]
    return [name for name in names
            if posixpath.dirname(name) in folders
            and posixpath.splitext(name)[1].lower() in endings
            and not any(match_template(each, name) for each in templates)]


def _layout(raw: Path, paths: dict[str, Path], files: FilesSpec) -> list[Source]:
    """The sources of one layout, empty where no image matches it."""
    images = {name: match.groupdict() for name in sorted(paths)
              if (match := match_template(files.images, name))}
    if not images or not files.labels:
        return [_source(name, paths, values, files, None) for name, values in images.items()]
    wanted = {_mask_key(files.labels, values) for values in images.values()}
    rather_image = _fixed(files.labels) <= _fixed(files.images)
    masks: dict[str, str] = {}
    for name in sorted(paths):
        match = match_template(files.labels, name)
        if match is None:
            continue
        key = _mask_key(files.labels, match.groupdict())
        if name in images and key not in wanted and rather_image:
            continue  # both templates match it, and no image has it for a mask
        if key in masks:
            raise DataError(f"{raw}: two masks for one image, {masks[key]} and {name}")
        masks[key] = name
    images = {name: values for name, values in images.items() if name not in masks.values()}
    taken = {name: masks.get(_mask_key(files.labels, values)) for name, values in images.items()}
    alone = sorted(set(masks.values()) - set(taken.values()))
    if alone:
        raise DataError(f"{raw}: {len(alone)} masks have no image, for example {alone[0]}")
    if not any(taken.values()):
        raise DataError(f"{raw}: no mask matches {files.labels!r} for any of {len(images)} images")
    return [_source(name, paths, values, files, taken[name]) for name, values in images.items()]


def _fixed(template: str) -> int:
    """How much of a template is not fields: the more of it, the more a name that matches says."""
    return len(_FIELD.sub("", template.removeprefix(ANYWHERE)))


def _mask_key(template: str, values: dict[str, str]) -> str:
    """What an image and its mask have in common; endings in capitals are no other ones."""
    stem, ending = posixpath.splitext(template.format_map(values))
    return stem + ending.lower()


def _source(
    name: str, paths: dict[str, Path], values: dict[str, str], files: FilesSpec, mask: str | None
) -> Source:
    group = (files.group.format_map(values) if files.group
             else Path(composed(name)).with_suffix("").as_posix())
    return Source(name, paths[name], paths[mask] if mask else None, group, files,
                  tuple(values.items()))
