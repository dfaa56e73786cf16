from __future__ import annotations

import json
import re
import statistics

import pytest
import yaml
from invented import make_run

from co2s_fast.errors import UsageError
from co2s_fast.report import comparison_table, read_run, write_comparison
from co2s_fast.report.comparison import _group_lines, grouped, spread


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


def cells_of(table):
    """The rows of a text table, cell by cell."""
    return [re.split(r"\s{2,}", line.strip()) for line in table.splitlines()]


def change(folder, section, **settings):
    content = yaml.safe_load((folder / "config.yaml").read_text())
    content.setdefault(section, {}).update(settings)
    (folder / "config.yaml").write_text(yaml.safe_dump(content))


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
    head, row = cells_of(comparison_table(runs[:1]))
    names = ["clip", "ssm", "both"]
    assert head[2:] == [f"{n} {which}" for which in ("last", "best") for n in names]
    assert row[1:] == ["1", *(f"{last_miou(runs[0], n):.2f}" for n in names), *["90.00"] * 3]


def test_means_and_spreads_as_text(runs):
    values = [last_miou(folder, "ssm") for folder in runs[:3]]
    _, row = cells_of(comparison_table(runs[:3]))
    assert row[1] == "3"
    assert row[3] == f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"


def test_columns_come_in_the_order_of_the_students(tmp_path):
    alone = make_run(tmp_path / "alone", students=("ssm",), evaluated=False)
    head, *_ = cells_of(comparison_table([alone, make_run(tmp_path / "two", evaluated=False)]))
    assert head[2:5] == ["clip last", "ssm last", "both last"]


def test_an_evaluation_alone_is_scored(tmp_path):
    run = make_run(tmp_path / "run", steps=0)
    expected = json.loads((run / "eval.json").read_text())["students"]["both"]["miou"]
    assert f"{100 * expected:.2f}" in text_of(write_comparison([run], tmp_path / "c.html"))


def test_settings_of_one_seed_each_are_said_to_be_so(runs, tmp_path):
    every = "Each setting was run with one seed: differences may be chance."
    some = "Run with one seed alone: onlysup. Differences may be chance."
    for first, last, expected in ((2, 4, [every]), (1, 4, [some]), (0, 5, []), (0, 1, [])):
        text = text_of(write_comparison(runs[first:last], tmp_path / "c.html"))
        assert [said for said in (every, some) if said in text] == expected


def test_a_run_given_twice_counts_once(runs, tmp_path):
    text = text_of(write_comparison([runs[0], runs[0]], tmp_path / "c.html"))
    assert "1 runs side by side" in text


def test_the_mean_curve_is_where_all_runs_are(tmp_path):
    lengths = {0: 300, 1: 200}
    members = [make_run(tmp_path / str(s), seed=s, steps=n, evaluated=False)
               for s, n in lengths.items()]  # fmt: skip
    (group,), _ = grouped([read_run(folder) for folder in members])
    *each, mean = _group_lines(group, ("students", "clip", "miou"))
    assert len(each) == 2 and list(mean.x) == [50, 100, 150, 200]
    one, other = (line.y[list(line.x).index(50)] for line in each)
    middle, half = (one + other) / 2, abs(one - other) / 2**0.5
    assert (mean.low[0], mean.y[0], mean.high[0]) == pytest.approx(
        (middle - half, middle, middle + half))  # fmt: skip


def test_a_setting_that_one_run_alone_names_sets_it_apart(tmp_path):
    plain, named = (make_run(tmp_path / n, evaluated=False) for n in ("plain", "named"))
    change(named, "method", threshold=0.7)
    groups, differing = grouped([read_run(plain), read_run(named)])
    assert differing == ["method.threshold"]
    assert [group.label for group in groups] == ["co2s (plain)", "co2s (named)"]


def test_more_than_three_settings_are_too_many_for_a_label(tmp_path):
    members = [make_run(tmp_path / n, evaluated=False) for n in ("one", "two")]
    for value, folder in enumerate(members):
        change(folder, "train", **dict.fromkeys(("lr", "power", "ema", "eps"), value))
    groups, differing = grouped([read_run(folder) for folder in members])
    assert len(differing) == 4
    assert [group.label for group in groups] == ["co2s (one)", "co2s (two)"]


def made_twice(folders, settings):
    """Two runs, of seeds 0 and 1, under each name; groups differ in a setting that one has."""
    for number, (folder, own) in enumerate(zip(folders, settings, strict=True)):
        make_run(folder, seed=number % 2, evaluated=False)
        change(folder, "method", **own)
    groups, _ = grouped([read_run(folder) for folder in folders])
    assert [len(group.runs) for group in groups] == [2, 2]
    return [group.label for group in groups]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("plain/0", "plain/1", "new/0", "new/1"), ["co2s (plain)", "co2s (new)"]),
        (("p0", "p1", "n0", "n1"), ["co2s (p0, p1)", "co2s (n0, n1)"]),
        (("p0/a", "p1/b", "n0/a", "n0/c"), ["co2s (a, b)", "co2s (n0)"]),
        (("p0/run", "p1/run", "n0/run", "n1/run"), None),
    ],
)
def test_groups_of_one_label_are_named_by_the_folders_of_all_their_runs(tmp_path, names, expected):
    folders = [tmp_path / name for name in names]
    labels = made_twice(folders, [{}, {}, {"threshold": 0.7}, {"threshold": 0.7}])
    if expected is None:  # neither parents nor names tell them apart
        expected = [f"co2s ({a}, {b})" for a, b in (folders[:2], folders[2:])]
    assert labels == expected


def test_unfinished_unscored_and_other_datasets_are_said(runs, tmp_path):
    part = make_run(tmp_path / "part", steps=40, evaluated=False)
    lines = (runs[0] / "metrics.jsonl").read_text().replace('"dataset": "demo"', '"dataset": "x"')
    (runs[0] / "metrics.jsonl").write_text(lines)
    members = [runs[0], runs[1], part]
    for text in (text_of(write_comparison(members, tmp_path / "c.html")),
                 comparison_table(members)):  # fmt: skip
        assert "different datasets" in text
        assert "Not evaluated yet: part" in text
        assert "Not finished: part" in text


def test_a_run_without_a_log_is_on_its_own_dataset(runs):
    (runs[1] / "metrics.jsonl").write_text("")
    (runs[1] / "dataset.yaml").write_text("name: demo\n")
    change(runs[1], "data", dataset="elsewhere/dataset.yaml")
    said = comparison_table(runs[:2])
    assert "Not evaluated yet: co2s-1" in said and "different datasets" not in said


def test_a_run_whose_last_evaluation_was_cut_off_is_not_finished(runs):
    log = runs[0] / "metrics.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    last = max(r["step"] for r in records if r["kind"] == "eval")
    kept = [r for r in records if r["kind"] != "eval" or r["step"] < last]
    log.write_text("".join(json.dumps(r) + "\n" for r in kept))
    assert "Not finished: co2s-0." in comparison_table(runs[:2])


def test_one_seed_twice_is_said(runs, tmp_path):
    again = make_run(tmp_path / "again", seed=1, evaluated=False)
    assert "One seed more than once: co2s-1, again." in comparison_table([*runs, again])


def test_the_terminal_says_what_the_page_says(runs):
    *table, note = comparison_table(runs[1:4]).splitlines()
    assert len(table) == 3
    assert note == "Run with one seed alone: onlysup. Differences may be chance."
    assert len(comparison_table(runs).splitlines()) == 3  # nothing to say


def test_spread_of_few_values():
    assert spread([]) == (None, None)
    assert spread([0.5, None]) == (0.5, None)
    mean, deviation = spread([0.4, 0.6])
    assert mean == pytest.approx(0.5)
    assert deviation == pytest.approx(0.02**0.5)


def test_a_page_that_would_be_a_folder_is_refused(runs, tmp_path):
    with pytest.raises(UsageError, match="is a folder, expected the name of an HTML file"):
        write_comparison(runs[:1], tmp_path)


def test_nothing_to_compare_is_refused(tmp_path):
    with pytest.raises(UsageError, match="at least one run"):
        write_comparison([], tmp_path / "c.html")
    with pytest.raises(UsageError, match="expected a run folder"):
        write_comparison([tmp_path / "none"], tmp_path / "c.html")
