"""Co2S: two UniMatch students that stabilise each other (arXiv 2512.23035, Eq. 1-11)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from co2s_fast.errors import UsageError
from co2s_fast.losses import stability_terms
from co2s_fast.methods.base import MethodConfig
from co2s_fast.methods.ramp import cosine_ramp
from co2s_fast.methods.reduce import LossTerms, by_shard
from co2s_fast.methods.unimatch import UniMatch, UniMatchConfig

if TYPE_CHECKING:
    from co2s_fast.data import Batch
    from co2s_fast.models import Student


class Co2SConfig(UniMatchConfig):
    """Options of co2s.

    Attributes:
        stability_weight: peak of λ(t).
        stability_ramp: share of the run over which λ(t) rises on a half cosine.
        stability_gradient: "learner", as the paper says; "none" leaves the term a number in the
            log that trains nothing, as the released code does.
        stability_padding: "mask" leaves the padding of crops out of the term; "include" is the
            released behaviour.
    """

    name: Literal["co2s"] = "co2s"
    stability_weight: float = Field(default=0.5, ge=0)
    stability_ramp: float = Field(default=0.2, ge=0, le=1)
    stability_gradient: Literal["learner", "none"] = "learner"
    stability_padding: Literal["mask", "include"] = "mask"


class Co2S(UniMatch):
    """L = ½ L_sup + ½ [½ H(fp) + ¼ (H(s1) + H(s2))] + λ(t) L_sta for each of two students."""

    name: ClassVar[str] = "co2s"
    Config: ClassVar[type[MethodConfig]] = Co2SConfig
    config: Co2SConfig

    def __init__(
        self, students: Mapping[str, Student], config: Co2SConfig, *, seed: int = 0
    ) -> None:
        if len(students) != 2:
            raise UsageError(f"students: co2s needs two, found {', '.join(students) or 'none'}")
        super().__init__(students, config, seed=seed)

    def add_joint_terms(
        self,
        terms: LossTerms,
        logits: dict[str, dict[str, Tensor]],
        batch: Batch,
        step: int,
        total_steps: int,
    ) -> None:
        """L_sta: where the other student is confident and no less so, learn its probabilities."""
        config = self.config
        weak = [views["w"] for views in logits.values()]
        if config.stability_gradient == "none":
            weak = [view.detach() for view in weak]
        size = batch.w.shape[-2:]
        if weak[0].shape != weak[1].shape:  # decoders of two grids, as the released ones have
            weak = [F.interpolate(view, size, mode="bilinear") for view in weak]
        ignore = batch.ignore if config.stability_padding == "mask" else None

        def sums(a: Tensor, b: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
            return stability_terms(a, b, threshold=config.threshold, size=size, ignore_mask=mask)

        if config.mean_shards == 1:
            sums_and_counts = sums(*weak, ignore)
        else:
            sums_and_counts = by_shard(sums, self.local_shards(), *weak, ignore)
        weight = cosine_ramp(step, total_steps, config.stability_weight, config.stability_ramp)
        num_classes = weak[0].shape[1]
        for name, total, count in zip(
            logits, sums_and_counts[:2], sums_and_counts[2:], strict=True
        ):
            terms.add(f"{name}/stability", weight, total / num_classes, count)
