"""Finding raw files by templates with named fields, and pairing images with masks."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from co2s_fast.data.catalogue import DatasetSpec, FilesSpec
from co2s_fast.errors import DataError, UsageError

_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Source:
    """One raw image, its mask if it has one, and the group it belongs to."""

    image: Path
    label: Path | None
    group: str


def fields(template: str) -> list[str]:
    """Names of the fields of a template, in order."""
    return _FIELD.findall(template)


def pattern(template: str) -> re.Pattern[str]:
    """The regular expression of a template; a field matches anything but a slash."""
    out, seen, end = "", set(), 0
    for match in _FIELD.finditer(template):
        name = match[1]
        out += re.escape(template[end : match.start()])
        out += f"(?P={name})" if name in seen else f"(?P<{name}>[^/]+)"
        seen.add(name)
        end = match.end()
    return re.compile(out + re.escape(template[end:]))


def check_templates(files: FilesSpec) -> None:
    """Raise UsageError where `labels` or `group` has fields that `images` has not."""
    known = set(fields(files.images))
    problems = [f"files.{key}: field {{{name}}} is not in files.images {files.images!r}"
                for key in ("labels", "group") for name in fields(getattr(files, key) or "")
                if name not in known]
    if not known:
        problems.append(f"files.images {files.images!r}: has no field like {{name}}")
    if problems:
        raise UsageError("; ".join(problems))


def find_sources(raw: Path, spec: DatasetSpec) -> list[Source]:
    """All images below raw that match the dataset's template, sorted, with their masks.

    Raises:
        UsageError: the dataset declares no templates, or wrong ones.
        DataError: no such folder, no match, or masks that no image belongs to.
    """
    if spec.files is None:
        raise UsageError(f"dataset {spec.name!r} does not say how its raw files pair up: add "
                         "`files: {images: ..., labels: ...}` to its description")
    check_templates(spec.files)
    if not raw.is_dir():
        raise DataError(f"raw folder {raw}: missing")
    names = sorted(
        Path(folder, name).relative_to(raw).as_posix()
        for folder, _, files in os.walk(raw, followlinks=True) for name in files
    )
    image_pattern = pattern(spec.files.images)
    sources = [_source(raw, name, match, spec.files)
               for name in names if (match := image_pattern.fullmatch(name))]
    if not sources:
        found = f"found {', '.join(names[:3])}, ..." if names else "found no files"
        raise DataError(f"{raw}: no file matches {spec.files.images!r}; {found}")
    _check_masks(raw, names, sources, spec.files)
    return sources


def _source(raw: Path, name: str, match: re.Match[str], files: FilesSpec) -> Source:
    values = match.groupdict()
    label = raw / files.labels.format_map(values) if files.labels else None
    group = files.group.format_map(values) if files.group else Path(name).with_suffix("").as_posix()
    return Source(raw / name, label if label is not None and label.is_file() else None, group)


def _check_masks(raw: Path, names: list[str], sources: list[Source], files: FilesSpec) -> None:
    if not files.labels:
        return
    mask_pattern = pattern(files.labels)
    paired = {source.label for source in sources}
    alone = [n for n in names if mask_pattern.fullmatch(n) and raw / n not in paired
             and not pattern(files.images).fullmatch(n)]
    if alone:
        raise DataError(f"{raw}: {len(alone)} masks have no image, for example {alone[0]}")
    if not any(paired):
        raise DataError(f"{raw}: no mask matches {files.labels!r} for any of {len(sources)} images")
