"""`torch.ops.co2s.softmax_confidence`: confidence and pseudo-label of every pixel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from co2s_fast.ops import reference
from co2s_fast.ops.registration import register, register_autograd


def _fake(
    logits: Tensor,
    height: int,
    width: int,
    align_corners: bool,
    label_dtype: torch.dtype = torch.int64,
) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], height, width)
    confidence = logits.new_empty(shape, dtype=reference.wide(logits.dtype))
    return confidence, logits.new_empty(shape, dtype=label_dtype)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output)


def _backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
    return (None,) * 5


register("softmax_confidence", reference=reference.softmax_confidence, fake=_fake)
register_autograd("softmax_confidence", _backward, _setup_context)
