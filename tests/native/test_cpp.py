"""The C++ tests (tests/csrc) through ctest: plain with all warnings as errors, and sanitized.

The sanitized build takes the baseline kernels; by hand, for all instruction sets and for the whole
Python module, see CONTRIBUTING.md.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from builds import cmake_build, tool

pytestmark = pytest.mark.slow


def run_ctest(folder: Path) -> dict[str, str]:
    """Name of every test -> Passed, ***Skipped or ***Failed."""
    command = [tool("ctest"), "--test-dir", folder, "--output-on-failure", "--no-tests=error"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    return dict(re.findall(r"Test +#\d+: (\w+) \.+ *(\S+)", done.stdout))


def test_all_pass():
    folder = cmake_build(
        "cpp", ("cpp_tests",), CO2S_BUILD_TESTS="ON", CO2S_WERROR="ON", CO2S_FEW_VARIANTS="ON"
    )
    results = run_ctest(folder)
    assert {"pixel_math", "plan", "simd_baseline", "kernels_baseline"} <= results.keys()
    assert results["kernels_baseline"] == "Passed"
    assert set(results.values()) <= {"Passed", "***Skipped"}  # an instruction set this CPU lacks


def test_all_pass_under_sanitizers():
    folder = cmake_build(
        "sanitized", ("cpp_tests",), CO2S_BUILD_TESTS="ON", CO2S_SANITIZE="address,undefined",
        CO2S_X86_VARIANTS="OFF", CO2S_FEW_VARIANTS="ON",
    )  # fmt: skip
    results = run_ctest(folder)
    assert set(results) == {"pixel_math", "plan", "simd_baseline", "kernels_baseline"}
    assert set(results.values()) == {"Passed"}
