"""Run folders: what a checkpoint of a run holds, and opening a run to use its students."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import nn

from co2s_fast.data.catalogue import DatasetSpec, load_dataset, parse_dataset
from co2s_fast.engine.averages import average_stem
from co2s_fast.engine.checkpoint import load_weights, read_arrays, read_state
from co2s_fast.engine.config import RunConfig, read_run_config, read_yaml, with_compat
from co2s_fast.errors import DataError
from co2s_fast.models import Student, StudentConfig, build_student
from co2s_fast.models.inflate import check_channels

SPEC_FILE = "dataset.yaml"


def checkpoint_folder(run: Path, which: str) -> Path:
    """Where a run keeps its "last" or "best" checkpoint."""
    return run / "checkpoints" / which


def dump_spec(spec: DatasetSpec) -> str:
    """The dataset's description as YAML, so that a run needs no file outside its folder."""
    return yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def read_spec(run: Path, config: RunConfig) -> DatasetSpec:
    """The dataset a run was trained on, from its own folder."""
    path = run / SPEC_FILE
    if path.is_file():
        return parse_dataset(read_yaml(path), path)
    return load_dataset(config.data.dataset)


def check_classes(state: dict[str, Any], spec: DatasetSpec, folder: Path) -> None:
    """A checkpoint must be of the same classes in the same order.

    Raises:
        DataError: it is not, or says nothing of them.
    """
    if lacking := {"classes", "provenance", "step"} - state.keys():
        raise DataError(f"checkpoint {folder} is damaged: without {', '.join(sorted(lacking))}")
    found = state["classes"]
    if found != spec.class_names:
        raise DataError(
            f"checkpoint {folder} is for {len(found)} classes ({', '.join(found)}), dataset "
            f"{spec.name!r} has {spec.num_classes} ({', '.join(spec.class_names)})"
        )


def load_run(
    folder: Path | str,
    which: Literal["best", "last"] = "best",
    *,
    device: torch.device | str = "cpu",
    compat: str | None = None,
) -> tuple[RunConfig, DatasetSpec, dict[str, Student]]:
    """Open a run to evaluate it, predict with it or report on it.

    No pretrained weight is fetched: every tensor comes from the checkpoint. Low-rank adapters are
    merged into the weights they stand beside. Where a run averages its weights (`train.ema`), its
    students are the averages, of either checkpoint.

    Args:
        folder: the run folder.
        which: checkpoint to take.
        device: where to put the students.
        compat: profile of `engine.compat` to set on top of the run's configuration.

    Returns:
        Configuration, dataset description, students by name in evaluation mode.

    Raises:
        UsageError: not a run folder. DataError: no such checkpoint, or it does not fit.
    """
    folder = Path(folder)
    config = read_run_config(folder)
    if compat is not None:
        config = with_compat(config, compat)
    spec = read_spec(folder, config)
    source = checkpoint_folder(folder, which)
    state = read_state(source)
    check_classes(state, spec, source)
    students = {}
    for name, student_config in config.students.items():
        student = bare_student(student_config, spec)
        stem = average_stem(name) if average_stem(name) in state["files"] else name
        weights = read_arrays(source, state, stem)
        file = f"checkpoint {source / state['files'][stem]}"
        check_channels(weights, student.channels, file)
        load_weights(student, weights, file)
        student.merge_adapters()
        student.provenance = state["provenance"][name]
        students[name] = student.to(device).eval()
    return config, spec, students


def checkpoint_step(folder: Path | str, which: Literal["best", "last"] = "best") -> dict[str, Any]:
    """"step", "epoch", "score" and "students" (scores by name) of a run's checkpoint."""
    state = read_state(checkpoint_folder(Path(folder), which))
    return {key: state.get(key) for key in ("step", "epoch", "score", "students")}


def bare_student(config: StudentConfig, spec: DatasetSpec) -> Student:
    """A student of the same shape without pretrained weights, to load a checkpoint into."""
    return build_student(config, spec.classes, seed=0, load=False)


def student_arrays(students: dict[str, nn.Module]) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of each student, by name of student."""
    return {name: dict(student.state_dict()) for name, student in students.items()}


def run_state(
    config: RunConfig, spec: DatasetSpec, students: dict[str, Student]
) -> dict[str, Any]:
    """What every checkpoint of a run says about it, besides its numbers."""
    return {
        "dataset": spec.name,
        "classes": spec.class_names,
        "palette": [list(color) for color in spec.palette],
        "config": config.model_dump(mode="json"),
        "provenance": {name: student.provenance for name, student in students.items()},
    }


def all_finite(module: nn.Module) -> bool:
    """Whether every trained parameter is finite; one synchronisation for all of them."""
    trained = [p.detach() for p in module.parameters() if p.requires_grad]
    return bool(torch.isfinite(torch.stack(torch._foreach_norm(trained))).all())
