"""Who takes part: the peers, and each of our backends, with the reason where one cannot.

eager            the peers' formulation, as their training loops are written
eager_in_batch   the same with the CutMix partner taken from the batch: no second weak view
compile          that work in the form torch.compile takes whole (no host counts), compiled
liger            liger-kernel's cross entropy on full-resolution logits, a GPU only
reference, cpp, triton, cuda    our backends
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PEERS = ("eager", "eager_in_batch", "compile", "liger")
BACKENDS = ("reference", "cpp", "triton", "cuda")


def unavailable(name: str, device: torch.device) -> str | None:
    """Why provider `name` cannot run on `device` here, or None."""
    if name == "liger":
        if device.type != "cuda":
            return "liger-kernel's kernels need a CUDA GPU"
        if importlib.util.find_spec("liger_kernel") is None:
            return "liger-kernel is not installed"
    if name not in BACKENDS:
        return None
    if name == "triton" and device.type != "cuda":
        return "Triton's kernels need a CUDA GPU (its interpreter is for tests, not for timing)"
    from co2s_fast import ops

    try:
        with ops.use_backend(name):
            ops.backend(device)
    except RuntimeError as error:
        return str(error)
    return None


def default_backend(device: torch.device) -> str:
    """The backend that serves this device when nobody asks for another."""
    from co2s_fast import ops

    return ops.backend(device)


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Run one of our backends and no other; peers run as they are."""
    if name not in BACKENDS:
        yield
        return
    from co2s_fast import ops

    with ops.use_backend(name):
        yield
