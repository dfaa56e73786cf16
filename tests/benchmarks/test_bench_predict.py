"""The prediction benchmark compares like with like, and its rows fit the schema."""

from __future__ import annotations

import numpy as np
from jsonschema import Draft202012Validator

from benchmarks import predict


def test_the_plain_loop_and_ours_draw_the_same_map(schema, monkeypatch) -> None:
    monkeypatch.setitem(predict.SCENES, "tiny", (64, 100, 150))
    students = {"clip": predict.Cheap(), "ssm": predict.Cheap()}
    monkeypatch.setattr(predict, "make_students", lambda kind: students)
    rows, wrong = predict.speed_rows("tiny", 2)
    assert wrong == []
    assert {row["provider"] for row in rows} == {"plain", "ours", "ours_float32"}
    for row in rows:
        Draft202012Validator({**schema["$defs"]["row"], "$defs": schema["$defs"]}).validate(row)


def test_a_map_that_differs_is_not_timed(monkeypatch) -> None:
    monkeypatch.setitem(predict.SCENES, "tiny", (64, 100, 150))
    monkeypatch.setattr(predict, "make_students", lambda kind: {"clip": predict.Cheap()})

    def ours(students, scene, crop, stride):
        return np.zeros((scene.height, scene.width), np.uint8)

    monkeypatch.setitem(predict.PROVIDERS, "ours", ours)
    rows, (wrong,) = predict.speed_rows("tiny", 2)
    assert {row["provider"] for row in rows} == {"plain", "ours_float32"}
    assert wrong["provider"] == "ours" and "differ from the plain loop" in wrong["reason"]


def test_peak_memory_is_taken_in_a_process_of_its_own(tmp_path) -> None:
    (plain, ours) = predict.memory_rows((700,), 700)
    assert plain["provider"] == "plain" and ours["provider"] == "ours"
    assert plain["median"] > 4 * predict.CLASSES * 700 * 700 / 2
    assert ours["median"] > 0
