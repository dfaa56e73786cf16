"""How raw images and masks pair up, guessed from the names of folders and files."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import chain, islice, takewhile
from pathlib import Path, PurePosixPath

from co2s_fast.data.tiles import composed
from co2s_fast.errors import DataError

WORDS = ("mask", "masks", "label", "labels", "lbl", "gt", "groundtruth", "truth", "ann",
          "anns", "annotation", "annotations", "seg", "segmentation", "segmentationclass",
         "target", "targets")  # fmt: skip
"""Parts of a name that say mask."""

VECTORS = (".gpkg", ".geojson", ".shp", ".fgb", ".gml")
"""Endings of files of polygons."""

FIELDS = ("scene", "area", "region", "site")
_SPLIT = re.compile(r"[^A-Za-z]+")
_VOTERS = 500
_HINT = 'give --images and --labels, such as --images "{scene}/rgb/{part}.tif"'


def guess_templates(names: Sequence[str], raw: Path) -> tuple[str, str]:
    """Templates of images and masks, as `FilesSpec` has them.

    A file is a mask where a folder above it, or the beginning or end of its name, says so. Folders
    that differ between images become fields; so does what is left of the names when prefixes and
    suffixes that all have (`_RGB`, `_mask`) are taken away. Without such masks, polygons are masks.

    Args:
        names: paths of all pictures and polygons below the raw folder, with forward slashes.
        raw: the folder, for messages.

    Raises:
        DataError: nothing that looks like images and masks of one layout.
    """
    every = [PurePosixPath(composed(name)) for name in names]
    paths = [path for path in every if path.suffix.lower() not in VECTORS]
    shared = _shared_folders(paths)
    images = [path for path in paths if not says_mask(path, shared)]
    masks = ([path for path in paths if says_mask(path, shared)]
             or [path for path in every if path.suffix.lower() in VECTORS])
    if not images or not masks:
        what = "masks" if images else "images"
        shown = ", ".join(names[:3]) if names else "nothing"
        raise DataError(f"{raw}: found no {what} by the names of files and folders (mask, label, "
                        f"gt, ... tell masks), found {shown}; {_HINT}")
    if _is_of_all(masks, images):
        fixed, masks = str(masks[0]), images
    else:
        fixed = None
    depths = {len(path.parts) for path in [*images, *masks]}
    if len(depths) > 1:
        raise DataError(f"{raw}: images and masks lie {min(depths) - 1} to {max(depths) - 1} "
                        f"folders deep, for example {images[0]} and {masks[0]}; {_HINT}")
    image_folders, mask_folders = _folders(images, masks, raw)
    before, after, mask_before, mask_after = _affixes(images, masks)
    template = "/".join([*image_folders, f"{before}{{name}}{after}{_ending(images, 'type')}"])
    if fixed is not None:
        return template, fixed
    ending = _ending(masks, None, raw)
    return template, "/".join([*mask_folders, f"{mask_before}{{name}}{mask_after}{ending}"])


def _is_of_all(masks: Sequence[PurePosixPath], images: Sequence[PurePosixPath]) -> bool:
    """The only mask is a file of polygons that has not the name of an image: all lie in it."""
    return (len(masks) == 1 < len(images) and masks[0].suffix.lower() in VECTORS
            and masks[0].stem not in {image.stem for image in images})


def _shared_folders(paths: Sequence[PurePosixPath]) -> set[int]:
    """Levels at which all paths lie in the same folder, whose name thus tells nothing."""
    least = min((len(path.parts) for path in paths), default=1)
    return {level for level in range(least - 1) if len({p.parts[level] for p in paths}) == 1}


def says_mask(path: PurePosixPath, shared: Collection[int] = ()) -> bool:
    """Whether a folder of a path, or the beginning or end of its name, is one of `WORDS`.

    Args:
        path: below the raw folder.
        shared: levels of folders that do not count.
    """
    folders = [part for level, part in enumerate(path.parts[:-1]) if level not in shared]
    words = [_SPLIT.split(folder.lower()) for folder in folders]
    own = [word for word in _SPLIT.split(path.stem.lower()) if word]
    return any(word in WORDS for word in [*chain(*words), *own[:1], *own[-1:]])


def _folders(images: Sequence[PurePosixPath], masks: Sequence[PurePosixPath], raw: Path
             ) -> tuple[list[str], list[str]]:
    """The folders of both templates: literal where all are alike, else a field."""
    found: tuple[list[str], list[str]] = ([], [])
    free = iter(FIELDS)
    for level in range(len(images[0].parts) - 1):
        sides = [sorted({path.parts[level] for path in side}) for side in (images, masks)]
        if all(len(side) == 1 for side in sides):
            for template, side in zip(found, sides, strict=True):
                template.append(side[0])
            continue
        if not set(sides[1]) <= set(sides[0]):
            raise DataError(f"{raw}: masks lie in folders {', '.join(sides[1][:3])}, images in "
                            f"{', '.join(sides[0][:3])}; {_HINT}")
        name = next(free, f"folder{level}")
        for template in found:
            template.append(f"{{{name}}}")
    return found


def _affixes(images: Sequence[PurePosixPath], masks: Sequence[PurePosixPath]
             ) -> tuple[str, str, str, str]:
    """What stands before and after the common part in the names of images, and of masks."""
    stems = sorted({path.stem for path in images})
    known, votes = set(stems), Counter()
    for mask in masks[:: max(len(masks) // _VOTERS, 1)]:
        for base, before, after in _bases(mask.stem):
            if base in known:
                votes["", "", before, after] += 1
                continue
            alike = takewhile(lambda stem, base=base: stem.startswith(base),
                              islice(stems, bisect_left(stems, base), None))
            votes.update({("", stem[len(base) :], before, after) for stem in alike
                          if not stem[len(base)].isalnum()})
    # Of those that as many masks vote for, what takes least away.
    return max(votes, key=lambda v: (votes[v], -len("".join(v))), default=("", "", "", ""))


def _bases(stem: str) -> list[tuple[str, str, str]]:
    """(rest, prefix, suffix) of a mask's name: as it is, and without a word that says mask."""
    found = [(stem, "", "")]
    if match := re.fullmatch(r"(.+?)([^A-Za-z0-9]+([A-Za-z]+))", stem):
        found += [(match[1], "", match[2])] if match[3].lower() in WORDS else []
    if match := re.fullmatch(r"(([A-Za-z]+)[^A-Za-z0-9]+)(.+)", stem):
        found += [(match[3], match[1], "")] if match[2].lower() in WORDS else []
    return found


def _ending(paths: Sequence[PurePosixPath], field: str | None, raw: Path | None = None) -> str:
    """The file ending all paths have, in capitals or not; a field where they differ."""
    endings = sorted({path.suffix.lower() for path in paths})
    if len(endings) == 1:
        return endings[0]
    if field is None:
        raise DataError(f"{raw}: masks end with {', '.join(endings)}, expected one kind: save them "
                        f"alike, or if those of one kind are the masks, {_HINT}")
    return f".{{{field}}}"
