"""How sure a prediction is, pixel by pixel, and where a share of a batch's pixels lies."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from co2s_fast.methods.reduce import rank_and_world


@torch.no_grad()
def entropy(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Entropy of the softmax of upsampled logits, in nats.

    One image after another, so that the upsampled logits of one are all there is at full size.

    Args:
        logits: [B, K, h, w], floating.
        size: (H, W) of the result; upsampled as `softmax_confidence` does.

    Returns:
        float32 (float64 of float64) [B, H, W], in [0, log K].
    """
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    maps = []
    for image in logits.detach().split(1):
        image = F.interpolate(image.to(wide), size, mode="bilinear", align_corners=False)
        logs = image.log_softmax(1)
        maps.append(-(logs.exp() * logs).sum(1))
    return torch.cat(maps)


@torch.no_grad()
def pooled_quantile(values: Tensor, counted: Tensor, share: float | Tensor) -> Tensor:
    """The value below which a share of the counted pixels of all processes lies.

    As `torch.quantile` with linear interpolation, but of any number of values, and without
    fetching how many count. A step in parts (`train.accumulate`) has one for each part.

    Args:
        values: floating, any shape.
        counted: bool, of the same shape.
        share: in [0, 1].

    Returns:
        A scalar; infinite where nothing counts.
    """
    flat = torch.where(counted, values, torch.inf).flatten()
    world = rank_and_world()[1]
    if world > 1:
        everyone = flat.new_empty(world * flat.numel())
        dist.all_gather_into_tensor(everyone, flat)
        flat = everyone
    ordered = flat.sort().values
    last = (ordered.isfinite().sum() - 1).clamp(min=0)
    place = (last.double() * share).clamp(max=last)
    low = place.floor().long()
    # An index of no dimensions, in brackets, would be fetched.
    below, above = ordered.take(low), ordered.take(torch.minimum(low + 1, last))
    # Between two infinities there is no difference to interpolate.
    return torch.where(below == above, below, torch.lerp(below, above, (place - low).to(below)))
