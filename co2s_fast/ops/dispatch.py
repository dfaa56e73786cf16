"""Which backend serves a tensor, why the others do not, and the switches for tests.

`reference` is plain PyTorch; `cpp` and `cuda` live in the native library `co2s_fast._native`;
`triton` in `co2s_fast.kernels`. Nothing is loaded before it is first needed, and a failure to load
is remembered, never raised, unless that backend was asked for by name.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from co2s_fast.ops import catalogue

BACKENDS = ("reference", "cpp", "triton", "cuda")
_FIX = {
    "reference": "",
    "cpp": "pip install --no-build-isolation -e .   (needs a C++20 compiler)",
    "triton": "pip install triton",
    "cuda": "CO2S_WITH_CUDA=ON pip install --no-build-isolation -e .   (needs nvcc)",
}
_FIX_INTERPRETER = "set TRITON_INTERPRET=1 before Python starts (slow: for tests)"

_references: dict[str, Callable] = {}
# Process-wide, not per thread: autograd runs CUDA backwards in threads of its own.
_forced: str | None = None
_debug = False
_loading = threading.Lock()
_native_library: torch.library.Library | None = None


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can be used here; `why` it cannot and the command that `fix`es it."""

    live: bool
    why: str = ""
    fix: str = ""


@functools.cache
def _load_native() -> str:
    """Load the native library once; the reason why that failed, empty when it did not."""
    global _native_library
    record = build_record()
    if record.get("operators", catalogue.fingerprint()) != catalogue.fingerprint():
        return "the native library was built from other sources of this package: build it again"
    built_for, here = record.get("torch", torch.__version__), str(torch.__version__)
    if built_for != here:
        return f"the native library was built for torch {built_for}, this is {here}: build it again"
    with _loading:  # the cache lets several threads in before the first result
        if _native_library is None:
            _native_library = catalogue.define("co2s_native")
    try:
        importlib.import_module("co2s_fast._native")
    except (ImportError, OSError, RuntimeError) as error:
        return f"the native library could not be loaded: {error}{_build_failure()}"
    return ""


def load_native() -> ModuleType | None:
    """The native module `co2s_fast._native`, loaded on the first call; None where it cannot be."""
    return None if _load_native() else importlib.import_module("co2s_fast._native")


def build_record() -> dict[str, Any]:
    """What the installation wrote about the native build (see setup.py).

    Empty where it wrote nothing. A damaged record counts as none and says so under "damaged".
    """
    path = Path(__file__).parents[1] / "_native_build.json"
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        return {"damaged": f"{path} cannot be read: {error}"}
    if not isinstance(record, dict):
        return {"damaged": f"{path}: expected an object, found {record!r:.40}"}
    return record


def _build_failure() -> str:
    """Why the native library was not built, as recorded by the installation."""
    reason = build_record().get("reason")
    return f" (it was not built: {reason})" if reason else ""


@functools.cache
def _native_status(dispatch_key: str) -> str:
    """Why the native kernels under `dispatch_key` cannot be used; empty when they can."""
    why = _load_native()
    if why:
        return why
    missing = [
        name
        for name in catalogue.SCHEMAS
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"co2s_native::{name}", dispatch_key)
    ]
    if missing:
        which = "any" if len(missing) == len(catalogue.SCHEMAS) else ", ".join(missing)
        return f"the native library was built without {dispatch_key} kernels (without {which})"
    if dispatch_key == "CUDA" and not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    if dispatch_key == "CUDA":
        return _no_code_for_this_gpu()
    return ""


def _no_code_for_this_gpu() -> str:
    """Why the CUDA kernels do not run on the current GPU; empty when they do."""
    try:
        built = importlib.import_module("co2s_fast._native").build_info()["cuda_archs"]
    except RuntimeError as error:  # an instruction set that CO2S_CPU_ISA names and there is not
        return str(error)
    major, minor = torch.cuda.get_device_capability()
    here = 10 * major + minor
    for arch in built.split(";"):
        # Machine code runs on later minor versions, the PTX beside it on all later GPUs; neither
        # does where an architecture's own features (90a) were asked for.
        if here == int(arch[:-1]) if arch.endswith("a") else here >= int(arch):
            return ""
    return (
        f"the native library was built for CUDA architectures {built}, this GPU is sm_{here}: "
        f"build it again with CO2S_CUDA_ARCHS={here}"
    )


@functools.cache
def _load_triton() -> str:
    """Import the Triton kernels once; the reason why that failed, empty when it did not."""
    try:
        for stem in {catalogue.stem(name) for name in catalogue.SCHEMAS}:
            importlib.import_module(f"co2s_fast.kernels.{stem}")
    except ImportError as error:
        checkout = (Path(__file__).parents[2] / "setup.py").is_file()
        where = "; this is the checkout, not the package that was installed" if checkout else ""
        return f"the Triton kernels could not be imported: {error}{where}"
    return ""


def interpreting() -> bool:
    """Whether Triton runs its interpreter, which serves CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _why_not(name: str, device_type: str) -> str:
    """Why backend `name` cannot serve tensors on `device_type`; empty when it can."""
    if name == "reference":
        return ""
    if name == "cpp":
        return _native_status("CPU") if device_type == "cpu" else "it serves CPU tensors only"
    if name == "cuda":
        return _native_status("CUDA") if device_type == "cuda" else "it serves CUDA tensors only"
    why = _load_triton()
    if not why and device_type != "cuda" and not interpreting():
        return f"it serves CUDA tensors, and {device_type} ones only with TRITON_INTERPRET=1"
    return why


def backend_status() -> dict[str, BackendStatus]:
    """For each backend, whether it can be used on this machine; else why and what to do."""
    device = {"reference": "cpu", "cpp": "cpu", "cuda": "cuda"}
    device["triton"] = "cuda" if torch.cuda.is_available() else "cpu"
    status = {}
    for name in BACKENDS:
        why = _why_not(name, device[name])
        fix = _FIX[name]
        if name == "triton" and importlib.util.find_spec("triton") and _load_triton():
            fix = "pip install --no-build-isolation -e ."
        elif name == "triton" and why and not _load_triton():
            why, fix = "torch sees no CUDA GPU", _FIX_INTERPRETER
        status[name] = BackendStatus(not why, why, fix if why else "")
    return status


@functools.cache
def _default(device_type: str) -> str:
    order = ("cuda", "triton") if device_type == "cuda" else ("cpp",)
    for name in order:
        if not _why_not(name, device_type):
            return name
    wanted = order[-1]
    warnings.warn(
        f"co2s_fast: {device_type} tensors are served by the slow PyTorch reference, because "
        f"{_why_not(wanted, device_type)}. To get the {wanted} backend: {_FIX[wanted]}",
        RuntimeWarning,
        stacklevel=2,
    )
    return "reference"


def backend(tensor: Tensor | torch.device | str | None = None) -> str:
    """Name of the backend that serves `tensor`.

    Args:
        tensor: a tensor, a device or its name; by default the GPU where there is one, else the CPU.

    Returns:
        "reference", "cpp", "triton" or "cuda".

    Raises:
        RuntimeError: the backend forced by `use_backend` cannot serve the tensor.
    """
    if tensor is None:
        tensor = "cuda" if torch.cuda.is_available() else "cpu"
    device = tensor.device if isinstance(tensor, Tensor) else torch.device(tensor)
    if _forced is None:
        return _default(device.type)
    why = _why_not(_forced, device.type)
    if why:
        raise RuntimeError(
            f"backend {_forced!r} was asked for but cannot serve {device.type} tensors: {why}"
        )
    return _forced


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, every op runs on backend `name` or raises; it never falls back.

    Process-wide, for tests and benchmarks. A backward pass uses the backend in force when it runs.

    Args:
        name: "reference", "cpp", "triton" or "cuda".

    Raises:
        ValueError: there is no such backend.
        RuntimeError: it cannot be used on this machine, or, at a call, for that tensor.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"use_backend: got {name!r}, expected one of {', '.join(BACKENDS)}")
    status = backend_status()[name]
    if not status.live:
        raise RuntimeError(f"backend {name!r} is not live: {status.why}. Fix: {status.fix}")
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


class debug_checks:
    """Switch device-side range checks on or off, at once; as a context manager, for the block.

    On the GPU a class index outside [0, K) is otherwise treated as a pixel without a label, since
    looking for it costs a host synchronisation. On the CPU such checks are always made.

    Args:
        enabled: whether GPU calls check class and partner indices and raise IndexError.
    """

    def __init__(self, enabled: bool = True) -> None:
        global _debug
        self.previous, _debug = _debug, bool(enabled)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc: object) -> None:
        global _debug
        _debug = self.previous


def debugging() -> bool:
    """Whether device-side range checks are on."""
    return _debug


def register_reference(name: str, function: Callable) -> None:
    """List `function` as the `reference` implementation of catalogue entry `name`."""
    _references[name] = function


@functools.cache
def implementation(name: str, backend_name: str) -> Callable:
    """The function with which `backend_name` implements catalogue entry `name`."""
    if backend_name == "reference":
        return _references[name]
    if backend_name == "triton":
        module = importlib.import_module(f"co2s_fast.kernels.{catalogue.stem(name)}")
        return getattr(module, name)
    return getattr(torch.ops.co2s_native, name).default
