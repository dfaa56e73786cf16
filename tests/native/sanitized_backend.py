"""Pytest plugin: the native module of a sanitizer build takes the place of the installed one."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import torch  # noqa: F401 - its libraries come first

from co2s_fast.ops import catalogue, dispatch

dispatch._native_library = catalogue.define("co2s_native")
path = next(Path(os.environ["CO2S_SANITIZED"]).glob("_native*.so"))
spec = importlib.util.spec_from_file_location("co2s_fast._native", path)
module = importlib.util.module_from_spec(spec)
sys.modules["co2s_fast._native"] = module
spec.loader.exec_module(module)
