"""Where a probability ranks among those lately predicted for the same class.

One threshold asks as much of a class that is learnt late as of one that is learnt early. A rank
compares a prediction with others of its own class instead: Huang et al., "Decouple and weight
semi-supervised semantic segmentation of remote sensing images" (ISPRS Journal 2024).

Probabilities are kept as counts in bins, not one by one: a fixed size, whose sum over processes is
the pool of all their pixels. Predictions crowd near 1, so bins get narrower towards it: a bin holds
the probabilities whose distances from 1 agree in their 8 leading bits, down to the 2^-24 that
float32 can tell from 1; 1 itself has its own. Ranks are exact for probabilities so rounded, and
off by no more than the share of the pool that lies in one bin.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from co2s_fast.data.catalogue import IGNORE
from co2s_fast.methods.reduce import rank_and_world

STEPS = 50  # that are kept
LEVELS = 20  # quantiles a probability is compared with
GRID = 64  # pixels of a map's side that are kept, at most
_BITS = 7  # of a float's mantissa; the leading one is not stored
_SMALLEST = (127 - 24) << _BITS  # 2^-24
BINS = (24 << _BITS) + 2  # of the distances 0; 2^-24 to 1; 1 and more


class ClassRanks(nn.Module):
    """Probabilities of one student's pseudo-labels in the last steps, by class.

    A buffer, so that it goes into a checkpoint. As in the release, every class starts with a
    probability of 1, which leaves with the oldest step.

    Args:
        num_classes: K.
    """

    counts: Tensor  # int32 [STEPS, K, BINS], the last bin of probability 1

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        counts = torch.zeros(STEPS, num_classes, BINS, dtype=torch.int32)
        counts[-1, :, -1] = 1
        self.register_buffer("counts", counts)

    @torch.no_grad()
    def forward(
        self, confidence: Tensor, label: Tensor, ignore: Tensor | None, step: int, part: int = 0
    ) -> Tensor:
        """Take a step's probabilities in, over all processes, and rank every pixel among the kept.

        Of a map, 64 x 64 pixels are taken in, its nearest ones, and all of a smaller one.

        Args:
            confidence: of every pixel, floating [B, H, W].
            label: pseudo-labels, uint8 or int64 [B, H, W].
            ignore: 255 where a pixel is padding, uint8 [B, H, W]; None: nowhere.
            step: step index; the step before it by 50 is forgotten.
            part: which part of the step's batch this is; the later ones add to the first.

        Returns:
            float32 [B, H, W]: how many of the 20 quantiles Q(1/20), ..., Q(1) of the probabilities
            kept for its class a pixel's own is above, over 20. Quantiles are nearest ranks, so Q(1)
            is the greatest value. 0 for a class of which nothing is kept.
        """
        classes = self.counts.shape[1]
        place = label.long() * BINS + bins_of(confidence)
        real = _on_grid(confidence).isfinite()  # a step that is skipped must leave nothing behind
        if ignore is not None:
            real &= _on_grid(ignore) != IGNORE
        taken = torch.where(real, _on_grid(place), classes * BINS)
        taken = taken.flatten()
        fresh = torch.zeros(classes * BINS + 1, dtype=torch.int64, device=taken.device)
        fresh.scatter_add_(0, taken, torch.ones_like(taken))
        if rank_and_world()[1] > 1:
            dist.all_reduce(fresh)
        fresh = fresh[:-1].view(classes, BINS)
        kept = self.counts[step % STEPS]
        if part == 0:
            kept.zero_()
        kept.add_(fresh)
        return self.table().flatten()[place]

    def table(self) -> Tensor:
        """The rank of a probability in each bin, float32 [K, BINS].

        Of n values, Q(b / 20) is number ceil(b n / 20) in ascending order. It is below a bin if so
        many values are, so the number of such b is 20 times the share of values below, rounded
        down.
        """
        pool = self.counts.sum(0)
        below = pool.cumsum(1) - pool
        all_of_class = pool.sum(1, keepdim=True).clamp(min=1)
        return (below * LEVELS).div(all_of_class, rounding_mode="floor").float() / LEVELS


def bins_of(probability: Tensor) -> Tensor:
    """Bin of each probability, int64 of the same shape; greater ones have greater bins.

    Args:
        probability: floating, in [0, 1]; NaN gets some bin, and does not count in it.
    """
    # A float's bits order as its value does: what is left of them is its exponent and 7 bits more.
    bits = (1 - probability.float()).view(torch.int32) >> (23 - _BITS)
    return BINS - 1 - (bits.long() - _SMALLEST + 1).clamp_(0, BINS - 1)


def _on_grid(maps: Tensor) -> Tensor:
    """Some rows and columns of maps [B, H, W], evenly spaced: `F.interpolate(mode="nearest")`."""
    for dim in (1, 2):
        side = maps.shape[dim]
        kept = min(side, GRID)
        maps = maps.index_select(dim, torch.arange(kept, device=maps.device) * side // kept)
    return maps
