"""Schedules as pure functions of the step, so that resuming needs no scheduler state."""

from __future__ import annotations

import torch

# The learning rate a linear warm-up starts from, as a share of the schedule's own.
WARMUP_FLOOR = 1e-6


def poly_factor(step: int, total_steps: int, power: float = 0.9, warmup_steps: int = 0) -> float:
    """Factor on every group's initial learning rate in the update of step `step` (from 0).

    `(1 - t/T)^power` with `t = max(step - 1, 0)`: UniMatch and Co2S set the rate *after* update t
    for update t + 1, so updates 0 and 1 both run at the full rate. During a warm-up of n steps it
    is `1 - (1 - t/n)(1 - 1e-6)` instead; update 0, which the released code makes at the full rate
    even then, is made at the floor of 1e-6 here.

    Args:
        step: the update about to be made, 0 .. total_steps - 1.
        total_steps: updates in the whole run, T.
        power: exponent of the decay.
        warmup_steps: updates of linear warm-up, 0 for none.
    """
    done = max(step - 1, 0)
    if done < warmup_steps:
        return 1.0 - (1.0 - done / warmup_steps) * (1.0 - WARMUP_FLOOR)
    return max(1.0 - done / total_steps, 0.0) ** power


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set each group's rate to `factor` times the `initial_lr` it was built with."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
