"""Times several providers of one computation in turn, and checks first that they agree.

Providers take turns inside every round, so that a change in the machine's load falls on all of
them. A sample is one forward pass and, where there is something to differentiate, one backward
pass; the three modes forward, backward and both come out of the same samples.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import providers

SHORTEST_SAMPLE_S = 0.004
MOST_PASSES_A_SAMPLE = 20
L2_FLUSH_BYTES = 256 << 20
# The reference is there to be read and to test against, not to be fast; it need not be slow here.
REFERENCE_REPEATS = 3
# The GPU idles before a timed region: the launches queue up meanwhile, so the events measure device
# work and not how fast Python can launch it (`wall` measures that). For so many times what a pass
# takes to launch, within limits; a pass longer than the upper one stays ahead by itself.
HEAD_START, HEAD_START_LIMITS_S = 1.5, (0.005, 0.05)
_CLOCK_CYCLES = 10_000_000  # slept once, to learn how long a cycle is


class NotMeasured(Exception):
    """Raised by a case's builder when a provider cannot do it here; the text says why."""


@dataclass
class Workload:
    """One provider's way of doing one case.

    `forward` returns the scalar to differentiate when there are `leaves`, else anything.
    `items` is the number of images a call works through, for images a second. `check` gives what
    is compared with the other providers' results where that is not what `forward` returns, as when
    it writes files; it is called once, after a pass, and is not timed.
    """

    forward: Callable[[], Any]
    leaves: tuple[Tensor, ...] = ()
    mode: str = "forward"
    items: int = 0
    check: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Case:
    """One configuration that all `providers` can be asked to do; the first is the yardstick.

    Where the peers themselves compute in a half type, `truth` builds what results are compared
    with instead, and `tolerance` holds for our backends alone: at a threshold, a half type's own
    rounding decides.
    """

    name: str
    providers: tuple[str, ...]
    build: Callable[[str, torch.device], Workload]
    bytes_forward: int = 0
    bytes_backward: int = 0
    tolerance: float | None = 1e-3  # largest relative error against the yardstick; None: unchecked
    memory: tuple[str, ...] = ("eager", "cpp", "triton", "cuda")  # whose peak is measured
    truth: Callable[[torch.device], Workload] | None = None


@dataclass
class Measured:
    """Samples in seconds by mode, and what could not be measured or came out wrong."""

    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    items: dict[str, int] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    ready: dict[str, Workload] = field(default_factory=dict)


def percentiles(samples: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile, by linear interpolation."""
    ordered = sorted(samples)

    def at(share: float) -> float:
        position = share * (len(ordered) - 1)
        low = math.floor(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])

    return at(0.5), at(0.2), at(0.8)


def run_pass(workload: Workload) -> tuple[Any, tuple[Tensor | None, ...]]:
    """One forward and, with leaves, one backward pass."""
    out = workload.forward()
    if not workload.leaves:
        return out, ()
    return out, torch.autograd.grad(out, workload.leaves, allow_unused=True)


def _time_on_cpu(workload: Workload) -> dict[str, float]:
    begin = time.perf_counter()
    out = workload.forward()
    middle = time.perf_counter()
    if not workload.leaves:
        return {workload.mode: middle - begin}
    gradients = torch.autograd.grad(out, workload.leaves, allow_unused=True)
    end = time.perf_counter()
    del gradients
    return {"forward": middle - begin, "backward": end - middle, "both": end - begin}


def _idle(cycles: int) -> None:
    """Keep the current stream waiting."""
    torch.cuda._sleep(cycles)  # private, but the only portable busy wait


def _head_start(workload: Workload) -> int:
    """Cycles for which the GPU should wait while a pass is launched; call within the scope."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    torch.cuda.synchronize()
    events[0].record()
    _idle(_CLOCK_CYCLES)
    events[1].record()
    begin = time.perf_counter()
    run_pass(workload)
    launched = time.perf_counter() - begin
    torch.cuda.synchronize()
    cycle = events[0].elapsed_time(events[1]) / 1e3 / _CLOCK_CYCLES
    shortest, longest = HEAD_START_LIMITS_S
    return round(min(max(HEAD_START * launched, shortest), longest) / cycle)


def _time_on_gpu(workload: Workload, flush: Tensor, head_start: int) -> dict[str, float]:
    flush.zero_()
    _idle(head_start)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
    events[0].record()
    out = workload.forward()
    events[1].record()
    if workload.leaves:
        torch.autograd.grad(out, workload.leaves, allow_unused=True)
    events[2].record()
    torch.cuda.synchronize()
    forward, backward = (events[i].elapsed_time(events[i + 1]) / 1e3 for i in (0, 1))
    begin = time.perf_counter()
    run_pass(workload)
    torch.cuda.synchronize()
    wall = time.perf_counter() - begin
    if not workload.leaves:
        return {workload.mode: forward, "wall": wall}
    return {"forward": forward, "backward": backward, "both": forward + backward, "wall": wall}


def _passes_for(workload: Workload) -> int:
    """How many passes make a sample long enough for the clock."""
    seconds = max(sum(_time_on_cpu(workload).values()), 1e-9)
    return max(1, min(MOST_PASSES_A_SAMPLE, math.ceil(SHORTEST_SAMPLE_S / seconds)))


def _sample_on_cpu(workload: Workload, passes: int) -> dict[str, float]:
    total: dict[str, float] = {}
    for _ in range(passes):
        for mode, seconds in _time_on_cpu(workload).items():
            total[mode] = total.get(mode, 0.0) + seconds
    return {mode: seconds / passes for mode, seconds in total.items()}


def _sampler(workload: Workload, flush: Tensor | None) -> Callable[[], dict[str, float]]:
    """What takes one sample, in seconds by mode; with `flush`, on its GPU."""
    if flush is None:
        return partial(_sample_on_cpu, workload, _passes_for(workload))
    return partial(_time_on_gpu, workload, flush, _head_start(workload))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for key in sorted(value):
            yield from _tensors(value[key])
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


def _result(workload: Workload) -> list[Tensor]:
    out, gradients = run_pass(workload)
    if workload.check is not None:
        out = workload.check()
    zeros = (torch.zeros_like(leaf) for leaf in workload.leaves)
    filled = [z if g is None else g for g, z in zip(gradients, zeros, strict=True)]
    return [t.detach().to("cpu", torch.float64, copy=True) for t in (*_tensors(out), *filled)]


def disagreement(result: list[Tensor], expected: list[Tensor]) -> float:
    """Largest ‖result - expected‖ / ‖expected‖ over the tensors; infinite when shapes differ."""
    if [t.shape for t in result] != [t.shape for t in expected]:
        return math.inf
    worst = 0.0
    for got, want in zip(result, expected, strict=True):
        error = float((got - want).norm() / want.norm().clamp(min=1e-12))
        worst = max(worst, math.inf if math.isnan(error) else error)
    return worst


def scope(provider: str) -> AbstractContextManager[None]:
    """The context all calls of a provider run in: its backend, forced."""
    return providers.forced(provider)


@contextmanager
def freshly_compiled() -> Iterator[None]:
    """Forget graphs of earlier cases, so that torch.compile specialises to this case's shapes."""
    torch._dynamo.reset()
    yield


def _prepare(
    case: Case, wanted: Callable[[str], bool], device: torch.device, found: Measured
) -> dict[str, Workload]:
    """Build every provider, compare its result with the first one's, and warm it up."""
    ready: dict[str, Workload] = {}
    expected = None if case.truth is None else _result(case.truth(device))
    for name in filter(wanted, case.providers):
        reason = providers.unavailable(name, device)
        if reason is None:
            try:
                workload = case.build(name, device)
            except NotMeasured as absent:
                reason = str(absent)
        if reason is not None:
            found.absent[name] = reason
            continue
        with scope(name):
            result = _result(workload)
        if case.tolerance is not None and not (case.truth and name in providers.PEERS):
            expected = result if expected is None else expected
            error = disagreement(result, expected)
            if not error <= case.tolerance:
                yardstick = "float32" if case.truth else next(iter(ready), name)
                found.wrong[name] = (
                    f"differs from {yardstick} by {error:.2g} relative, "
                    f"allowed {case.tolerance:.2g}"
                )
                continue
        ready[name] = workload
        found.items[name] = workload.items
    return ready


def measure(
    case: Case,
    device: torch.device,
    repeats: int,
    wanted: Callable[[str], bool] = lambda name: True,
) -> Measured:
    """Time every provider of `case` in interleaved rounds."""
    found = Measured()
    with freshly_compiled():
        ready = found.ready = _prepare(case, wanted, device, found)
    flush = None
    if device.type == "cuda":
        flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device=device)
    samplers = {}
    for name, workload in ready.items():
        with scope(name):
            samplers[name] = _sampler(workload, flush)
    order = list(ready)
    for turn in range(repeats):
        shift = turn % max(len(order), 1)  # nobody always follows the same neighbour
        for name in order[shift:] + order[:shift]:
            if name == "reference" and turn >= REFERENCE_REPEATS:
                continue
            with scope(name):
                taken = samplers[name]()
            for mode, seconds in taken.items():
                found.samples.setdefault(name, {}).setdefault(mode, []).append(seconds)
    return found


def copy_bandwidth(device: torch.device, repeats: int = 15) -> list[float]:
    """Bytes a second of a large copy within a device's memory, counting bytes read and written."""
    source = torch.randn(1 << 20, device=device).repeat(256)
    target = torch.empty_like(source)
    seconds = _copy_on_cpu if device.type == "cpu" else _copy_on_gpu
    rates = [2 * source.nbytes / seconds(source, target) for _ in range(repeats + 3)]
    return rates[3:]  # the first ones warm up


def _copy_on_cpu(source: Tensor, target: Tensor) -> float:
    begin = time.perf_counter()
    target.copy_(source)
    return time.perf_counter() - begin


def _copy_on_gpu(source: Tensor, target: Tensor) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    target.copy_(source)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3
