"""Argument checks of the public losses: each error names the argument, the value and the rule.

They read types, shapes, dtypes and devices only, never a tensor's values, so that they cost no
host synchronisation and torch.compile traces through them (`can_read` tells where values may be
looked at all the same). Order: type, shape, dtype, device.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

_INTEGERS = (torch.uint8, torch.int32, torch.int64)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(name: str, value: object) -> None:
    """Raise TypeError unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def can_read(value: Tensor) -> bool:
    """Whether a tensor's values can be looked at for nothing: on the CPU, and no tracer's."""
    traced = torch.compiler.is_compiling() or isinstance(value, FakeTensor)
    return value.device.type == "cpu" and not traced


def check_device(name: str, value: Tensor, device: torch.device) -> None:
    """Raise ValueError unless `value` lies on the device of the logits."""
    if value.device != device:
        raise ValueError(f"{name}: expected on {device} like the logits, got {value.device}")


def check_logits(name: str, value: object) -> None:
    """Raise unless `value` is a float tensor [B,K,h,w] with at least one class and one cell."""
    check_tensor(name, value)
    if value.dim() != 4 or min(value.shape[1:]) < 1:
        raise ValueError(
            f"{name}: expected shape [B,K,h,w] with K, h, w >= 1, got {list(value.shape)}"
        )
    if value.dtype not in _FLOATS:
        raise TypeError(
            f"{name}: expected float16, bfloat16, float32 or float64, got {value.dtype}"
        )


def check_map(
    name: str, value: object, logits: Tensor, size: Sequence[int] | None, kind: str
) -> None:
    """Raise unless `value` [B,H,W] fits the logits' batch, `size` if given, and the kind's dtypes.

    Args:
        name: the argument's name, for the message.
        value: what was passed.
        logits: checked logits.
        size: (H, W) that the map must have, or None for any.
        kind: "integer" (uint8, int32, int64) or "float".
    """
    check_tensor(name, value)
    given = list(value.shape)
    batch = logits.shape[0]
    if value.dim() != 3 or given[0] != batch or (size is not None and given[1:] != list(size)):
        height, width = ("H", "W") if size is None else size
        raise ValueError(f"{name}: expected shape [{batch}, {height}, {width}], got {given}")
    if min(given[1:]) < 1:
        raise ValueError(f"{name}: expected at least one pixel, got shape {given}")
    if kind == "integer" and value.dtype not in _INTEGERS:
        hint = ""
        if value.dtype == torch.bool:
            hint = (f"; for classes 0 and 1: {name}.to(torch.uint8)" if name == "target" else
                    f"; for True where a pixel is left out: torch.where({name}, ignore_index, "
                    "ignore_index + 1)")
        raise TypeError(f"{name}: expected uint8, int32 or int64, got {value.dtype}{hint}")
    if kind == "float" and value.dtype not in _FLOATS:
        hint = f"; for True where a pixel is confident: {name}.float()" * (
            value.dtype == torch.bool)
        raise TypeError(f"{name}: expected a floating dtype, got {value.dtype}{hint}")
    check_device(name, value, logits.device)


def check_number(name: str, value: object, whole: bool = False) -> int | float:
    """`value`, or raise TypeError unless it is an int, or, when not `whole`, a float.

    A number of NumPy becomes Python's.
    """
    kinds = (int, torch.SymInt) if whole else (int, float)  # of a size that is traced, a SymInt
    if isinstance(value, kinds) and not isinstance(value, bool):
        return value
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, Real) and not isinstance(value, bool) and not whole:
        return float(value)
    kind = type(value).__name__
    shown = f"{kind} {value}" if isinstance(value, Real) else kind
    hint = ""
    if name == "threshold" and isinstance(value, Tensor):
        hint = ("; thresholds of classes: confidence=(confidence >= thresholds[label]).float(), "
                "threshold=1.0")
    raise TypeError(f"{name}: expected {'an int' if whole else 'a number'}, got {shown}{hint}")


def check_ignore_index(value: object) -> int:
    """`value` as an int of 64 bits, or raise."""
    value = check_number("ignore_index", value, whole=True)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"ignore_index: expected an int of 64 bits, got {value}")
    return value


def check_flag(name: str, value: object) -> None:
    """Raise TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")


def check_threshold(value: object) -> float:
    """`value` as a number in [0, 1], or raise."""
    value = check_number("threshold", value)
    if not 0 <= value <= 1:
        raise ValueError(f"threshold: expected a number in [0, 1], got {value}")
    return float(value)


def check_size(value: object) -> tuple[int, int]:
    """`value` as (height, width), or raise."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"size: expected (height, width), got {value!r}")
    height, width = (check_number("size", side, whole=True) for side in value)
    if height < 1 or width < 1:
        raise ValueError(f"size: expected a height and a width of at least 1, got {value!r}")
    return height, width


def check_class_weight(value: object, logits: Tensor | None = None) -> None:
    """Raise unless `value` is a constant float tensor [K], with logits of their K."""
    check_tensor("class_weight", value)
    classes = "K" if logits is None else logits.shape[1]
    if value.dim() != 1 or (logits is not None and value.shape[0] != classes):
        raise ValueError(
            f"class_weight: expected shape [{classes}], one for each class, "
            f"got {list(value.shape)}"
        )
    if value.dtype not in _FLOATS:
        raise TypeError(f"class_weight: expected a floating dtype, got {value.dtype}")
    if logits is not None:
        check_device("class_weight", value, logits.device)
    if value.requires_grad:
        raise ValueError("class_weight: expected a constant, got a tensor that requires grad")


def recordable(value: Tensor | None) -> Tensor | None:
    """`value`, or a copy that autograd can keep for the backward pass.

    What was made under `torch.inference_mode`, by a teacher say, it cannot.
    """
    if value is None or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return value
    return value.clone() if value.is_inference() else value
