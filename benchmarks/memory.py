"""Peak extra memory of one pass: what it needs beyond its inputs.

On the CPU a freshly forked process builds the case, runs one pass so that libraries, threads and
compiled code are in place, resets the kernel's high-water mark of resident memory (writing 5 to
/proc/self/clear_refs) and runs the pass that is measured. The difference between the new mark
(VmHWM) and the resident size before it counts everything: tensors, oneDNN scratch, and buffers
that C++ code takes from malloc, which the allocator hooks of torch.profiler do not see. glibc is
told to hand freed blocks back, so that no pass is served from an earlier one's leftovers.

On a GPU it is the difference in `torch.cuda.max_memory_allocated`.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import multiprocessing
import os
import platform
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.harness import Case, Workload, run_pass, scope

TIMEOUT_S = 120.0
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def unavailable(device: torch.device) -> str | None:
    """Why peak memory cannot be measured here, or None."""
    if device.type == "cuda" or platform.system() == "Linux":
        return None
    return "peak resident memory is read from /proc, which only Linux has"


def _resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def _peak_of_pass(workload: Workload, provider: str) -> int:
    with scope(provider):
        run_pass(workload)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        run_pass(workload)
    return max(0, _resident("VmHWM") - before)


def _child(
    pipe: Connection, module: str, case_name: str, provider: str, quick: bool, threads: int
) -> None:
    """Measure in this fresh process and send (bytes, None) or (None, what went wrong)."""
    try:
        torch.set_num_threads(threads)
        device = torch.device("cpu")
        cases = importlib.import_module(module).cases(device, quick)
        case = next(c for c in cases if c.name == case_name)
        pipe.send((_peak_of_pass(case.build(provider, device), provider), None))
    except BaseException:
        pipe.send((None, traceback.format_exc(limit=-3)))
        raise
    finally:
        pipe.close()


def _on_cpu(module: str, case: Case, provider: str, quick: bool) -> int:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "benchmarks.memory", module])
    saved = {key: os.environ.get(key) for key in GIVE_BACK}
    os.environ.update(GIVE_BACK)  # read by glibc when the fork server starts
    receive, send = context.Pipe(duplex=False)
    arguments = (send, module, case.name, provider, quick, torch.get_num_threads())
    process = context.Process(target=_child, args=arguments)
    process.start()
    send.close()
    for key, value in saved.items():
        os.environ.pop(key) if value is None else os.environ.update({key: value})
    try:
        if not receive.poll(TIMEOUT_S):
            raise RuntimeError(f"no answer within {TIMEOUT_S:.0f} s")
        peak, problem = receive.recv()
    except EOFError:
        peak, problem = None, "the process died"
    finally:
        process.join(5)
        if process.is_alive():
            process.kill()
    if problem is not None:
        raise RuntimeError(f"peak memory of {provider} in {case.name}: {problem}")
    return peak


def _on_gpu(workload: Workload, provider: str, device: torch.device) -> int:
    with scope(provider):
        run_pass(workload)
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run_pass(workload)
        torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(device) - before


def peak_extra_bytes(
    module: str, case: Case, provider: str, device: torch.device, quick: bool,
    ready: Workload | None = None,
) -> int:  # fmt: skip
    """Peak memory of one pass (forward, and backward if there is one) beyond the inputs, bytes.

    A GPU's allocator counts by itself, so there the workload that was timed serves (`ready`).
    """
    if device.type == "cuda":
        return _on_gpu(ready or case.build(provider, device), provider, device)
    return _on_cpu(module, case, provider, quick)
