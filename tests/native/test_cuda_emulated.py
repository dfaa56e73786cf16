"""The CUDA kernels themselves, run on the CPU by tests/native/cuda_emulation, without a GPU.

They are compiled from the same sources and launched by the same host code; what this cannot see is
what nvcc makes of them, speed, and the difference between expf and the CPU's exponential.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builds import REPOSITORY, cmake_build

from co2s_fast.ops import catalogue, reference
from co2s_fast.ops.registration import FUSED_CLASSES

pytestmark = pytest.mark.slow

ALL = os.environ.get("CO2S_EMULATED_ALL") == "1"

# What the CPU's ops do otherwise, by contract: they name classes out of range, and save gradients.
_OF_THE_CPU = "classes_outside or unknown_classes or opcheck or bad_partner or peak"
_libraries = []


@pytest.fixture(scope="module")
def emulated_folder() -> Path:
    """The folder with the built module; `CO2S_EMULATED` names one that exists already."""
    if "CO2S_EMULATED" in os.environ:
        return Path(os.environ["CO2S_EMULATED"])
    folder = cmake_build("emulation", ("_cuda_emulated",), CO2S_EMULATE_CUDA="ON",
                         CO2S_WERROR="ON")  # fmt: skip
    return folder / "tests" / "native" / "cuda_emulation"


@pytest.fixture(scope="module")
def ops(emulated_folder):
    """`torch.ops.co2s_emulated`, with every entry of the catalogue."""
    if not _libraries:
        _libraries.append(catalogue.define("co2s_emulated"))
        sys.path.insert(0, str(emulated_folder))
        import _cuda_emulated  # noqa: F401
    return torch.ops.co2s_emulated


@pytest.mark.parametrize("order", ["forward", "random"])
def test_the_whole_conformance_suite(emulated_folder, order):
    if not ALL:
        pytest.skip("minutes long (CO2S_EMULATED_ALL=1 runs it)")
    here = str(Path(__file__).parent)
    environment = {**os.environ, "CO2S_EMULATED": str(emulated_folder), "OMP_NUM_THREADS": "1",
                   "CO2S_EMULATION_ORDER": order, "PYTHONPATH": here}  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-p", "emulated_backend",
               "tests/conformance", "-k", f"cpp and not ({_OF_THE_CPU})"]  # fmt: skip
    run = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:]
    assert " passed" in run.stdout


# name: decoder's grid, label grid
GRIDS = {
    "vectors": ((8, 16), (8, 16)),
    "no_vectors": ((5, 7), (5, 7)),
    "up4": ((6, 10), (24, 40)),
    "many_tiles": ((3, 150), (6, 300)),  # several tiles across
    "fraction": ((3, 150), (7, 331)),
    "many_rows": ((21, 3), (63, 9)),  # several tiles down
    "one_cell": ((1, 1), (3, 450)),  # a cell's pixels are wider than a block
    "two_cells": ((2, 2), (5, 700)),
    "down": ((9, 170), (3, 34)),
    "down_fraction": ((9, 170), (4, 31)),
}
CLASSES = [1, 6, 7, 9, 16, 17, 32, 33, 100] if ALL else [6, 9, 33]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}
# Source positions are float32, as in F.interpolate: near column 150 they err by 1e-5 of a cell.
FRACTIONS = {"fraction": 20, "down_fraction": 20}


def close(ours, truth, dtype, grid, what):
    slack = TOLERANCE[dtype] * (1 if dtype == torch.float64 else FRACTIONS.get(grid, 1))
    allowed = slack * truth.abs().max().clamp(min=1e-3)
    assert (ours.double() - truth).abs().max() <= allowed, what


def draw(grid, classes, dtype, seed, batch=2):
    generator = torch.Generator().manual_seed(seed)
    small, size = GRIDS[grid]
    shape, maps = (batch, classes, *small), (batch, *size)
    a, b = (torch.randn(shape, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    target = torch.randint(0, classes, maps, generator=generator, dtype=torch.uint8)
    target[torch.rand(maps, generator=generator) < 0.1] = 255
    confidence = torch.rand(maps, generator=generator)
    return a.to(dtype), b.to(dtype), target, confidence, generator


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("grid", GRIDS)
def test_every_path(grid, classes, ops):
    for dtype in TOLERANCE:
        check_cross_entropy(ops, grid, classes, dtype)
        check_stability(ops, grid, classes, dtype)


def check_cross_entropy(ops, grid, classes, dtype):
    z, _, target, confidence, generator = draw(grid, classes, dtype, seed=1)
    weight = torch.rand(classes, generator=generator, dtype=torch.float64)
    height, width = target.shape[1:]
    boxes = torch.tensor([[-3, 0, width // 2 + 1, height], [1, 1, width + 9, height - 1]]).int()
    partner = torch.tensor([1, 0])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    mixed = (confidence, 0.5, (target == 1).int() * 255, 255)
    own = (z, target, *mixed, weight.to(wide), boxes, partner, False, False)
    fused = classes <= FUSED_CLASSES["masked_cross_entropy"] and dtype != torch.float64
    fused = fused and GRIDS[grid][0] != GRIDS[grid][1]
    scale = torch.tensor(1.3, dtype=wide)
    exact = z.double().requires_grad_()
    truth, truth_counts = reference.masked_cross_entropy(
        exact, target, *mixed, weight.to(wide).double(), boxes, partner, False, False
    )
    (truth * scale.double()).backward()
    for with_grad in (True, False):
        mean, _, _, inverse = ops.masked_cross_entropy(*own, with_grad, int(with_grad))
        divisor = truth_counts[int(with_grad)].clamp(min=1).to(wide)
        close(mean, truth.detach() / divisor, wide, grid, f"mean, {dtype}")
        close(inverse, 1 / divisor, wide, grid, f"scale, {dtype}")
        loss, counts, saved, none = ops.masked_cross_entropy(*own, with_grad, -1)
        assert none.shape == (0,)
        gradient = ops.masked_cross_entropy_backward(scale, *own, saved)
        assert counts.tolist() == truth_counts.tolist()
        assert saved.shape == (z.shape if with_grad and fused else (0,)) and saved.dtype == wide
        assert loss.dtype == wide and gradient.dtype == dtype
        close(loss, truth.detach(), wide, grid, f"loss, {dtype}")
        close(gradient, exact.grad, dtype, grid, f"gradient, {dtype}")


def check_stability(ops, grid, classes, dtype):
    a, b, target, _, _ = draw(grid, classes, dtype, seed=2)
    height, width = target.shape[1:]
    own = (0.4, height, width, target, 255, grid in FRACTIONS)  # align_corners makes fractions
    fused = classes <= FUSED_CLASSES["stability_loss"] and dtype != torch.float64
    fused = fused and GRIDS[grid][0] != GRIDS[grid][1]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scale = torch.tensor([1.7, -0.6], dtype=wide)
    exact = [x.double().requires_grad_() for x in (a, b)]
    truth, truth_counts = reference.stability_loss(*exact, *own)
    (truth * scale.double()).sum().backward()
    for need in ((True, True), (True, False), (False, True)):
        for save in (need, (False, False)):
            divisors = classes * truth_counts.clamp(min=1).to(wide)
            means, _, *_, inverse = ops.stability_loss(a, b, *own, *save, True)
            close(means, truth.detach() / divisors, wide, grid, f"means, {dtype}")
            close(inverse, 1 / divisors, wide, grid, f"scale, {dtype}")
            sums, counts, *saved, none = ops.stability_loss(a, b, *own, *save, False)
            assert none.shape == (0,)
            if counts.tolist() != truth_counts.tolist():  # a decision at the edge of rounding
                pytest.fail(f"counts {counts.tolist()}, not {truth_counts.tolist()}, {dtype}")
            assert sums.dtype == wide
            close(sums, truth.detach(), wide, grid, f"sums, {dtype}")
            gradients = ops.stability_loss_backward(scale, a, b, *own, *need, *saved)
            for z, wanted, kept, held, gradient in zip(
                exact, need, save, saved, gradients, strict=True
            ):
                assert held.shape == (z.shape if kept and fused else (0,)) and held.dtype == wide
                assert gradient.shape == (z.shape if wanted else (0,)) and gradient.dtype == dtype
                if wanted:
                    close(gradient, z.grad, dtype, grid, f"gradient, {dtype}")


@pytest.mark.parametrize("grid", GRIDS)
def test_predictions(grid, ops):
    for classes in (1, 6, 33, 70):
        for dtype in TOLERANCE:
            z, _, target, _, _ = draw(grid, classes, dtype, seed=3)
            size = target.shape[1:]
            confidence, label = ops.softmax_confidence(z, *size, False)
            truth, _ = reference.softmax_confidence(z.double(), *size, False)
            close(confidence, truth, confidence.dtype, grid, "confidence")
            again = reference.up(z.double(), *size, False)
            picked = again.gather(1, label[:, None])[:, 0]
            assert (again.amax(1) - picked).max() < 1e-4
            counts = torch.zeros(classes, classes, dtype=torch.int64)
            ops.confusion_matrix(z, target, 255, False, counts)
            expected = torch.zeros_like(counts)
            valid = target != 255
            expected.index_put_(
                (target[valid].long(), label[valid]), torch.ones(1, dtype=torch.int64), True
            )
            assert torch.equal(counts, expected)


def test_the_same_bits_again_and_in_any_batch(ops):
    z, _, target, confidence, _ = draw("many_tiles", 6, torch.float32, seed=4)
    own = (z, target, confidence, 0.5, None, 255, None, None, None, False, False)
    one = torch.ones(())
    first = ops.masked_cross_entropy_backward(one, *own, z.new_empty(0))
    again = ops.masked_cross_entropy_backward(one, *own, z.new_empty(0))
    assert torch.equal(first, again)
    single = ops.masked_cross_entropy_backward(
        one, z[1:], target[1:], confidence[1:], *own[3:], z.new_empty(0)
    )
    assert torch.equal(single[0], first[1])


def largest_allocation(call) -> int:
    """Bytes of the largest block that torch's allocator gave out during the call."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    return max(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.mark.parametrize("classes", [9, 33])
def test_no_tensor_of_full_resolution(classes, ops):
    a, b = (torch.randn(1, classes, 8, 8) * 3 for _ in range(2))
    side = 32
    full = 4 * classes * side * side
    target = torch.zeros(1, side, side, dtype=torch.uint8)
    own = (target, None, 0.5, None, 255, None, None, None, False, False)
    pair = (0.1, side, side, None, 255, False, True, True)
    empty, one = torch.empty(0), torch.ones(())
    calls = {
        "loss": lambda: ops.masked_cross_entropy(a, *own, True, 0),
        "loss backward": lambda: ops.masked_cross_entropy_backward(one, a, *own, empty),
        "stability": lambda: ops.stability_loss(a, b, *pair, True),
        "stability backward": lambda: ops.stability_loss_backward(
            torch.ones(2), a, b, *pair, empty, empty
        ),
        "confidence": lambda: ops.softmax_confidence(a, side, side, False),
    }
    for name, call in calls.items():
        assert 0 < largest_allocation(call) < full, name
    up = torch.nn.functional.interpolate
    assert largest_allocation(lambda: up(a, (side, side), mode="bilinear")) >= full  # the control


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.bool, torch.bfloat16, torch.float32, torch.int64,
              torch.complex128], ids=str)  # fmt: skip
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "maps"])
def test_cutmix(dtype, layout, ops):
    images = torch.randint(0, 2 if dtype == torch.bool else 200, (3, 4, 9, 300)).to(dtype)
    if layout == "channels_last":
        images = images.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        images = torch.cat([images, images], 3)[..., 1::2]
    elif layout == "maps":
        images = images[:, 0].contiguous()
    boxes = torch.tensor([[2, -1, 290, 6], [0, 3, 999, 99], [5, 5, 5, 9]]).int()
    partner = torch.tensor([1, 2, 0])
    expected = reference.cutmix(images, boxes, partner)
    ops.cutmix_(images, boxes, partner)
    assert torch.equal(images, expected)


def test_unknown_partners_and_classes_are_left_out(ops):
    images = torch.rand(2, 3, 4, 5)
    before = images.clone()
    boxes = torch.tensor([[0, 0, 5, 4]] * 2).int()
    ops.cutmix_(images, boxes, torch.tensor([7, -1]))
    assert torch.equal(images, before)
    z = torch.randn(2, 3, 4, 5)
    target = torch.full((2, 4, 5), 9)
    target[:, 0] = 1
    arguments = (None, 0.0, None, 255, None, boxes, torch.tensor([7, -1]), False, False)
    _, counts, saved, _ = ops.masked_cross_entropy(z, target, *arguments, True, 0)
    assert counts.tolist() == [10, 10]
    gradient = ops.masked_cross_entropy_backward(torch.ones(()), z, target, *arguments, saved)
    assert gradient[:, :, 1:].eq(0).all() and gradient[:, :, 0].ne(0).all()
