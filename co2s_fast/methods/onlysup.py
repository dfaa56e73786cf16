"""OnlySup: the supervised baseline, on the same students and for as many steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from co2s_fast.methods.base import Method, MethodConfig

if TYPE_CHECKING:
    from co2s_fast.data import Batch


class OnlySupConfig(MethodConfig):
    """Options of onlysup. Adam's updates do not change when the weight does."""

    name: Literal["onlysup"] = "onlysup"
    supervised_weight: float = Field(default=1.0, gt=0)


class OnlySup(Method):
    """L = L_sup for each student by itself: mean cross entropy over all valid labelled pixels."""

    name: ClassVar[str] = "onlysup"
    Config: ClassVar[type[MethodConfig]] = OnlySupConfig
    views: ClassVar[frozenset[str]] = frozenset({"x"})

    def forward(self, batch: Batch, step: int, total_steps: int) -> dict[str, Tensor]:
        """Losses of one step; see `Method.forward`."""
        terms = self.loss_terms()
        for name, student in self.students.items():
            logits = student.decode(student.features(batch.x))
            self.add_supervised(terms, name, logits, batch.y)
        return terms.finish()
