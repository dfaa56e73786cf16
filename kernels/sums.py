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
def _sum_partials_kernel(
    values_ptr, counts_ptr, sums_ptr, totals_ptr, programs,
    VALUES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row of `values` [VALUES, programs] or `counts` [COUNTS, programs].

    The order of additions depends on `programs` alone, hence the same bits every run; float64
    costs nothing here and keeps a sum over millions of pixels exact to float32.
    """
    row = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    if row < VALUES:
        total = tl.zeros([BLOCK], tl.float64)
        for start in range(0, programs, BLOCK):
            index = start + lane
            part = tl.load(values_ptr + row * programs + index, mask=index < programs, other=0.0)
            total += part.to(tl.float64)
        tl.store(sums_ptr + row, tl.sum(total, 0).to(tl.float32))
    else:
        count = tl.zeros([BLOCK], tl.int64)
        for start in range(0, programs, BLOCK):
            index = start + lane
            offset = (row - VALUES) * programs + index
            count += tl.load(counts_ptr + offset, mask=index < programs, other=0).to(tl.int64)
        tl.store(totals_ptr + row - VALUES, tl.sum(count, 0))


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
