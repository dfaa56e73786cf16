"""Training methods, one file each. Adding one takes a new file and a line in `METHODS`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from co2s_fast.errors import UsageError

if TYPE_CHECKING:
    from co2s_fast.methods.base import Method

METHODS: dict[str, str] = {
    "co2s": "co2s_fast.methods.co2s:Co2S",
    "onlysup": "co2s_fast.methods.onlysup:OnlySup",
    "fixmatch": "co2s_fast.methods.fixmatch:FixMatch",
    "unimatch": "co2s_fast.methods.unimatch:UniMatch",
    "u2pl": "co2s_fast.methods.u2pl:U2PL",
    "dwl": "co2s_fast.methods.dwl:DWL",
    "wscl": "co2s_fast.methods.wscl:WSCL",
    "muca": "co2s_fast.methods.muca:MUCA",
}
"""Name on the command line -> "module:class"."""


def get_method(name: str) -> type[Method]:
    """The class of a method, imported when it is asked for.

    Raises:
        UsageError: no such method.
    """
    if name not in METHODS:
        raise UsageError(f"method: unknown name {name!r}; expected one of {', '.join(METHODS)}")
    module, attribute = METHODS[name].split(":")
    return getattr(importlib.import_module(module), attribute)


__all__ = ["METHODS", "get_method"]
