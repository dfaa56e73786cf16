"""Distribution alignment of pseudo-labels: classes that are over-predicted lose confidence.

Trained from few labels, a student is sure of frequent classes first, learns only those from its
own pseudo-labels, and drifts towards them. ReMixMatch (Berthelot et al., ICLR 2020, section 3.1)
multiplies a prediction by the ratio of the labelled classes' frequencies to the mean prediction;
on logits that is one number a class, so nothing is stored at full resolution.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from co2s_fast.methods.reduce import rank_and_world

IGNORE = 255
FLOOR = 1e-4  # of a frequency: a class that never occurs moves a logit by at most log(1 / FLOOR)


class DistributionAlignment(nn.Module):
    """Running frequencies of the labelled classes and of one student's predictions.

    Both start uniform and are buffers, so that they go into a checkpoint.

    Args:
        num_classes: K.
        strength: factor on the shift of the logits; 1 is ReMixMatch's ratio.
        momentum: share of a running frequency that a step keeps.
    """

    labeled: Tensor
    predicted: Tensor

    def __init__(self, num_classes: int, strength: float, momentum: float = 0.97) -> None:
        super().__init__()
        self.strength, self.momentum = strength, momentum
        uniform = torch.full((num_classes,), 1 / num_classes)
        self.register_buffer("labeled", uniform.clone())
        self.register_buffer("predicted", uniform.clone())

    @torch.no_grad()
    def forward(self, logits: Tensor, target: Tensor, ignore: Tensor | None) -> Tensor:
        """Take a step's frequencies in, over all processes, and shift the weak view's logits.

        Args:
            logits: of the weak view, [B, K, h, w].
            target: labels of the labelled images, [B, H, W], 255 ignored.
            ignore: 255 where the weak view is padding, uint8 [B, H, W]; None: nowhere.

        Returns:
            logits + strength · (log labelled - log predicted) per class, without gradient.
        """
        classes = logits.shape[1]
        index = target.long().flatten()
        index = torch.where(index == IGNORE, classes, index)
        labels = torch.zeros(classes + 1, dtype=torch.int64, device=logits.device)
        labels = labels.scatter_add_(0, index, torch.ones_like(index))[:-1]
        probabilities = logits.detach().float().softmax(1)
        if ignore is not None:
            real = F.interpolate((ignore != IGNORE)[:, None].float(), logits.shape[-2:])
            probabilities = probabilities * real
        predictions = probabilities.sum((0, 2, 3))
        sums = torch.stack([labels.double(), predictions.double()])
        if rank_and_world()[1] > 1:
            dist.all_reduce(sums)
        for running, fresh in zip((self.labeled, self.predicted), sums, strict=True):
            total = fresh.sum()
            share = torch.where(total > 0, fresh / total.clamp(min=1e-12), running.double())
            running.lerp_(share.to(running.dtype), 1 - self.momentum)
        shift = (self.labeled + FLOOR).log() - (self.predicted + FLOOR).log()
        return logits.detach() + self.strength * shift.to(logits.dtype).view(1, -1, 1, 1)
