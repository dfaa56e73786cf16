"""`train.nonfinite: skip`: steps whose losses or gradients are not finite change no weight."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from co2s_fast.engine.distributed import any_rank
from co2s_fast.engine.meter import FiniteGuard, NonFiniteLossError

IN_A_ROW = 10
"""So many skipped steps one after another are no accident: the run stops."""


class Skips:
    """Counts the steps that were left out.

    Args:
        guard: has watched the losses of each step, and is not eager.
    """

    def __init__(self, guard: FiniteGuard) -> None:
        self.guard = guard
        self.total = self.in_a_row = 0

    def look(self, step: int, parameters: Iterable[nn.Parameter]) -> str | None:
        """Why this step is to be skipped; every rank must call, and waits for the device.

        Args:
            step: updates made before it.
            parameters: with their gradients.

        Raises:
            NonFiniteLossError: `IN_A_ROW` steps in a row were.
        """
        reason = self.guard.fetch()
        if reason is None and any_rank(not finite_gradients(parameters)):
            reason = f"a gradient is not finite at step {step + 1}, though every loss is"
        self.in_a_row = 0 if reason is None else self.in_a_row + 1
        self.total += reason is not None
        if self.in_a_row == IN_A_ROW:
            raise NonFiniteLossError(
                f"{reason}. So were the {IN_A_ROW - 1} steps before; the run stopped, its "
                "checkpoints are from before"
            )
        return reason

    def state(self) -> dict[str, int]:
        """For a checkpoint."""
        return {"total": self.total, "in_a_row": self.in_a_row}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where a checkpoint was."""
        self.total, self.in_a_row = state.get("total", 0), state.get("in_a_row", 0)


def finite_gradients(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether every gradient is finite; one synchronisation for all of them."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return bool(torch.isfinite(torch.stack(torch._foreach_norm(gradients))).all())
