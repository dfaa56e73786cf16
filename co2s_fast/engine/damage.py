"""The count of damaged files that a run has met: each named once, and the end above the limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from co2s_fast.data.damage import Damaged, too_many
from co2s_fast.engine.distributed import gather_objects
from co2s_fast.engine.log import RunLog
from co2s_fast.errors import DataError


class DamageTally:
    """Distinct damaged images over all ranks, from the first step of a run on.

    Args:
        limit: how many may be met.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.known: dict[str, str] = {}  # file -> reason
        self._met: list[tuple[int, Damaged]] = []

    def meet(self, step: int, damaged: Sequence[Damaged]) -> None:
        """Remember what this rank's batch of a step had to skip. No other rank is asked."""
        self._met += [(step, each) for each in damaged if each.file not in self.known]

    @property
    def pending(self) -> bool:
        """Whether this rank has met something that `settle` has not seen."""
        return bool(self._met)

    def settle(self, log: RunLog | None) -> None:
        """Name the files that are new to all ranks in the log; every rank must call.

        Raises:
            DataError: there are more than the limit; lists them.
        """
        met = sorted((step, each.file, each.reason)
                     for found in gather_objects(self._met) for step, each in found)
        self._met = []
        for step, file, reason in met:
            if file in self.known:
                continue
            self.known[file] = reason
            count = len(self.known)
            if log is not None:
                log.tell({"kind": "damaged", "step": step, "file": file, "reason": reason,
                          "count": count, "limit": self.limit},
                         f"damaged file {count} (of {self.limit} allowed), skipped from step "
                         f"{step} on: {reason}")
        if len(self.known) > self.limit:
            raise DataError(too_many(list(self.known.values()), self.limit))

    def restore(self, known: Mapping[str, str]) -> None:
        """Go on with the count of a checkpoint."""
        self.known = dict(known)
