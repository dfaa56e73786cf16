"""Registers the catalogue with PyTorch: kernels that dispatch, fake kernels, autograd.

An op's own module calls `register` once for each of its catalogue entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from co2s_fast.ops import catalogue, dispatch

LIBRARY = catalogue.define("co2s")


def register(
    name: str,
    *,
    reference: Callable,
    fake: Callable,
    debug_check: Callable | None = None,
    on_interpreter: Callable | None = None,
) -> None:
    """Register catalogue entry `name` as `torch.ops.co2s.<name>` for CPU and CUDA tensors.

    Args:
        name: key of `catalogue.SCHEMAS`.
        reference: its implementation in plain PyTorch, with the schema's arguments.
        fake: shapes and dtypes of its results, for torch.compile and export.
        debug_check: raises on bad values; called on CUDA tensors while debug checks are on.
        on_interpreter: completes what the Triton function returns for CPU tensors; called with its
            arguments and, as `result`, its result.
    """
    dispatch.register_reference(name, reference)
    arguments = torch._C.parse_schema(f"{name}{catalogue.SCHEMAS[name]}").arguments
    written = [i for i, each in enumerate(arguments)
               if each.alias_info is not None and each.alias_info.is_write]

    def kernel(*args: Any) -> Any:
        tensor = next(arg for arg in args if isinstance(arg, Tensor) and arg.dim() > 1)
        chosen = dispatch.backend(tensor)
        # CPU kernels check in passing; Triton's, interpreted, cannot raise.
        checked = dispatch.debugging() if tensor.is_cuda else chosen == "triton"
        if debug_check is not None and checked:
            debug_check(*args)
        for position in written:
            # Kernels write behind autograd's back: who has saved that tensor must be told.
            torch.autograd.graph.increment_version(args[position])
        function = dispatch.implementation(name, chosen)
        if chosen == "reference":
            # The ops fix their own precision; autocast must not choose another inside them.
            with torch.autocast(tensor.device.type, enabled=False):
                return function(*args)
        result = function(*args)
        if on_interpreter is not None and chosen == "triton" and not tensor.is_cuda:
            return on_interpreter(*args, result=result)
        return result

    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, kernel, device)
    torch.library.register_fake(f"co2s::{name}", fake, lib=LIBRARY)


def register_autograd(name: str, backward: Callable, setup_context: Callable) -> Callable:
    """Register the derivative of catalogue entry `name`.

    Args:
        name: key of `catalogue.SCHEMAS`.
        backward: as `torch.library.register_autograd` takes it.
        setup_context: likewise.

    Returns:
        The operator as eager code should call it, with all arguments by position: the same results
        and derivative for less time in Python, most of which torch.library's own wrapper of a
        derivative takes. The backward may overwrite the saved tensors among the results.
    """
    operator, transformed = _register_derivative(name, backward, setup_context)

    def forward(ctx: Any, *args: Any) -> Any:
        output = operator(*args)
        setup_context(ctx, args, output)
        ctx.may_overwrite_saved = True
        return output

    functions = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function = type(_title(name), (torch.autograd.Function,), functions)

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():  # which traces the operator itself, as torch.export does
            return operator(*args)
        return (transformed if transforms_are_active() else function).apply(*args)

    return call


def _register_derivative(name: str, backward: Callable, setup_context: Callable
                         ) -> tuple[Callable, type[torch.autograd.Function]]:
    """Register a derivative; the operator, and it in the form that torch.func's grad and vmap take.

    The forward mode of that form (jvp, jacfwd) raises; the operator would drop the tangent.
    """
    torch.library.register_autograd(
        f"co2s::{name}", backward, setup_context=setup_context, lib=LIBRARY
    )
    operator = getattr(torch.ops.co2s, name).default
    return operator, type(f"{_title(name)}Transformed", (torch.autograd.Function,), {
        "forward": staticmethod(lambda *args: operator(*args)),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(backward),
        "generate_vmap_rule": True,
    })


def _title(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


def once_differentiable(name: str) -> Callable:
    """Make differentiating backward entry `name`, a second derivative, a clear error.

    Returns:
        The operator as a backward should call it, with all arguments by position.
    """

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(
            f"co2s_fast: {name.removesuffix('_backward')} has no second derivative; "
            "call backward() without create_graph=True, or use co2s_fast.ops.reference"
        )

    operator, transformed = _register_derivative(name, backward, setup_context)

    def call(*args: Any) -> Any:
        if not torch.compiler.is_compiling() and transforms_are_active():
            return transformed.apply(*args)
        return operator(*args)

    return call


# Private in PyTorch, whose own autograd.Function asks it.
transforms_are_active = getattr(
    torch._C, "_are_functorch_transforms_active", lambda: True
)
# Private in PyTorch, whose own compiled backward asks it; without it nothing is scaled in place.
_graph_is_kept = getattr(
    torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True
)
# Private in PyTorch, whose own vmap asks it: a batch of upstream gradients (is_grads_batched).
is_batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda tensor: True)


def may_scale_saved(ctx: Any, *saved: Tensor) -> bool:
    """Whether a backward may call `scale_saved` for each of `saved` in place of its own operator.

    Not where one of them is empty, a derivative of the result is wanted, or the call is traced; nor
    where the caller of the operator itself holds what it saved.
    """
    return (
        getattr(ctx, "may_overwrite_saved", False)
        and all(type(tensor) is Tensor and tensor.numel() > 0 for tensor in saved)
        and not torch.is_grad_enabled()
    )


def scale_saved(saved: Tensor, upstream: Tensor, logits: Tensor) -> Tensor:
    """The saved gradient times `upstream`, in the logits' dtype and contiguous, in one launch.

    Of the logits' dtype it is multiplied where it is, which spares a tensor of that size: its node
    is released next, unless the engine was asked to keep the graph.
    """
    if is_batched(upstream):
        return torch.mul(saved, upstream).to(logits.dtype)
    if saved.dtype == logits.dtype and not _graph_is_kept():
        return saved.mul_(upstream)
    return torch.mul(saved, upstream, out=logits.new_empty(saved.shape))


# Up to so many classes the CUDA kernels find the gradient on the way to the loss (kMostTransposed
# and kMostTransposedPair in csrc/ops/cuda/problems.h).
FUSED_CLASSES = {"masked_cross_entropy": 16, "stability_loss": 8}


def saved_like(name: str, logits: Tensor, wanted: bool, size: Sequence[int]) -> Tensor:
    """Uninitialised saved gradient of op `name`: of the logits' shape where it saves one, or empty.

    Every CPU backend saves a wanted gradient; on a GPU the CUDA kernels do, through the upsampling
    to `size` and with few classes.
    """
    if wanted and logits.device.type == "cuda":
        wanted = (
            logits.dtype != torch.float64
            and logits.shape[1] <= FUSED_CLASSES[name]
            and tuple(logits.shape[2:]) != tuple(size)
            and dispatch.backend(logits.device) == "cuda"
        )
    shape = logits.shape if wanted and logits.device.type in ("cpu", "cuda") else (0,)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return torch.empty(shape, dtype=dtype, device=logits.device)
