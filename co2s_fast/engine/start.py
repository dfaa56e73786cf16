"""What a run says about itself when it starts, its seeds, and the students it starts with."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from co2s_fast import ops
from co2s_fast.data.imbalance import BALANCED, ClassSampler
from co2s_fast.models import Student, StudentConfig, build_student
from co2s_fast.models.student import RandomBackboneWarning
from co2s_fast.version import __version__

if TYPE_CHECKING:
    from co2s_fast.data.catalogue import ClassSpec
    from co2s_fast.engine.trainer import Trainer


def derived_seed(*parts: int) -> int:
    """A seed that is a pure function of the given numbers and shares no stream with others."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def student_seed(seed: int, index: int) -> int:
    """Seed of a student's initial weights: two students of one shape must not start alike."""
    return derived_seed(seed, index, 0x57D)


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of torch's own generator at a step of one rank."""
    return derived_seed(seed, step, rank, 0x57E)


def build_students(
    configs: dict[str, StudentConfig], classes: Sequence[ClassSpec], seed: int
) -> tuple[dict[str, Student], list[str]]:
    """The students of a run, each with a seed of its own, and what to warn of about them."""
    students, said = {}, []
    for index, (name, config) in enumerate(configs.items()):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RandomBackboneWarning)
            students[name] = build_student(config, classes, seed=student_seed(seed, index))
        for one in caught:
            if issubclass(one.category, RandomBackboneWarning):
                said.append(f"student {name}: {one.message}")
            else:  # not ours to put into a record
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    return students, said


def describe(trainer: Trainer) -> dict[str, Any]:
    """The record that opens metrics.jsonl."""
    split, spec = trainer.split, trainer.spec
    pixels = dict(zip(spec.class_names, split.pixels.sum(0).tolist(), strict=True))
    never = [name for name, count in pixels.items() if count == 0]
    said = [*trainer.random_backbones, *trainer.warnings, *trainer.memory.warnings]
    if never:
        said.append(
            f"no labelled pixel of class {', '.join(never)}: it can only be learnt never to occur"
        )
    return {
        "versions": {
            "co2s-fast": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "device": device_name(trainer.device),
        "world": trainer.ranks.world,
        "loader": str(trainer.loader),
        "backend": ops.backend(torch.empty(0, device=trainer.device)),
        "method": trainer.config.method.name,
        "dataset": spec.name,
        "seed": trainer.config.seed,
        "images": {
            "labeled": len(split.labeled),
            "unlabeled": len(split.unlabeled),
            "val": len(split.val),
        },
        "steps": trainer.total_steps,
        "steps_per_epoch": trainer.steps_per_epoch,
        "students": {
            name: {**student.provenance, "trained_parameters": student.trainable_count()}
            for name, student in trainer.students.items()
        },
        "method_parameters": sum(p.numel() for group in trainer.method.own_parameters().values()
                                 for p in group),
        "labeled_pixels": pixels,
        "memory": trainer.memory.record(),
        "class_weight": weighting(trainer),
        "sampling": sampling(trainer),
        "notes": list(split.notes),
        "warnings": said,
        "config": trainer.config.model_dump(mode="json"),
    }


def headline(trainer: Trainer, record: dict[str, Any]) -> str:
    """The same in a few lines for people."""
    images = record["images"]
    lines = [
        f"{record['method']} on {record['dataset']}: {images['labeled']} labelled, "
        f"{images['unlabeled']} unlabelled, {images['val']} validation images; "
        f"steps {trainer.step}-{record['steps']} on {record['device']}, losses by "
        f"{record['backend']}, input by {record['loader']}; run folder {trainer.folder}",
        *record["notes"],
    ]
    for name, student in record["students"].items():
        lines.append(
            f"student {name}: {student['model']}, weights {student['source']} "
            f"(sha256 {student['sha256'][:12]}, licence {student.get('licence', 'unknown')}), "
            f"{student['trained_parameters'] / 1e6:.2f} M parameters train"
        )
        if student.get("inflated"):
            lines.append(
                f"student {name}: patch projection inflated to {student['channels']} channels: "
                f"{', '.join(trainer.config.students[name].bands or ('RGB',))}"
            )
    if own := record["method_parameters"]:
        lines.append(f"method {record['method']}: {own / 1e6:.2f} M parameters of its own train")
    if trainer.memory.footprint is not None:
        lines.append(str(trainer.memory))
    if ema := trainer.config.train.ema:
        lines.append(f"evaluated and kept as best: averages of the weights (train.ema {ema:g})")
    total = sum(record["labeled_pixels"].values()) or 1
    shares = [f"{name} {100 * n / total:.1f} %" for name, n in record["labeled_pixels"].items()]
    lines.append(f"labelled pixels: {', '.join(shares)}")
    weights, chosen = record["class_weight"], record["sampling"]
    if weights["weights"]:
        shown = ", ".join(f"{name} {value:.3g}" for name, value in weights["weights"].items())
        lines.append(f"class weights in the supervised loss ({weights['rule']}): {shown}")
    if chosen["classes"]:
        shown = ", ".join(f"{name} {100 * p:.1f} %" for name, p in chosen["classes"].items())
        lines.append(f"labelled crops by class ({chosen['rule']}): {shown}")
    return "\n".join(lines)


def weighting(trainer: Trainer) -> dict[str, Any]:
    """Rule and weights of the classes in the supervised loss."""
    rule, beta = trainer.config.train.class_weight, trainer.config.train.class_weight_beta
    weights = trainer.class_weight
    named = {} if weights is None else dict(
        zip(trainer.spec.class_names, weights.tolist(), strict=True))
    name = "given" if isinstance(rule, dict) else BALANCED if rule == "balanced" else rule
    return {"rule": name, "beta": beta, "weights": named}


def sampling(trainer: Trainer) -> dict[str, Any]:
    """Rule of the labelled crops, and the probability that each class is asked for."""
    data = trainer.config.data
    if data.sampling == "uniform":
        return {"rule": data.sampling, "classes": {}}
    sampler = ClassSampler(trainer.split.pixels, data.sampling_temperature, trainer.config.seed)
    odds = dict(zip(trainer.spec.class_names, sampler.probabilities.tolist(), strict=True))
    return {"rule": data.sampling, "temperature": data.sampling_temperature, "classes": odds}


def device_name(device: torch.device) -> str:
    """The GPU's name, or "cpu" with its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.get_num_threads()} threads)"
