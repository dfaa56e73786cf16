"""The CUDA kernels compile, link and register without a GPU. Their results: test_cuda_emulated.py
and, where there is a GPU, tests/conformance.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builds import REPOSITORY, cmake_build, tool

from co2s_fast.ops import catalogue

ARCHITECTURES = ("86", "90")
pytestmark = pytest.mark.slow

# In a process of its own: this one may hold the installed library, with the same registrations.
_REGISTRATIONS = """
import sys, torch
from co2s_fast.ops import catalogue
library = catalogue.define("co2s_native")
sys.path.insert(0, sys.argv[1])
import _native
has = torch._C._dispatch_has_kernel_for_dispatch_key
print(*(name for name in catalogue.SCHEMAS if has(f"co2s_native::{name}", "CUDA")))
print(_native.build_info()["cuda_archs"])
"""


@pytest.fixture(scope="module")
def library() -> Path:
    """`_native*.so` with CUDA; `CO2S_CUDA_BUILT` names a folder that has one already."""
    if "CO2S_CUDA_BUILT" in os.environ:
        return next(Path(os.environ["CO2S_CUDA_BUILT"]).glob("_native*.so"))
    if torch.version.cuda is None:
        pytest.skip(f"torch {torch.__version__} was built without CUDA")
    folder = cmake_build(
        "cuda", ("_native",), needs=("nvcc",), CO2S_WITH_CUDA="ON", CO2S_WERROR="ON",
        CO2S_CUDA_ARCHS=";".join(ARCHITECTURES), CO2S_X86_VARIANTS="OFF", CO2S_FEW_VARIANTS="ON",
    )  # fmt: skip
    return next((folder / "out").glob("_native*.so"))


def cuobjdump() -> str | None:
    """From the toolkit, or the one that Triton brings."""
    try:
        import triton
    except ImportError:
        return tool("cuobjdump")
    own = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return tool("cuobjdump") or (str(own) if own.is_file() else None)


def test_registers_every_op(library):
    command = [sys.executable, "-c", _REGISTRATIONS, str(library.parent)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert run.returncode == 0, run.stderr
    registered, architectures = run.stdout.splitlines()
    assert registered.split() == list(catalogue.SCHEMAS)
    assert architectures == ";".join(ARCHITECTURES)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_has_machine_code_of_every_kernel(library, architecture):
    program = cuobjdump()
    if program is None:
        pytest.skip("needs cuobjdump, of the CUDA toolkit or of Triton")
    listing = subprocess.run([program, "--list-elf", library], capture_output=True, text=True)
    files = [line for line in listing.stdout.splitlines() if f"sm_{architecture}." in line]
    sources = list((REPOSITORY / "csrc" / "ops" / "cuda").glob("*_kernel.cu"))
    assert len(files) == len(sources), listing.stdout + listing.stderr
