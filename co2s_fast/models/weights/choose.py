"""`--clip NAME|FILE` and `--ssm NAME|FILE`: from weights to the configuration of a student."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from co2s_fast.errors import UsageError
from co2s_fast.models.inflate import NORMALIZATION
from co2s_fast.models.weights.convert import describe
from co2s_fast.models.weights.files import is_file_name
from co2s_fast.models.weights.registry import Kind, entry_named
from co2s_fast.models.weights.store import require

BACKBONES = {"clip": "clip", "ssm": "timm"}

# What belongs to a backbone and its weights: it goes when they are exchanged.
OF_THE_MODEL = (
    "backbone", "model", "weights", "overrides", "levels", "stem", "skips", "queries", "text",
    "activation", "eps", "rope", "normalization", "mean", "std", "odd_sizes",
)  # fmt: skip


def students_for(clip: Sequence[str], ssm: Sequence[str]) -> dict[str, dict[str, Any] | None]:
    """The students that `--clip` and `--ssm` ask for.

    One of a kind replaces the student of that name, `clip` or `ssm`. Two of a kind are `clip` and
    `clip2`, or `ssm` and `ssm2`, and the student of the other kind goes.

    Returns:
        Student name -> settings of `StudentConfig`, None for a student that goes.

    Raises:
        UsageError: more than two. UsageError, DataError: see `settings` and `require`.
    """
    if len(clip) + len(ssm) > 2:
        raise UsageError(
            f"--clip and --ssm: expected at most two students, got {len(clip) + len(ssm)}"
        )
    chosen: dict[str, dict[str, Any] | None] = {}
    for kind, other, given in (("clip", "ssm", clip), ("ssm", "clip", ssm)):
        for number, value in enumerate(given, 1):
            if not is_file_name(value):
                require(entry_named(value, kind))  # before data is prepared for nothing
            chosen[kind if number == 1 else f"{kind}{number}"] = settings(kind, value)
        if len(given) == 2:
            chosen[other] = None
    return chosen


def settings(kind: Kind, value: str) -> dict[str, Any]:
    """A student's backbone, model, weights, levels, queries and normalisation.

    Args:
        kind: "clip" or "ssm".
        value: a known name, or a file of a known layout.

    Raises:
        UsageError: an unknown name. DataError: see `describe`.
    """
    if is_file_name(value):
        about = describe(Path(value), kind)
        found: dict[str, Any] = {"model": about.model, "weights": str(Path(value).resolve())}
        found |= _normalization(about.mean, about.std)
        overrides, depth, patch, text = about.overrides, about.depth, about.patch, about.text
    else:
        entry = entry_named(value, kind)
        found = {"model": entry.model, "weights": entry.name}
        found["normalization"] = entry.normalization
        overrides, depth, patch, text = dict(entry.overrides), entry.depth, entry.patch, True
    found |= {"backbone": BACKBONES[kind], "levels": levels(kind, depth)}
    if overrides:
        found["overrides"] = overrides
    if patch & (patch - 1):  # no power of two, and so no divisor of the usual crops
        found["odd_sizes"] = "resize"
    if kind == "clip" and text:
        found["text"] = {"model": found["model"], "weights": found["weights"]}
    return found


def levels(kind: Kind, depth: int) -> list[int]:
    """The paper's levels, (0, 4, 12) and (2, 7, 11) of 12 blocks, for a model of another depth."""
    if kind == "clip":
        return [0, round(depth / 3), depth]
    return [max(round(depth * share / 12) - 1, number) for number, share in enumerate((3, 8, 12))]


def _normalization(mean: tuple[float, ...], std: tuple[float, ...]) -> dict[str, Any]:
    """By name where it has one: a name holds for any number of bands."""
    for rule, pair in NORMALIZATION.items():
        if pair == (mean, std):
            return {"normalization": rule}
    return {"mean": list(mean), "std": list(std)}


def put_students(
    content: dict[str, Any], chosen: dict[str, dict[str, Any] | None]
) -> dict[str, Any]:
    """A recipe's content with other backbones: what else it says of a student stays.

    A second student of a kind takes over what the recipe says of the first, unless it has one.
    """
    students = dict(content.get("students", {}))
    for name, found in chosen.items():
        if found is None:
            students.pop(name, None)
            continue
        there = content.get("students", {})
        before = there.get(name) or there.get(name.rstrip("2")) or {}
        kept = {key: value for key, value in before.items() if key not in OF_THE_MODEL}
        students[name] = {**kept, **found}
    return {**content, "students": students}
