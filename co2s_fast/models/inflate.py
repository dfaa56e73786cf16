"""Students of N bands: three-channel filters on other bands, and the mean and deviation.

The rule. Let R, G, B be the filters of a pretrained patch embedding and S = R + G + B, its response
to a grey image. A band called red, green or blue keeps its filter times 3/N; all other bands share
what is left of S in equal parts. So the filters of the N bands add up to S: an image whose bands
are all equal gets the response that it had as a grey image. With red, green and blue among the
bands, the part of every other one is the mean of the three filters times 3/N; with no band named,
or N below 3, the part of every band is S/N. Three bands without names are red, green and blue.

The inflated projection learns even where only the attention does: unless it learns, bands that
share a filter cannot be told apart.

timm's `adapt_input_conv` (factor 3/N, filters repeated in turn: R, G, B, R, ...) keeps the response
only where N is 1 or a multiple of 3, and knows no names; hence a rule of our own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from co2s_fast.errors import DataError, UsageError

if TYPE_CHECKING:
    from co2s_fast.models.config import StudentConfig

RGB = ("red", "green", "blue")
NORMALIZATION = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    # Of SAT-493M, which Meta's DINOv3 for satellite images was trained on (timm 1.0, `eva.py`).
    "satellite": ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
# Where a backbone's state dict has the layer that takes the image, by the end of its name.
INPUT_LAYERS = ("conv1.weight", "patch_embed.proj.weight", "stages.0.0.weight")


def colour_positions(channels: int, names: Sequence[str] | None) -> dict[int, int]:
    """Which channels are red (0), green (1) and blue (2): channel -> colour.

    Args:
        channels: N.
        names: of the channels, compared without case; None: unknown, then three are RGB.
    """
    if names is None:
        return {0: 0, 1: 1, 2: 2} if channels == 3 else {}
    lowered = [name.lower() for name in names]
    return {lowered.index(name): colour for colour, name in enumerate(RGB) if name in lowered}


def is_plain_rgb(channels: int, names: Sequence[str] | None) -> bool:
    """Whether pretrained filters fit as they are."""
    return channels == 3 and colour_positions(channels, names) == {0: 0, 1: 1, 2: 2}


def learns_input(config: StudentConfig) -> bool:
    """Whether some band's filter is invented, so that the projection has to learn it."""
    named = len(colour_positions(config.channels, config.bands))
    sparse = config.trainable in ("attention", "lora")
    return sparse and (config.channels < 3 or named < config.channels)


def is_input_layer(name: str) -> bool:
    """Whether a backbone's parameter belongs to the layer that takes the image."""
    return name.endswith(INPUT_LAYERS) or name.endswith("patch_embed.proj.bias")


def inflate(weight: Tensor, channels: int, names: Sequence[str] | None = None) -> Tensor:
    """Filters [O, 3, h, w] of a pretrained embedding for `channels` bands; see the module's rule.

    Args:
        weight: the filters of red, green and blue.
        channels: N, at least 1.
        names: of the bands.

    Returns:
        [O, N, h, w] in the same dtype; `weight` itself for three bands in RGB's order.
    """
    if weight.dim() != 4 or weight.shape[1] != 3:
        raise ValueError(f"weight must be [O, 3, h, w], got {tuple(weight.shape)}")
    if is_plain_rgb(channels, names):
        return weight
    places = colour_positions(channels, names) if channels >= 3 else {}
    total = weight.double().sum(1)
    parts = {i: weight[:, colour].double() * 3 / channels for i, colour in places.items()}
    others = channels - len(parts)
    # Nothing is left for none: with three bands and three names the parts are a permutation.
    share = (total - sum(parts.values())) / others if others else total
    return torch.stack([parts.get(i, share) for i in range(channels)], 1).to(weight.dtype)


def input_conv(
    conv: nn.Module, channels: int, names: Sequence[str] | None, *, pretrained: bool
) -> nn.Module:
    """The patch projection for `channels` bands.

    Args:
        conv: of three channels; returned as it is where `channels` are three in RGB's order.
        channels: N, of the images.
        names: of the channels, see `inflate`.
        pretrained: True inflates the weights, False draws new ones from torch's generator.

    Raises:
        UsageError: the projection is no convolution over three channels.
    """
    if channels == 3 and (not pretrained or is_plain_rgb(channels, names)):
        return conv
    if not isinstance(conv, nn.Conv2d) or conv.in_channels != 3 or conv.groups != 1:
        raise UsageError(
            f"channels {channels}: the model's patch projection is {conv}; only a convolution over "
            "three channels can be given others"
        )
    wide = nn.Conv2d(
        channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,
        bias=conv.bias is not None, device=conv.weight.device, dtype=conv.weight.dtype,
    )  # fmt: skip
    if pretrained:
        with torch.no_grad():
            wide.weight.copy_(inflate(conv.weight, channels, names))
            if conv.bias is not None:
                wide.bias.copy_(conv.bias)
    return wide


def input_channels(state: Mapping[str, Tensor]) -> int | None:
    """Channels that a backbone or student takes, by its state dict; None where that is unclear."""
    for name, value in state.items():
        if name.endswith(INPUT_LAYERS) and value.dim() == 4:
            return value.shape[1]
    return None


def check_channels(state: Mapping[str, Tensor], channels: int, source: str) -> None:
    """Weights must be for as many channels as the student takes.

    Raises:
        DataError: they are not; both numbers are named.
    """
    found = input_channels(state)
    if found is not None and found != channels:
        raise DataError(f"{source} is for images of {found} channels, expected {channels}")


def channel_statistics(config: StudentConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel, from the configuration or from its normalisation.

    Where they follow from the normalisation, a band that is none of red, green and blue has the
    average of the three, as an inflated filter is an average of three.
    """
    if config.mean is not None and config.std is not None:
        return config.mean, config.std
    places = colour_positions(config.channels, config.bands)
    mean, std = (
        tuple(
            values[places[i]] if i in places else sum(values) / 3 for i in range(config.channels)
        )
        for values in NORMALIZATION[config.normalization]
    )
    return mean, std
