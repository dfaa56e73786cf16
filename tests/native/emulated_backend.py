"""Pytest plugin: the CUDA kernels, emulated on the CPU, stand in for the `cpp` backend.

CO2S_EMULATED=<folder of _cuda_emulated*.so> pytest -p emulated_backend tests/conformance -k cpp
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable

import torch

from co2s_fast.ops import catalogue, dispatch

LIBRARY = catalogue.define("co2s_emulated")
sys.path.insert(0, os.environ["CO2S_EMULATED"])
importlib.import_module("_cuda_emulated")
_status, _implementation = dispatch._native_status, dispatch.implementation


def status(key: str) -> str:
    return "" if key == "CPU" else _status(key)


def implementation(name: str, backend: str) -> Callable:
    if backend == "cpp":
        return getattr(torch.ops.co2s_emulated, name).default
    return _implementation(name, backend)


dispatch._native_status, dispatch.implementation = status, implementation
