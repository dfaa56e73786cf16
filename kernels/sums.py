# ruff: noqa: ANN001, ANN202 - device functions are typed by what they are called with
"""The second step of every sum: partial results of the programs, added in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import WARPS

_BLOCK = 1024


@triton.jit
def _row_sum(ptr, programs, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of `programs` values from `ptr` on.

    The order of additions depends on `programs` alone, hence the same bits every run; float64
    costs nothing here and keeps a sum over millions of pixels exact to float32.
    """
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], DTYPE)
    for start in range(0, programs, BLOCK):
        index = start + lane
        total += tl.load(ptr + index, mask=index < programs, other=0).to(DTYPE)
    return tl.sum(total, 0)


@triton.jit
def _sum_partials_kernel(
    values_ptr, counts_ptr, sums_ptr, totals_ptr, programs,
    VALUES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row of `values` [VALUES, programs] or `counts` [COUNTS, programs]."""
    row = tl.program_id(0)
    if row < VALUES:
        total = _row_sum(values_ptr + row * programs, programs, tl.float64, BLOCK)
        tl.store(sums_ptr + row, total.to(tl.float32))
    else:
        count = _row_sum(counts_ptr + (row - VALUES) * programs, programs, tl.int64, BLOCK)
        tl.store(totals_ptr + row - VALUES, count)


@triton.jit
def _mean_of_partials_kernel(
    values_ptr, counts_ptr, mean_ptr, scale_ptr, totals_ptr, programs, times,
    VALUES: tl.constexpr, MEAN_OVER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: both counts, and sum i over `times` · max(count MEAN_OVER + i, 1)."""
    first = _row_sum(counts_ptr, programs, tl.int64, BLOCK)
    second = _row_sum(counts_ptr + programs, programs, tl.int64, BLOCK)
    tl.store(totals_ptr, first)
    tl.store(totals_ptr + 1, second)
    for i in tl.static_range(VALUES):
        count = first if MEAN_OVER + i == 0 else second
        divisor = (tl.maximum(count, 1) * times).to(tl.float64)
        total = _row_sum(values_ptr + i * programs, programs, tl.float64, BLOCK)
        tl.store(mean_ptr + i, (total / divisor).to(tl.float32))
        tl.store(scale_ptr + i, (1.0 / divisor).to(tl.float32))


def launch_sum_partials(values: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the partials along their last dimension; `programs` is at least 1.

    Args:
        values: float32 [V, programs], contiguous.
        counts: int32 [C, programs], contiguous.

    Returns:
        float32 [V], int64 [C].
    """
    rows, programs = values.shape
    sums = torch.empty(rows, dtype=torch.float32, device=values.device)
    totals = torch.empty(len(counts), dtype=torch.int64, device=values.device)
    _sum_partials_kernel[(rows + len(counts),)](
        values, counts, sums, totals, programs, VALUES=rows, BLOCK=_BLOCK, num_warps=WARPS
    )
    return sums, totals


def launch_mean_of_partials(
    values: Tensor, counts: Tensor, mean_over: int = 0, times: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """The sums of the partials, each over `times` · one of their counts, taken as at least 1.

    Args:
        values: float32 [V, programs], contiguous, V 1 or 2.
        counts: int32 [2, programs], contiguous.
        mean_over: which count divides the first sum; with two sums 0, and the other the second.
        times: a factor of every divisor.

    Returns:
        float32 [V] means, int64 [2] counts, float32 [V] one over each divisor.
    """
    rows, programs = values.shape
    mean, scale = (torch.empty(rows, dtype=torch.float32, device=values.device) for _ in range(2))
    totals = torch.empty(2, dtype=torch.int64, device=values.device)
    _mean_of_partials_kernel[(1,)](
        values, counts, mean, scale, totals, programs, times, VALUES=rows, MEAN_OVER=mean_over,
        BLOCK=_BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return mean, totals, scale
