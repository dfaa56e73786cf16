"""Files that turn out damaged while a run trains: named, skipped, counted, and the end above it."""

from __future__ import annotations

import json
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
from test_trainer import assert_same_weights, numbers, start

from co2s_fast.data.damage import Damaged
from co2s_fast.engine.config import RunConfig
from co2s_fast.engine.interrupt import Interrupted
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


def test_two_ranks_count_together(monkeypatch) -> None:
    """A file that both have met is one; the first rank's log has them in order of steps."""
    from co2s_fast.engine import damage

    told = []
    one, other = damage.DamageTally(2), damage.DamageTally(2)
    a, b, c = (Damaged(f"images/{n}.png", f"{n}.png: damaged") for n in "abc")
    monkeypatch.setattr(damage, "gather_objects", lambda mine: [*found])
    log = SimpleNamespace(tell=lambda record, text: told.append((record["step"], record["file"])))
    one.meet(5, [b])
    other.meet(3, [a])
    other.meet(4, [b])
    found = [one._met, other._met]
    one.settle(log)
    other.settle(None)
    assert one.known == other.known and not one.pending and not other.pending
    assert told == [(3, "images/a.png"), (4, "images/b.png")]
    one.meet(9, [a])  # known
    other.meet(9, [c])
    found = [one._met, other._met]
    for tally in (one, other):
        with pytest.raises(DataError, match=r"3 damaged files met in training.*allows 2: a\.png"):
            tally.settle(None)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def assert_same_run(one, other) -> None:
    assert numbers(one) == numbers(other)
    assert_same_weights(one, other)
    assert numbers_of(one, "damaged") == numbers_of(other, "damaged")


def test_resuming_over_files_that_broke_on_the_way(content, monkeypatch, tmp_path) -> None:
    """A labelled and an unlabelled image break after step 2; SIGTERM after step 3, --resume."""
    run = content(eval_every=6)
    run["data"]["max_damaged"] = 2
    files = [content.root / f"images/{number:02}.png" for number in (1, 6)]
    whole = [file.read_bytes() for file in files]
    one, other = ({**run, "out": str(tmp_path / name)} for name in ("one", "other"))
    with monkeypatch.context() as patch:
        damage_at(patch, 2, lambda: cut(content.root, 1, 6))
        start(one)
        for file, pixels in zip(files, whole, strict=True):
            file.write_bytes(pixels)
        damage_at(patch, 3, stop)
        with pytest.raises(Interrupted):
            start(other)
    folder = start(other, resume=True)
    assert_same_run(tmp_path / "one", folder)
    assert [record["count"] for record in numbers_of(folder, "damaged")] == [1, 2]
    assert "training will skip it" not in str(read_metrics(folder / "metrics.jsonl")[0])


def test_files_damaged_from_the_start(content, monkeypatch, tmp_path) -> None:
    """Unlabelled ones are said before the first step; workers and resuming change nothing."""
    cut(content.root, 6, 9)
    one, other = (content(eval_every=6) | {"out": str(tmp_path / name)} for name in ("a", "b"))
    other["data"] = other["data"] | {"workers": 1}
    start(one)
    with monkeypatch.context() as patch:
        damage_at(patch, 3, stop)
        with pytest.raises(Interrupted):
            start(other)
    folder = start(other, resume=True)
    assert_same_run(tmp_path / "a", folder)
    notes = read_metrics(folder / "metrics.jsonl")[0]["notes"]
    assert ["06.png" in note or "09.png" in note for note in notes] == [True, True]
    assert len(numbers_of(folder, "damaged")) == 2


def numbers_of(folder, kind):
    return [r for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == kind]
