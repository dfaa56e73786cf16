"""A run's whole configuration: recipe, then --set overrides, then command-line options."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import nn

from co2s_fast.data import DataConfig, dataset_names
from co2s_fast.data.catalogue import DESCRIPTION
from co2s_fast.data.imbalance import read_class_weight
from co2s_fast.engine.averages import average_stem
from co2s_fast.engine.compat import compat_settings, nested
from co2s_fast.engine.evaluation import BOTH, EvalConfig
from co2s_fast.engine.footprint import parse_gib
from co2s_fast.errors import UsageError
from co2s_fast.methods import METHODS, get_method
from co2s_fast.models import StudentConfig
from co2s_fast.models.config import merge
from co2s_fast.models.weights.choose import put_students

RECIPES = Path(__file__).parent.parent / "recipes"
CONFIG_FILE = "config.yaml"

AnyMethodConfig = Annotated[
    Union[tuple(get_method(name).Config for name in METHODS)],  # noqa: UP007
    Field(discriminator="name"),
]


Beta = Annotated[float, Field(ge=0, lt=1)]
_STUDENT_NAME = re.compile(r"[A-Za-z0-9_-]+")
_TAKEN = {BOTH, "all", "optimizer", "rng", "split", "method"}  # predictions, files of a checkpoint
_EXAMPLES = {"data": "data.labels=20", "method": "method.name=onlysup",
             "train": "train.steps=500", "students": "students.ssm.model=..."}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class TrainConfig(_Strict):
    """How long, how fast and on what a run trains.

    Attributes:
        epochs, steps: length of the run, one of the two. An epoch is a pass over the unlabelled
            images, for every method alike.
        lr, weight_decay, betas, eps: AdamW.
        backbone_multiplier, decoder_multiplier: factors on `lr` for those parameters.
        adapter_multiplier: the same for low-rank adapters (`trainable: lora`), which take the
            backbone's place among the parameters.
        accumulate: pass each step's batch through the students in so many equal parts, one after
            another, and add their gradients up: less memory, as many images and steps. A part has
            loss means and CutMix partners of its own, as a process of several has of its share.
        gpu_memory: GiB of each GPU that a step must fit into ("24G" is read, too), or "auto": what
            is free there. What it takes is estimated, and where it is too much, gradient
            checkpointing is turned on and `accumulate` raised, as far as needed; see
            `engine.footprint`. None: as configured.
        ema: decay of an exponential moving average of each student's weights (`engine.averages`),
            e.g. 0.99; it is what is evaluated, kept as `best`, predicted with and exported, in
            place of the weights of one step. 0, as the paper has it: none, but with a method whose
            teacher is an average of its own (u2pl, muca), which then has its own decay, 0.99.
        power, warmup_steps: polynomial decay, and a linear warm-up (none by default).
        device: "auto" takes CUDA where there is one.
        precision: "auto" is bfloat16 autocast on CUDA and float32 on the CPU.
        backend: of the losses and other operators: "auto", or one of `co2s_fast.ops.BACKENDS`,
            which then serves all of them or ends the run.
        channels_last, compile: memory layout and torch.compile of the students.
        cudnn_benchmark: let cuDNN time its algorithms for every new shape, which delays the first
            step, and every validation image of another size.
        class_weight: weights of the classes in the supervised loss: "none", "median-frequency"
            (also called "balanced"), "effective-number", a YAML or JSON file of a weight for each
            class name, or its content (which is what config.yaml keeps); see
            `data.imbalance.class_weights`.
        class_weight_beta: β of "effective-number"; None: from the mean labelled image.
        log_every: steps between log records.
        eval_every: steps between evaluations; None: once an epoch.
        save_every: steps between writes of `last`; None: at every evaluation.
        probe_images: unlabelled images that have labels, on which pseudo-labels are measured at
            every evaluation. A few dozen show a trend; a difference of one point needs hundreds.
        debug_steps: first steps with range checks of the losses' inputs, which cost a
            synchronisation each.
        deterministic: ask torch for deterministic kernels wherever it has them.
        nonfinite: "stop" ends the run where a loss is NaN or infinite; "skip" leaves such a step
            out, and one whose gradients are not finite, and ends the run at ten in a row. To know
            before the weights change, every step then waits for the device.
        tensorboard: write event files beside metrics.jsonl.
    """

    epochs: float | None = Field(default=None, gt=0, le=1_000_000)
    steps: int | None = Field(default=None, ge=1, le=1_000_000_000)
    lr: float = Field(default=1e-4, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    backbone_multiplier: float = Field(default=0.01, ge=0)
    decoder_multiplier: float = Field(default=10.0, ge=0)
    adapter_multiplier: float = Field(default=1.0, ge=0)
    accumulate: int = Field(default=1, ge=1)
    gpu_memory: float | Literal["auto"] | None = None
    ema: float = Field(default=0.0, ge=0, lt=1)
    power: float = Field(default=0.9, ge=0)
    warmup_steps: int = Field(default=0, ge=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    backend: Literal["auto", "reference", "cpp", "triton", "cuda"] = "auto"
    channels_last: bool = False
    compile: bool = False
    cudnn_benchmark: bool = False
    class_weight: str | dict[str, float] = "none"
    class_weight_beta: float | None = Field(default=None, ge=0, lt=1)
    log_every: int = Field(default=20, ge=1)
    eval_every: int | None = Field(default=None, ge=1)
    save_every: int | None = Field(default=None, ge=1)
    probe_images: int = Field(default=32, ge=0)
    debug_steps: int = Field(default=2, ge=0)
    deterministic: bool = False
    nonfinite: Literal["stop", "skip"] = "stop"
    tensorboard: bool = True

    @field_validator("gpu_memory", mode="before")
    @classmethod
    def _read_gpu_memory(cls, value: Any) -> float | str | None:
        return value if value in (None, "auto") else parse_gib(str(value))

    @field_validator("class_weight", mode="before")
    @classmethod
    def _read_class_weight(cls, value: Any) -> str | dict[str, float]:
        return read_class_weight(value)

    @model_validator(mode="after")
    def _has_one_length(self) -> TrainConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"give epochs or steps: epochs {self.epochs}, steps {self.steps}")
        return self


class PretrainConfig(_Strict):
    """How `co2s-fast pretrain` trains the backbones of students that start from random weights.

    Attributes:
        steps: updates of each student.
        batch_size: images a step.
        lr, weight_decay, warmup_steps: AdamW with a linear warm-up and a cosine decay to 0.
        mask_ratio: share of an image's patches that are hidden.
    """

    steps: int = Field(default=1000, ge=1)
    batch_size: int = Field(default=32, ge=1)
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    warmup_steps: int = Field(default=40, ge=0)
    mask_ratio: float = Field(default=0.6, gt=0, lt=1)


class RunConfig(_Strict):
    """Everything that decides a run. `config.yaml` in the run folder is one of these.

    `compat` names the profile of `engine.compat` that the other values were made with. In a file it
    fills in only what the file itself leaves open.
    """

    data: DataConfig
    students: dict[str, StudentConfig] = Field(min_length=1)
    method: AnyMethodConfig
    train: TrainConfig
    eval: EvalConfig = Field(default_factory=EvalConfig)
    pretrain: PretrainConfig = Field(default_factory=PretrainConfig)
    seed: int = Field(default=0, ge=0, le=2**63 - 1)  # torch takes signed 64-bit numbers
    out: Path | None = None
    compat: Literal["official", "official-infer", "official-train"] | None = None

    @field_validator("students", mode="before")
    @classmethod
    def _drop_removed_students(cls, students: Any) -> Any:
        """`--set students.ssm=null` takes a student out of a recipe."""
        if isinstance(students, Mapping):
            return {name: config for name, config in students.items() if config is not None}
        return students

    @field_validator("students")
    @classmethod
    def _names_can_be(cls, students: dict[str, StudentConfig]) -> dict[str, StudentConfig]:
        """A student's name is a key of the log, a file of a checkpoint and part of a module."""
        for name in students:
            if not _STUDENT_NAME.fullmatch(name):
                raise ValueError(f"a student's name is of letters, digits, - and _, found {name!r}")
            if name in _TAKEN or name.endswith(average_stem("")) or hasattr(nn.ModuleDict(), name):
                raise ValueError(f"{name!r} cannot be a student's name: it means something else")
        return students

    @model_validator(mode="after")
    def _windows_are_crops(self) -> RunConfig:
        """A run that trains on another crop than the dataset's is evaluated on windows of it."""
        if self.eval.crop is None and self.data.crop is not None:
            self.eval = self.eval.model_copy(update={"crop": self.data.crop})
        return self

    @model_validator(mode="after")
    def _averages_can_teach(self) -> RunConfig:
        if getattr(self.method, "teacher", "student") == "average" and not self.train.ema:
            raise ValueError("method.teacher: 'average' needs train.ema > 0 (e.g. 0.99), found 0")
        decay = get_method(self.method.name).teacher_decay
        if decay and not self.train.ema:
            self.train = self.train.model_copy(update={"ema": decay})
        return self

    @property
    def folder(self) -> Path:
        """The run folder: `out`, or a name made of dataset, split, method and seed."""
        if self.out is not None:
            return self.out
        data = self.data
        split = data.ratio or (data.split and data.split.name) or data.labels or "all"
        file = Path(data.dataset)  # a prepared folder's is dataset.yaml: the folder has the name
        name = file.resolve().parent.name if file.name == DESCRIPTION else file.stem
        parts = [name, str(split).replace("/", "_"), self.method.name]
        if self.seed:
            parts.append(f"seed{self.seed}")
        return Path("runs") / "-".join(parts)


def load_config(
    recipe: str | Path | None = None,
    overrides: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    compat: str | None = None,
) -> RunConfig:
    """Put a configuration together and check all of it.

    Args:
        recipe: name of a recipe of the package, or path of a YAML file; None: the default of the
            dataset that `options` or `overrides` name.
        overrides: "section.key=value", the value in YAML.
        options: nested values that win over everything, e.g. `{"data": {"ratio": "1/32"}}`; its
            key "chosen" holds students for `put_students`.
        compat: profile of `engine.compat`, above the recipe and below `overrides` and `options`.

    Raises:
        UsageError: anything is unknown or wrong; all of it is listed.
    """
    options = dict(options or {})
    chosen = options.pop("chosen", {})
    changes = merge(parse_overrides(overrides), options)
    check_sections(changes, "--set")
    if recipe is None:
        recipe = default_recipe(str(changes.get("data", {}).get("dataset", "demo")))
    content = read_recipe(recipe)
    check_sections(content, f"recipe {recipe}")
    content = put_students(content, chosen)
    name = changes.get("method", {}).get("name")
    if name is not None and content.get("method", {}).get("name") != name:
        content["method"] = {}  # options of another method would be unknown to this one
    if {"ratio", "labels", "split"} & changes.get("data", {}).keys():
        for key in ("ratio", "labels", "split"):
            content.get("data", {}).pop(key, None)
    if {"epochs", "steps"} & changes.get("train", {}).keys():
        for key in ("epochs", "steps"):
            content.get("train", {}).pop(key, None)
    config = parse_config(merge(content, changes), f"recipe {recipe}")
    asked = compat or config.compat
    if asked is None:
        return config
    settings = nested(compat_settings(config, asked))
    if compat is not None:
        content = merge(content, settings)
    else:  # the recipe's own wish: above the recipe it is based on, below what it says itself
        own = still_in(content, own_content(recipe))
        students = {"students": merge(settings.get("students", {}), content.get("students", {}))}
        content = merge(merge(content, settings), own) | students
    return parse_config(merge(content, changes) | {"compat": asked}, f"recipe {recipe}")


def check_sections(content: Mapping[str, Any], origin: str) -> None:
    """Raise a UsageError where a section of the configuration is a single value."""
    for name in ("data", "method", "train", "students"):
        if not isinstance(content.get(name, {}), Mapping):
            raise UsageError(f"{origin}: {name}: expected a section of values, like "
                             f"{_EXAMPLES[name]}, found {content[name]!r}")


def with_compat(config: RunConfig, compat: str) -> RunConfig:
    """A configuration with everything set that a profile of `engine.compat` sets."""
    settings = nested(compat_settings(config, compat)) | {"compat": compat}
    return parse_config(merge(config.model_dump(mode="json"), settings), f"compat {compat}")


def parse_config(content: Mapping[str, Any], origin: str) -> RunConfig:
    """Validate a whole configuration; `origin` names it in the error."""
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        raise UsageError(f"{origin}: {'; '.join(problems(error))}") from None


def problems(error: ValidationError) -> list[str]:
    """Every problem of a validation error as `key: what is wrong`."""
    found = []
    for problem in error.errors(include_url=False):
        location = [str(part) for part in problem["loc"]]
        if location[:1] == ["method"] and location[1:2] and location[1] in METHODS:
            del location[1]  # the tag of the union, no key of the file
        key = ".".join(location)
        kind, message = problem["type"], problem["msg"].removeprefix("Value error, ")
        if kind == "extra_forbidden":
            message = f"unknown key{suggestion(location[-1])}"
        elif kind == "missing":
            message = "missing"
        elif kind == "union_tag_invalid":
            message = f"unknown method {problem['ctx']['tag']!r}, expected {', '.join(METHODS)}"
        elif kind not in {"value_error", "union_tag_not_found"}:
            message = f"{message}, found {problem['input']!r}"
        found.append(f"{key}: {message}" if key else message)
    return list(dict.fromkeys(found))


def suggestion(key: str) -> str:
    """The known key that is spelt most alike, if any is near."""
    schema = RunConfig.model_json_schema()
    known = set(schema["properties"])
    for definition in schema["$defs"].values():
        known |= definition.get("properties", {}).keys()
    near = difflib.get_close_matches(key, known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """`["train.steps=500", "seed=1"]` as nested dictionaries.

    Raises:
        UsageError: some are not `key=value`; all of them are listed.
    """
    nested: dict[str, Any] = {}
    wrong = []
    for text in overrides:
        path, equals, value = text.partition("=")
        keys = [key.strip() for key in path.split(".")]
        try:
            content = yaml.safe_load(value)
        except yaml.YAMLError:
            equals = ""
        if not equals or not all(keys):
            wrong.append(text)
            continue
        for key in reversed(keys):
            content = {key: content}
        nested = merge(nested, content)
    if wrong:
        found = ", ".join(wrong)
        raise UsageError(f"--set: expected KEY=VALUE like train.steps=500, found {found}")
    return nested


def recipe_names() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def default_recipe(dataset: str) -> str:
    """The recipe of the dataset's name, else `own` with a GPU and `tiny` without."""
    if dataset in recipe_names() and dataset in dataset_names():
        return dataset
    return "own" if torch.cuda.is_available() else "tiny"


def read_recipe(recipe: str | Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The content of a recipe on top of the recipe that its `base` key names, if it does."""
    path = recipe_path(recipe)
    if path in seen:
        raise UsageError(f"recipe {path}: is its own base")
    content = read_yaml(path)
    base = content.pop("base", None)
    return content if base is None else merge(read_recipe(base, (*seen, path)), content)


def still_in(content: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """What of `own` no option has taken out of `content`."""
    return {key: still_in(content[key], value) if isinstance(value, dict) else value
            for key, value in own.items() if key in content}  # fmt: skip


def own_content(recipe: str | Path) -> dict[str, Any]:
    """The content of a recipe without what it is based on."""
    return {k: v for k, v in read_yaml(recipe_path(recipe)).items() if k != "base"}


def recipe_path(recipe: str | Path) -> Path:
    """The file of a recipe: itself, or that of the package's recipe of this name."""
    path = Path(recipe)
    if path.suffix.lower() in {".yaml", ".yml"}:
        return path
    if str(recipe) not in recipe_names():
        names = ", ".join(recipe_names())
        raise UsageError(f"recipe {str(recipe)!r}: expected one of {names}, or a .yaml file")
    return RECIPES / f"{recipe}.yaml"


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file of keys and values, or a one-line error."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path}: expected keys and values, found {type(content).__name__}")
    return content


def read_run_config(folder: Path) -> RunConfig:
    """The configuration a run folder was trained with."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UsageError(f"{folder} is not a run folder: it has no {CONFIG_FILE}")
    return parse_config(read_yaml(path), str(path))


def dump_config(config: RunConfig) -> str:
    """The complete configuration as YAML, with the command that runs it again."""
    content = config.model_dump(mode="json")
    content["out"] = None  # a second run from this file gets a folder of its own
    head = "# co2s-fast train --recipe config.yaml --out NEW_FOLDER\n"
    return head + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


# What may differ between a run and its continuation: none of it changes what is computed, but for
# the rounding of sums where images go through in other groups.
RESUMABLE = {"out", "compat", "data.root", "data.workers", "data.max_damaged", "train.device",
             "train.backend", "train.tensorboard", "train.log_every", "train.save_every",
             "train.debug_steps", "train.gpu_memory", "train.nonfinite", "eval.batch_windows",
             "eval.panels"}  # fmt: skip
_CHECKPOINTING = re.compile(r"students\.[^.]+\.(decoder\.)?gradient_checkpointing")


def differences(before: RunConfig, now: RunConfig) -> list[str]:
    """What keeps `now` from continuing a run of `before`, as `key: old, now new`."""
    old, new = (dict(flatten(config.model_dump(mode="json"))) for config in (before, now))
    return [
        f"{key}: {old.get(key)!r} in the run, now {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if key not in RESUMABLE and not _CHECKPOINTING.fullmatch(key)
        and old.get(key) != new.get(key)
    ]


def flatten(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested dictionaries as ("a.b.c", value) pairs."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
