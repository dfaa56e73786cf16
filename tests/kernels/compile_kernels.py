"""Compile every Triton kernel for real GPUs, on a machine that has none; run as a script.

Launchers are called on CPU tensors with Triton's launch replaced by a compilation for each target
with the types, constants and alignments a launch on a GPU would have. Prints a JSON list: kernel,
capability, bytes of machine code, of shared memory, operations that may be fused, and whether a
kernel on equal grids reads logits in less than 16 bytes a thread.

    python compile_kernels.py few|many CAPABILITY...
"""

from __future__ import annotations

import inspect
import itertools
import json
import re
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.uint8: "*u8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


def wide_loads(ptx: str) -> str:
    """The PTX with load modifiers (caching, scope) removed, so that widths can be looked for."""
    return re.sub(r"ld\.global\S*?\.v4", "ld.global.v4", ptx)


class Compiler:
    """Stands in for `JITFunction.run`; compiles each distinct specialization once a target."""

    def __init__(self, capabilities: list[int]) -> None:
        self.capabilities = capabilities
        self.done: set[str] = set()
        self.results: list[dict] = []

    def run(self, function: JITFunction, *args, grid, warmup, num_warps=4, enable_fp_fusion=True,
            **kwargs) -> None:  # fmt: skip
        bound = inspect.signature(function.fn).bind(*args, **kwargs)
        source = self.source(function, bound.arguments)
        for capability in self.capabilities:
            key = f"{function.fn.__name__} {capability} {source.signature} {source.constants}"
            key += f"{sorted(source.attrs)}"
            if key in self.done:
                continue
            self.done.add(key)
            target = GPUTarget("cuda", capability, 32)
            choices = {"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion}
            kernel = triton.compile(source, target=target, options=choices)
            options = bound.arguments
            equal = options.get("RESAMPLE", options.get("RESAMPLE_A")) is False
            self.results.append({
                "kernel": function.fn.__name__, "capability": capability,
                "bytes": len(kernel.asm["cubin"]), "shared": kernel.metadata.shared,
                # sums and products that the assembler may still fuse into one rounding
                "fusable": len(re.findall(r"\b(?:mul|add|sub)\.f32", kernel.asm["ptx"])),
                "unaligned": equal and "ld.global.v4" not in wide_loads(kernel.asm["ptx"]),
            })  # fmt: skip

    def source(self, function: JITFunction, arguments: dict) -> ASTSource:
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(function.params):
            value = arguments[parameter.name]
            if parameter.is_constexpr or (isinstance(value, int) and value == 1):
                signature[parameter.name], constants[(index,)] = "constexpr", value
                continue
            if isinstance(value, torch.Tensor):
                signature[parameter.name] = TYPES[value.dtype]
                aligned = value.data_ptr() % 16 == 0
            elif isinstance(value, float):
                signature[parameter.name], aligned = "fp32", False
            else:
                signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
                aligned = value % 16 == 0
            if aligned:
                attributes[(index,)] = [["tt.divisibility", 16]]
        return ASTSource(function, signature, constants, attributes)


def call_launchers(dtype: torch.dtype, num_classes: int, align_corners: bool, wide: bool) -> None:
    """Call every function of the catalogue once on equal grids and once through upsampling."""
    from co2s_fast.kernels.confusion_matrix import confusion_matrix
    from co2s_fast.kernels.cutmix import cutmix_
    from co2s_fast.kernels.masked_cross_entropy import (
        masked_cross_entropy,
        masked_cross_entropy_backward,
    )
    from co2s_fast.kernels.softmax_confidence import softmax_confidence
    from co2s_fast.kernels.stability_loss import stability_loss, stability_loss_backward

    batch, size, out = 2, 32, 128
    target_dtype = torch.uint8 if dtype == torch.float32 else torch.int64
    target = torch.zeros(batch, out, out, dtype=target_dtype)
    confidence, ignore = torch.ones(batch, out, out), torch.zeros_like(target, dtype=torch.uint8)
    boxes = torch.zeros(batch, 4, dtype=torch.int32)
    partner = torch.zeros(batch, dtype=torch.int64)
    if wide:
        for name, module in sys.modules.items():
            if name.startswith("co2s_fast.kernels.") and hasattr(module, "is_wide"):
                module.is_wide = lambda *tensors: True
    for grid, mixed in itertools.product((size, out), (True,) if wide else (False, True)):
        logits = torch.zeros(batch, num_classes, grid, grid, dtype=dtype)
        labels = (
            (target, confidence, 0.95, ignore, 255, torch.ones(num_classes), boxes, partner)
            if mixed else (target, None, 0.95, None, 255, None, None, None)
        )  # fmt: skip
        softmax_confidence(logits, out, out, align_corners)
        masked_cross_entropy(logits, *labels, mixed, align_corners, True, -1)
        masked_cross_entropy(logits, *labels, False, align_corners, True, 0)
        grad = torch.ones(batch, out, out) if mixed else torch.ones(())
        masked_cross_entropy_backward(grad, logits, *labels, mixed, align_corners, grad)
        mask = ignore if mixed else None
        pair = (logits, logits, 0.95, out, out, mask, 255, align_corners, True, True)
        stability_loss(*pair, mixed)
        stability_loss_backward(torch.ones(2), *pair, grad, grad)
        matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        confusion_matrix(logits, target, 255, align_corners, matrix)
    cutmix_(torch.zeros(batch, 3, out, out, dtype=dtype), boxes, partner)


def main() -> None:
    """Compile for the compute capabilities given as arguments."""
    compiler = Compiler([int(argument) for argument in sys.argv[2:]])
    JITFunction.run = lambda self, *args, **kwargs: compiler.run(self, *args, **kwargs)
    if sys.argv[1] == "few":
        call_launchers(torch.float32, 6, False, wide=False)
    else:
        call_launchers(torch.bfloat16, 40, True, wide=True)
    print(json.dumps(compiler.results))


if __name__ == "__main__":
    main()
