"""The authors' released student checkpoints as a run folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from co2s_fast.data.catalogue import load_dataset
from co2s_fast.data.writing import write_text
from co2s_fast.engine import checkpoint
from co2s_fast.engine.compat import describe_compat
from co2s_fast.engine.config import (
    CONFIG_FILE,
    RunConfig,
    default_recipe,
    dump_config,
    load_config,
    parse_config,
    with_compat,
)
from co2s_fast.engine.folder import holds_run
from co2s_fast.engine.optimizer import build_optimizer
from co2s_fast.engine.runs import (
    SPEC_FILE,
    checkpoint_folder,
    dump_spec,
    run_state,
    student_arrays,
)
from co2s_fast.errors import DataError, UsageError
from co2s_fast.methods import get_method
from co2s_fast.models import Student
from co2s_fast.models.config import merge
from co2s_fast.models.released import load_released, released_config

NAMES = {"clip": "clip", "timm": "ssm"}  # backbone -> the student's name in a run
TAG = "imported"


def import_checkpoints(
    paths: Sequence[Path],
    dataset: str,
    out: Path,
    options: dict[str, Any] | None = None,
    compat: str = "official-infer",
) -> str:
    """Turn `best_clip.pth`, `best_dinov3.pth` or both into a run that eval, predict and train take.

    The students keep the settings their released scores were made under (`released_config`). The
    run's `last` checkpoint stands before its first step with a fresh optimizer: resuming trains on
    from these weights, by the schedule of the configuration from its start. Co2S itself needs both
    students; one alone becomes a run of `onlysup`.

    Args:
        paths: one or two released checkpoints, in any order.
        dataset: name in the catalogue, or a YAML description, of the same classes.
        out: run folder, not there yet.
        options: nested configuration values, e.g. `{"data": {"split": ...}}`.
        compat: profile of `engine.compat` for the run's configuration.

    Returns:
        What was imported, and the commands that go on from it.

    Raises:
        DataError: a file that is not such a checkpoint, or of another number of classes or
            channels.
        UsageError: more or the same students, or a folder that holds a run.
    """
    if not 1 <= len(paths) <= 2:
        raise UsageError(f"import-checkpoint: expected one or two files, found {len(paths)}")
    if holds_run(out):
        raise UsageError(f"{out} already holds a run; give another folder")
    spec = load_dataset(dataset)
    if spec.channels != 3:
        raise DataError(f"weights {paths[0]}: the released students are for images of 3 channels, "
                        f"dataset {spec.name!r} has {spec.channels}")  # fmt: skip
    students: dict[str, Student] = {}
    for path in paths:
        student = load_released(path, spec.classes)
        name = NAMES[student.config.backbone]
        if name in students:
            raise UsageError(f"{paths[0]} and {path} are both checkpoints of the {name} student")
        students[name] = student
    students = {name: students[name] for name in NAMES.values() if name in students}
    config = _configuration(dataset, spec.info.labeled, list(students), options or {}, compat)
    state = run_state(config, spec, students) | {"step": 0, "epoch": 0.0, "score": None}
    arrays = student_arrays(students)
    tensors, structure = checkpoint.pack_optimizer(build_optimizer(students, config.train))
    random_tensors, random_rest = checkpoint.pack_rng()
    method = get_method(config.method.name)(students, config.method, seed=config.seed)
    more = {"method": own} if (own := method.own_state()) else {}
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / SPEC_FILE, dump_spec(spec))
    except OSError as error:
        raise UsageError(f"run folder {out}: {error.strerror or error}") from None
    checkpoint.save_checkpoint(checkpoint_folder(out, "best"), TAG, arrays, state)
    checkpoint.save_checkpoint(
        checkpoint_folder(out, "last"), TAG,
        {**arrays, "optimizer": tensors, "rng": random_tensors, **more},
        state | {"optimizer": structure, "rng": random_rest, "total_steps": None,
                 "best": {"score": None, "step": None}, "window": {"steps": 0, "sums": {}}},
    )  # fmt: skip
    write_text(out / CONFIG_FILE, dump_config(config))  # last: a folder with it is a run
    return "\n".join([*describe_compat(config, compat), describe(students, out)])


def _configuration(
    dataset: str, labeled: dict[str, int], names: list[str], options: dict[str, Any], compat: str
) -> RunConfig:
    """The dataset's recipe with the released students in place of its own."""
    data = dict(options.get("data", {})) | {"dataset": dataset}
    if not {"ratio", "labels", "split"} & data.keys():
        data["ratio"] = next(iter(labeled), "1/8")  # validation is the same for every ratio
    recipe = default_recipe(dataset)
    base = load_config("own" if recipe == "tiny" else recipe, (), merge(options, {"data": data}))
    content = base.model_dump(mode="json")
    backbones = {name: backbone for backbone, name in NAMES.items()}
    content["students"] = {
        name: released_config(backbones[name]).model_dump(mode="json") for name in names
    }
    if len(names) == 1:
        content["method"] = {"name": "onlysup"}
    return with_compat(parse_config(content, "imported checkpoint"), compat)


def describe(students: dict[str, Student], out: Path) -> str:
    """A few lines for people: what came from where, and what to do next."""
    lines = []
    for name, student in students.items():
        about = student.provenance
        lines.append(
            f"student {name}: {about['model']} from {about['source']} "
            f"(backbone sha256 {about['sha256'][:12]}), "
            f"{student.trainable_count() / 1e6:.2f} M parameters train"
        )
        if about["reinitialised"]:
            lines.append(
                f"  note: every LayerScale of {name} is exactly 1e-5: this backbone was drawn anew "
                "before it was trained, and never saw its pretrained weights"
            )
    lines += [
        f"wrote {out}; next:",
        f"  co2s-fast eval {out}",
        f"  co2s-fast predict {out} IMAGE... -o maps",
        f"  co2s-fast train --recipe {out / CONFIG_FILE} --out {out} --resume   # trains on",
    ]
    return "\n".join(lines)
