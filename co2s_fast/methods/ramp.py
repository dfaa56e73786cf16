"""Ramps: of the stability weight λ(t), and of the consistency terms where that is asked for."""

from __future__ import annotations

import math


def cosine_ramp(step: int, total_steps: int, peak: float = 0.5, ramp: float = 0.2) -> float:
    """λ(t) of Co2S (paper Eq. 11): a half cosine from 0 to `peak` over the first `ramp` of a run.

    With `n = round(ramp · total_steps)`: `peak · ½ (1 - cos(π t / (n - 1)))` for `t < n`, then
    `peak`. A ramp of a single step is already at its peak's foot: 0 for `n > 1`, `peak` otherwise.

    Args:
        step: step index t; outside 0 .. total_steps - 1 the weight is 0.
        total_steps: steps in the whole run.
        peak: weight after the ramp.
        ramp: share of the run that the ramp takes, in [0, 1].
    """
    if not 0 <= step < total_steps:
        return 0.0
    length = round(ramp * total_steps)
    if step >= length or length < 2:
        return peak
    return peak * 0.5 * (1.0 - math.cos(math.pi * step / (length - 1)))
