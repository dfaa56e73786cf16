"""Files that cannot be read while a run trains: which image takes their place, and when to give up.

The substitute is a function of (seed, step) and of which files are damaged, and of nothing else:
not of the rank, the worker, or what was read before. So the same damaged files give the same
batches, in every pipeline, and after resuming.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from co2s_fast.data.files import Item
from co2s_fast.data.plan import Plan
from co2s_fast.errors import DataError

T = TypeVar("T")
_SHOWN = 20


@dataclass(frozen=True)
class Damaged:
    """A training image that was skipped.

    Args:
        file: folder and name of the image, `images/a.png`.
        reason: one line that names the file and says what is wrong with it or with its label.
    """

    file: str
    reason: str

    @classmethod
    def of(cls, item: Item, error: DataError) -> Damaged:
        """What an error says about an image."""
        return cls("/".join(item.image.parts[-2:]), str(error))


@dataclass(frozen=True)
class Reading(Generic[T]):
    """What was read for one place of a batch, from which image, and what had to be skipped."""

    content: T
    item: Item
    damaged: tuple[Damaged, ...] = ()


def read_place(plan: Plan, stream: int, step: int, position: int,
               read: Callable[[Item], T]) -> Reading[T]:
    """Read the image of a place, or the first usable one of those that can take its place.

    Args:
        plan: the run's plan; its `candidates` are tried in turn.
        stream: LABELED or UNLABELED.
        step: of the batch.
        position: in the global batch.
        read: reads an image (and its label); a DataError means that it cannot be used.

    Raises:
        DataError: more images in a row are damaged than `plan.max_damaged`, or all there are.
    """
    failed: dict[Item, Damaged] = {}
    for item in plan.candidates(stream, step, position):
        if item in failed:
            continue
        try:
            return Reading(read(item), item, tuple(failed.values()))
        except DataError as error:
            failed[item] = Damaged.of(item, error)
        if len(failed) > plan.max_damaged or len(failed) == plan.count(stream):
            break
    raise DataError(too_many([each.reason for each in failed.values()], plan.max_damaged))


def too_many(reasons: Sequence[str], limit: int) -> str:
    """The line that ends a run: every damaged file, and the limit."""
    shown = "; ".join(reasons[:_SHOWN])
    left = len(reasons) - _SHOWN
    more = f" (and {left} more, see metrics.jsonl)" if left > 0 else ""
    files = "1 damaged file" if len(reasons) == 1 else f"{len(reasons)} damaged files"
    verdict = f"data.max_damaged allows {limit}" if len(reasons) > limit else "no other is left"
    return f"{files} met in training, {verdict}: {shown}{more}"
