"""Pictures that are in both training and validation: what the fingerprints say about the lists."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from co2s_fast.data.duplicates import Fingerprint, Likeness
from co2s_fast.data.files import Item
from co2s_fast.data.integrity import Finding
from co2s_fast.data.splits import Split

KIND = "duplicate"


def duplicate_findings(items: Sequence[Item], prints: Sequence[Fingerprint | None],
                       splits: Sequence[Split]) -> list[Finding]:
    """What like pictures mean for the lists.

    A validation image that shows the same as a training image of the same split is a problem, one
    finding each, with its closest training image. All other like images are one warning: within a
    list they do no harm, and where no split has been made yet they may end up on both sides.
    """
    likeness = Likeness(prints)
    paths = [item.image for item in items]
    index = {path: i for i, path in enumerate(paths)}
    findings: dict[Path, Finding] = {}
    leaking: set[int] = set()
    for val, train in _sides(splits):
        trained = {index[path] for path in train if path in index}
        for path in sorted(val & index.keys()):
            found = [each for each in likeness.like(index[path]) if each[0] in trained]
            if found:
                findings.setdefault(path, _leak(path, found, paths))
                leaking |= {index[path], *(other for other, _ in found)}
    rest = {i: other for i in range(len(paths)) if i not in leaking
            for other in likeness.like(i)}
    found = [findings[path] for path in sorted(findings)]
    return [*found, _harmless(rest, paths, bool(splits))] if rest else found


def _sides(splits: Sequence[Split]) -> list[tuple[frozenset[Path], set[Path]]]:
    """(validation images, training images); splits of one validation list are taken together."""
    sides: dict[frozenset[Path], set[Path]] = {}
    for split in splits:
        val = frozenset(item.image for item in split.val)
        train = {item.image for item in (*split.labeled, *split.unlabeled)}
        sides.setdefault(val, set()).update(train - val)
    return list(sides.items())


def _leak(val: Path, found: Sequence[tuple[int, int | None]], paths: Sequence[Path]) -> Finding:
    other, distance = min(found, key=lambda each: (-1 if each[1] is None else each[1], each[0]))
    more = f", and as {len(found) - 1} more" if len(found) > 1 else ""
    message = (f"validation image {val} shows the same as training image {paths[other]} "
               f"({_how(distance)}){more}")
    return Finding(KIND, message, (str(val), str(paths[other])))


def _harmless(like: dict[int, tuple[int, int | None]], paths: Sequence[Path],
              split: bool) -> Finding:
    first = min(like)
    other, distance = like[first]
    names = (str(paths[first]), str(paths[other]))
    advice = ("none of them in both training and validation" if split else
              "give them one group, or a split may put them into both training and validation")
    message = (f"{len(like)} images show the same as another one, for example {names[0]} and "
               f"{names[1]} ({_how(distance)}); {advice}")
    return Finding(KIND, message, names, "warning")


def _how(distance: int | None) -> str:
    if distance is None:
        return "equal pixels"
    return f"perceptual hashes differ in {distance} of 64 bits"
