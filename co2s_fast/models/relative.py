"""Relative position biases of BEiT models on a grid of any size.

timm's BEiT has one window, that of its pretraining. Images of other sizes need its table of biases
on another grid: tokens at a distance d keep about the bias of distance d, and far distances share
what the table has for far ones (the geometric sequence of BEiT's own fine-tuning, Bao et al. 2022,
`run_class_finetuning.py`), with a cubic spline in between. The interpolation is linear in the
table, so it is two matrices, and gradients flow through it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.interpolate import make_interp_spline
from timm.models import beit
from torch import Tensor, nn

from co2s_fast.errors import UsageError

CLASS_ENTRIES = 3
"""Rows at the table's end: class to token, token to class, class to class."""


def resize_biases(table: Tensor, window: Sequence[int], grid: Sequence[int]) -> Tensor:
    """A table of biases on another grid.

    Args:
        table: [(2h - 1)(2w - 1) + 3, heads] for a window of h x w tokens.
        window: (h, w).
        grid: (H, W).

    Returns:
        [(2H - 1)(2W - 1) + 3, heads], differentiable in the table.
    """
    if tuple(window) == tuple(grid):
        return table
    rows, columns = (
        _matrix(2 * old - 1, 2 * new - 1, table.device).to(table.dtype)
        for old, new in zip(window, grid, strict=True)
    )
    pairs = table[:-CLASS_ENTRIES].unflatten(0, (2 * window[0] - 1, 2 * window[1] - 1))
    pairs = torch.einsum("Yy,Xx,yxh->YXh", rows, columns, pairs)
    return torch.cat([pairs.flatten(0, 1), table[-CLASS_ENTRIES:]])


_kept: dict[tuple, Tensor] = {}


def _once(key: tuple, make: Callable[[], Tensor]) -> Tensor:
    """What `make` returns, made at the first call with this key."""
    if key in _kept:
        return _kept[key]
    # A tensor made under inference_mode could not take part in a later training step.
    with torch.inference_mode(False):
        made = make()
    if type(made) is Tensor:  # not a stand-in of some tracer
        _kept[key] = made
    return made


def _matrix(old: int, new: int, device: torch.device) -> Tensor:
    """[new, old]: a row of `old` values at geometric distances to `new` at distances 0, 1, 2..."""
    return _once((old, new, device), lambda: torch.from_numpy(_spline(old, new)).to(device))


def _spline(old: int, new: int) -> np.ndarray:
    if old == 1:
        return np.ones((new, 1))
    if old == new:
        return np.eye(new)
    known = _geometric(old // 2, new // 2)
    wanted = np.arange(-(new // 2), new // 2 + 1, dtype=float).clip(known[0], known[-1])
    spline = make_interp_spline(known, np.eye(old), k=min(3, old - 1))
    return np.ascontiguousarray(spline(wanted))


def _geometric(count: int, reach: int) -> np.ndarray:
    """-d_n ... 0 ... d_n with d_i = 1 + q + ... + q^(i-1), q in [1.01, 1.5] such that d_n = reach.

    The bounds are BEiT's: below, a smaller grid takes the middle of the table.
    """
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        if (1 - q**count) / (1 - q) > reach:
            high = q
        else:
            low = q
    distances = np.cumsum(q ** np.arange(count))
    return np.concatenate([-distances[::-1], [0.0], distances])


def _index(height: int, width: int, device: torch.device) -> Tensor:
    """[N + 1, N + 1] rows of a table for each pair of tokens, class token first."""
    make = beit.gen_relative_position_index
    return _once(("index", height, width, device), lambda: make((height, width)).to(device))


def bias_of(table: Tensor, window: Sequence[int], grid: tuple[int, int]) -> Tensor:
    """[heads, N + 1, N + 1], what attention adds to its scores on a grid of N tokens."""
    index = _index(*grid, table.device)
    return resize_biases(table, window, grid)[index.flatten()].unflatten(0, index.shape).movedim(
        -1, 0).contiguous()  # fmt: skip


class AnyGridAttention(beit.Attention):
    """BEiT's attention, its biases on the grid at hand."""

    grid: tuple[int, int]

    def _get_rel_pos_bias(self) -> Tensor:
        return bias_of(self.relative_position_bias_table, self.window_size, self.grid)[None]


class AnyGridBias(beit.RelativePositionBias):
    """Biases that all blocks share, on the grid at hand."""

    grid: tuple[int, int]

    def forward(self) -> Tensor:
        return bias_of(self.relative_position_bias_table, self.window_size, self.grid)


def free_grid(model: nn.Module) -> list[nn.Module]:
    """Let a BEiT model of timm take any grid; other models stay as they are.

    The classes of its modules are exchanged for subclasses in place: parameters and their names
    stay.

    Returns:
        The modules that want to be told the grid, as attribute `grid`, before each forward pass.

    Raises:
        UsageError: a table of absolute positions, which timm's BEiT adds as it is.
    """
    if not isinstance(model, beit.Beit):
        return []
    if model.pos_embed is not None:
        raise UsageError(
            "a BEiT model with absolute positions takes one image size only: expected relative "
            "ones (use_abs_pos_emb=False)"
        )
    model.patch_embed.img_size = None  # else it refuses images of another size
    told: list[nn.Module] = []
    for module in model.modules():
        if type(module) is beit.Attention and module.relative_position_bias_table is not None:
            module.__class__ = AnyGridAttention
        elif type(module) is beit.RelativePositionBias:
            module.__class__ = AnyGridBias
        else:
            continue
        told.append(module)
    return told
