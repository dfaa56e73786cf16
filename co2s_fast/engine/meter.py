"""Sums of a step's outputs that stay on the device, and the guard against values not finite."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from co2s_fast.engine.distributed import gather_objects, sum_over_ranks
from co2s_fast.errors import DataError

NEVER = 2**62


class NonFiniteLossError(DataError):
    """A loss term became NaN or infinite. The message names the term, the step and the files."""


class Meter:
    """Adds up every output of a method over the steps between two log records.

    Losses and counts are stacked by dtype and added in float64 on the device: a handful of kernels
    a step, and no synchronisation before `fetch`.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.steps_before = 0  # of these, those before a restart
        self._keys: list[str] = []
        self._sums: Tensor | None = None
        self._restored: dict[str, float] = {}

    def add(self, outputs: Mapping[str, Tensor]) -> None:
        """Add one step's outputs; the same keys at every step of a window."""
        floats = [key for key in outputs if outputs[key].is_floating_point()]
        counts = [key for key in outputs if not outputs[key].is_floating_point()]
        parts = [torch.stack([outputs[k].detach() for k in group]) for group in (floats, counts)
                 if group]  # fmt: skip
        values = torch.cat([part.to(torch.float64) for part in parts])
        self._keys = floats + counts
        self._sums = values if self._sums is None else self._sums + values
        self.steps += 1

    def fetch(self) -> dict[str, float]:
        """Sums over all ranks and all steps since the last `reset`; every rank must call."""
        sums = dict(self._restored)
        if self._sums is not None:
            values = sum_over_ranks(self._sums.clone()).tolist()
            for key, value in zip(self._keys, values, strict=True):
                sums[key] = sums.get(key, 0.0) + value
        return sums

    def reset(self) -> None:
        """Begin a new window."""
        self.steps, self.steps_before, self._sums, self._restored = 0, 0, None, {}

    def restore(self, steps: int, sums: Mapping[str, float]) -> None:
        """Go on with a window that a checkpoint cut in two."""
        self.reset()
        self.steps = self.steps_before = steps
        self._restored = dict(sums)


class FiniteGuard:
    """Remembers, on the device, the first step at which each loss term was not finite.

    Args:
        eager: look at every step before the weights change (a CPU needs no synchronisation for
            that); otherwise only when `check` is called.
    """

    def __init__(self, *, eager: bool) -> None:
        self.eager = eager
        self._keys: list[str] = []
        self._first: Tensor | None = None
        self._files: dict[int, list[str]] = {}

    def watch(self, step: int, losses: Mapping[str, Tensor], files: list[str]) -> None:
        """Look at the losses of one step.

        Raises:
            NonFiniteLossError: one is not finite, and the guard is eager.
        """
        self._files[step] = files
        keys = [key for key in losses if losses[key].is_floating_point()]
        finite = torch.isfinite(torch.stack([losses[key].detach() for key in keys]))
        first = torch.where(finite, NEVER, step)
        if self._first is not None:
            first = torch.minimum(first, self._first)
        self._keys, self._first = keys, first
        if self.eager:
            self.check()

    def check(self) -> None:
        """Fetch what was remembered; every rank must call.

        Raises:
            NonFiniteLossError: with the same message on every rank.
        """
        if found := self.fetch():
            raise NonFiniteLossError(
                f"{found}. The run stopped; its checkpoints are from before. --resume --set "
                "train.nonfinite=skip leaves out what is not finite"
            )

    def fetch(self) -> str | None:
        """What was not finite first, the same on every rank; every rank must call."""
        mine = None
        if self._first is not None:
            steps = self._first.tolist()
            if min(steps) != NEVER:
                mine = (min(steps), self._describe(steps))
        found = [each for each in gather_objects(mine) if each is not None]
        self._first, self._files = None, {}
        return min(found)[1] if found else None

    def _describe(self, steps: list[int]) -> str:
        first = min(steps)
        # "<student>/total" and "loss" are sums: name the terms that are to blame, if any are.
        bad = [key for key, step in zip(self._keys, steps, strict=True) if step == first]
        terms = [key for key in bad if key != "loss" and not key.endswith("/total")] or bad
        files = ", ".join(self._files.get(first, [])) or "unknown"
        return (
            f"loss term {', '.join(terms)} is not finite at step {first + 1}; the images of that "
            f"batch: {files}"
        )
