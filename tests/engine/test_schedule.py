from __future__ import annotations

import numpy as np
import pytest
import torch

from co2s_fast.engine.schedule import poly_factor, set_learning_rates


@pytest.mark.parametrize(
    "case, initial, total, warmup",
    [
        ("adamw_T1000", (1e-6, 1e-4, 1e-3), 1000, 0),
        ("adamw_T1000_smax2000", (1e-6, 1e-4, 1e-3), 2000, 0),
        ("adamw_T1000_warmup100", (1e-6, 1e-4, 1e-3), 1000, 100),
        ("sgd_T1000", (1e-3, 1e-2), 1000, 0),
    ],
)
def test_matches_the_release(golden, case, initial, total, warmup) -> None:
    # row i is set after update i, for update i + 1
    expected = golden("losses.npz")[f"sched/lr/{case}"]
    factors = [poly_factor(i + 1, total, 0.9, warmup) for i in range(len(expected))]
    np.testing.assert_allclose(np.outer(factors, initial), expected, rtol=1e-9)


def test_the_first_two_updates_run_at_the_full_rate() -> None:
    assert poly_factor(0, 10) == poly_factor(1, 10) == 1.0
    assert poly_factor(2, 10) == pytest.approx(0.9**0.9)


def test_rates_are_set_from_each_groups_own() -> None:
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [
        {"params": [w], "lr": rate, "initial_lr": rate}
        for w, rate in zip(weights, (1.0, 0.1), strict=True)
    ]
    optimizer = torch.optim.AdamW(groups)
    set_learning_rates(optimizer, 0.5)
    set_learning_rates(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.05]
