"""FixMatch for segmentation, as the UniMatch repository formulates it: one strong view."""

from __future__ import annotations

from typing import ClassVar, Literal

from co2s_fast.methods.base import MethodConfig
from co2s_fast.methods.consistency import ConsistencyConfig, ConsistencyMethod


class FixMatchConfig(ConsistencyConfig):
    """Options of fixmatch."""

    name: Literal["fixmatch"] = "fixmatch"


class FixMatch(ConsistencyMethod):
    """L = ½ [L_sup + H(s1)] for each student by itself."""

    name: ClassVar[str] = "fixmatch"
    Config: ClassVar[type[MethodConfig]] = FixMatchConfig
    views: ClassVar[frozenset[str]] = frozenset({"x", "w", "s1"})
    strong: ClassVar[tuple[str, ...]] = ("s1",)
