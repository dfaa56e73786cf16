"""Virtual upsampling is virtual: no B×K×H×W tensor is ever allocated, forward or backward."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from co2s_fast.ops import backend_status
from co2s_fast.ops.dispatch import implementation

BATCH, CLASSES, GRID, SIDE = 4, 32, 64, 256
FULL_MIB = BATCH * CLASSES * SIDE**2 * 4 / 2**20  # one float32 tensor at full resolution: 32
# What remains are maps (1 MiB for a float32 one) and low-resolution logits, saved gradients and
# gradients (2 MiB each, four of them for two students).
ALLOWED_SHARE = 0.4

WORKER = """
import json, sys, torch
from co2s_fast import losses, ops

batch, classes, grid, side = (int(x) for x in sys.argv[2:6])
torch.set_num_threads(2)


def inputs(grid, side):
    a, b = (torch.randn(batch, classes, grid, grid) * 4 for _ in range(2))
    label = torch.randint(0, classes, (batch, side, side), dtype=torch.uint8)
    return a, b, label, torch.rand(batch, side, side) * 0.1 + 0.9


def cross_entropy(a, b, label, confidence):
    losses.masked_cross_entropy(a.requires_grad_(), label, confidence).backward()


def cross_entropy_map(a, b, label, confidence):
    loss = losses.masked_cross_entropy(a.requires_grad_(), label, confidence, reduction="none")
    loss.sum().backward()


def stability(a, b, label, confidence):
    pair = losses.stability_loss(
        a.requires_grad_(), b.requires_grad_(), threshold=0.5, size=label.shape[1:]
    )
    sum(pair).backward()


def confidence(a, b, label, confidence):
    losses.softmax_confidence(a, label.shape[1:])


def confusion(a, b, label, confidence):
    losses.confusion_matrix(a, label)


def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def peak_mib(function):
    given = inputs(grid, side)
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts anew
    before = status("VmRSS")
    function(*given)
    return status("VmHWM") - before


with ops.use_backend(sys.argv[1]):
    functions = [globals()[name] for name in sys.argv[6:]]
    for function in functions:
        function(*inputs(8, 32))  # libraries and threads are loaded now
    print(json.dumps({function.__name__: peak_mib(function) for function in functions}))
"""


OPS = ("cross_entropy", "cross_entropy_map", "stability", "confidence", "confusion")


def peaks(backend: str, tmp_path: Path, names: tuple[str, ...] = OPS) -> dict[str, float]:
    """Extra resident memory in MiB at the peak of each op, forward and backward."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc/self")
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    sizes = [str(x) for x in (BATCH, CLASSES, GRID, SIDE)]
    done = subprocess.run(
        [sys.executable, str(script), backend, *sizes, *names],
        capture_output=True,
        text=True,
        timeout=300,
        # Every large block comes fresh from the system and goes back when freed, so none hides in
        # memory that an earlier op left resident.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    if done.returncode and "clear_refs" in done.stderr:
        pytest.skip("this kernel does not reset the peak of resident memory")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_measurement_sees_full_resolution_tensors(tmp_path):
    """The control: the reference does allocate them."""
    for name, mib in peaks("reference", tmp_path, ("cross_entropy", "confusion")).items():
        assert mib > 0.9 * FULL_MIB, f"{name}: {mib:.1f} MiB at the peak"


def test_cpp_allocates_none(cpp_target, tmp_path):
    for name, mib in peaks("cpp", tmp_path).items():
        assert mib < ALLOWED_SHARE * FULL_MIB, f"{name}: {mib:.1f} MiB at the peak"


class LargestTensor(TorchDispatchMode):
    """Remembers the most bytes that any tensor made inside the block has."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


class LiveBytes(TorchDispatchMode):
    """Follows the bytes of all memory that was taken inside the block and lives on."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.views: Counter[int] = Counter()  # tensors on each piece of memory

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {self._memory(t) for t in tree_leaves((args, kwargs)) if self._memory(t)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            memory = self._memory(tensor)
            if memory is None or (memory in before and memory not in self.views):
                continue  # nothing, or memory of the arguments
            size = tensor.untyped_storage().nbytes()
            self.views[memory] += 1
            if self.views[memory] == 1:
                self.now += size
                self.peak = max(self.peak, self.now)
            weakref.finalize(tensor, self._forget, memory, size)
        return result

    @staticmethod
    def _memory(value: object) -> int | None:
        if not isinstance(value, torch.Tensor) or not value.untyped_storage().nbytes():
            return None
        return value.untyped_storage().data_ptr()

    def _forget(self, memory: int, size: int) -> None:
        self.views[memory] -= 1
        if not self.views[memory]:
            del self.views[memory]
            self.now -= size


class NoKernel:
    """Stands in for a Triton kernel, whose interpreter makes tensors of its own."""

    def __getitem__(self, grid):
        return lambda *args, **options: None


@pytest.mark.parametrize("classes", [8, 32], ids=["one_pass", "statistics"])
def test_scratch_of_triton_backwards_is_a_share(classes, monkeypatch):
    """What the launchers allocate, for as many programs as on a GPU."""
    if not backend_status()["triton"].live:
        pytest.skip(backend_status()["triton"].why)
    from co2s_fast.kernels import (
        corner_sums,
        masked_cross_entropy_backward,
        stability_loss_backward,
    )

    monkeypatch.setattr(corner_sums, "CPU_PROGRAMS", corner_sums.GPU_PROGRAMS)
    for module in (corner_sums, masked_cross_entropy_backward, stability_loss_backward):
        for name in filter(lambda name: name.endswith("_kernel"), dir(module)):
            monkeypatch.setattr(module, name, NoKernel())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    grid, side = 16, 64
    a, b = (torch.randn(4, classes, grid, grid, device=device) * 4 for _ in range(2))
    label = torch.zeros(4, side, side, dtype=torch.uint8, device=device)
    one, two = torch.ones((), device=device), torch.ones(2, device=device)
    calls = {
        "masked_cross_entropy_backward":
            (one, a, label, None, 0.5, None, 255, None, None, None, False, False, one),
        "stability_loss_backward": (two, a, b, 0.1, side, side, None, 255, False, True, True, a, a),
    }  # fmt: skip
    for name, arguments in calls.items():
        with LiveBytes() as seen:
            gradients = implementation(name, "triton")(*arguments)
        kept = sum(t.nbytes for t in tree_leaves(gradients))
        share = (seen.peak - kept) / (4 * side**2 * 4 * classes)
        assert 0 < share < 0.25, f"{name}: {share:.2f} of upsampled logits"


@pytest.mark.parametrize("classes", [12, 20], ids=["one_pass", "statistics"])
def test_triton_kernels_make_no_tensor_of_that_size(classes):
    """In the interpreter: the launchers' own allocations, which are the same on a GPU."""
    if not backend_status()["triton"].live:
        pytest.skip(backend_status()["triton"].why)
    cross_entropy = implementation("masked_cross_entropy", "triton")
    cross_entropy_backward = implementation("masked_cross_entropy_backward", "triton")
    stability = implementation("stability_loss", "triton")
    stability_backward = implementation("stability_loss_backward", "triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    grid, side = 4, 16
    a, b = (torch.randn(1, classes, grid, grid, device=device) * 4 for _ in range(2))
    label = torch.zeros(1, side, side, dtype=torch.uint8, device=device)
    matrix = torch.zeros(classes, classes, dtype=torch.int64, device=device)
    labels = (label, None, 0.5, None, 255, None, None, None, False, False)
    pair = (0.1, side, side, None, 255, False, True, True)
    one = torch.ones((), device=device)
    with LargestTensor() as seen:
        _, _, saved, _ = cross_entropy(a, *labels, True, 0)
        cross_entropy_backward(one, a, *labels, saved)
        stability(a, b, *pair, True)
        stability_backward(torch.ones(2, device=device), a, b, *pair, saved, saved)
        implementation("softmax_confidence", "triton")(a, side, side, False)
        implementation("confusion_matrix", "triton")(a, label, 255, False, matrix)
    full = 4 * classes * side * side
    assert 0 < seen.largest < full
    with LargestTensor() as seen:
        torch.nn.functional.interpolate(a, (side, side), mode="bilinear")
    assert seen.largest == full, "the control: it would be seen"


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_gpu_backends_allocate_none(backend):
    from co2s_fast import losses, ops

    status = ops.backend_status()[backend]
    if not status.live:
        pytest.skip(f"backend {backend}: {status.why}")
    a, b = (torch.randn(BATCH, CLASSES, GRID, GRID, device="cuda") * 4 for _ in range(2))
    label = torch.randint(0, CLASSES, (BATCH, SIDE, SIDE), device="cuda", dtype=torch.uint8)
    a.requires_grad_(), b.requires_grad_()

    def step() -> None:
        confidence, pseudo = losses.softmax_confidence(a, (SIDE, SIDE))
        loss = losses.masked_cross_entropy(a, pseudo, confidence, threshold=0.5)
        loss = loss + sum(losses.stability_loss(a, b, threshold=0.5, size=(SIDE, SIDE)))
        loss.backward()
        losses.confusion_matrix(a, label)

    with ops.use_backend(backend):
        step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        extra = (torch.cuda.max_memory_allocated() - before) / 2**20
    # Confidence (1 MiB), label (2 MiB) and the gradients live together in this step.
    assert extra < 0.5 * FULL_MIB, f"{extra:.1f} MiB at the peak"
