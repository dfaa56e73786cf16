"""Values that no run can have: each is one line before anything is opened or made."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
import yaml
from click.testing import CliRunner
from pydantic import BaseModel

from co2s_fast.cli import main
from co2s_fast.engine.config import RunConfig, load_config
from co2s_fast.errors import UsageError
from co2s_fast.methods import METHODS, get_method
from co2s_fast.models import StudentConfig

NAMES = ["a/b", "a b", "", "é", "clip-average", "both", "all", "optimizer", "rng", "split",
         "method", "type", "training", "_modules", "keys"]  # fmt: skip
WRONG = {
    "method.supervised_weight": ["0", "-1", ".nan", ".inf"],
    "data.scale": ["[0, 64]", "[-1, -2]", "[64, 0]"],
    "data.scale_range": ["[2, 0.5]", "[0, 0]", "[-1, 2]", "[.nan, .nan]", "[1, .inf]"],
    "data.crop": ["15", "16385", "99999999999999999999"],
    "train.betas": ["[1, 0.9]", "[0.9, 1]", "[-0.1, 0.9]", "[.nan, 0.9]"],
    "train.epochs": ["0", ".inf", "1e308"],
    "train.steps": ["0", "99999999999999999999"],
    "seed": ["-1", str(2**63)],
    "students.clip.decoder.rates": ["[]", "[0]", "[6, -1]"],
    "students.clip.decoder.pool": ["[0, 0]", "[4, -1]"],
    "students.clip.decoder.resize_to": ["[0, 64]", "[-1, -2]"],
    "students.clip.decoder.skip_channels": ["[0]", "[-8]"],
    "students.clip.decoder.up_channels": ["[0]", "[-16]"],
    "students.ssm.overrides.depth": ["-1"],
    "students.ssm.overrides.num_heads": ["0"],
    "students.ssm.overrides.embed_dim": ["-64"],
    "students.ssm.overrides.drop_rate": ["2"],
    "students.clip.overrides.vision_cfg": ["3", "{width: -64}"],
    "students.clip.overrides.text_cfg": ["{heads: 5}"],
    "students.clip.overrides.vision_cfg.head_width": ["0"],
}


def refused(content: dict[str, Any], tmp_path: Path, change: str) -> str:
    """What `train` says of a configuration with a change; the run folder is not made."""
    content["method"] = {"name": "onlysup"}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    result = CliRunner().invoke(main, ["train", "--recipe", str(path), "--set", change])
    assert result.exit_code == 2, (result.output, result.exception)
    error = [line for line in result.output.splitlines() if line.startswith("error:")]
    assert len(error) == 1, result.output
    assert not Path(content["out"]).exists()
    return error[0]


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, values in WRONG.items() for v in values])
def test_a_value_that_cannot_be_is_one_line(run_content, tmp_path, key, value) -> None:
    said = refused(run_content(), tmp_path, f"{key}={value}")
    if "overrides" in key:
        assert "timm refuses" in said or "open_clip refuses" in said
    else:
        assert key in said


@pytest.mark.parametrize("name", NAMES)
def test_a_student_name_that_means_something_else_is_one_line(run_content, tmp_path, name) -> None:
    content = run_content()
    content["students"] = {"ssm": content["students"]["ssm"], name: content["students"]["clip"]}
    assert f"found {name!r}" in (said := refused(content, tmp_path, "seed=1")) or (
        f"students: {name!r} cannot be a student's name" in said
    )


@pytest.mark.parametrize("name", ["clip", "b2", "my-student_3", "averages"])
def test_other_student_names_are_free(run_content, name) -> None:
    content = run_content()
    content["students"] = {name: content["students"]["clip"], "ssm": content["students"]["ssm"]}
    assert list(RunConfig.model_validate(content).students) == [name, "ssm"]


def float_fields(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, Any]]:
    """Dotted keys of the fields of a model that hold a float somewhere, and their types."""
    for name, field in model.model_fields.items():
        inside = [a for a in (field.annotation, *get_args(field.annotation))
                  if isinstance(a, type) and issubclass(a, BaseModel)]  # fmt: skip
        if inside:
            yield from float_fields(inside[0], f"{prefix}{name}.")
        elif with_float(field.annotation, 0.0) is not None:
            yield f"{prefix}{name}", field.annotation


def with_float(kind: Any, number: float) -> Any:
    """A value of a type with the number at the place of each float; None where there is none."""
    if kind is float:
        return number
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return with_float(inner[0], number)
    if origin in (Union, types.UnionType):
        return next((v for v in (with_float(i, number) for i in inner) if v is not None), None)
    if origin is tuple and with_float(inner[0], number) is not None:
        return [number] * (3 if inner[-1] is Ellipsis else len(inner))
    if origin is dict and inner[1] is float:
        return {"field": number}
    return None


SECTIONS = [("", RunConfig), ("students.clip.", StudentConfig),
            *[(f"method.{name}.", get_method(name).Config) for name in METHODS]]  # fmt: skip
FLOATS = [each for prefix, model in SECTIONS for each in float_fields(model, prefix)]


def test_the_walk_finds_the_fields() -> None:
    keys = {key for key, _ in FLOATS}
    assert keys >= {"train.lr", "train.betas", "train.class_weight", "data.scale_range",
                    "eval.stride", "pretrain.mask_ratio", "students.clip.eps",
                    "students.clip.mean", "students.clip.lora.alpha",
                    "students.clip.decoder.mlp_ratio", "method.co2s.stability_weight",
                    "method.onlysup.supervised_weight"}  # fmt: skip
    assert len(keys) > 50


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("key", "kind"), FLOATS)
def test_no_float_is_nan_or_infinite(key, kind, number) -> None:
    section, name, *_ = key.split(".")
    changes = []
    if section == "method":
        changes = [f"method.name={name}"]
        key = key.replace(f"method.{name}", "method")
    value = yaml.safe_dump(with_float(kind, number), default_flow_style=True).split("\n")[0]
    with pytest.raises(UsageError) as caught:
        load_config("demo", [*changes, f"{key}={value}"])
    assert f"{key}" in str(caught.value) and "\n" not in str(caught.value)
