"""Hands the native build over to CMake; everything else stands in pyproject.toml.

The native part is optional. Where it cannot be built the package installs as pure Python, the
reason is printed and kept in co2s_fast/_native_build.json, and `co2s-fast doctor` repeats it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
RECORD = "_native_build.json"
CMAKE_OPTIONS = ("CO2S_WITH_CUDA", "CO2S_WERROR", "CO2S_SANITIZE", "CO2S_CUDA_ARCHS")


class NativeBuildError(Exception):
    """Why the native part cannot be built here, in words for the person who installs."""


def find_tool(name: str) -> str | None:
    """A program beside this Python (PyPI's cmake and ninja) or on PATH."""
    beside = shutil.which(name, path=str(Path(sys.executable).parent))
    return beside or shutil.which(name)


def find_compiler() -> str | None:
    if "CXX" in os.environ:
        return os.environ["CXX"]
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def check_prerequisites() -> None:
    """Raise NativeBuildError listing everything that is missing, not only the first."""
    if os.environ.get("CO2S_NATIVE", "auto").lower() in ("0", "off", "no"):
        raise NativeBuildError("CO2S_NATIVE=0 was set")
    missing = []
    for module in ("torch", "pybind11"):
        if importlib.util.find_spec(module) is None:
            missing.append(f"the Python package {module} in the build environment")
    if find_tool("cmake") is None:
        missing.append("cmake")
    if find_tool("ninja") is None and shutil.which("make") is None:
        missing.append("ninja")
    if find_compiler() is None:
        missing.append("a C++20 compiler (c++, g++ or clang++)")
    if missing:
        raise NativeBuildError("not found: " + "; ".join(missing))


def cuda_was_asked_for() -> bool:
    """Whether CMake would read the environment's CO2S_WITH_CUDA as true."""
    value = os.environ.get("CO2S_WITH_CUDA", "").upper()
    return value not in ("", "0", "OFF", "NO", "FALSE", "N")


def run(command: list[str], what: str) -> None:
    """Run a build command with its output shown; its last lines become the error's text."""
    print("co2s-fast:", " ".join(command), flush=True)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            sys.stdout.write(line)
            lines.append(line)
    if process.returncode != 0:
        tail = "".join(lines[-30:])
        raise NativeBuildError(f"{what} failed with code {process.returncode}:\n{tail}")


def operators() -> str:
    """Fingerprint of the operators' schemas, compared before the package loads the build."""
    spec = importlib.util.spec_from_file_location(
        "catalogue", ROOT / "co2s_fast" / "ops" / "catalogue.py"
    )
    assert spec is not None and spec.loader is not None
    catalogue = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(catalogue)
    return catalogue.fingerprint()


def check_import(library: Path) -> str:
    """Import a built library as the package will; the version of the torch it then ran with."""
    code = (
        "import importlib.util, sys, torch\n"
        "spec = importlib.util.spec_from_file_location('_native', sys.argv[1])\n"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
        "print(torch.__version__)"
    )
    command = [sys.executable, "-c", code, str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        why = said[-1] if said else f"exit code {done.returncode}"
        raise NativeBuildError(f"{library.name} was built, but cannot be imported: {why}")
    return done.stdout.split()[-1]


class CleanBuildPy(build_py):
    """Copies the modules into an empty folder: build/ may hold some that exist no more."""

    def run(self) -> None:
        earlier = Path(self.build_lib).resolve() / "co2s_fast"
        if earlier.is_dir() and not self.editable_mode and earlier != ROOT / "co2s_fast":
            shutil.rmtree(earlier)
        super().run()


class CMakeBuild(build_ext):
    """Builds co2s_fast/_native with CMake; a failure is recorded, never raised."""

    def destination(self) -> Path:
        in_source = self.inplace or self.editable_mode
        return (ROOT if in_source else Path(self.build_lib).resolve()) / "co2s_fast"

    def run(self) -> None:
        destination = self.destination()
        destination.mkdir(parents=True, exist_ok=True)
        record: dict[str, object] = {"built": True, "python": sys.version.split()[0]}
        try:
            check_prerequisites()
            try:
                self.build_native(destination, record)
            except NativeBuildError as error:
                if not cuda_was_asked_for():
                    raise
                record["without_cuda"] = str(error)
                self.explain("the CUDA kernels; the CPU kernels are built alone.", str(error))
                self.build_native(destination, record, cuda=False)
            record["operators"] = operators()
        except (NativeBuildError, OSError) as error:
            record.update(built=False, reason=str(error))
            self.remove_stale(destination)
            self.explain(
                "the native part. The fused CPU kernels and the raster helpers fall back to "
                "PyTorch and NumPy: same results, slower. To build it, install torch, pybind11, "
                "cmake, ninja and a C++20 compiler, then run "
                "`pip install --no-build-isolation .`",
                str(error),
            )
        unfinished = destination / f"{RECORD}.tmp"  # whole or not at all
        unfinished.write_text(json.dumps(record, indent=1) + "\n")
        unfinished.replace(destination / RECORD)

    def build_native(self, destination: Path, record: dict[str, object], cuda: bool = True) -> None:
        """Build, import once, and record for which torch; without CUDA whatever was asked for."""
        cmake = find_tool("cmake")
        assert cmake is not None
        tag = f"{sys.platform}-cp{sys.version_info.major}{sys.version_info.minor}"
        folder = Path(os.environ.get("CO2S_BUILD_DIR", ROOT / "build" / f"native-{tag}"))
        configure = [cmake, "-S", str(ROOT), "-B", str(folder)]
        ninja = find_tool("ninja")
        if ninja and not (folder / "Makefile").is_file():
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        configure += [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCO2S_OUTPUT_DIR={destination}",
            "-DCMAKE_BUILD_TYPE=Release",
        ]
        options = {name: os.environ[name] for name in CMAKE_OPTIONS if name in os.environ}
        if not cuda:
            options["CO2S_WITH_CUDA"] = "OFF"
        # What is not asked for now is forgotten, too: the folder remembers the last build's.
        configure += [f"-D{o}={options[o]}" if o in options else f"-U{o}" for o in CMAKE_OPTIONS]
        run(configure, "configuring with CMake")
        run([cmake, "--build", str(folder), "--target", "_native"], "compiling")
        if not options.get("CO2S_SANITIZE"):  # a sanitizer has to be in the process before Python
            library = destination / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
            record["torch"] = check_import(library)

    def remove_stale(self, destination: Path) -> None:
        """A library from an earlier build would contradict the record of this one."""
        for library in destination.glob("_native.*"):
            library.unlink()

    def explain(self, missing: str, reason: str) -> None:
        text = f"co2s-fast: installing WITHOUT {missing}"
        print(f"\n{textwrap.fill(text, 100)}\nReason: {reason}\n", file=sys.stderr, flush=True)

    def get_outputs(self) -> list[str]:
        if self.inplace or self.editable_mode:
            return []
        folder = self.destination()
        return [str(p) for p in (*folder.glob("_native.*"), folder / RECORD) if p.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    packages=[
        *find_packages(include=["co2s_fast", "co2s_fast.*"]),
        "co2s_fast.kernels",
    ],
    package_dir={"co2s_fast.kernels": "kernels"},
    ext_modules=[Extension("co2s_fast._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": CleanBuildPy},
)
