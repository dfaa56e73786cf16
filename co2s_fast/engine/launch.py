"""What the commands `train`, `eval` and `predict` do: options in, engine calls, text out."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from co2s_fast.data import DataConfig, open_split, val_dataset
from co2s_fast.data.catalogue import DatasetSpec
from co2s_fast.data.splits import candidate_roots, find_root
from co2s_fast.engine.checkpoint import STATE_FILE
from co2s_fast.engine.compat import describe_compat
from co2s_fast.engine.config import CONFIG_FILE, load_config, read_run_config
from co2s_fast.engine.evaluation import BOTH, evaluate, wanted_predictions, write_evaluation
from co2s_fast.engine.folder import EVALUATION_FILE, holds_run
from co2s_fast.engine.log import say
from co2s_fast.engine.memory import with_fewer_windows
from co2s_fast.engine.metrics import format_table
from co2s_fast.engine.opening import chosen_backend, chosen_device
from co2s_fast.engine.outputs import check_writable, parse_shard
from co2s_fast.engine.runs import checkpoint_folder, checkpoint_step, load_run
from co2s_fast.errors import UsageError

PANELS_FOLDER = "panels"


def train_from_options(
    *,
    resume: bool,
    resume_if_exists: bool,
    dry_run: bool,
    recipe: str | None,
    overrides: Sequence[str],
    pretrained: Path | None = None,
    trainable: str | None = None,
    compat: str | None = None,
    **options: Any,
) -> Path | None:
    """`co2s-fast train`: put the configuration together and train it.

    A run that is resumed keeps its settings: they take the recipe's place where none is given.

    Returns:
        The run folder where there is something to show: not after a dry run, and only in the first
        of several processes.

    Raises:
        UsageError, DataError: see `load_config` and `Trainer`.
    """
    from co2s_fast.engine.trainer import train

    nested = nested_options(options)
    if recipe is None and (resume or resume_if_exists):
        folder = nested.get("out") or load_config(None, overrides, nested, compat).folder
        if holds_run(folder):
            recipe, nested["out"] = str(folder / CONFIG_FILE), folder
    config = load_config(recipe, overrides, nested, compat)
    changes = [f"students.{name}.weights={pretrained / name}.safetensors"
               for name in config.students if pretrained is not None]  # fmt: skip
    changes += [f"students.{name}.trainable={trainable}"
                for name in config.students if trainable is not None]  # fmt: skip
    if changes:
        config = load_config(recipe, [*overrides, *changes], nested, compat)
    first = int(os.environ.get("RANK", "0")) == 0  # set by torchrun
    if config.compat is not None and first:
        say("\n".join(describe_compat(config, config.compat)))
    there = holds_run(config.folder)
    if resume and not there:
        raise UsageError(f"--resume: {config.folder} holds no run (no {CONFIG_FILE})")
    if resume_if_exists:
        resume = there
    folder = train(config, resume=resume, dry_run=dry_run)
    return folder if first and not dry_run else None


def options_of_each(seeds: str | None, options: dict[str, Any]) -> list[dict[str, Any]]:
    """The options of `train_from_options` for each of the runs of `--seeds`: a seed and a folder.

    Args:
        seeds: "0,1,2"; None: one run, of the options as they are.
        options: of the command.

    Raises:
        UsageError: no list of different whole numbers, or --seed or several processes beside it.
    """
    if seeds is None:
        return [options]
    parts = [part.strip() for part in seeds.split(",")]
    if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts):
        raise UsageError(f"--seeds {seeds!r}: expected different whole numbers, like 0,1,2")
    if options.get("seed") is not None:
        raise UsageError("--seeds: give it without --seed")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("--seeds: several processes make one run at a time; start torchrun once a "
                         "seed, with --seed")
    base = options.get("out")
    if base is None:
        base = load_config(options["recipe"], options["overrides"], nested_options(options),
                           options.get("compat")).folder
    folders = [base / f"seed-{part}" for part in parts]
    recipes = [options["recipe"]] * len(parts)
    if options["resume"]:
        begun = [file for folder in folders if (file := folder / CONFIG_FILE).is_file()]
        if not begun:
            raise UsageError(f"--resume: {base} holds no run of these seeds")
        options = {**options, "resume": False, "resume_if_exists": True}
        if options["recipe"] is None:  # later ones begin, with the settings of those before
            recipes = [None if holds_run(folder) else str(begun[0]) for folder in folders]
    return [{**options, "seed": int(part), "out": folder, "recipe": recipe}
            for part, folder, recipe in zip(parts, folders, recipes, strict=True)]


def pretrain_from_options(
    *, out: Path, recipe: str | None, overrides: Sequence[str], **options: Any
) -> list[Path]:
    """`co2s-fast pretrain`: the files of the students' backbones; see `pretrain`."""
    from co2s_fast.engine.pretrain import pretrain

    return pretrain(load_config(recipe, overrides, nested_options(options)), out)


def nested_options(options: dict[str, Any]) -> dict[str, Any]:
    """Command-line options as the nested configuration they change; absent ones are left out."""
    data = {
        "dataset": options.get("dataset"),
        "root": options.get("data_root"),
        "ratio": options.get("ratio"),
        "labels": options.get("labels"),
        "split": options.get("split"),
        "loader": options.get("loader"),
        "sampling": options.get("sampling"),
    }
    data = {key: value for key, value in data.items() if value is not None}
    nested: dict[str, Any] = {"data": data} if data else {}
    if options.get("method") is not None:
        nested["method"] = {"name": options["method"]}
    train: dict[str, Any] = {key: True for key in ("compile", "deterministic") if options.get(key)}
    if options.get("gpu_mem") is not None:
        train["gpu_memory"] = options["gpu_mem"]
    if options.get("class_weight") is not None:
        train["class_weight"] = options["class_weight"]
    nested |= {"train": train} if train else {}
    nested |= {key: options[key] for key in ("seed", "out") if options.get(key) is not None}
    if options.get("clip") or options.get("ssm"):
        from co2s_fast.models.weights.choose import students_for

        nested["chosen"] = students_for(options.get("clip") or (), options.get("ssm") or ())
    return nested


def device_of(run: Path) -> torch.device:
    """The GPU where there is one, unless the run was told to stay on the CPU (`train.device`).

    Raises:
        UsageError: not a run folder.
    """
    return chosen_device(read_run_config(run).train)


def evaluate_run(
    run: Path,
    *,
    student: str | None = None,
    checkpoint: str = "best",
    mode: str | None = None,
    data_root: Path | None = None,
    split: Path | None = None,
    precision: str | None = None,
    compat: str | None = None,
) -> str:
    """`co2s-fast eval`: score a run on its validation images, or on those of another split folder.

    With a `compat` profile, its settings take the place of the run's, students' included. Without
    `student`, the run's `eval.student` is scored.

    Scoring everything ("all") also writes RUN/eval.json and the pictures of the report; on another
    split or data folder NAME, RUN/eval-NAME.json and no pictures. The file says what was scored.

    Returns:
        A table of per-class and mean scores.
    """
    device = device_of(run)
    config, spec, students = load_run(run, checkpoint, device=device, compat=compat)
    student = student or config.eval.student
    wanted_predictions(students, student)  # a wrong name is told before any data is read
    data = config.data if data_root is None else config.data.model_copy(update={"root": data_root})
    changes = {"student": student, "mode": mode or config.eval.mode,
               "precision": precision or config.eval.precision}  # fmt: skip
    settings = config.eval.model_copy(update=changes)
    report = run / EVALUATION_FILE
    if split is not None:
        data = data.model_copy(update={"split": split, "ratio": None, "labels": None})
        report = run / f"eval-{split.resolve().name}.json"
    elif other := other_root(config.data, data, spec):
        report = run / f"eval-{other.name}.json"
    if student == "all":
        check_writable(run)
    about = checkpoint_step(run, checkpoint)
    # Imported students have trained on none of the images, so any split will do.
    images = open_split(data, spec, "evaluate", make=about["step"] == 0 or None).val
    root = find_root(data, spec)
    own = report.name == EVALUATION_FILE
    panels = run / PANELS_FOLDER if student == "all" and own else None
    items = val_dataset(images, spec, data)
    with chosen_backend(config.train.backend, device, may_lack=True):
        results, settings = with_fewer_windows(
            lambda changed: evaluate(students, items, spec, changed, device, panels=panels),
            settings)  # fmt: skip
    if student == "all":
        write_evaluation(
            report, results, spec, settings, checkpoint=checkpoint, step=about["step"],
            epoch=about["epoch"], images=len(images), compat=config.compat,
            root=str(root), split=None if split is None else str(split),
        )  # fmt: skip
    head = f"{run}, {checkpoint} checkpoint (step {about['step']}), {len(images)} images"
    head += "" if data == config.data else f" of {root}"
    lines = [head, *(describe_compat(config, compat) if compat else [])]
    return "\n".join([*lines, format_table(results)])


def other_root(own: DataConfig, asked: DataConfig, spec: DatasetSpec) -> Path | None:
    """The folder that is asked for where it is not the run's own, which may have moved."""
    roots = [root for root in candidate_roots(own, spec) if (root / "images").is_dir()]
    found = find_root(asked, spec).resolve()
    return found if roots and found != roots[0].resolve() else None


def predict_run(
    run: Path,
    images: Sequence[str],
    *,
    out: Path,
    validation: int | None = None,
    student: str = BOTH,
    checkpoint: str = "best",
    scale: float | None = None,
    overlay: bool = False,
    confidence: bool = False,
    polygons: bool = False,
    shard: str | None = None,
    precision: str | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """`co2s-fast predict`: write a class map for every image.

    Images are brought to the scale of the dataset's tiles first (`tile.scale` of its description),
    unless `scale` says otherwise; validation images are tiles already. Maps that this checkpoint
    has made of the same images with the same settings are kept, unless `overwrite`.

    Raises:
        UsageError: neither images nor `validation` are given, or both.
    """
    from co2s_fast.engine.prediction import Outputs, predict

    if bool(images) == (validation is not None):
        raise UsageError("predict: name images, folders or globs, or give --val N; one of the two")
    device = device_of(run)
    config, spec, students = load_run(run, checkpoint, device=device)
    if validation is not None:
        split = open_split(config.data, spec, "evaluate")
        images = [str(item.image) for item in split.val[:validation]]
    elif scale is None and spec.tile.scale != 1:
        scale = spec.tile.scale
        say(f"images go through at {scale} of their size, as the tiles of {spec.name} were cut; "
            "--scale 1 takes them as they are")  # fmt: skip
    state = (checkpoint_folder(run, checkpoint) / STATE_FILE).read_bytes()
    outputs = Outputs(
        overlay, confidence, polygons, None if shard is None else parse_shard(shard), overwrite,
        signature=hashlib.sha256(state).hexdigest(),
    )  # fmt: skip
    settings = config.eval.model_copy(update={"precision": precision or config.eval.precision})
    return predict(
        students, images, out, spec, config=settings, data=config.data, device=device,
        student=student, scale=1.0 if scale is None else scale, outputs=outputs,
    )  # fmt: skip
