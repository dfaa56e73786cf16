"""What `doctor` says about the native part: built, gone, damaged, or without what was asked for."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from co2s_fast import ops
from co2s_fast.engine import doctor
from co2s_fast.ops import dispatch

BUILT = {"built": True, "python": "3.11.7", "operators": "0"}


class Module:
    @staticmethod
    def build_info() -> dict[str, str]:
        return {"compiler": "GNU 12"}


@pytest.fixture
def says(monkeypatch):
    """Lines about the native part, given what was recorded and whether the library is there."""

    def say(record: dict, there: bool = True, module: object = Module) -> list[str]:
        monkeypatch.setattr(dispatch, "build_record", lambda: record)
        monkeypatch.setattr(ops, "load_native", lambda: module if there else None)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if there else None)
        return doctor.native_lines()

    return say


def test_a_live_library(says):
    assert says(BUILT) == ["compiler: GNU 12"]
    assert says({}) == ["compiler: GNU 12"]


def test_cuda_kernels_that_could_not_be_built(says):
    lines = says({**BUILT, "without_cuda": "nvcc is not here"})
    assert lines == ["compiler: GNU 12", "without_cuda: nvcc is not here"]


def test_a_damaged_record_beside_a_live_library(says):
    assert says({"damaged": "it cannot be read"})[-1] == "damaged: it cannot be read"
    lines = says({"damaged": "it cannot be read"}, there=False)
    assert lines[0] == "damaged: it cannot be read" and lines[1].startswith("not built; ")


def test_a_library_that_is_gone(says):
    (line,) = says(BUILT, there=False)
    assert line.startswith("built, but the library is gone; pip install ")


def test_a_build_that_failed(says):
    assert says({"built": False, "reason": "no compiler"}, there=False) == [
        "built: False", "reason: no compiler"
    ]  # fmt: skip
    (line,) = says({}, there=False)
    assert line.startswith("not built; ")


def test_an_unknown_instruction_set_is_one_line():
    pytest.importorskip("co2s_fast._native", reason="the native part is not built here")
    done = subprocess.run(
        [sys.executable, "-m", "co2s_fast", "doctor"], capture_output=True, text=True,
        env={**os.environ, "CO2S_CPU_ISA": "mmx"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "\n  CO2S_CPU_ISA=mmx: expected baseline, avx2 or avx512\n" in done.stdout
    assert "Traceback" not in done.stderr
