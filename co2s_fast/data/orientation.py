"""The EXIF orientation of a picture: how a viewer is to turn it. Here pixels are taken as stored.

So do GDAL and most training code; labelling tools draw over what a viewer shows.
"""

from __future__ import annotations

from pathlib import Path

from PIL import ExifTags, Image

_TAG = ExifTags.Base.Orientation
_UNDONE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def orientation(image: Image.Image) -> int:
    """The tag of an opened picture whose pixels were not loaded yet; 1: viewers do not turn it."""
    found = image.getexif().get(_TAG, 1)
    return found if found in _UNDONE else 1


def orientation_of(path: Path) -> int:
    """The same by a file's header; 1 of a damaged one, which is told of where pixels are read."""
    try:
        with Image.open(path) as image:
            return orientation(image)
    except (OSError, SyntaxError, ValueError):
        return 1


def as_stored(image: Image.Image, tag: int) -> Image.Image:
    """The loaded picture on the grid it is stored on: of TIFFs, Pillow turns pixels and size."""
    if tag == 1 or image.format != "TIFF" or image.getexif().get(_TAG, 1) == tag:
        return image
    stored = image.transpose(_UNDONE[tag])
    stored.format = image.format
    return stored


def stored_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) by the header of a picture that was not loaded yet."""
    turned = image.format == "TIFF" and orientation(image) >= 5
    return image.size[::-1] if turned else image.size
