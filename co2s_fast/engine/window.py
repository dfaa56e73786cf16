"""The log record of the steps since the last one."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from co2s_fast.engine.memory import peak_gib

if TYPE_CHECKING:
    from co2s_fast.engine.trainer import Trainer


def train_record(trainer: Trainer) -> tuple[dict[str, Any], list[str]]:
    """Fetch the sums of a window; every rank must call.

    Returns:
        The record: mean of each loss term, the method's ratios, each student's pseudo-labels and
        confidence by class, learning rates, speed; and warnings to give.
    """
    method, config = trainer.method, trainer.config
    sums, steps = trainer.meter.fetch(), trainer.meter.steps
    by_class = {student: [sums.get(key, 0.0) for key in keys]
                for student, keys in method.class_counts().items()}
    counted = {key for pair in method.ratios().values() for key in pair}
    counted |= {key for keys in method.class_counts().values() for key in keys}
    counted |= {key for pairs in method.class_means().values() for pair in pairs for key in pair}
    terms = {key: value / steps for key, value in sums.items() if key not in counted}
    record: dict[str, Any] = {"kind": "train", "step": trainer.step, "epoch": trainer.epoch}
    record |= {f"loss/{key}": value for key, value in terms.items()}
    for name, (part, whole) in method.ratios().items():
        record[name] = sums[part] / sums[whole] if sums.get(whole) else None
    for student, counts in by_class.items():
        total = sum(counts)
        record[f"pseudo_share/{student}"] = {
            name: count / total if total else None
            for name, count in zip(trainer.spec.class_names, counts, strict=True)}
    for student, pairs in method.class_means().items():
        record[f"confidence/{student}"] = {
            name: sums[total] / sums[count] if sums.get(count) else None
            for name, (total, count) in zip(trainer.spec.class_names, pairs, strict=True)}
    factor = trainer.lr_factor(trainer.step - 1)
    groups = trainer.optimizer.param_groups
    record |= {f"lr/{group['name']}": group["initial_lr"] * factor for group in groups}
    seconds = time.perf_counter() - trainer.window_start
    images = len({"x", "w"} & method.views) * config.data.batch_size
    record["images_per_s"] = images * (steps - trainer.meter.steps_before) / seconds
    record["data_wait_s"] = trainer.waited_s
    record["damaged_files"] = len(trainer.damage.known)
    if (peak := peak_gib(trainer.device)) is not None:
        record["gpu_memory_gib"] = peak
    return record, trainer.collapse.look(steps, terms, by_class)
