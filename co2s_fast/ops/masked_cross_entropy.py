"""`torch.ops.co2s.masked_cross_entropy` and its backward, with the reference kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from co2s_fast.ops import dispatch, reference
from co2s_fast.ops.registration import (
    may_scale_saved,
    once_differentiable,
    register,
    register_autograd,
    saved_like,
    scale_saved,
)


def _gradient(
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    confidence: Tensor | None,
    threshold: float,
    ignore_mask: Tensor | None,
    ignore_index: int,
    class_weight: Tensor | None,
    boxes: Tensor | None,
    partner: Tensor | None,
    align_corners: bool,
) -> Tensor:
    """Gradient of the logits in the wide dtype: (softmax - one-hot) · weight · upstream."""
    label, taken = reference.valid_pixels(
        target, ignore_mask, ignore_index, logits.shape[1], boxes, partner
    )
    if confidence is not None:
        taken = taken & (reference.paste(confidence, boxes, partner) >= threshold)
    label = torch.where(taken, label, 0)[:, None]
    gradient = reference.up(logits, *target.shape[1:], align_corners).softmax(1)
    gradient = gradient.scatter_add(1, label, gradient.new_full((), -1).expand(label.shape))
    if class_weight is not None:
        gradient = gradient * class_weight.to(gradient.dtype)[label]
    upstream = grad_loss[:, None] if grad_loss.dim() else grad_loss
    gradient = torch.where(taken[:, None], gradient * upstream, 0)
    return reference.up_transposed(gradient, *logits.shape[2:], align_corners)


def _mean_of(loss: Tensor, counts: Tensor, mean_over: int) -> tuple[Tensor, Tensor]:
    """`loss` over the count that `mean_over` names, and one over it; -1: as it is, and empty."""
    if mean_over < 0:
        return loss, loss.new_empty(0)
    divisor = counts[mean_over].clamp(min=1).to(loss.dtype)
    return loss / divisor, divisor.reciprocal()


def _reference(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *inputs, per_pixel, align_corners, with_grad, mean_over = args
    loss, counts = reference.masked_cross_entropy(logits, *inputs, per_pixel, align_corners)
    saved = logits.new_empty(0, dtype=loss.dtype)
    if with_grad and not per_pixel and logits.device.type == "cpu":
        saved = _gradient(torch.ones((), dtype=saved.dtype), logits, *inputs, align_corners)
    loss, scale = _mean_of(loss, counts, mean_over)
    return loss, counts, saved, scale


def _reference_backward(grad_loss: Tensor, logits: Tensor, *args: Any) -> Tensor:
    *inputs, _per_pixel, align_corners, saved = args
    if saved.numel():
        return (grad_loss * saved).to(logits.dtype)
    return _gradient(grad_loss, logits, *inputs, align_corners).to(logits.dtype)


def _fake(logits: Tensor, target: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, per_pixel, _align_corners, with_grad, mean_over = args
    shape = target.shape if per_pixel else ()
    loss = logits.new_empty(shape, dtype=reference.wide(logits.dtype))
    counts = logits.new_empty((2,), dtype=torch.int64)
    wanted = with_grad and not per_pixel
    saved = saved_like("masked_cross_entropy", logits, wanted, target.shape[1:])
    return loss, counts, saved, loss.new_empty((0,) if mean_over < 0 else ())


def _fake_backward(grad_loss: Tensor, logits: Tensor, *args: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _debug_check(logits: Tensor, target: Tensor, *args: Any) -> None:
    _confidence, _threshold, ignore_mask, ignore_index, _weight, boxes, partner, *_ = args
    reference.check_partner(partner)
    label = reference.paste(target, boxes, partner).long()
    valid = label != ignore_index
    if ignore_mask is not None:
        valid &= reference.paste(ignore_mask, boxes, partner).long() != ignore_index
    reference.check_classes(label, valid, logits.shape[1], ignore_index)


def _save_on_interpreter(*args: Any, result: tuple) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """On the CPU the op promises the saved gradient, which Triton leaves to the backward."""
    loss, counts, saved, scale = result
    logits, *inputs, per_pixel, align_corners, with_grad, _mean_over = args
    if with_grad and not per_pixel:
        from co2s_fast.kernels.masked_cross_entropy import masked_cross_entropy_backward

        wide = logits.to(saved.dtype)  # a saved gradient is never rounded to half precision
        one = torch.ones((), dtype=saved.dtype)
        saved = masked_cross_entropy_backward(one, wide, *inputs, False, align_corners, saved)
    return loss, counts, saved, scale


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    (logits, target, confidence, threshold, ignore_mask, ignore_index, class_weight, boxes,
     partner, per_pixel, align_corners, _with_grad, _mean_over) = inputs  # fmt: skip
    _loss, counts, saved, scale = output
    ctx.mark_non_differentiable(counts, saved, scale)
    ctx.set_materialize_grads(False)
    maps: tuple[Tensor | None, ...] = (
        target, confidence, ignore_mask, class_weight, boxes, partner
    )  # fmt: skip
    if saved.numel() and dispatch.backend(logits) != "triton":  # which recomputes in any case
        maps = (None,) * 6  # the saved gradient is enough; maps of the labels' size may go
    ctx.save_for_backward(logits, *maps, saved, scale)
    ctx.options = (threshold, ignore_index, per_pixel, align_corners)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_loss is None or not ctx.needs_input_grad[0]:
        return (None,) * 13
    (logits, target, confidence, ignore_mask, class_weight, boxes, partner, saved,
     scale) = ctx.saved_tensors  # fmt: skip
    threshold, ignore_index, per_pixel, align_corners = ctx.options
    if scale.numel():
        grad_loss = grad_loss * scale
    if may_scale_saved(ctx, saved):
        return scale_saved(saved, grad_loss, logits), *(None,) * 12
    if target is None:
        target = saved  # stands in: not read where there is a saved gradient
    gradient = _differentiated_once(
        grad_loss.contiguous(), logits, target, confidence, threshold, ignore_mask, ignore_index,
        class_weight, boxes, partner, per_pixel, align_corners, saved,
    )  # fmt: skip
    return gradient, *(None,) * 12


register(
    "masked_cross_entropy",
    reference=_reference,
    fake=_fake,
    debug_check=_debug_check,
    on_interpreter=_save_on_interpreter,
)
register("masked_cross_entropy_backward", reference=_reference_backward, fake=_fake_backward)
masked_cross_entropy = register_autograd("masked_cross_entropy", _backward, _setup_context)
_differentiated_once = once_differentiable("masked_cross_entropy_backward")
