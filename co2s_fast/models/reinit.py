"""The accident of the Co2S release: a DINOv3 whose loaded weights are all drawn anew.

Its constructor reads the pretrained file; the framework then calls the backbone's own initialiser.
Linear weights come from a normal distribution of deviation 0.02 cut off at 2, class and register
tokens from the same uncut; biases are 0, norms 1 and 0, the patch projection is a new convolution,
LayerScale is 1e-5. So the blocks do hardly anything, and the maps are the final norm of a random
patch embedding.
"""

from __future__ import annotations

import torch
from torch import nn

from co2s_fast.errors import UsageError

LAYER_SCALE = 1e-5


@torch.no_grad()
def reinitialize(model: nn.Module) -> None:
    """Draw every weight of a timm DINOv3 from torch's generator, as the release does.

    Raises:
        UsageError: no DINOv3: it lacks register tokens or LayerScale.
    """
    scaled = getattr(model.blocks[0], "gamma_1", None) is not None
    if not scaled or getattr(model, "reg_token", None) is None:
        raise UsageError(f"reinitialize=true needs a DINOv3 model, got {type(model).__name__}")
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.LayerNorm, nn.Conv2d)):
            module.reset_parameters()
    for name, parameter in model.named_parameters():
        own = name.rpartition(".")[2]
        if own in ("q_bias", "v_bias"):
            nn.init.zeros_(parameter)
        elif own in ("gamma_1", "gamma_2"):
            nn.init.constant_(parameter, LAYER_SCALE)
        elif own in ("cls_token", "reg_token"):
            nn.init.normal_(parameter, std=0.02)
