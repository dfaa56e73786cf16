"""Runs take the bands of their dataset and refuse what is for others."""

from __future__ import annotations

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from untrained import untrained_run

from co2s_fast.data.catalogue import DatasetSpec, parse_dataset
from co2s_fast.engine.bands import fit_students
from co2s_fast.engine.config import RunConfig
from co2s_fast.engine.runs import load_run
from co2s_fast.errors import DataError, UsageError

STATISTICS = {"dtype": "uint16", "low": [0] * 4, "high": [1e4] * 4, "mean": [0.2, 0.3, 0.3, 0.6],
              "std": [0.1, 0.1, 0.2, 0.0]}  # fmt: skip


def dataset(bands=(1, 2, 3, 4), **changes) -> DatasetSpec:
    classes = [{"name": n, "color": [i, i, i]} for i, n in enumerate("ab")]
    return parse_dataset({"name": "bands", "classes": classes, "bands": bands, **changes}, "test")


def test_plain_rgb_changes_nothing(run_content) -> None:
    config = RunConfig.model_validate(run_content())
    assert fit_students(config, dataset(3)) == config


def test_students_take_number_names_and_statistics(run_content) -> None:
    config = RunConfig.model_validate(run_content())
    spec = dataset(bands=[2, 3, 4, 8], display=[4, 3, 2], statistics=STATISTICS)
    fitted = fit_students(config, spec)
    for student in fitted.students.values():
        assert student.channels == 4 and student.bands == ("blue", "green", "red", "band 8")
        assert student.mean == (0.2, 0.3, 0.3, 0.6)
        assert student.std == (0.1, 0.1, 0.2, 1 / 255)
    again = RunConfig.model_validate(yaml.safe_load(yaml.safe_dump(fitted.model_dump(mode="json"))))
    assert again.students == fitted.students  # what config.yaml of the run holds
    assert fit_students(again, spec) == fitted


@pytest.mark.parametrize(
    ("bands", "display", "names"),
    [
        (4, None, ("red", "green", "blue", "band 4")),
        ([4, 3, 2], None, None),
        ([2, 3, 4], [4, 3, 2], ("blue", "green", "red")),
        ([5, 1], None, ("band 5", "band 1")),
        ([7], None, ("band 7",)),
        ([1, 2, 3, 4], [4, 4, 1], ("blue", "band 2", "band 3", "red")),
    ],
)
def test_colours_are_what_pictures_show(run_content, bands, display, names) -> None:
    config = RunConfig.model_validate(run_content())
    student = fit_students(config, dataset(bands, display=display)).students["ssm"]
    assert (student.bands, student.mean) == (names, None)


def test_what_is_configured_for_other_bands_is_refused(run_content) -> None:
    content = run_content()
    students = content["students"]
    six = {**students, "ssm": {**students["ssm"], "channels": 6}}
    config = RunConfig.model_validate({**content, "students": six})
    with pytest.raises(UsageError, match=r"students.ssm.channels is 6, .* have 4"):
        fit_students(config, dataset())
    own = {**students["clip"], "mean": [0.5] * 3, "std": [0.2] * 3}
    config = RunConfig.model_validate({**content, "students": {**students, "clip": own}})
    assert fit_students(config, dataset(3)).students["clip"].mean == (0.5, 0.5, 0.5)
    with pytest.raises(UsageError, match=r"students.clip.mean has 3 values, .* have 4 channels"):
        fit_students(config, dataset())


def test_a_checkpoint_for_other_channels_is_refused(run_content) -> None:
    content = run_content()
    students = {
        name: {**each, "channels": 4} for name, each in content["students"].items()
    }
    run = untrained_run({**content, "students": students})
    assert load_run(run)[2]["clip"].channels == 4
    file = next((run / "checkpoints/best").glob("clip.*.safetensors"))
    weights = load_file(file)
    first = "backbone.visual.conv1.stages.0.0.weight"
    save_file(weights | {first: torch.zeros(*weights[first].shape[:1], 6, 3, 3)}, file)
    with pytest.raises(DataError, match=f"{file.name} is for images of 6 channels, expected 4"):
        load_run(run)
