"""A pixel is taken where `confidence >= threshold`, in the confidence's own dtype."""

from __future__ import annotations

import pytest
import torch

from co2s_fast import ops
from co2s_fast.losses import masked_cross_entropy


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("threshold", [0.95, 0.9, 0.8, 0.7, 0.3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_at_the_threshold_and_one_step_below(backend, threshold, dtype):
    if not ops.backend_status()[backend].live:
        pytest.skip(f"backend {backend} is not live")
    at = torch.tensor(threshold, dtype=dtype)
    below = torch.nextafter(at, at - 1)
    confidence = torch.stack([at, below, torch.tensor(torch.nan, dtype=dtype)]).view(1, 1, 3)
    logits, target = torch.zeros(1, 2, 1, 3), torch.zeros(1, 1, 3, dtype=torch.int64)
    with ops.use_backend(backend):
        losses = masked_cross_entropy(logits, target, confidence, threshold=threshold,
                                      reduction="none")  # fmt: skip
    assert torch.equal(losses > 0, confidence >= threshold)
