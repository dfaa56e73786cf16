"""Pictures that show the same: one fingerprint an image, and the pairs that are alike.

A pair is alike when the perceptual hashes (pHash: the signs of the low frequencies of a discrete
cosine transform of a 32 x 32 grey copy, by the library imagehash) differ in few bits and the grey
copies themselves correlate. Re-encoded, resized and brightened copies are found; mirrored or turned
ones are not. Flat pictures (water, shadow, no data) have nothing to compare: a constant one is like
no other, one without structure is like its exact copies only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 32
DISTANCE = 6
"""Bits of 64 in which the hashes of two like pictures may differ."""

CORRELATION = 0.98
"""Least correlation of the grey copies of two like pictures, a plane taken off each."""

STRUCTURE = 3.0
"""Standard deviation, in grey levels of 255 and without a plane, below which a copy is flat."""

CONSTANT = 1.0
"""Standard deviation over all pixels, in grey levels of 255, below which a picture is constant."""

_ROWS = 512


@dataclass(frozen=True)
class Fingerprint:
    """What is kept of an image to compare it with all others.

    Args:
        digest: of its size and pixels.
        phash: the perceptual hash, 64 bits.
        relief: its grey copy without a plane, float16 [SIDE * SIDE], mean 0 and norm 1; None where
            it is flat.
        constant: all its pixels are about the same.
    """

    digest: bytes
    phash: int
    relief: NDArray[np.float16] | None
    constant: bool


class Likeness:
    """Which images are like which.

    Args:
        prints: one an image; None (an image that could not be read) is like no other.
    """

    def __init__(self, prints: Sequence[Fingerprint | None]) -> None:
        first: dict[object, int] = {}
        self._leader: dict[int, int] = {}
        self._members: dict[int, list[int]] = {}
        for index, each in enumerate(prints):
            if each is None or each.constant:
                continue
            leader = first.setdefault(each.digest, index)
            self._leader[index] = leader
            self._members.setdefault(leader, []).append(index)
        self._near: dict[int, dict[int, int]] = {}
        for one, other, distance in _near(prints, list(self._members)):
            self._near.setdefault(one, {})[other] = distance
            self._near.setdefault(other, {})[one] = distance

    def like(self, index: int) -> Iterator[tuple[int, int | None]]:
        """The images like one, each with the bits its hash differs in; None: equal pixels."""
        leader = self._leader.get(index)
        if leader is None:
            return
        for other in self._members[leader]:
            if other != index:
                yield other, None
        for near, distance in self._near.get(leader, {}).items():
            for other in self._members[near]:
                yield other, distance


def fingerprint(pixels: NDArray) -> Fingerprint:
    """The fingerprint of an image [H, W, C] of any number type."""
    import imagehash  # brings PyWavelets along: wanted by the deep check only

    grey = _grey(pixels)
    copy = grey.resize((SIDE, SIDE), Image.Resampling.BOX)
    bits = imagehash.phash(copy, highfreq_factor=SIDE // 8).hash
    digest = blake2b(repr((pixels.shape, pixels.dtype.str)).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(pixels))
    relief = _without_plane(np.asarray(copy, np.float64))
    return Fingerprint(
        digest.digest(), int.from_bytes(np.packbits(bits).tobytes(), "big"),
        (relief / np.linalg.norm(relief)).astype(np.float16).ravel()
        if relief.std() >= STRUCTURE else None,
        bool(np.asarray(grey, np.float32).std() < CONSTANT),
    )  # fmt: skip


def _grey(pixels: NDArray) -> Image.Image:
    """The picture in 256 grey levels; number types other than uint8 are stretched to them."""
    bands = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.dtype == np.uint8 and bands.shape[2] == 3:
        return Image.fromarray(np.ascontiguousarray(pixels)).convert("L")
    mean = sum(bands[..., i].astype(np.float32) for i in range(bands.shape[2])) / bands.shape[2]
    if pixels.dtype != np.uint8:
        mean = np.nan_to_num(mean, nan=0.0, posinf=0.0, neginf=0.0)
        low, high = np.percentile(mean, (1, 99))
        mean = (mean - low) * (255 / (high - low) if high > low else 0)
    return Image.fromarray(mean.clip(0, 255).astype(np.uint8))


def _without_plane(copy: NDArray[np.float64]) -> NDArray[np.float64]:
    """The copy minus the plane that fits it best: light that falls off says nothing."""
    ramp = np.linspace(-1, 1, SIDE)
    down, across = ramp[:, None], ramp[None, :]
    scale = SIDE * (ramp**2).sum()
    slopes = (copy * down).sum() / scale * down + (copy * across).sum() / scale * across
    return copy - copy.mean() - slopes


def _near(prints: Sequence[Fingerprint | None],
          chosen: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Like pairs among the chosen images and their distance, each pair once."""
    rows = [i for i in chosen if prints[i].relief is not None]
    hashes = np.array([prints[i].phash for i in rows], np.uint64)
    for start in range(0, len(rows), _ROWS):
        distance = np.bitwise_count(hashes[start : start + _ROWS, None] ^ hashes[None, start:])
        for one, other in zip(*np.nonzero(distance <= DISTANCE), strict=True):
            if other <= one:
                continue
            first, second = rows[start + one], rows[start + other]
            correlation = np.vdot(prints[first].relief.astype(np.float32),
                                  prints[second].relief.astype(np.float32))
            if correlation >= CORRELATION:
                yield first, second, int(distance[one, other])
