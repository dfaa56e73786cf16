from __future__ import annotations

import pytest
import yaml

from co2s_fast.engine import config as configs
from co2s_fast.engine.config import (
    RunConfig,
    differences,
    dump_config,
    load_config,
    parse_config,
    recipe_names,
)
from co2s_fast.errors import UsageError

PAPER = ("whdld", "loveda", "potsdam", "gid15", "mer", "msl")


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_whole_and_opens_with_its_command(name) -> None:
    first = (configs.RECIPES / f"{name}.yaml").read_text().splitlines()[0]
    assert first.startswith("# co2s-fast train --dataset ")
    options = {"data": {"labels": 5}}
    config = load_config(name, options=options)
    assert {"clip", "ssm"} == config.students.keys()
    assert config.method.name == "co2s"


@pytest.mark.parametrize("name", PAPER)
def test_paper_recipes_have_the_papers_students_and_epochs(name) -> None:
    config = load_config(name, options={"data": {"ratio": "1/8"}})
    assert config.data.dataset == name
    assert config.data.batch_size == (8 if name == "whdld" else 4)
    assert config.train.epochs == (150 if name == "mer" else 80)
    assert config.students["clip"].model == "ViT-B-16-quickgelu"
    assert config.students["clip"].weights == "openai"
    assert "dinov3" in config.students["ssm"].model and config.students["ssm"].weights
    assert config.train.lr == 1e-4


def test_order_recipe_then_overrides_then_options(tmp_path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("base: demo\nseed: 1\ntrain: {lr: 0.1, log_every: 3}\n")
    config = load_config(
        recipe, ["seed=2", "train.lr=1e-3", "method.threshold=0.5"], {"seed": 3, "out": "here"}
    )
    assert (config.seed, config.train.lr, config.train.log_every) == (3, 1e-3, 3)
    assert config.method.threshold == 0.5
    assert str(config.folder) == "here"


def test_all_problems_are_listed_at_once() -> None:
    wrong = ["train.stepz=3", "train.lr=-1", "method.treshold=0.9", "bogus=1",
             "data.batch_size=two", "students.clip.decoder.pol=[2, 2]"]  # fmt: skip
    with pytest.raises(UsageError) as caught:
        load_config("demo", wrong)
    text = str(caught.value)
    assert "\n" not in text
    for part in (
        "train.stepz: unknown key (did you mean steps?)",
        "train.lr: Input should be greater than 0, found -1",
        "method.treshold: unknown key (did you mean threshold?)",
        "bogus: unknown key",
        "data.batch_size: Input should be a valid integer",
        "students.clip.decoder.pol: unknown key (did you mean pool?)",
    ):
        assert part in text


def test_options_of_another_method_are_left_behind(tmp_path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("base: demo\nmethod: {name: co2s, stability_weight: 0.1}\n")
    assert load_config(recipe, options={"method": {"name": "onlysup"}}).method.name == "onlysup"
    with pytest.raises(UsageError, match="unknown method 'dreaming', expected co2s, onlysup"):
        load_config("demo", options={"method": {"name": "dreaming"}})


def test_another_way_to_say_the_length_or_the_split_replaces_the_recipes() -> None:
    config = load_config("demo", ["train.epochs=2"], {"data": {"ratio": "1/16"}})
    assert (config.train.steps, config.train.epochs) == (None, 2)
    assert (config.data.labels, config.data.ratio) == (None, "1/16")


def test_bad_overrides_and_recipes() -> None:
    with pytest.raises(UsageError, match=r"expected KEY=VALUE .*, found train.steps, =3$"):
        load_config("demo", ["train.steps", "=3"])
    with pytest.raises(UsageError, match="recipe 'demmo': expected one of"):
        load_config("demmo")
    with pytest.raises(UsageError, match=r"nowhere\.yaml: No such file"):
        load_config("nowhere.yaml")


@pytest.mark.parametrize("wrong", ["method=onlysup", "train=5", "data=x", "students=2"])
def test_a_section_is_no_value(tmp_path, wrong) -> None:
    key, value = wrong.split("=")
    with pytest.raises(UsageError, match=rf"--set: {key}: expected a section .* found '?{value}"):
        load_config("demo", [wrong])
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"{key}: {value}\n")
    with pytest.raises(UsageError, match=rf"r\.yaml: {key}: expected a section"):
        load_config(recipe, [], {"method": {"name": "onlysup"}})


def test_the_default_folder_of_a_prepared_dataset_has_its_name(tmp_path) -> None:
    (tmp_path / "dubai").mkdir()
    path = tmp_path / "dubai/dataset.yaml"
    config = load_config("tiny", options={"data": {"dataset": str(path), "labels": 20}})
    assert config.folder.name == "dubai-20-co2s"


def test_a_recipe_cannot_be_its_own_base(tmp_path) -> None:
    recipe = tmp_path / "loop.yaml"
    recipe.write_text(f"base: {recipe}\n")
    with pytest.raises(UsageError, match="is its own base"):
        load_config(recipe)


def test_recipes_are_not_unpickled(tmp_path) -> None:
    recipe = tmp_path / "evil.yaml"
    recipe.write_text("!!python/object/apply:os.system ['true']\n")
    with pytest.raises(UsageError, match="is not YAML"):
        load_config(recipe)


def test_default_recipe_of_a_dataset(monkeypatch) -> None:
    assert configs.default_recipe("demo") == "demo"
    assert configs.default_recipe("potsdam") == "potsdam"
    monkeypatch.setattr(configs.torch.cuda, "is_available", lambda: False)
    assert configs.default_recipe("my/data.yaml") == "tiny"
    assert configs.default_recipe("tiny") == "tiny"  # a recipe's name that is no dataset's
    monkeypatch.setattr(configs.torch.cuda, "is_available", lambda: True)
    assert configs.default_recipe("my/data.yaml") == "own"


def test_what_is_dumped_is_complete_and_reads_back(run_content) -> None:
    config = RunConfig.model_validate(run_content())
    content = yaml.safe_load(dump_config(config))
    assert content["train"]["weight_decay"] == 0.01  # defaults are written out
    again = parse_config(content, "dump")
    assert again == config.model_copy(update={"out": None})


def test_a_student_can_be_taken_out() -> None:
    config = load_config("demo", ["students.ssm=null"], {"method": {"name": "onlysup"}})
    assert list(config.students) == ["clip"]


def test_differences_ignore_what_changes_no_number(run_content) -> None:
    config = RunConfig.model_validate(run_content())
    other = RunConfig.model_validate(run_content(lr=5e-3, tensorboard=True))
    assert differences(config, other) == ["train.lr: 0.001 in the run, now 0.005"]
