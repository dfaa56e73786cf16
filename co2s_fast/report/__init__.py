"""Reports of runs: one self-contained HTML file each, and several runs side by side."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {"write_report": "page", "write_comparison": "comparison",
         "comparison_table": "comparison", "read_run": "run", "draw_attention": "attention"}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    # Loaded on first use: matplotlib and Jinja take a second that `--help` does not have.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
