"""Class vectors: text embeddings averaged over concepts, a file of them, or hashed n-grams."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from co2s_fast.errors import DataError, UsageError
from co2s_fast.models.config import TextConfig

Tokenizer = Callable[[list[str]], Tensor]


class Named(Protocol):
    """What is asked of a class: its name and its concepts."""

    name: str
    concepts: list[str]


def concepts_of(cls: Named) -> list[str]:
    """The class name, then its other concepts, verbatim and without repetition."""
    return list(dict.fromkeys([cls.name, *cls.concepts]))


def text_queries(
    config: TextConfig,
    classes: Sequence[Named],
    width: int,
    *,
    tower: nn.Module | None = None,
) -> Tensor:
    """Fixed class vectors [K, width], float32.

    Args:
        config: where they come from.
        classes: in the order of the labels.
        width: channels of the backbone's deepest map.
        tower: a CLIP model already loaded with the text weights that `config` asks for.

    Raises:
        DataError: the file cannot be read or has another shape.
        UsageError: the text tower's width is another, or it has no weights.
    """
    if config.source == "file":
        return load_queries(Path(str(config.path)), len(classes), width)
    if config.source == "checkpoint":
        return torch.full((len(classes), width), torch.nan)
    if config.source == "hash":
        return torch.stack([_hashed_class(cls, width) for cls in classes])
    from co2s_fast.models.loading import load_clip, tokenizer_for

    if config.weights is None:
        raise UsageError(
            "text.source 'open_clip' needs text weights: an untrained tower's vectors mean nothing "
            "(source 'hash' gives fixed vectors without weights)"
        )
    tower = tower if tower is not None else load_clip(config.model, config.weights)
    if not getattr(tower, "has_text_weights", True):
        raise UsageError(
            f"text.weights {config.weights}: holds a vision tower only, expected a whole CLIP model"
        )
    tokenize = tokenizer_for(config.model, tower)
    queries = torch.stack(
        [_average([config.template.format(concept=c) for c in concepts_of(cls)], tokenize, tower)
         for cls in classes]
    )  # fmt: skip
    if queries.shape[1] != width:
        raise UsageError(
            f"text tower {config.model!r} gives vectors of width {queries.shape[1]}, but the "
            f"backbone's deepest map has {width} channels"
        )
    return queries


def load_queries(path: Path, classes: int, width: int) -> Tensor:
    """A `.npy` array [classes, width] as float32, values unchanged."""
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"text.path {path}: not a readable .npy array ({error})") from error
    if not isinstance(array, np.ndarray) or array.shape != (classes, width):
        found = getattr(array, "shape", type(array).__name__)
        raise DataError(
            f"text.path {path}: found shape {found}, expected ({classes}, {width}): one row for "
            "each class, as wide as the backbone's deepest map"
        )
    if array.dtype.kind != "f" or not np.isfinite(array).all():
        raise DataError(f"text.path {path}: expected finite floats, found {array.dtype} or NaN/inf")
    return torch.from_numpy(array.astype(np.float32))


@torch.no_grad()
def _average(prompts: list[str], tokenize: Tokenizer, tower: nn.Module) -> Tensor:
    # Averaged before normalising: longer embeddings weigh more, as in the authors' files.
    embedded = tower.encode_text(tokenize(prompts), normalize=False).float()
    return F.normalize(embedded.mean(0), dim=0)


def _hashed_class(cls: Named, width: int) -> Tensor:
    vectors = [_hashed(concept, width) for concept in concepts_of(cls)]
    # The name counts as much as all other concepts, so that classes with overlapping concept
    # lists stay apart.
    rest = torch.stack(vectors[1:]).mean(0) if len(vectors) > 1 else 0
    return F.normalize(vectors[0] + rest, dim=0)


def _hashed(text: str, width: int) -> Tensor:
    """Unit vector: sum over words and 3-letter grams, each a random sign vector of its own."""
    padded = f" {text.lower().replace('_', ' ')} "
    grams = [padded[i : i + 3] for i in range(len(padded) - 2)] + padded.split()
    total = np.zeros(width)
    for gram in grams:
        stream = hashlib.shake_256(gram.encode()).digest(-(-width // 8))
        total += 2.0 * np.unpackbits(np.frombuffer(stream, np.uint8))[:width] - 1.0
    return F.normalize(torch.from_numpy(total), dim=0).float()
