"""Result files: the header that says where numbers come from, the long-format rows, the ratios."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks import providers
from benchmarks.harness import percentiles

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(__file__).resolve().parent / "results"
SCHEMA_VERSION = 1
PACKAGES = ("torchvision", "numpy", "pillow", "triton", "timm", "open_clip_torch", "liger-kernel",
            "nvidia-dali-cuda120")  # fmt: skip

Row = dict[str, Any]

# What the project sets out to reach, device type by device type:
# (device, section, case, mode, metric, peer, goal). "ours" is the default backend.
GOALS = (
    ("cpu", "loss_section", "128to512", "both", "time", "eager", 15.0),
    ("cpu", "loss_section", "128to512", "both", "time", "compile", 15.0),
    ("cpu", "loss_section", "128to512", "both", "peak_memory", "eager", 20.0),
    ("cpu", "loss_section", "512", "both", "time", "eager", 8.0),
    ("cpu", "step", "tiny", "step", "time", "eager", 1.5),
    ("cpu", "input", "512", "load", "images_per_s", "pil", 1.5),
    ("cpu", "prepare", "mask-6000", "load", "time", "loop", 5.0),
    ("cpu", "prepare", "whole-6000", "load", "time", "loop", 5.0),
    ("cpu", "predict", "tiny-1024x1024", "predict", "time", "plain", 1.5),
    ("cpu", "predict", "vit_b16-512x938", "predict", "time", "plain", 1.5),
    ("cpu", "predict", "raster-20000x20000", "predict", "peak_memory", "plain", 4.0),
    ("cuda", "loss_section", "128to512", "both", "time", "eager", 20.0),
    ("cuda", "step", "vit_b16", "step", "time", "eager", 3.0),
    ("cuda", "step", "vit_b16", "step", "time", "compile_autocast", 1.5),
    ("cuda", "step", "vit_b16", "step", "peak_memory", "eager", 2.0),
)
BANDWIDTH_GOALS = (("cuda", "loss_section", "512", "both", 0.85),)


def cpu_name() -> str:
    """The processor's model name."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if found:
            return found.group(1).strip()
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def slug(device: torch.device, threads: int) -> str:
    """File name of a device: its name in plain letters and the number of threads."""
    name = re.sub(r"\([^)]*\)|\bprocessor\b|\bcpu\b|@.*", " ", device_name(device).lower())
    plain = re.sub(r"[^a-z0-9]+", "-", name).strip("-")
    return f"{plain}-{threads}-threads"


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that matter; null where one is not installed."""
    from co2s_fast.version import __version__

    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "co2s_fast": __version__,
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def commit() -> dict[str, Any]:
    """The commit of this code, and whether it has local changes (None: nobody knows)."""
    # Results themselves are no part of what was measured.
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", ".",
                   ":(exclude)benchmarks/results")  # fmt: skip
    return {"commit": _git("rev-parse", "HEAD") or "unknown",
            "dirty": None if changes is None else bool(changes)}


def make_header(device: torch.device, repeats: int, quick: bool) -> dict[str, Any]:
    """Everything about the run that is known at its start."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        **commit(),
        "date": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "versions": versions(),
        "device": device_name(device),
        "device_type": device.type,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count() or 1,
        "default_backend": providers.default_backend(device),
        "repeats": repeats,
        "quick": quick,
        "load_before": [round(x, 2) for x in os.getloadavg()],
    }


def row(
    where: tuple[str, str, str], mode: str, metric: str, unit: str, samples: list[float]
) -> Row:
    """One line of the long format. `where` is (section, case, provider)."""
    median, p20, p80 = percentiles(samples)
    section, case, provider = where
    return {
        "section": section, "case": case, "provider": provider, "mode": mode, "metric": metric,
        "unit": unit, "median": median, "p20": p20, "p80": p80, "n": len(samples),
    }  # fmt: skip


def save(path: Path, content: dict[str, Any]) -> None:
    """Write JSON under a temporary name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    os.replace(partial, path)


def load(path: Path) -> dict[str, Any]:
    """Read a result file, with a clear error when it is not one."""
    try:
        content = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a readable result file ({error})") from error
    found = content.get("schema_version") if isinstance(content, dict) else None
    if found != SCHEMA_VERSION:
        raise ValueError(f"{path}: schema_version is {found!r}, expected {SCHEMA_VERSION}")
    return content


def lookup(rows: list[Row], **keys: str) -> Row | None:
    """The one row with these keys, or None."""
    return next((r for r in rows if all(r[k] == v for k, v in keys.items())), None)


def ratios(content: dict[str, Any]) -> dict[str, float]:
    """How many times better each of our backends is than each peer, by name.

    Names read section/case/mode/metric/peer:ours, for instance
    loss_section/128to512/both/time/eager:cpp. Above 1 ours is faster or smaller.
    """
    found = {}
    steps = ("ours", "ours_float32", "ours_channels_last", "ours_compile")
    ours = (*providers.BACKENDS, *steps, "torch", "dali")
    for mine in content["rows"]:
        if mine["provider"] not in ours or mine["metric"] in ("bytes_moved", "bandwidth_share"):
            continue
        for peer in content["rows"]:
            same = all(mine[k] == peer[k] for k in ("section", "case", "mode", "metric"))
            if not same or peer["provider"] in ours or not mine["median"] or not peer["median"]:
                continue
            value = peer["median"] / mine["median"]
            if mine["metric"] in ("images_per_s", "megapixels_per_s"):
                value = 1 / value
            name = "/".join(mine[k] for k in ("section", "case", "mode", "metric"))
            found[f"{name}/{peer['provider']}:{mine['provider']}"] = value
    return found


def goals(content: dict[str, Any]) -> list[tuple[str, float, float | None]]:
    """(name, goal, value or None where not measured) for every goal of this kind of device."""
    header = content["header"]
    values = ratios(content)
    # predict.py and throughput.py write files of their own, each with its own goals
    alone = {r["section"] for r in content["rows"]} & {"predict", "prepare"}
    mine = {"step": "ours", "input": "torch", "predict": "ours", "prepare": "ours"}
    found: list[tuple[str, float, float | None]] = []
    for device, section, case, mode, metric, peer, goal in GOALS:
        if device == header["device_type"] and alone == {section} & {"predict", "prepare"}:
            us = mine.get(section, header["default_backend"])
            name = f"{section}/{case}/{mode}/{metric}/{peer}:{us}"
            found.append((name, goal, values.get(name)))
    for device, section, case, mode, goal in BANDWIDTH_GOALS:
        if device == header["device_type"] and not alone:
            us = header["default_backend"]
            keys = {"section": section, "case": case, "mode": mode, "provider": us}
            at = lookup(content["rows"], metric="bandwidth_share", **keys)
            name = f"{section}/{case}/{mode}/bandwidth_share/{us}"
            found.append((name, goal, at["median"] if at else None))
    return found
