"""co2s-fast: semi-supervised segmentation of remote-sensing imagery with two ViT students."""

from __future__ import annotations

import importlib
from types import ModuleType

from co2s_fast.version import __version__

__all__ = ["__version__"]
_ROOMS = ("data", "engine", "losses", "methods", "models", "ops", "report")


def __getattr__(name: str) -> ModuleType:
    """A room, as `co2s_fast.losses`; it is imported when it is first asked for."""
    if name in _ROOMS:
        return importlib.import_module(f"co2s_fast.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS})
