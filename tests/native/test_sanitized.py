"""The native module of a sanitizer build, under the conformance suite and its own tests.

Building it takes minutes, so that a folder with one has to be named: see CONTRIBUTING.md.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from builds import REPOSITORY, tool

pytestmark = pytest.mark.slow

# Peaks of memory are the sanitizer's own; other processes would have the installed module.
_LEFT_OUT = "peak or instruction_set or import_in_either_order or unknown_instruction_set"


def preload() -> str:
    """The sanitizers' libraries, which have to be in the process before Python is."""
    found = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):
        answer = subprocess.run(
            [tool("c++"), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        )
        found.append(answer.stdout.strip())
    return ":".join(found)


def test_nothing_is_found():
    folder = os.environ.get("CO2S_SANITIZED")
    if folder is None:
        pytest.skip("CO2S_SANITIZED names no folder with a sanitized _native (see CONTRIBUTING.md)")
    environment = {
        **os.environ, "LD_PRELOAD": preload(), "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1", "PYTHONPATH": str(Path(__file__).parent),
        "CO2S_SANITIZED": str(Path(folder).resolve()),
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-p", "sanitized_backend",
               "-p", "no:cacheprovider", "tests/conformance", "tests/native/test_native.py",
               "-k", f"(cpp or native) and not ({_LEFT_OUT})"]  # fmt: skip
    run = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, (run.stdout + run.stderr)[-5000:]
    assert " passed" in run.stdout
