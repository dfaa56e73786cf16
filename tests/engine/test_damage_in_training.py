"""Files that turn out damaged while a run trains: named, skipped, counted, and the end above it."""

from __future__ import annotations

import json
import shutil

import pytest
from test_trainer import start

from co2s_fast.engine.config import RunConfig
from co2s_fast.engine.log import read_metrics
from co2s_fast.engine.trainer import Trainer
from co2s_fast.errors import DataError


@pytest.fixture
def content(run_content, stripes, tmp_path):
    """As `run_content`, over a copy of the dataset that a test may break."""
    root = tmp_path / "stripes"
    shutil.copytree(stripes, root)

    def build(**train):
        content = run_content(**train)
        paths = {"dataset": root / "stripes.yaml", "root": root, "split": root / "split"}
        content["data"] |= {key: str(path) for key, path in paths.items()}
        return content

    build.root = root
    return build


def cut(root, *numbers):
    for number in numbers:
        path = root / f"images/{number:02}.png"
        path.write_bytes(path.read_bytes()[:200])


def damage_at(monkeypatch, step, damage):
    """Call `damage` when a run has made that many steps."""
    make_step = Trainer._make_step

    def then(self, batch) -> None:
        make_step(self, batch)
        if self.step == step:
            damage()

    monkeypatch.setattr(Trainer, "_make_step", then)


def test_a_damaged_file_is_named_once_and_counted(content, monkeypatch, capsys) -> None:
    damage_at(monkeypatch, 1, lambda: cut(content.root, 6, 9))
    folder = start(content())
    records = read_metrics(folder / "metrics.jsonl")
    damaged = [record for record in records if record["kind"] == "damaged"]
    assert sorted(record["file"] for record in damaged) == ["images/06.png", "images/09.png"]
    assert [record["count"] for record in damaged] == [1, 2]
    assert all(record["limit"] == 10 and 2 <= record["step"] <= 4 for record in damaged)
    assert all("damaged or not an image" in record["reason"] for record in damaged)
    trained = [record for record in records if record["kind"] == "train"]
    assert trained[-1]["damaged_files"] == 2
    said = capsys.readouterr().err
    assert said.count("images/06.png: damaged") == 1 and "damaged file 2 (of 10 allowed)" in said
    assert json.loads((folder / "checkpoints/last/state.json").read_text())["damaged"].keys() == {
        "images/06.png", "images/09.png"}


def test_more_of_them_than_allowed_end_the_run(content, monkeypatch) -> None:
    damage_at(monkeypatch, 1, lambda: cut(content.root, 5, 6, 9))
    run = content()
    run["data"]["max_damaged"] = 2
    with pytest.raises(DataError) as caught:
        start(run)
    text = str(caught.value)
    assert "3 damaged files met in training, data.max_damaged allows 2" in text
    assert all(f"images/{number}.png: damaged" in text for number in ("05", "06", "09"))
    assert "\n" not in text
    folder = RunConfig.model_validate(run).folder
    kinds = [record["kind"] for record in read_metrics(folder / "metrics.jsonl")]
    assert kinds.count("damaged") == 3
