"""The decoder's parts: pooling before its attention, memory with checkpointing."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from co2s_fast.models.config import DecoderConfig
from co2s_fast.models.decoder import ClassAttention, QueryDecoder


def test_classes_meet_at_pools_of_so_many_rows_and_columns():
    """What the attention adds depends on the means over 2 rows x 4 columns alone."""
    torch.manual_seed(0)
    config = DecoderConfig(pool=(2, 4))
    layer = ClassAttention(config).eval()
    x, text = torch.rand(3, config.channels, 8, 8), torch.rand(1, 3, config.text_channels)
    means = F.avg_pool2d(x, (2, 4)).repeat_interleave(2, 2).repeat_interleave(4, 3)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, text) - x, layer(means, text) - means,
                                   rtol=1e-4, atol=1e-5)  # fmt: skip


def test_checkpointing_keeps_less_for_the_backward_pass():
    kept = {}
    for on in (False, True):
        config = DecoderConfig(gradient_checkpointing=on)
        skips = len(config.skip_channels)
        decoder = QueryDecoder([8] * skips + [16], 16, config)
        maps = [torch.rand(1, 8, 8, 8) for _ in range(skips)] + [torch.rand(1, 16, 4, 4)]
        sizes = []

        def keep(tensor, sizes=sizes):
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            decoder(maps, torch.rand(3, 16))
        kept[on] = sum(sizes)
    assert kept[True] < 0.7 * kept[False]
