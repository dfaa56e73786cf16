"""What setup.py does around CMake: options, failures, the record it leaves, stale files.

The commands are stand-ins where a test is not about what CMake does; nothing is compiled but a few
lines.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import setuptools
import torch
from builds import REPOSITORY, tool

LIBRARY = f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"


@pytest.fixture
def project(monkeypatch, tmp_path):
    """setup.py as a module that has set nothing up; what it would have been given is `.given`."""
    given = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
    spec = importlib.util.spec_from_file_location("co2s_setup", REPOSITORY / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.given = given
    for name in (*module.CMAKE_OPTIONS, "CO2S_NATIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CO2S_BUILD_DIR", str(tmp_path / "native"))
    return module


def build(project, folder: Path) -> dict:
    """Run the extension's build into `folder`; what it recorded."""
    command = project.given["cmdclass"]["build_ext"](setuptools.Distribution())
    command.build_lib, command.inplace, command.editable_mode = str(folder), False, False
    command.run()
    assert not list((folder / "co2s_fast").glob("*.tmp"))
    return json.loads((folder / "co2s_fast" / project.RECORD).read_text())


@pytest.fixture
def commands(project, monkeypatch):
    """The commands that a build would have run; those with CUDA fail."""
    monkeypatch.setattr(project, "check_prerequisites", lambda: None)
    monkeypatch.setattr(project, "find_tool", lambda name: name)
    monkeypatch.setattr(project, "check_import", lambda library: "2.8.0")
    commands = []

    def run(command, what):
        commands.append(command)
        if any(c.startswith("-DCO2S_WITH_CUDA=") and not c.endswith("=OFF") for c in command):
            raise project.NativeBuildError("nvcc is not here")

    monkeypatch.setattr(project, "run", run)
    return commands


def test_options_of_an_earlier_build_are_forgotten(project, commands, monkeypatch, tmp_path):
    monkeypatch.setenv("CO2S_WERROR", "ON")
    build(project, tmp_path)
    assert {"-DCO2S_WERROR=ON", "-UCO2S_WITH_CUDA", "-UCO2S_CUDA_ARCHS"} < set(commands[0])
    monkeypatch.delenv("CO2S_WERROR")
    build(project, tmp_path)
    assert "-UCO2S_WERROR" in commands[2]


def test_a_failed_cuda_build_leaves_the_cpu_kernels(
    project, commands, monkeypatch, tmp_path, capsys
):
    monkeypatch.setenv("CO2S_WITH_CUDA", "1")
    record = build(project, tmp_path)
    assert record["built"] and record["without_cuda"] == "nvcc is not here"
    assert record["torch"] == "2.8.0"
    assert "-DCO2S_WITH_CUDA=1" in commands[0] and "-DCO2S_WITH_CUDA=OFF" in commands[1]
    assert "--build" in commands[2] and len(commands) == 3
    assert "WITHOUT the CUDA kernels" in capsys.readouterr().err
    monkeypatch.delenv("CO2S_WITH_CUDA")
    assert "without_cuda" not in build(project, tmp_path)


@pytest.mark.parametrize("value", ["", "0", "off", "FALSE"])
def test_cuda_that_was_not_asked_for(value, project, monkeypatch):
    monkeypatch.setenv("CO2S_WITH_CUDA", value)
    assert not project.cuda_was_asked_for()


def test_a_failure_without_cuda_is_recorded(project, monkeypatch, tmp_path):
    def fail(command, what):
        raise project.NativeBuildError(f"{what} failed")

    monkeypatch.setattr(project, "check_prerequisites", lambda: None)
    monkeypatch.setattr(project, "find_tool", lambda name: name)
    monkeypatch.setattr(project, "run", fail)
    record = build(project, tmp_path)
    assert not record["built"] and record["reason"] == "configuring with CMake failed"


def build_gives(project, monkeypatch, library: Path) -> None:
    """Have the commands, instead of compiling, put `library` where the build's belongs."""

    def run(command, what):
        if what == "compiling":
            return
        folder = next(c for c in command if c.startswith("-DCO2S_OUTPUT_DIR=")).split("=", 1)[1]
        shutil.copy(library, Path(folder) / LIBRARY)

    monkeypatch.setattr(project, "check_prerequisites", lambda: None)
    monkeypatch.setattr(project, "find_tool", lambda name: name)
    monkeypatch.setattr(project, "run", run)


def test_a_library_that_cannot_be_imported_is_not_installed(project, monkeypatch, tmp_path):
    if tool("c++") is None:
        pytest.skip("needs c++")
    source, library = tmp_path / "bad.cpp", tmp_path / "bad.so"
    source.write_text(
        'extern "C" void __kmpc_nowhere();\n'
        'extern "C" void* PyInit__native() { __kmpc_nowhere(); return nullptr; }\n'
    )
    subprocess.run([tool("c++"), "-shared", "-fPIC", source, "-o", library], check=True)
    build_gives(project, monkeypatch, library)
    record = build(project, tmp_path)
    assert not record["built"] and "torch" not in record
    assert f"{LIBRARY} was built, but cannot be imported: " in record["reason"]
    assert "__kmpc_nowhere" in record["reason"]
    assert not (tmp_path / "co2s_fast" / LIBRARY).exists()


def test_the_record_says_for_which_torch(project, monkeypatch, tmp_path):
    installed = REPOSITORY / "co2s_fast" / LIBRARY
    if not installed.is_file():
        pytest.skip("the native part is not built here")
    build_gives(project, monkeypatch, installed)
    record = build(project, tmp_path)
    assert record["built"] and record["torch"] == torch.__version__
    assert (tmp_path / "co2s_fast" / LIBRARY).is_file()


def test_the_record_is_never_half_written(project, commands, monkeypatch, tmp_path):
    before = build(project, tmp_path)

    def fill_the_disk(path, text):
        with path.open("w") as file:
            file.write(text[: len(text) // 2])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        build(project, tmp_path)
    assert json.loads((tmp_path / "co2s_fast" / project.RECORD).read_text()) == before


@pytest.mark.parametrize("editable", [False, True])
def test_modules_that_exist_no_more_are_not_packed(editable, project, monkeypatch, tmp_path):
    monkeypatch.setattr(project.build_py, "run", lambda self: None)
    gone = tmp_path / "co2s_fast" / "gone.py"
    gone.parent.mkdir()
    gone.touch()
    command = project.given["cmdclass"]["build_py"](setuptools.Distribution())
    command.build_lib, command.editable_mode = str(tmp_path), editable
    command.run()
    assert gone.exists() == editable


def test_building_into_the_checkout_deletes_nothing(project, monkeypatch):
    removed = []
    monkeypatch.setattr(project.build_py, "run", lambda self: None)
    monkeypatch.setattr(project.shutil, "rmtree", lambda *a, **k: removed.append(a))
    command = project.given["cmdclass"]["build_py"](setuptools.Distribution())
    command.build_lib, command.editable_mode = str(REPOSITORY), False
    command.run()
    assert not removed


def test_make_clean_removes_the_record_with_the_library():
    if tool("make") is None:
        pytest.skip("needs make")
    done = subprocess.run(
        ["make", "-n", "clean"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert "co2s_fast/_native*.so" in done.stdout
    assert "co2s_fast/_native_build.json" in done.stdout


def configure(folder: Path, *options: str, **environment: str) -> tuple[str, str]:
    """Configure with CMake and Ninja; build.ninja with the cache, and what was said."""
    for program in ("cmake", "ninja", "c++"):
        if tool(program) is None:
            pytest.skip(f"needs {program}")
    command = [tool("cmake"), "-S", REPOSITORY, "-B", folder, "-G", "Ninja",
               f"-DPython_EXECUTABLE={sys.executable}", f"-DCO2S_OUTPUT_DIR={folder}",
               f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", *options]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}
    )
    if "their major versions have to agree" in done.stderr:
        pytest.skip(f"torch is for CUDA {torch.version.cuda}, nvcc of another major version")
    assert done.returncode == 0, done.stderr
    files = (folder / "build.ninja", folder / "CMakeCache.txt")
    return "".join(file.read_text() for file in files), done.stderr


@pytest.mark.slow
def test_the_torch_of_an_earlier_configuration_is_forgotten(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "torch").symlink_to(Path(torch.__file__).parent)
        text, _ = configure(tmp_path / "build", PYTHONPATH=str(tmp_path / name))
        assert str(tmp_path / name / "torch" / "lib" / "libc10.so") in text
    assert str(tmp_path / "first") not in text
    assert f"-DCO2S_FOR_TORCH={torch.__version__}" in text  # another one compiles all again


@pytest.mark.slow
def test_the_same_with_cuda_and_its_architectures(tmp_path):
    if torch.version.cuda is None or tool("nvcc") is None:
        pytest.skip("needs nvcc and a torch with CUDA")
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "torch").symlink_to(Path(torch.__file__).parent)
        text, _ = configure(
            tmp_path / "build", "-DCO2S_WITH_CUDA=ON", PYTHONPATH=str(tmp_path / name),
            CO2S_CUDA_ARCHS="", TORCH_CUDA_ARCH_LIST="",
        )  # fmt: skip
        assert str(tmp_path / name / "torch" / "lib" / "libc10_cuda.so") in text
    assert str(tmp_path / "first") not in text
    for arch in ("80", "86", "90"):
        assert f"arch=compute_{arch},code=[compute_{arch},sm_{arch}]" in text


@pytest.mark.slow
def test_clang_does_without_the_openmp_of_gcc(tmp_path):
    clang = tool("clang++")
    if clang is None:
        pytest.skip("needs clang++")
    if not list((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        pytest.skip("this torch does not bring GCC's OpenMP")
    text, said = configure(tmp_path, f"-DCMAKE_CXX_COMPILER={clang}")
    assert "will run on one thread" in " ".join(said.split())
    assert "-fopenmp" not in text.split("# This is the CMakeCache file")[0]
    assert "libgomp" not in text


@pytest.mark.slow
def test_cuda_without_a_toolkit_then_none(project, monkeypatch, tmp_path):
    """CMake's own part of a build that fails with CUDA, and of the next one without."""
    if tool("cmake") is None or tool("c++") is None:
        pytest.skip("needs cmake and c++")
    run, library = project.run, tmp_path / "co2s_fast" / LIBRARY

    def only_configure(command, what):
        if what == "compiling":
            library.touch()
        else:
            run(command, what)

    monkeypatch.setattr(project, "run", only_configure)
    monkeypatch.setattr(project, "check_import", lambda library: torch.__version__)
    monkeypatch.setenv("CO2S_WITH_CUDA", "1")
    monkeypatch.setenv("CUDAToolkit_ROOT", "/nonexistent")
    record = build(project, tmp_path)
    assert record["built"] and library.is_file()
    assert "CUDA" in record["without_cuda"]
    for name in ("CO2S_WITH_CUDA", "CUDAToolkit_ROOT"):
        monkeypatch.delenv(name)
    record = build(project, tmp_path)
    assert record["built"] and library.is_file() and "without_cuda" not in record
    assert "CO2S_WITH_CUDA:BOOL=OFF" in (tmp_path / "native" / "CMakeCache.txt").read_text()
