from __future__ import annotations

import json
import re
import statistics

import pytest
import yaml
from invented import make_run

from co2s_fast.errors import UsageError
from co2s_fast.report import read_run, write_comparison
from co2s_fast.report.comparison import grouped, spread


@pytest.fixture
def runs(tmp_path):
    made = [make_run(tmp_path / f"co2s-{s}", seed=s, evaluated=False) for s in (0, 1, 2)]
    made += [
        make_run(tmp_path / f"sup-{s}", seed=s, method="onlysup", gain=-0.05, evaluated=False)
        for s in (0, 1)
    ]
    return made


def text_of(path):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", path.read_text()))


def last_miou(folder, name):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return 100 * [r for r in records if r["kind"] == "eval"][-1]["students"][name]["miou"]


def test_seeds_become_a_mean_and_a_spread(runs, tmp_path):
    path = write_comparison(runs, tmp_path / "comparison.html")
    text = text_of(path)
    for members in (runs[:3], runs[3:]):
        values = [last_miou(folder, "both") for folder in members]
        expected = f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"
        assert expected in text
    for folder in runs:
        assert f"{last_miou(folder, 'clip'):.2f}" in text
    assert path.read_text().count("data:image/svg+xml") == 3 + 4
    assert "http" not in re.sub(r"data:[^\"]+", "", path.read_text())


def test_groups_and_what_sets_them_apart(runs, tmp_path):
    other = make_run(tmp_path / "few", labels=4, evaluated=False)
    groups, differing = grouped([read_run(folder) for folder in (*runs, other)])
    assert [len(group.runs) for group in groups] == [3, 2, 1]
    assert [group.label for group in groups] == [
        "co2s, labels 8", "onlysup, labels 8", "co2s, labels 4",
    ]  # fmt: skip
    assert differing == ["data.labels", "method.name"]
    assert len({group.color for group in groups}) == 3


def test_seeds_of_the_split_and_where_it_ran_set_nothing_apart(runs):
    changed = runs[1] / "config.yaml"
    content = yaml.safe_load(changed.read_text())
    content["data"] |= {"split_seed": 1, "workers": 0, "root": "elsewhere"}
    changed.write_text(yaml.safe_dump(content))
    groups, differing = grouped([read_run(folder) for folder in runs[:3]])
    assert [len(group.runs) for group in groups] == [3]
    assert differing == []


def test_runs_without_configuration_are_not_taken_for_repetitions(runs):
    for folder in runs[:2]:
        (folder / "config.yaml").unlink()
    groups, _ = grouped([read_run(folder) for folder in runs[:2]])
    assert [len(group.runs) for group in groups] == [1, 1]
    assert groups[0].label != groups[1].label


def test_best_and_last_are_told_apart(runs, tmp_path):
    lines = (runs[0] / "metrics.jsonl").read_text().splitlines()
    peak = json.loads(next(line for line in lines if '"eval"' in line))
    for scores in peak["students"].values():
        scores["miou"] = 0.9
    lines.insert(1, json.dumps({**peak, "step": 51}))
    (runs[0] / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    text = text_of(write_comparison(runs[:1], tmp_path / "c.html"))
    assert "90.00 90.00 90.00" in text
    assert f"{last_miou(runs[0], 'both'):.2f}" in text


def test_unfinished_unscored_and_other_datasets_are_said(runs, tmp_path):
    part = make_run(tmp_path / "part", steps=40, evaluated=False)
    lines = (runs[0] / "metrics.jsonl").read_text().replace('"dataset": "demo"', '"dataset": "x"')
    (runs[0] / "metrics.jsonl").write_text(lines)
    text = text_of(write_comparison([runs[0], runs[1], part], tmp_path / "c.html"))
    assert "different datasets" in text
    assert "Not evaluated yet: part" in text
    assert "Not finished: part" in text


def test_spread_of_few_values():
    assert spread([]) == (None, None)
    assert spread([0.5, None]) == (0.5, None)
    mean, deviation = spread([0.4, 0.6])
    assert mean == pytest.approx(0.5)
    assert deviation == pytest.approx(0.02**0.5)


def test_nothing_to_compare_is_refused(tmp_path):
    with pytest.raises(UsageError, match="at least one run"):
        write_comparison([], tmp_path / "c.html")
    with pytest.raises(UsageError, match="expected a run folder"):
        write_comparison([tmp_path / "none"], tmp_path / "c.html")
