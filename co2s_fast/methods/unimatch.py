"""UniMatch (Yang et al. 2023): two strong views and a perturbation of the features."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from co2s_fast.methods.base import MethodConfig
from co2s_fast.methods.consistency import ConsistencyConfig, ConsistencyMethod


class UniMatchConfig(ConsistencyConfig):
    """Options of unimatch."""

    name: Literal["unimatch"] = "unimatch"
    fp_weight: float = Field(default=0.25, ge=0)
    s1_weight: float = Field(default=0.125, ge=0)
    s2_weight: float = Field(default=0.125, ge=0)


class UniMatch(ConsistencyMethod):
    """L = ½ [L_sup + ½ H(fp) + ¼ (H(s1) + H(s2))] for each student by itself."""

    name: ClassVar[str] = "unimatch"
    Config: ClassVar[type[MethodConfig]] = UniMatchConfig
    views: ClassVar[frozenset[str]] = frozenset({"x", "w", "s1", "s2"})
    strong: ClassVar[tuple[str, ...]] = ("fp", "s1", "s2")
