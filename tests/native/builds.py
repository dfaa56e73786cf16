"""CMake builds for tests, kept under build/ so that only what has changed is compiled again."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

REPOSITORY = Path(__file__).resolve().parents[2]


def tool(name: str) -> str | None:
    """A program beside this Python (PyPI's cmake and ninja) or on PATH."""
    beside = shutil.which(name, path=str(Path(sys.executable).parent))
    return beside or shutil.which(name)


def cmake_build(
    name: str, targets: tuple[str, ...], needs: tuple[str, ...] = (), **options: str
) -> Path:
    """Configure and build `targets` in build/tests-NAME-...; skips the test where tools lack.

    Args:
        name: of the build folder, which also depends on this Python and this torch.
        targets: what to build.
        needs: programs beyond CMake and a C++ compiler.
        options: CMake variables, e.g. `CO2S_WERROR="ON"`.

    Returns:
        The build folder.
    """
    for program in ("cmake", "c++", *needs):
        if tool(program) is None:
            pytest.skip(f"needs {program}")
    tag = hashlib.sha256(f"{sys.executable} {torch.__version__}".encode()).hexdigest()[:8]
    folder = REPOSITORY / "build" / f"tests-{name}-{tag}"
    configure = [tool("cmake"), "-S", REPOSITORY, "-B", folder,
                 f"-DPython_EXECUTABLE={sys.executable}", f"-DCO2S_OUTPUT_DIR={folder / 'out'}",
                 *(f"-D{key}={value}" for key, value in options.items())]  # fmt: skip
    if tool("ninja") and not (folder / "Makefile").is_file():
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    folder.parent.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"):  # tests may run in several processes
        _configure_and_build(configure, folder, targets)
    return folder


def _configure_and_build(configure: list, folder: Path, targets: tuple[str, ...]) -> None:
    configured = subprocess.run(configure, capture_output=True, text=True, timeout=600)
    if "their major versions have to agree" in configured.stderr:
        pytest.skip(f"torch is for CUDA {torch.version.cuda}, nvcc of another major version")
    assert configured.returncode == 0, (configured.stdout + configured.stderr)[-5000:]
    build = [tool("cmake"), "--build", folder, "--parallel", "--target", *targets]
    built = subprocess.run(build, capture_output=True, text=True, timeout=5400)
    assert built.returncode == 0, (built.stdout + built.stderr)[-5000:]
