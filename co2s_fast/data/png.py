"""Writing PNGs quickly: one filter for the whole picture, and runs instead of a search for repeats.

Pillow's encoder weighs five filters for every row, also where it is asked not to compress, and no
option of it says otherwise. Photographs gain next to nothing by the choice, so tiles take the
difference to the row above ("Up") and zlib's run lengths with Huffman codes. Reading is Pillow's.
Format: PNG specification (third edition, W3C 2025), sections 5, 9, 11.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GREY, _RGB, _INDEXED, _RGBA = 0, 2, 3, 6  # colour types
_NONE, _UP = 0, 2  # filters
_CHUNK = 1 << 30  # bytes; a chunk may have 2^31 - 1


def png_bits(path: Path) -> int:
    """Bits a channel by the header of a PNG; 8 of any other file, also of one that is not there."""
    if path.suffix.lower() != ".png":
        return 8
    try:
        with path.open("rb") as file:
            head = file.read(25)
    except OSError:
        return 8
    return head[24] if len(head) == 25 and head.startswith(_SIGNATURE) else 8


def encode_png(
    pixels: NDArray[np.uint8], palette: Sequence[Sequence[int]] | None = None
) -> bytes:
    """The bytes of a PNG of 8 bits a channel.

    Args:
        pixels: uint8 [H, W] (grey, or indices into `palette`), [H, W, 3] (RGB) or [H, W, 4] (RGBA).
        palette: up to 256 colours (red, green, blue), each from 0 to 255; only with [H, W].

    Raises:
        ValueError: `pixels` has another type or shape, or `palette` does not fit it.
    """
    color = _color_type(pixels, palette)
    height, width = pixels.shape[:2]
    rows = np.ascontiguousarray(pixels).reshape(height, -1)
    filtered = np.empty((height, 1 + rows.shape[1]), np.uint8)
    if color == _INDEXED:  # areas of one class are runs as they are
        filtered[:, 0] = _NONE
        filtered[:, 1:] = rows
    else:
        filtered[:, 0] = _UP
        filtered[0, 1:] = rows[0]
        np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])  # modulo 256
    packer = zlib.compressobj(level=1, strategy=zlib.Z_RLE)
    header = struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, 0)
    chunks = [_chunk(b"IHDR", header)]
    if palette is not None:
        chunks.append(_chunk(b"PLTE", bytes(channel for entry in palette for channel in entry)))
    packed = packer.compress(filtered) + packer.flush()
    chunks += [_chunk(b"IDAT", packed[i : i + _CHUNK]) for i in range(0, len(packed), _CHUNK)]
    return b"".join([_SIGNATURE, *chunks, _chunk(b"IEND", b"")])


def _color_type(pixels: NDArray, palette: Sequence[Sequence[int]] | None) -> int:
    shape = pixels.shape
    if pixels.dtype != np.uint8 or 0 in shape or len(shape) not in (2, 3):
        raise ValueError(f"pixels: expected uint8 [H, W] or [H, W, 3 or 4] with at least one pixel,"
                         f" found {pixels.dtype} {list(shape)}")  # fmt: skip
    if palette is not None:
        if len(shape) != 2 or not 0 < len(palette) <= 256 or any(len(c) != 3 for c in palette):
            raise ValueError(f"palette: expected 1 to 256 colours (red, green, blue) for [H, W], "
                             f"found {len(palette)} for {list(shape)}")  # fmt: skip
        if pixels.max() >= len(palette):
            raise ValueError(f"pixels: expected indices below {len(palette)}, the palette's size, "
                             f"found {pixels.max()}")  # fmt: skip
        return _INDEXED
    if len(shape) == 2:
        return _GREY
    if shape[2] not in (3, 4):
        raise ValueError(f"pixels: expected 3 or 4 channels, found {shape[2]}")
    return _RGB if shape[2] == 3 else _RGBA


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(content, zlib.crc32(kind))
    return b"".join([struct.pack(">I", len(content)), kind, content, struct.pack(">I", checksum)])
