"""What `co2s-fast doctor` prints: versions, GPUs, and which backends are live and why not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess

PACKAGES = (
    "torch", "torchvision", "triton", "open_clip_torch", "timm", "numpy", "pillow", "safetensors",
    "click", "pydantic", "tensorboard", "rasterio", "kornia", "nvidia-dali-cuda120", "fiona",
    "onnx", "onnxscript", "onnxruntime", "pybind11", "ninja",
)  # fmt: skip
OPTIONAL_FIX = {
    "fiona": "pip install 'co2s-fast[geo]' (for polygons)",
    **dict.fromkeys(("onnx", "onnxscript", "onnxruntime"), "pip install 'co2s-fast[export]'"),
    "nvidia-dali-cuda120": "pip install 'co2s-fast[dali]'",
    "pybind11": "pip install pybind11 (only to build the native kernels)",
    "ninja": "pip install ninja (only to build the native kernels)",
}


def diagnose() -> str:
    """Describe this installation in a page of text that can be pasted into a bug report."""
    sections = [
        ("machine", machine_lines()),
        ("packages", package_lines()),
        ("gpus", gpu_lines()),
        ("native module", native_lines()),
        ("weights", weight_lines()),
        ("backends of the fused losses", backend_lines()),
    ]
    texts = [f"{title}\n" + "\n".join(f"  {line}" for line in lines) for title, lines in sections]
    return "\n\n".join(texts)


def machine_lines() -> list[str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    version = _version("co2s-fast")
    return [
        f"co2s-fast {version}" if version else "co2s-fast is not installed: pip install .",
        f"Python {platform.python_version()} on {platform.platform()}, {cores} cores",
    ]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def package_lines() -> list[str]:
    lines = []
    for package in PACKAGES:
        fix = OPTIONAL_FIX.get(package, f"pip install {package}")
        lines.append(f"{package:<22}{_version(package) or f'not installed; {fix}'}")
    return lines


def gpu_lines() -> list[str]:
    import torch

    if torch.version.cuda:
        built = f"torch is built for CUDA {torch.version.cuda}"
    else:
        built = "torch is a CPU-only build; install a CUDA build from pytorch.org to use a GPU"
    if not torch.cuda.is_available():
        driver = "nvidia-smi found" if shutil.which("nvidia-smi") else "no nvidia-smi on PATH"
        return [built, f"torch sees no GPU ({driver}): training runs on the CPU"]
    lines = [built, f"driver {driver_version() or 'unknown (nvidia-smi does not say)'}"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(
            f"cuda:{index} {properties.name}, sm_{properties.major}{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB"
        )
    return lines


def driver_version() -> str | None:
    """Of the first GPU, as nvidia-smi says; None where it does not."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def native_lines() -> list[str]:
    from co2s_fast.ops import load_native
    from co2s_fast.ops.dispatch import build_record

    build = "pip install --no-build-isolation --no-deps -e ."
    record = build_record()
    lines = [f"{key}: {record[key]}" for key in ("damaged", "without_cuda") if key in record]
    there = importlib.util.find_spec("co2s_fast._native") is not None
    module = load_native() if there else None
    if module is not None and not hasattr(module, "build_info"):
        return [*lines, f"older than this package; {build}"]
    if module is not None:
        try:
            return [*(f"{key}: {value}" for key, value in module.build_info().items()), *lines]
        except RuntimeError as error:  # an instruction set that CO2S_CPU_ISA names and there is not
            return [*lines, str(error)]
    if record.get("built") and not there:
        return [f"built, but the library is gone; {build}"]
    if "built" in record:
        return [f"{key}: {value}" for key, value in record.items()]
    return [*lines, f"not built; with a C++ compiler: {build}"]


def weight_lines() -> list[str]:
    from co2s_fast.models.weights.registry import REGISTRY
    from co2s_fast.models.weights.store import folder, locate
    from co2s_fast.offline import VARIABLE, is_offline

    here = [name for name, entry in REGISTRY.items() if locate(entry) is not None]
    return [
        f"looked for in {folder()} and Hugging Face's cache",
        f"on this machine: {', '.join(here) or 'none; co2s-fast weights fetch NAME'}",
        f"{VARIABLE} is set: nothing is fetched" if is_offline() else "fetched where missing",
    ]


def backend_lines() -> list[str]:
    from co2s_fast.ops import backend_status

    lines = []
    for name, status in backend_status().items():
        lines.append(f"{name:<10} {'live' if status.live else 'not live: ' + status.why}")
        if not status.live and status.fix:
            lines.append(f"{'':<10} to mend it: {status.fix}")
    return lines
