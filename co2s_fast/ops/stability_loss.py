"""`torch.ops.co2s.stability_loss` and its backward, with the reference kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from co2s_fast.ops import reference
from co2s_fast.ops.registration import (
    may_scale_saved,
    once_differentiable,
    register,
    register_autograd,
    saved_like,
    scale_saved,
)


def _gradients(
    logits_a: Tensor,
    logits_b: Tensor,
    threshold: float,
    height: int,
    width: int,
    ignore_mask: Tensor | None,
    ignore_index: int,
    align_corners: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of sums[0] to logits_a, sums[1] to logits_b, in the wide dtype; or empty."""
    p_a = reference.up(logits_a, height, width, align_corners).softmax(1)
    p_b = reference.up(logits_b, height, width, align_corners).softmax(1)
    learns = reference.learners(p_a, p_b, threshold, ignore_mask, ignore_index)

    def gradient(p: Tensor, q: Tensor, pixels: Tensor, logits: Tensor) -> Tensor:
        slope = 2 * (p - q)
        slope = p * (slope - (slope * p).sum(1, keepdim=True))  # through the softmax
        slope = torch.where(pixels[:, None], slope, 0)
        return reference.up_transposed(slope, *logits.shape[2:], align_corners)

    return (
        gradient(p_a, p_b, learns[0], logits_a) if need_a else p_a.new_empty(0),
        gradient(p_b, p_a, learns[1], logits_b) if need_b else p_b.new_empty(0),
    )


def _reference(logits_a: Tensor, logits_b: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *inputs, with_grad_a, with_grad_b, mean = args
    sums, counts = reference.stability_loss(logits_a, logits_b, *inputs)
    on_cpu = logits_a.device.type == "cpu"
    saved = _gradients(logits_a, logits_b, *inputs, with_grad_a and on_cpu, with_grad_b and on_cpu)
    if not mean:
        return sums, counts, *saved, sums.new_empty(0)
    divisors = (logits_a.shape[1] * counts.clamp(min=1)).to(sums.dtype)
    return sums / divisors, counts, *saved, divisors.reciprocal()


def _reference_backward(
    grad_sums: Tensor, logits_a: Tensor, logits_b: Tensor, *args: Any
) -> tuple[Tensor, Tensor]:
    *inputs, need_a, need_b, saved_a, saved_b = args
    redo = (need_a and not saved_a.numel(), need_b and not saved_b.numel())
    if any(redo):
        again = _gradients(logits_a, logits_b, *inputs, *redo)
        saved_a, saved_b = (
            new if r else old for new, old, r in zip(again, (saved_a, saved_b), redo, strict=True)
        )
    empty = logits_a.new_empty(0)
    return (
        (grad_sums[0] * saved_a).to(logits_a.dtype) if need_a else empty,
        (grad_sums[1] * saved_b).to(logits_b.dtype) if need_b else empty.clone(),
    )


def _fake(logits_a: Tensor, logits_b: Tensor, *args: Any) -> tuple[Tensor, ...]:
    _threshold, *size, _ignore_mask, _ignore_index, _align = args[:6]
    with_grad_a, with_grad_b, mean = args[6:]
    sums = logits_a.new_empty((2,), dtype=reference.wide(logits_a.dtype))
    counts = logits_a.new_empty((2,), dtype=torch.int64)
    saved = (
        saved_like("stability_loss", z, wanted, size)
        for z, wanted in ((logits_a, with_grad_a), (logits_b, with_grad_b))
    )
    return sums, counts, *saved, sums.new_empty((2,) if mean else (0,))


def _fake_backward(
    grad_sums: Tensor, logits_a: Tensor, logits_b: Tensor, *args: Any
) -> tuple[Tensor, Tensor]:
    *_, need_a, need_b, _saved_a, _saved_b = args

    def like(logits: Tensor, needed: bool) -> Tensor:
        shape = logits.shape if needed else (0,)
        return torch.empty(shape, dtype=logits.dtype, device=logits.device)

    return like(logits_a, need_a), like(logits_b, need_b)


def _save_on_interpreter(*args: Any, result: tuple) -> tuple[Tensor, ...]:
    """On the CPU the op promises the saved gradients, which Triton leaves to the backward."""
    sums, counts, saved_a, saved_b, scale = result
    logits_a, logits_b, *inputs, with_grad_a, with_grad_b, _mean = args
    if with_grad_a or with_grad_b:
        from co2s_fast.kernels.stability_loss import stability_loss_backward

        saved_a, saved_b = stability_loss_backward(
            torch.ones_like(sums), logits_a.to(sums.dtype), logits_b.to(sums.dtype), *inputs,
            with_grad_a, with_grad_b, saved_a, saved_b,
        )  # fmt: skip
    return sums, counts, saved_a, saved_b, scale


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    (logits_a, logits_b, threshold, height, width, ignore_mask, ignore_index, align_corners,
     _with_grad_a, _with_grad_b, _mean) = inputs  # fmt: skip
    _sums, counts, saved_a, saved_b, scale = output
    ctx.mark_non_differentiable(counts, saved_a, saved_b, scale)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits_a, logits_b, ignore_mask, saved_a, saved_b, scale)
    ctx.options = (threshold, height, width, ignore_index, align_corners)


def _backward(ctx: Any, grad_sums: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    need_a, need_b = ctx.needs_input_grad[:2]
    if grad_sums is None or not (need_a or need_b):
        return (None,) * 11
    logits_a, logits_b, ignore_mask, saved_a, saved_b, scale = ctx.saved_tensors
    threshold, height, width, ignore_index, align_corners = ctx.options
    if scale.numel():
        grad_sums = grad_sums * scale
    needed = ((need_a, saved_a), (need_b, saved_b))
    if may_scale_saved(ctx, *(saved for need, saved in needed if need)):
        return (
            scale_saved(saved_a, grad_sums[0], logits_a) if need_a else None,
            scale_saved(saved_b, grad_sums[1], logits_b) if need_b else None,
            *(None,) * 9,
        )
    grad_a, grad_b = _differentiated_once(
        grad_sums.contiguous(), logits_a, logits_b, threshold, height, width, ignore_mask,
        ignore_index, align_corners, need_a, need_b, saved_a, saved_b,
    )  # fmt: skip
    return grad_a if need_a else None, grad_b if need_b else None, *(None,) * 9


register("stability_loss", reference=_reference, fake=_fake, on_interpreter=_save_on_interpreter)
register("stability_loss_backward", reference=_reference_backward, fake=_fake_backward)
stability_loss = register_autograd("stability_loss", _backward, _setup_context)
_differentiated_once = once_differentiable("stability_loss_backward")
