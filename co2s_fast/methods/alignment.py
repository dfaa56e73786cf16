"""Distribution alignment of pseudo-labels: classes that are over-predicted lose confidence.

Trained from few labels, a student is sure of frequent classes first, learns only those from its
own pseudo-labels, and drifts towards them. ReMixMatch (Berthelot et al., ICLR 2020, section 3.1)
multiplies a prediction by the ratio of the labelled classes' frequencies to the mean prediction;
on logits that is one number a class, so nothing is stored at full resolution.

A handful of labelled images says little about the frequencies in all others. What students predict
for the others, before pseudo-labels teach them, is a second estimate: `prior` weighs the two.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from co2s_fast.data.catalogue import IGNORE
from co2s_fast.methods.reduce import rank_and_world

FLOOR = 1e-4  # of a frequency: a class that never occurs moves a logit by at most log(1 / FLOOR)


class DistributionAlignment(nn.Module):
    """Running frequencies of the labelled classes and of one student's predictions.

    They start uniform and are buffers, so that they go into a checkpoint.

    Args:
        num_classes: K.
        strength: factor on the shift of the logits; 1 is ReMixMatch's ratio.
        momentum: share of a running frequency that a step keeps.
        prior: weight of the early predictions in the logarithm of the frequencies that are aligned
            to; that of the labelled classes is 1 - prior. 0 is ReMixMatch's ratio.
    """

    labeled: Tensor
    predicted: Tensor
    early: Tensor
    """As `predicted`, taken in only as far as pseudo-labels did not teach yet; where prior > 0."""

    def __init__(self, num_classes: int, strength: float, momentum: float = 0.97,
                 prior: float = 0.0) -> None:
        super().__init__()
        self.strength, self.momentum, self.prior = strength, momentum, prior
        uniform = torch.full((num_classes,), 1 / num_classes)
        self.register_buffer("labeled", uniform.clone())
        self.register_buffer("predicted", uniform.clone())
        if prior > 0:
            self.register_buffer("early", uniform.clone())

    @torch.no_grad()
    def forward(self, logits: Tensor, target: Tensor, ignore: Tensor | None, *,
                taught: float = 1.0,
                students: Iterable[DistributionAlignment] = ()) -> Tensor:
        """Take a step's frequencies in, over all processes, and shift the weak view's logits.

        Args:
            logits: of the weak view, [B, K, h, w].
            target: labels of the labelled images, [B, H, W], 255 ignored.
            ignore: 255 where the weak view is padding, uint8 [B, H, W]; None: nowhere.
            taught: how much of their weight pseudo-labels have at this step, in [0, 1].
            students: the alignments, this one among them, whose early predictions are averaged;
                together students are nearer the truth than one. Empty: this one's alone.

        Returns:
            logits + strength · (log wanted - log predicted) per class, without gradient; log wanted
            is (1 - prior) · log labelled + prior · log early.
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
        rate = 1 - self.momentum
        parts = [(self.labeled, sums[0], rate), (self.predicted, sums[1], rate)]
        if self.prior > 0:
            parts.append((self.early, sums[1], rate * (1 - taught)))
        for running, fresh, share_taken in parts:
            total = fresh.sum()
            share = torch.where(total > 0, fresh / total.clamp(min=1e-12), running.double())
            running.lerp_(share.to(running.dtype), share_taken)
        wanted = (self.labeled + FLOOR).log()
        if self.prior > 0:
            early = torch.stack([one.early for one in students or (self,)]).mean(0)
            wanted = torch.lerp(wanted, (early + FLOOR).log(), self.prior)
        shift = wanted - (self.predicted + FLOOR).log()
        return logits.detach() + self.strength * shift.to(logits.dtype).view(1, -1, 1, 1)
