"""Scores of the students on labelled images, and of their pseudo-labels on unlabelled ones."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from co2s_fast.data.catalogue import IGNORE
from co2s_fast.data.writing import write_text
from co2s_fast.engine import panels as pictures
from co2s_fast.engine.inference import (
    BOTH,
    EvalConfig,
    Logits,
    evaluating,
    fuse,
    image_logits,
    wanted_predictions,
)
from co2s_fast.engine.metrics import Metrics
from co2s_fast.errors import DataError
from co2s_fast.losses import confusion_matrix, softmax_confidence

FORMAT = 1
# At which pseudo-labels are measured where the method has no threshold, and beside it.
THRESHOLD = 0.95
THRESHOLDS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)


def evaluate(
    students: Mapping[str, nn.Module],
    items: Sequence | Iterable,
    spec: Any,
    config: EvalConfig,
    device: torch.device | str,
    *,
    progress: bool = True,
    panels: Path | None = None,
    rank: int = 0,
    world: int = 1,
) -> dict[str, Metrics]:
    """Score each student, and the mean of their probabilities ("both"), on labelled images.

    Labels keep their own size: logits are brought to it (bilinear, align_corners=True) before
    argmax. With `world` > 1 every rank takes each `world`-th image, no image twice, and all ranks
    return the sum; all of them must call.

    Args:
        students: name -> network, [B,C,H,W] in, logits [B,K,h,w] out.
        items: validation set, (image uint8, or float in [0, 1], [C,H,W], label uint8 [h,w] or None,
            name) each.
        spec: the dataset: `num_classes`, `class_names`, `palette`, `crop`.
        config: see `EvalConfig`.
        device: where the students are.
        progress: draw a bar (rank 0 only).
        panels: folder for pictures of a fixed choice of images; None draws nothing.
        rank: this process.
        world: number of processes.

    Returns:
        name -> Metrics, "both" last where there are two students.

    Raises:
        DataError: an image has no label, a label holds a class outside [0, K), or there is no
            image at all.
        UsageError: `config.student` names a student that is not there.

    Source: sliding window, stride and resize of the Co2S release.
    """
    device = torch.device(device)
    names = wanted_predictions(students, config.student)
    shape = (spec.num_classes, spec.num_classes)
    totals = {n: torch.zeros(shape, dtype=torch.int64, device=device) for n in names}
    crop = config.crop or getattr(spec, "crop", None)
    drawn = []
    if panels is not None and config.panels:
        drawn = pictures.choose(items, config.panels, spec.num_classes)
    running = {n: s for n, s in students.items() if n in names or BOTH in names}
    loaded = _loaded(items, spec, rank, world)
    if progress and rank == 0:
        loaded = tqdm(loaded, total=_share(items, rank, world), desc="eval", unit="img")
    with evaluating(students, config, device):
        for group in _groups(loaded, config.batch_windows):
            images = torch.stack([each.image for each in group]).to(device)
            labels = torch.stack([each.label for each in group]).to(device)
            logits = {n: image_logits(s, images, config, crop) for n, s in running.items()}
            _add_scores(totals, logits, labels)
            for row, each in enumerate(group):
                if panels is not None and each.position in drawn:
                    number = drawn.index(each.position)
                    _draw(panels, number, each, _predictions(logits, row, each.label.shape), spec)
    if world > 1:
        for matrix in totals.values():
            dist.all_reduce(matrix)
    if not any(int(matrix.sum()) for matrix in totals.values()):
        raise DataError("evaluation: expected validation images with labels, found no such pixel")
    if panels is not None and rank == 0:
        pictures.remove_from(panels, len(drawn))
    classes = tuple(spec.class_names)
    return {n: Metrics(m.cpu().numpy(), classes, config.absent) for n, m in totals.items()}


def pseudo_label_quality(
    students: Mapping[str, nn.Module],
    items: Sequence | Iterable,
    spec: Any,
    config: EvalConfig,
    device: torch.device | str,
    *,
    threshold: float = THRESHOLD,
    limit: int | None = None,
    progress: bool = True,
    rank: int = 0,
    world: int = 1,
) -> dict[str, dict[str, Any]]:
    """How good the pseudo-labels of unlabelled images are, where those images do have labels.

    accuracy = #{c >= τ and pseudo-label = label} / #{c >= τ}; coverage = #{c >= τ} / #pixels, over
    pixels that have a label. Images without a label are passed over.

    Args:
        students: name -> network.
        items: unlabelled images as in `evaluate`.
        spec: the dataset.
        config: see `EvalConfig`.
        device: where the students are.
        threshold: τ, in [0, 1].
        limit: take at most this many images, evenly spread; None takes all.
        progress: draw a bar (rank 0 only).
        rank: this process.
        world: number of processes.

    Returns:
        name -> {"accuracy", "coverage", "pixels", "thresholds"}; accuracy is None where no pixel is
        confident; empty if no image has a label. "thresholds" are the same two at the levels of
        `THRESHOLDS`, as [τ, accuracy, coverage] each: runs whose students are not equally sure
        compare at equal coverage only.

    Source: Co2S Eq. 12.
    """
    device = torch.device(device)
    crop = config.crop or getattr(spec, "crop", None)
    levels = torch.tensor([threshold, *THRESHOLDS], device=device)
    counts = {n: torch.zeros(2, len(levels), dtype=torch.int64, device=device) for n in students}
    pixels = torch.zeros((), dtype=torch.int64, device=device)
    if limit is not None and _length(items) is not None and _length(items) > limit:
        items = [items[round(i * (len(items) - 1) / max(limit - 1, 1))] for i in range(limit)]
    loaded = _loaded(items, spec, rank, world, need_label=False)
    if progress and rank == 0:
        total = _share(items, rank, world)
        loaded = tqdm(loaded, total=total, desc="pseudo-labels", unit="img")
    with evaluating(students, config, device):
        for group in _groups((i for i in loaded if i.label is not None), config.batch_windows):
            images = torch.stack([each.image for each in group]).to(device)
            labels = torch.stack([each.label for each in group]).to(device)
            size = tuple(labels.shape[-2:])
            valid = labels != IGNORE
            pixels += valid.sum()
            for name, student in students.items():
                logits = image_logits(student, images, config, crop).coarse(*size)
                confidence, predicted = softmax_confidence(logits, size)
                right = predicted == labels
                for column, level in enumerate(levels):
                    taken = valid & (confidence >= level)
                    counts[name][:, column] += torch.stack([(taken & right).sum(), taken.sum()])
    if world > 1:
        for count in (pixels, *counts.values()):
            dist.all_reduce(count)
    valid_pixels = int(pixels)
    return {n: _quality(*count.tolist(), valid_pixels) for n, count in counts.items()
            if valid_pixels}  # fmt: skip


def _quality(right: list[int], taken: list[int], valid: int) -> dict[str, Any]:
    """Accuracy and coverage at the first level, and a list of them at the others."""
    accuracy, *others = (r / t if t else None for r, t in zip(right, taken, strict=True))
    coverage, *covered = (t / valid for t in taken)
    return {"accuracy": accuracy, "coverage": coverage, "pixels": valid,
            "thresholds": [list(each) for each in zip(THRESHOLDS, others, covered, strict=True)]}


def write_evaluation(
    path: Path, results: Mapping[str, Metrics], spec: Any, config: EvalConfig, **about: Any
) -> dict[str, Any]:
    """Write eval.json atomically and return its content.

    Args:
        path: RUN/eval.json.
        results: what `evaluate` returned.
        spec: the dataset.
        config: what was asked for.
        **about: anything JSON takes to be kept beside it, e.g. step, epoch, checkpoint, images,
            pseudo.
    """
    record = {
        "format": FORMAT,
        "dataset": spec.name,
        "classes": [
            {"name": name, "color": list(color)}
            for name, color in zip(spec.class_names, spec.palette, strict=True)
        ],
        "config": config.model_dump(),
        **about,
        "students": {name: metrics.to_dict() for name, metrics in results.items()},
    }
    write_text(Path(path), json.dumps(record, indent=1))
    return record


@dataclass(frozen=True)
class _Loaded:
    position: int
    name: str
    image: Tensor  # uint8, or float in [0, 1], [C,H,W]
    label: Tensor | None  # uint8 [h,w]


def _add_scores(totals: dict[str, Tensor], logits: dict[str, Logits], labels: Tensor) -> None:
    size = tuple(labels.shape[-2:])
    for name, matrix in totals.items():
        if name == BOTH:
            mixed = fuse(each.at(*size) for each in logits.values())
        else:
            mixed = logits[name].coarse(*size)
        confusion_matrix(mixed, labels, ignore_index=IGNORE, out=matrix)


def _predictions(
    logits: dict[str, Logits], row: int, size: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Class maps of one image of the batch, for each student and both."""
    full = {
        name: Logits(each.grid[row : row + 1], each.size, each.patch).at(*size)
        for name, each in logits.items()
    }
    if len(full) > 1:
        full[BOTH] = fuse(list(full.values()))
    return {n: z.argmax(1)[0].to(torch.uint8).cpu().numpy() for n, z in full.items()}


def _draw(folder: Path, number: int, each: _Loaded, maps: dict[str, np.ndarray], spec: Any) -> None:
    shown = getattr(spec, "display_channels", None)
    image = pictures.as_rgb(each.image.permute(1, 2, 0).numpy(), shown)
    pictures.save(folder, number, each.name, image, each.label.numpy(), maps, spec.palette)


def _groups(loaded: Iterable[_Loaded], largest: int) -> Iterator[list[_Loaded]]:
    """Runs of consecutive images with equal image and label shape, `largest` at most."""
    group: list[_Loaded] = []
    for each in loaded:
        shapes = (each.image.shape, each.label.shape)
        if group and (
            len(group) == largest or shapes != (group[0].image.shape, group[0].label.shape)
        ):
            yield group
            group = []
        group.append(each)
    if group:
        yield group


def _loaded(
    items: Sequence | Iterable, spec: Any, rank: int, world: int, need_label: bool = True
) -> Iterator[_Loaded]:
    """This rank's images in order, decoded a little ahead of their use."""

    def check(position: int, entry: tuple) -> _Loaded:
        image, label, name = entry
        if label is None:
            if need_label:
                raise DataError(f"validation image {name}: expected a label, found none")
            return _Loaded(position, str(name), image, None)
        label = torch.as_tensor(label)
        wrong = label[(label != IGNORE) & (label >= spec.num_classes)]
        if len(wrong):
            found, last = int(wrong[0]), spec.num_classes - 1
            raise DataError(f"label of {name}: expected classes 0..{last} or 255, found {found}")
        return _Loaded(position, str(name), torch.as_tensor(image), label)

    if _length(items) is None:
        for position, entry in islice(enumerate(items), rank, None, world):
            yield check(position, entry)
        return
    waiting: deque[Future] = deque()
    with ThreadPoolExecutor(max_workers=2) as pool:
        for position in range(rank, len(items), world):
            waiting.append(pool.submit(lambda p: check(p, items[p]), position))
            if len(waiting) > 8:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _length(items: Sequence | Iterable) -> int | None:
    """Number of items where they can be had by position, else None."""
    return len(items) if hasattr(items, "__getitem__") and hasattr(items, "__len__") else None


def _share(items: Sequence | Iterable, rank: int, world: int) -> int | None:
    length = _length(items)
    return None if length is None else len(range(rank, length, world))
