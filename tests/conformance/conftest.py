"""The backends: each is tested where it is present, and skipped with its reason where it is not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from op_cases import INTERPRETED, INTERPRETED_ON_EQUAL_GRIDS, Case

from co2s_fast.ops import backend_status, use_backend


@dataclass(frozen=True)
class Target:
    """The backend in force and the device its tensors live on."""

    name: str
    device: str

    @property
    def interpreted(self) -> bool:
        """Triton's interpreter: right but slow, so it gets fewer and smaller cases."""
        return self.name == "triton" and self.device == "cpu"

    def leave_out(self, unless: bool = False, why: str = "too slow in the interpreter") -> None:
        """Skip the test under the interpreter, `unless` it is a chosen one or all are wanted."""
        if self.interpreted and not unless and os.environ.get("CO2S_INTERPRET_ALL") != "1":
            pytest.skip(f"{why} (CO2S_INTERPRET_ALL=1 runs it)")

    def fit(self, case: Case) -> Case:
        """The case as this backend runs it; skips the test where the interpreter would not."""
        if self.interpreted and case.name in INTERPRETED_ON_EQUAL_GRIDS:
            return case.on_equal_grids()
        self.leave_out(unless=case.name in INTERPRETED)
        return case


def _target(name: str) -> Iterator[Target]:
    status = backend_status()[name]
    if not status.live:
        if name == "cpp" and os.environ.get("CO2S_REQUIRE_NATIVE") == "1":
            pytest.fail(f"CO2S_REQUIRE_NATIVE=1, but {status.why}")
        pytest.skip(f"backend {name}: {status.why}")
    on_gpu = name == "cuda" or (name == "triton" and torch.cuda.is_available())
    with use_backend(name):
        yield Target(name, "cuda" if on_gpu else "cpu")


@pytest.fixture(params=["reference", "cpp", "triton", pytest.param("cuda", marks=pytest.mark.gpu)])
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    yield from _target(request.param)


@pytest.fixture(params=["reference", "cpp"])
def cpu_target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """The backends that take float64 and keep their gradients from the forward pass."""
    yield from _target(request.param)


@pytest.fixture
def cpp_target() -> Iterator[Target]:
    yield from _target("cpp")
