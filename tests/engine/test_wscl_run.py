"""Runs of wscl: resumed exactly, and the same in two processes as in one."""

from __future__ import annotations

import pytest
from test_distributed import assert_same_gradients
from trained import assert_resumed_exactly


def test_a_run_is_resumed_exactly(run_content, stop_after, tmp_path) -> None:
    content = run_content() | {"method": {"name": "wscl"}}
    assert_resumed_exactly(content, stop_after, tmp_path / "cut", 4, "clip", "ssm", "optimizer")


@pytest.mark.parametrize("selection", [
    pytest.param("pixel", marks=pytest.mark.slow), "mean",
])  # fmt: skip
def test_two_processes_have_the_gradients_of_one(run_content, tmp_path, selection) -> None:
    """One quantile, one count and one share of both; partners would be other images."""
    method = {"name": "wscl", "mixing": "ds", "mixing_probability": 1.0, "selection": selection}
    _, losses = assert_same_gradients(run_content() | {"method": method}, tmp_path)
    assert losses["clip/s"] > 0 and losses["ssm/s"] > 0
