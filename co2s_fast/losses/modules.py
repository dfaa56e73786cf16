"""The losses as modules, for code that builds its criteria once."""

from __future__ import annotations

from torch import Tensor, nn

from co2s_fast.losses._checks import (
    check_class_weight,
    check_flag,
    check_ignore_index,
    check_threshold,
)
from co2s_fast.losses.cross_entropy import REDUCTIONS, masked_cross_entropy
from co2s_fast.losses.cutmix import CutMix
from co2s_fast.losses.stability import stability_loss


class MaskedCrossEntropyLoss(nn.Module):
    """`masked_cross_entropy` with its options fixed.

    Args:
        threshold: τ in [0, 1].
        ignore_index: value that marks pixels without a label.
        class_weight: [K] floating, or None; kept as a buffer, so it moves with the module.
        reduction: "valid", "confident", "sum" or "none".
        align_corners: as in `F.interpolate`.

    Raises:
        TypeError, ValueError: an option is wrong.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        *,
        threshold: float = 0.95,
        ignore_index: int = 255,
        class_weight: Tensor | None = None,
        reduction: str = "valid",
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        check_flag("align_corners", align_corners)
        if class_weight is not None:
            check_class_weight(class_weight)
        if reduction not in REDUCTIONS:
            raise ValueError(
                f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}"
            )
        self.threshold = check_threshold(threshold)
        self.ignore_index = check_ignore_index(ignore_index)
        self.reduction = reduction
        self.align_corners = align_corners
        self.register_buffer("class_weight", class_weight)

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        confidence: Tensor | None = None,
        *,
        ignore_mask: Tensor | None = None,
        cutmix: CutMix | None = None,
    ) -> Tensor:
        """Arguments and result as in `masked_cross_entropy`."""
        return masked_cross_entropy(
            logits,
            target,
            confidence,
            threshold=self.threshold,
            ignore_mask=ignore_mask,
            ignore_index=self.ignore_index,
            class_weight=self.class_weight,
            cutmix=cutmix,
            reduction=self.reduction,
            align_corners=self.align_corners,
        )

    def extra_repr(self) -> str:
        return (
            f"threshold={self.threshold}, ignore_index={self.ignore_index}, "
            f"reduction={self.reduction!r}, align_corners={self.align_corners}"
        )


class StabilityLoss(nn.Module):
    """`stability_loss` with its options fixed.

    Args:
        threshold: τ in [0, 1].
        ignore_index: value that marks padding in the ignore mask.
        align_corners: as in `F.interpolate`.

    Raises:
        TypeError, ValueError: an option is wrong.
    """

    def __init__(
        self, *, threshold: float = 0.95, ignore_index: int = 255, align_corners: bool = False
    ) -> None:
        super().__init__()
        check_flag("align_corners", align_corners)
        self.threshold = check_threshold(threshold)
        self.ignore_index = check_ignore_index(ignore_index)
        self.align_corners = align_corners

    def forward(
        self,
        logits_a: Tensor,
        logits_b: Tensor,
        *,
        size: tuple[int, int] | None = None,
        ignore_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Arguments and result as in `stability_loss`."""
        return stability_loss(
            logits_a,
            logits_b,
            threshold=self.threshold,
            size=size,
            ignore_mask=ignore_mask,
            ignore_index=self.ignore_index,
            align_corners=self.align_corners,
        )

    def extra_repr(self) -> str:
        return (
            f"threshold={self.threshold}, ignore_index={self.ignore_index}, "
            f"align_corners={self.align_corners}"
        )
