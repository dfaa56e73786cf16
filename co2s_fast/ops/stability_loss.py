"""`torch.ops.co2s.stability_loss` and its backward, with the reference kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from co2s_fast.ops import reference
from co2s_fast.ops.registration import (
    is_batched,
    may_scale_saved,
    once_differentiable,
    register,
    register_autograd,
    saved_like,
    scale_saved,
    transforms_are_active,
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


class _Side(torch.autograd.Function):
    """One student's sum or mean as a node of its own, so that each may have its own backward call.

    Where both are in one call, and no gradient was saved, the second node, which the engine reaches
    first, finds both gradients in one pass and leaves the other one for the first node.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, side: int, sums: Tensor, other: Tensor, saved: Tensor,
        scale: Tensor, ignore_mask: Tensor | None, options: tuple, nodes: list,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, other, ignore_mask, saved, scale)
        ctx.side, ctx.options = side, options
        ctx.may_overwrite_saved, ctx.left = True, None
        ctx.partner = nodes[0] if nodes else None
        nodes.append(ctx)
        return sums[side].clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        rest = (None,) * 8
        if upstream is None:
            return None, *rest
        logits, other, ignore_mask, saved, scale = ctx.saved_tensors
        side, (left, ctx.left) = ctx.side, (ctx.left, None)
        if may_scale_saved(ctx, saved):
            own = upstream * scale[side] if scale.numel() else upstream
            return scale_saved(saved, own, logits), *rest
        if left is not None and _is_same(left[0], upstream):
            return left[1], *rest
        upstreams = torch.stack((upstream, upstream))
        if scale.numel():
            upstreams = upstreams * scale
        both = (ctx.partner is not None and not torch.is_grad_enabled()
                and _runs_now(ctx.partner))
        pair, empty = [other, other], saved.new_empty(0)
        pair[side] = logits
        kept = [empty, empty]
        kept[side] = saved
        needed = [both, both]
        needed[side] = True
        threshold, height, width, ignore_index, align_corners = ctx.options
        found = _differentiated_once(
            upstreams, *pair, threshold, height, width, ignore_mask, ignore_index, align_corners,
            *needed, *kept,
        )  # fmt: skip
        if both:
            ctx.partner.left = (upstream, found[1 - side])
        return found[side], *rest


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two upstream gradients are known to be equal without asking a GPU."""
    if one is other:
        return True
    plain = type(one) is Tensor and type(other) is Tensor and not is_batched(one)
    return plain and not is_batched(other) and other.device.type == "cpu" and bool(one == other)


# Private in PyTorch, whose own multi-gradient hooks ask it; without it each node works for itself.
_runs_now = getattr(torch._C, "_will_engine_execute_node", lambda node: False)


def stability_loss_pair(
    logits_a: Tensor, logits_b: Tensor, threshold: float, height: int, width: int,
    ignore_mask: Tensor | None, ignore_index: int, align_corners: bool, with_grad_a: bool,
    with_grad_b: bool, mean: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator's values (of a, of b) and counts [2]; backward calls may come one by one."""
    args = (threshold, height, width, ignore_mask, ignore_index, align_corners, with_grad_a,
            with_grad_b, mean)  # fmt: skip
    if torch.compiler.is_compiling() or transforms_are_active():
        sums, counts, *_ = stability_loss(logits_a, logits_b, *args)
        return *sums.unbind(0), counts
    a, b = logits_a.detach(), logits_b.detach()
    sums, counts, saved_a, saved_b, scale = torch.ops.co2s.stability_loss(a, b, *args)
    options, nodes = (threshold, height, width, ignore_index, align_corners), []
    value_a = _Side.apply(logits_a, 0, sums, b, saved_a, scale, ignore_mask, options, nodes)
    value_b = _Side.apply(logits_b, 1, sums, a, saved_b, scale, ignore_mask, options, nodes)
    return value_a, value_b, counts


register("stability_loss", reference=_reference, fake=_fake, on_interpreter=_save_on_interpreter)
register("stability_loss_backward", reference=_reference_backward, fake=_fake_backward)
stability_loss = register_autograd("stability_loss", _backward, _setup_context)
_differentiated_once = once_differentiable("stability_loss_backward")
