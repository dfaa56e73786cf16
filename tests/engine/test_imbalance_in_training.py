"""Class weights and class-aware crops in whole runs; warnings of collapsing pseudo-labels."""

from __future__ import annotations

import json

import pytest
import yaml
from test_damage_in_training import assert_same_run, content, damage_at, stop
from test_trainer import start

from co2s_fast.data.imbalance import class_weights
from co2s_fast.engine.collapse import CollapseWatch
from co2s_fast.engine.config import RunConfig, load_config
from co2s_fast.engine.interrupt import Interrupted
from co2s_fast.engine.log import read_metrics
from co2s_fast.engine.trainer import Trainer
from co2s_fast.errors import UsageError

__all__ = ["content"]  # a fixture
NAMES = ["field", "road", "water"]


def with_balance(content, **train):
    run = content(class_weight="balanced", **train)
    run["data"]["sampling"] = "class-aware"
    return run


def test_what_was_chosen_is_said_and_logged(content, capsys) -> None:
    run = with_balance(content, steps=2, eval_every=2)
    run["method"]["threshold"] = 0.3  # of three classes, one always reaches that
    folder = start(run)
    first, second = read_metrics(folder / "metrics.jsonl")[:2]
    weights, odds = first["class_weight"], first["sampling"]
    assert weights["rule"] == "median-frequency" and list(weights["weights"]) == NAMES
    pixels = first["labeled_pixels"]
    mean = sum(weights["weights"][n] * pixels[n] for n in NAMES) / sum(pixels.values())
    assert mean == pytest.approx(1)
    assert odds["rule"] == "class-aware" and sum(odds["classes"].values()) == pytest.approx(1)
    rarest = min(NAMES, key=pixels.get)
    assert rarest == max(NAMES, key=weights["weights"].get) == max(NAMES, key=odds["classes"].get)
    for student in ("clip", "ssm"):
        shares = second[f"pseudo_share/{student}"]
        sure = second[f"confidence/{student}"]
        assert sure.keys() == shares.keys() and any(sure.values())
        assert all(value is None or 1 / 3 <= value <= 1 for value in sure.values())
        assert list(shares) == NAMES and sum(shares.values()) == pytest.approx(1)
    said = capsys.readouterr().err
    assert "class weights in the supervised loss (median-frequency): field" in said
    assert "labelled crops by class (class-aware): field" in said
    plain = start({**content(steps=2, eval_every=2), "out": str(folder.parent / "plain")})
    first = read_metrics(plain / "metrics.jsonl")[0]
    assert first["class_weight"] == {"rule": "none", "beta": None, "weights": {}}
    assert first["sampling"] == {"rule": "uniform", "classes": {}}


def test_resuming_weighs_and_samples_as_before(content, monkeypatch, tmp_path) -> None:
    """Even where a label broke in between: the counts are those of the beginning."""
    label = content.root / "labels/02.png"
    whole = label.read_bytes()

    def damage() -> None:
        label.write_bytes(whole[:60])

    one, other = (with_balance(content, eval_every=6) | {"out": str(tmp_path / name)}
                  for name in ("one", "other"))
    with monkeypatch.context() as patch:
        damage_at(patch, 2, damage)
        start(one)
        label.write_bytes(whole)
        damage_at(patch, 3, stop)
        with pytest.raises(Interrupted):
            start(other)
    assert_same_run(tmp_path / "one", start(other, resume=True))


def test_weights_of_a_file_are_kept_in_the_configuration(content, tmp_path) -> None:
    path = tmp_path / "weights.json"
    path.write_text(json.dumps({"field": 1, "road": 4, "water": 2}))
    run = content(steps=1, class_weight=str(path))
    folder = start(run)
    kept = yaml.safe_load((folder / "config.yaml").read_text())["train"]["class_weight"]
    assert kept == {"field": 1.0, "road": 4.0, "water": 2.0}
    weights = read_metrics(folder / "metrics.jsonl")[0]["class_weight"]
    assert weights["rule"] == "given"
    assert weights["weights"]["road"] == pytest.approx(2 * weights["weights"]["water"])
    path.write_text(json.dumps({"field": 1, "road": 4, "water": 3}))
    with pytest.raises(UsageError, match=r"train\.class_weight\.water: 2\.0 in the run, now 3\.0"):
        start(content(steps=1, class_weight=str(path)), resume=True)


def test_wrong_weights_are_told_before_training(content, tmp_path) -> None:
    path = tmp_path / "weights.yaml"
    path.write_text("field: 1\nroads: 2\n")
    run = content(class_weight=str(path))
    with pytest.raises(UsageError, match="no weight for road, water; unknown class roads"):
        start(run)
    assert not RunConfig.model_validate(run).folder.exists()
    with pytest.raises(UsageError, match=r"train\.class_weight: expected one of none, .* No such"):
        load_config("demo", ["train.class_weight=nowhere.yaml"])
    path.write_text("field: -3\n")
    with pytest.raises(UsageError, match=r"weights.yaml: expected numbers of at least 0"):
        load_config("demo", [f"train.class_weight={path}"])


def test_methods_get_the_weights(content) -> None:
    for method in ("onlysup", "co2s"):
        run = content(class_weight="effective-number", class_weight_beta=0.999)
        trainer = Trainer(RunConfig.model_validate({**run, "method": {"name": method}}))
        trainer.set_up(resume=False, dry_run=True)
        expected = class_weights("effective-number", trainer.split.pixels, NAMES, 0.999)
        assert trainer.method.class_weight.tolist() == pytest.approx(expected.tolist(), rel=1e-6)


def look(watch, *, water=0, road=50, field=50, s1=0.1, windows=1):
    """The warnings of some equal windows."""
    return [text for _ in range(windows) for text in watch.look(
        20, {"clip/x": 0.5, "clip/s1": s1}, {"clip": [field, road, water]})]


def test_one_class_that_takes_all_pseudo_labels() -> None:
    watch = CollapseWatch(NAMES, [600, 300, 100])
    assert look(watch, windows=9) == []
    assert look(watch, water=9900, windows=2) == []
    said = look(watch, water=9900, windows=5)
    assert len(said) == 1
    assert "student clip: 99.0 % of its pseudo-labels are of class water" in said[0]
    assert "10.0 % of the labelled pixels" in said[0]
    assert look(watch) == []
    assert len(look(watch, water=9900, windows=3)) == 1  # again, after it was well
    assert look(CollapseWatch(NAMES, [5, 5, 990]), water=9900, windows=9) == []  # labels say so too
    assert look(watch, road=0, field=0, windows=9) == []  # no pseudo-label at all is no collapse


def test_a_term_that_is_zero_for_long() -> None:
    watch = CollapseWatch(NAMES, [600, 300, 100])
    assert look(watch, s1=0.0, windows=9) == []
    said = look(watch, s1=0.0, windows=9)
    assert said == ["loss term clip/s1 has been exactly 0 for 10 log windows (200 steps)"]
    watch = CollapseWatch(NAMES, [600, 300, 100])
    look(watch, s1=0.0, road=0, field=0, windows=6)
    resumed = CollapseWatch(NAMES, [600, 300, 100])
    resumed.restore(json.loads(json.dumps(watch.state())))
    said = look(resumed, s1=0.0, road=0, field=0, windows=4)
    assert len(said) == 1 and "no pixel of the weak view reaches method.threshold" in said[0]


def test_a_supervised_term_of_zero_is_not_laid_to_the_threshold() -> None:
    watch = CollapseWatch(NAMES, [1, 1, 1])
    said = [text for _ in range(10)
            for text in watch.look(20, {"clip/x": 0.0}, {"clip": [0, 0, 0]})]  # fmt: skip
    assert said == ["loss term clip/x has been exactly 0 for 10 log windows (200 steps)"]


def test_warnings_are_printed_and_logged(content, monkeypatch, capsys) -> None:
    monkeypatch.setattr("co2s_fast.engine.collapse.ZERO_WINDOWS", 2)
    run = content(log_every=1, steps=3)
    run["method"]["threshold"] = 1.0
    folder = start(run)
    said = [r for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "warning"]
    assert {r["step"] for r in said} == {2}
    assert any(r["text"].startswith("loss term clip/s1 has been exactly 0 for 2") for r in said)
    assert "warning: loss term ssm/fp has been exactly 0" in capsys.readouterr().err
