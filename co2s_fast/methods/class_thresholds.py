"""Thresholds of each class for pseudo-labels: classes that are hard to learn ask for less.

With one threshold for all, a student trained from few labels takes pseudo-labels of easy, frequent
classes alone and drifts towards them. As in FlexMatch (Zhang et al., NeurIPS 2021) and FreeMatch
(Wang et al., ICLR 2023), a class's threshold is scaled by how well it is learnt compared with the
best one; here that is the mean confidence of the pixels predicted as that class.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from co2s_fast.data.catalogue import IGNORE
from co2s_fast.methods.reduce import rank_and_world


class ClassThresholds(nn.Module):
    """Running mean confidence of one student's predictions of each class, weak views.

    A buffer, so that it goes into a checkpoint. All classes start equal.

    Args:
        num_classes: K.
        strength: exponent s in τ_k = τ · (m_k / max m)^s; 0 leaves one threshold for all.
        momentum: share of a running mean that a step keeps.
    """

    mean: Tensor

    def __init__(self, num_classes: int, strength: float, momentum: float = 0.97) -> None:
        super().__init__()
        self.strength, self.momentum = strength, momentum
        self.register_buffer("mean", torch.full((num_classes,), 1 / num_classes))

    @torch.no_grad()
    def forward(
        self, logits: Tensor, confidence: Tensor, label: Tensor, ignore: Tensor | None
    ) -> Tensor:
        """Take a step's means in, over all processes, and rate the confidences by them.

        Args:
            logits: of the weak view, [B, K, h, w].
            confidence: of its pixels, float [B, H, W].
            label: pseudo-labels, uint8 or int64 [B, H, W].
            ignore: 255 where the weak view is padding, uint8 [B, H, W]; None: nowhere.

        Returns:
            confidence / (m_label / max m)^s, at most 1, [B, H, W]: over τ where the confidence is
            over the class's threshold.
        """
        top, predicted = logits.detach().float().softmax(1).max(1)
        real = torch.ones_like(top, dtype=torch.bool)
        if ignore is not None:
            real = F.interpolate((ignore != IGNORE)[:, None].float(), top.shape[-2:])[:, 0] > 0
        real = real & top.isfinite()  # one NaN would stay in the means for good
        classes = logits.shape[1]
        index = torch.where(real, predicted, classes).flatten()
        sums = top.new_zeros(2, classes + 1, dtype=torch.float64)
        sums[0].scatter_add_(0, index, top.nan_to_num(0).flatten().double())
        sums[1].scatter_add_(0, index, torch.ones_like(index, dtype=torch.float64))
        if rank_and_world()[1] > 1:
            dist.all_reduce(sums)
        total, count = sums[:, :-1]
        fresh = torch.where(count > 0, total / count.clamp(min=1), self.mean.double())
        self.mean.lerp_(fresh.to(self.mean.dtype), 1 - self.momentum)
        factor = (self.mean / self.mean.max()) ** self.strength
        return (confidence / factor.to(confidence.dtype)[label.long()]).clamp_(max=1)
