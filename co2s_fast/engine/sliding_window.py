"""Logits of an image of any size: in one piece, or window by window with overlaps averaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Border = Literal["shift", "cut", "pad"]
Average = Literal["logits", "probability_sum"]
Blend = Literal["uniform", "hann"]
Network = Callable[[Tensor], Tensor]
Reader = Callable[["Window"], Tensor]


@dataclass(frozen=True)
class Window:
    """A rectangle of an image, in pixels; it may reach over the border when `border="pad"`."""

    y: int
    x: int
    height: int
    width: int


def window_starts(length: int, crop: int, stride: int, border: Border = "shift") -> list[int]:
    """First pixels of the windows along one axis.

    "shift" moves the last window back so that it ends at the border, and needs no window beyond
    it (mmsegmentation's grid: max(length - crop + stride - 1, 0) // stride + 1 windows).
    "cut" and "pad" start a window every `stride` pixels while it starts inside the image.
    """
    if length < 1 or crop < 1 or stride < 1:
        raise ValueError(
            f"length, crop and stride: expected at least 1, got {length}, {crop}, {stride}"
        )
    if stride > crop:
        raise ValueError(f"stride: expected at most the crop {crop}, got {stride}")
    if border != "shift":
        return list(range(0, length, stride))
    count = max(length - crop + stride - 1, 0) // stride + 1
    return [max(min(index * stride, length - crop), 0) for index in range(count)]


def window_rows(
    height: int, width: int, crop: int, stride: int, border: Border = "shift"
) -> list[list[Window]]:
    """The windows of an image, one list for each row of windows, top to bottom."""

    def extent(start: int, length: int) -> int:
        return crop if border == "pad" else min(crop, length - start)

    return [
        [
            Window(y, x, extent(y, height), extent(x, width))
            for x in window_starts(width, crop, stride, border)
        ]
        for y in window_starts(height, crop, stride, border)
    ]


def padding_of(network: object) -> int:
    """What a network pads images to multiples of: its `pads_to`, else `patch_size`, else 1."""
    return int(getattr(network, "pads_to", getattr(network, "patch_size", 1)))


def upsample(logits: Tensor, height: int, width: int, patch: int = 1) -> Tensor:
    """Bring logits [B,K,h,w] to the grid of the image [B,K,height,width] they belong to.

    A student pads its input at the right and bottom to a multiple of its patch, and its logits
    cover the padded image: upsample to that, then cut, or the map would be stretched.
    Equals `F.interpolate(logits, padded_size, mode="bilinear")[..., :height, :width]`.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    padded = (-(-height // patch) * patch, -(-width // patch) * patch)
    if logits.shape[-2:] == (height, width):
        return logits
    if logits.shape[-2:] != padded:
        logits = F.interpolate(logits, size=padded, mode="bilinear", align_corners=False)
    return logits[..., :height, :width]


def resize_logits(logits: Tensor, height: int, width: int) -> Tensor:
    """The last step before argmax where labels have another size than the image.

    Bilinear with align_corners=True, as the released evaluation does (sliding window of the
    UniMatch family).
    """
    if logits.shape[-2:] == (height, width):
        return logits
    return F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=True)


def sliding_window(
    network: Network,
    images: Tensor,
    *,
    crop: int,
    stride: int,
    batch_windows: int = 8,
    border: Border = "shift",
    average: Average = "logits",
    blend: Blend = "uniform",
    patch: int | None = None,
) -> Tensor:
    """Logits of whole images from overlapping windows.

    `sum_w weight_w · up(network(window_w)) / sum_w weight_w` at each pixel with
    `average="logits"`; `sum_w softmax(up(network(window_w)))` with "probability_sum".

    Args:
        network: takes [N,C,crop,crop] (smaller where the image is), gives logits [N,K,h,w].
        images: [B,C,H,W], whatever dtype the network takes.
        crop: side of a window, in pixels.
        stride: distance of windows, in pixels, at most `crop`.
        batch_windows: windows that go through the network at once.
        border: what happens at the right and bottom border, see `window_starts`.
        average: what is summed over the windows.
        blend: weight of a pixel inside its window, constant or falling towards the edges.
        patch: the network pads to multiples of this; `padding_of(network)` when None.

    Returns:
        float32 (float64 for float64 logits) [B,K,H,W].

    Raises:
        ValueError: images is not [B,C,H,W], or crop, stride or batch_windows is out of range.

    Source: the released evaluation of Co2S (average of raw logits) and of UniMatch (sum of
    probabilities).
    """
    if images.ndim != 4:
        raise ValueError(f"images: expected [B,C,H,W], got shape {tuple(images.shape)}")
    height, width = images.shape[-2:]

    def read(window: Window) -> Tensor:
        rows = images[..., window.y : window.y + window.height, :]
        return rows[..., window.x : window.x + window.width]

    bands = stream(
        network,
        read,
        height,
        width,
        crop=crop,
        stride=stride,
        batch_windows=batch_windows,
        border=border,
        average=average,
        blend=blend,
        patch=patch,
    )
    result: Tensor | None = None
    for top, band in bands:
        if result is None:
            if band.shape[2] == height:
                return band
            result = band.new_empty((*band.shape[:2], height, width))
        result[:, :, top : top + band.shape[2]] = band
    assert result is not None  # window_starts gives at least one window
    return result


def stream(
    network: Network,
    read: Reader,
    height: int,
    width: int,
    *,
    crop: int,
    stride: int,
    batch_windows: int = 8,
    border: Border = "shift",
    average: Average = "logits",
    blend: Blend = "uniform",
    patch: int | None = None,
    columns: tuple[int, int] | None = None,
    empty: Callable[[Window], bool] | None = None,
    classes: int | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """`sliding_window` in bands of finished rows, top to bottom, for images of any height.

    Only one row of windows is held at a time. `read` gives the pixels [B,C,h,w] of a window, cut
    at the border of the image.

    Args:
        network: see `sliding_window`, as for all that is not named here.
        read: see above.
        height: of the image.
        width: of the image.
        crop: side of a window, in pixels.
        stride: distance of windows, in pixels, at most `crop`.
        batch_windows: windows that go through the network at once.
        border: see `window_starts`.
        average: what is summed over the windows.
        blend: weight of a pixel inside its window.
        patch: the network pads to multiples of this; `padding_of(network)` when None.
        columns: first column and end of the strip of the image that is wanted; None: all of it.
            Strips side by side equal the whole, and memory is that of a strip.
        empty: whether a window holds nothing of interest: it is not put through the network. A
            pixel that only such windows cover has logits 0. Needs `classes`.
        classes: K.

    Yields:
        (first row, logits [B,K,rows,columns]); the bands follow each other without gaps.
    """
    if batch_windows < 1:
        raise ValueError(f"batch_windows: expected at least 1, got {batch_windows}")
    patch = patch or padding_of(network)
    first, end = columns or (0, width)
    rows = window_rows(height, width, crop, stride, border)
    total: Tensor | None = None  # sums of the rows of pixels from `top` on
    for index, row in enumerate(rows):
        row = [w for w in row if w.x < end and w.x + w.width > first]
        top, reach = row[0].y, min(row[0].height, height - row[0].y)
        full = [w for w in row if empty is None or not empty(w)]
        if total is None and not full:
            assert classes is not None
            total = torch.zeros(1, classes, reach, end - first)
            weight = torch.zeros(1, 1, reach, end - first)
        for window, logits in _window_logits(network, read, full, batch_windows, patch):
            value = logits.softmax(1) if average == "probability_sum" else logits
            if total is None:
                total = value.new_zeros((*value.shape[:2], reach, end - first))
                weight = value.new_zeros((1, 1, reach, end - first))
            elif total.device != value.device:  # so far nothing but empty windows
                total, weight = total.to(value.device), weight.to(value.device)
            begin, stop = max(window.x, first), min(window.x + window.width, end, width)
            inside = (..., slice(0, reach), slice(begin - first, stop - first))
            part = (..., slice(0, reach), slice(begin - window.x, stop - window.x))
            if blend == "hann":
                ramp = _hann(window, value)[part]
                total[inside] += value[part] * ramp
                weight[inside] += ramp
            else:
                total[inside] += value[part]
                weight[inside] += 1
        assert total is not None
        below = rows[index + 1][0].y if index + 1 < len(rows) else height
        done, kept = below - top, reach - (below - top)
        finished = total[:, :, :done]
        if average == "logits":
            finished = finished / weight[:, :, :done].clamp_min(torch.finfo(weight.dtype).tiny)
        yield top, finished
        if index + 1 < len(rows):
            following = min(rows[index + 1][0].height, height - below)
            total = F.pad(total[:, :, done:], (0, 0, 0, following - kept))
            weight = F.pad(weight[:, :, done:], (0, 0, 0, following - kept))


def _window_logits(
    network: Network, read: Reader, row: list[Window], batch_windows: int, patch: int
) -> Iterator[tuple[Window, Tensor]]:
    """Each window of a row with its logits [B,K,h,w] at window size, batched by equal shape."""
    for (height, width), same in groupby(row, key=lambda w: (w.height, w.width)):
        waiting: list[tuple[Window, Tensor]] = []
        windows = list(same)
        for window in windows:
            pixels = read(window)
            short = (width - pixels.shape[-1], height - pixels.shape[-2])
            if any(short):
                pixels = F.pad(pixels, (0, short[0], 0, short[1]))
            waiting.append((window, pixels))
            images = pixels.shape[0]
            if len(waiting) * images >= batch_windows or window is windows[-1]:
                stacked = torch.cat([pixels for _, pixels in waiting])
                parts = stacked.split(batch_windows)
                logits = torch.cat([upsample(network(p), height, width, patch) for p in parts])
                yield from zip((w for w, _ in waiting), logits.split(images), strict=True)
                waiting = []


def _hann(window: Window, like: Tensor) -> Tensor:
    """Separable raised cosine over a window, above zero everywhere so that borders count."""

    def ramp(length: int) -> Tensor:
        position = (torch.arange(length, device=like.device, dtype=like.dtype) + 0.5) / length
        return (torch.pi * position).sin().square().clamp_min(1e-3)

    return ramp(window.height)[:, None] * ramp(window.width)[None, :]
