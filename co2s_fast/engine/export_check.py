"""Whether an exported file says what the run says: same tiles through both, differences counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from co2s_fast.data import open_split, val_dataset
from co2s_fast.data.catalogue import DatasetSpec
from co2s_fast.data.config import DataConfig
from co2s_fast.data.splits import candidate_roots
from co2s_fast.engine.export_formats import Runner, Stretch
from co2s_fast.engine.inference import EvalConfig, evaluating, fuse, image_logits
from co2s_fast.engine.log import say
from co2s_fast.errors import DataError, UsageError

BATCHES = (1, 3)
ARGMAX_SHARE = 1e-3
"""Pixels whose class may differ: two classes as good as equal fall either way."""


@dataclass(frozen=True)
class Comparison:
    """An exported file beside its run.

    Attributes:
        difference: largest absolute difference of a probability (of the confidence where the file
            gives labels, over pixels of the same class).
        differing: share of pixels with another class.
        tiles: number of tiles compared.
        source: what they show.
        tolerance: what `difference` may be.
    """

    difference: float
    differing: float
    tiles: int
    source: str
    tolerance: float

    @property
    def passed(self) -> bool:
        """NaN does not pass."""
        return self.difference <= self.tolerance and self.differing <= ARGMAX_SHARE

    def __str__(self) -> str:
        batches = " and ".join(map(str, BATCHES))
        return (
            f"probabilities differ by at most {self.difference:.1e} (tolerance "
            f"{self.tolerance:.0e}), classes in {100 * self.differing:.4f} % of pixels (tolerance "
            f"{100 * ARGMAX_SHARE:g} %), on {self.tiles} {self.source} in batches of {batches}"
        )


def compare(
    runner: Runner, students: Mapping[str, nn.Module], tiles: Tensor, source: str,
    tolerance: float, stretch: Stretch | None = None,
) -> Comparison:  # fmt: skip
    """Put tiles through an exported file and through the students of the run.

    Args:
        runner: of the file.
        students: of the run.
        tiles: [N, C, T, T] as the students take them.
        source: what they show.
        tolerance: largest difference of a probability that passes.
        stretch: what the file does first: it gets the tiles in the rasters' numbers.
    """
    differences, differing = [], []
    for part in tiles.split(list(BATCHES)):
        expected = reference(students, part)
        found = runner((part if stretch is None else stretch.undo(part)).numpy())
        if len(found) == 1:
            differences.append(np.abs(found[0] - expected).max())
            differing.append(found[0].argmax(1) != expected.argmax(1))
        else:
            labels, confidence = found
            other = labels != expected.argmax(1)
            off = np.abs(confidence - expected.max(1))
            differences.append(np.where(other, 0, off).max())
            differing.append(other)
    share = float(np.mean(np.concatenate(differing)))
    return Comparison(float(np.max(differences)), share, len(tiles), source, tolerance)


def reference(students: Mapping[str, nn.Module], tiles: Tensor) -> NDArray[np.float32]:
    """Probabilities [N, K, T, T] as the run's own evaluation makes them, in float32."""
    config = EvalConfig(mode="whole", precision="float32")
    size = tuple(tiles.shape[-2:])
    with evaluating(students, config, torch.device("cpu")):
        logits = [image_logits(s, tiles, config, None).at(*size) for s in students.values()]
        return fuse(logits).numpy()


def sample_tiles(
    data: DataConfig, spec: DatasetSpec, like: Tensor, tile: int
) -> tuple[Tensor, str]:
    """Tiles to compare on: cut from validation images where they are here, else generated.

    Args:
        data: the run's data configuration.
        spec: its dataset.
        like: an image batch of the channels and dtype that the students take.
        tile: side in pixels.

    Returns:
        [N, C, tile, tile], and what they show.
    """
    count = sum(BATCHES)
    try:
        if spec.generated and not any((r / "images").is_dir() for r in candidate_roots(data, spec)):
            raise DataError(f"dataset {spec.name!r} has not been generated here")
        items = val_dataset(open_split(data, spec, "evaluate").val, spec, data)
        images = [torch.as_tensor(items[i % len(items)][0]) for i in range(count)]
    except (DataError, UsageError) as error:
        say(f"export: comparing on generated tiles, as the validation images are not here: {error}")
        return _generated(count, like, tile), "generated tiles"
    corners = ((0, 0), (1, 1), (0, 1), (1, 0))
    return torch.stack([_cut(i, tile, c) for i, c in zip(images, corners, strict=True)]), (
        "tiles of validation images"
    )


def _cut(image: Tensor, tile: int, corner: tuple[int, int]) -> Tensor:
    """A corner [C, tile, tile] of an image, mirrored outwards where that is smaller."""
    short = [(0, max(0, tile - side)) for side in image.shape[-2:]]
    image = torch.from_numpy(np.pad(image.numpy(), [(0, 0), *short], mode="symmetric"))
    top, left = ((side - tile) * c for side, c in zip(image.shape[-2:], corner, strict=True))
    return image[:, top : top + tile, left : left + tile]


def _generated(count: int, like: Tensor, tile: int) -> Tensor:
    """Smooth random fields with grain, over the middle of the range of values."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, like.shape[1], 6, 6, generator=generator)
    fields = F.interpolate(coarse, (tile, tile), mode="bilinear")
    grain = 0.1 * torch.rand(fields.shape, generator=generator)
    fields = 0.9 * fields + grain
    if not like.dtype.is_floating_point:
        fields = fields * torch.iinfo(like.dtype).max
    return fields.to(like.dtype)
