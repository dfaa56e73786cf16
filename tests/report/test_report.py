from __future__ import annotations

import csv
import html
import json
import re
from html.parser import HTMLParser

import pytest
import yaml
from invented import make_run

from co2s_fast.engine.log import read_metrics
from co2s_fast.errors import DataError, UsageError
from co2s_fast.report import write_report


class Page(HTMLParser):
    """What a test asks about a page: sections, pictures, notes and every outside address."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sections, self.images, self.addresses, self.open = [], [], [], []
        self.text = re.sub(
            r"\s+", " ", re.sub(r"<[^>]+>", " ", re.sub(r"<style.*?</style>", "", text, flags=re.S))
        )
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "section":
            self.sections.append(values["id"])
        if tag == "img":
            assert values["alt"]
            self.images.append(values["src"])
        self.addresses += [values[k] for k in ("src", "href") if k in values]
        assert tag not in ("script", "link", "iframe")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def open_page(path) -> Page:
    return Page(path.read_text())


def test_a_whole_run_has_every_section_and_nothing_outside(reported):
    path = reported / "report.html"
    page = open_page(path)
    assert page.sections == ["headline", "about", "curves", "classes", "confusion", "panels"]
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert "http" not in re.sub(r"data:[^\"]+", "", path.read_text())
    curves = [image for image in page.images if image.startswith("data:image/svg")]
    assert len(curves) == 4 + 6 + 3
    assert len(page.images) - len(curves) == 4 * 6
    for said in (
        "co2s on demo", "8 labelled, 248 unlabelled, 64 validation images", "seed 0",
        "torch 2.8.0", "3f3f3f3f3f3f", "losses by cpp", "best, step 250",
        "Pseudo-label accuracy", "Stability loss", "only CLIP right", "Disagreement",
    ):  # fmt: skip
        assert said in page.text, said
    assert path.stat().st_size < 2_000_000


def test_numbers_are_those_of_the_evaluation(reported):
    page = open_page(reported / "report.html")
    scores = json.loads((reported / "eval.json").read_text())["students"]
    for student in scores.values():
        assert f"{100 * student['miou']:.1f} % mIoU" in page.text
        assert f"{student['kappa']:.3f}" in page.text
        assert f"{100 * student['iou'][0]:.1f}" in page.text


def test_the_table_has_a_row_for_every_step_of_the_log(reported):
    with (reported / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    records = read_metrics(reported / "metrics.jsonl")
    by_kind = {kind: {r["step"]: r for r in records if r["kind"] == kind}
               for kind in ("train", "eval")}  # fmt: skip
    steps = sorted(by_kind["train"].keys() | by_kind["eval"].keys())
    assert [int(row["step"]) for row in rows] == steps and len(by_kind["eval"]) > 1
    for row in rows:
        train, evaluated = (by_kind[kind].get(int(row["step"])) for kind in by_kind)
        found = row["loss/clip/total"], row["eval/students/both/miou"]
        assert found == (str(train["loss/clip/total"]) if train else "",
                         str(evaluated["students"]["both"]["miou"]) if evaluated else "")
    assert "kind" not in rows[0] and "eval/pseudo/clip/coverage" in rows[0]


def test_steps_that_were_only_evaluated_stand_in_their_place_with_their_epoch(run_folder):
    records = read_metrics(run_folder / "metrics.jsonl")
    kept = [r for r in records if r["kind"] != "train" or r["step"] != 50]
    (run_folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept))
    write_report(run_folder)
    with (run_folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    steps = [int(row["step"]) for row in rows]
    assert steps == sorted(steps) and 50 in steps
    assert all(float(row["epoch"]) == int(row["step"]) / 32 for row in rows)
    assert "eval/epoch" not in rows[0]


def test_an_absent_class_is_na_and_said_to_be_left_out(reported):
    text = open_page(reported / "report.html").text
    assert "Not in the ground truth: roof" in text
    assert "means run over the classes present in the ground truth" in text
    assert re.search(r"roof 0\.0( n/a){6}", text)
    assert "n/a: no pixel in the ground truth" in text


def test_a_run_that_was_stopped_before_its_evaluation(tmp_path):
    folder = make_run(tmp_path / "run", evaluated=False, steps=120)
    page = open_page(write_report(folder))
    assert page.sections == ["headline", "about", "curves", "classes"]
    assert "stopped at step 120 of 300" in page.text
    assert "run co2s-fast eval" in page.text


def test_a_run_without_pseudo_labels_and_with_one_student(tmp_path):
    folder = make_run(tmp_path / "run", method="onlysup", students=("clip",))
    page = open_page(write_report(folder))
    assert "onlysup uses no pseudo-labels" in page.text
    assert "SSM" not in page.text
    assert "Disagreement" not in page.text
    assert len([i for i in page.images if i.startswith("data:image/svg")]) == 3 + 2 + 3


def with_settings(folder, section, **settings):
    content = yaml.safe_load((folder / "config.yaml").read_text())
    content[section] |= settings
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    return html.unescape(open_page(write_report(folder)).text)


def test_thresholds_by_class_are_said_to_take_more(run_folder):
    more = "Training takes more: there each class has a threshold of its own"
    probed = "on unlabelled images whose labels are known."
    text = with_settings(run_folder, "method", class_thresholds=0.0)
    assert probed in text and more not in text
    assert f"{probed} {more}" in with_settings(run_folder, "method", class_thresholds=1.0)


def test_without_a_probe_the_curves_are_said_to_be_of_training(run_folder):
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    records = [{**json.loads(line), "pseudo": {}} for line in lines]
    (run_folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    text = with_settings(run_folder, "method", class_thresholds=1.0)
    assert "share of the training batches' pixels that were taken" in text
    assert "Pseudo-label coverage" in text
    assert "at or above" not in text and "Training takes more" not in text


def test_scored_averages_are_said_to_be_averages(run_folder):
    said = "scored weights moving averages of the students' weights (train.ema 0.99)"
    assert "scored weights" not in with_settings(run_folder, "train", ema=0.0)
    assert said in with_settings(run_folder, "train", ema=0.99)


def test_what_happened_on_the_way_is_told(tmp_path):
    folder = make_run(tmp_path / "run")
    events = [{"kind": "warning", "step": 40, "text": "loss term clip/s1 has been exactly 0"}]
    events += [{"kind": "damaged", "step": 9, "file": f"images/{n}.png", "count": n, "limit": 10,
                "reason": f"/data/images/{n}.png: damaged"} for n in range(1, 8)]
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)
    text = write_report(folder).read_text()
    assert "Step 40: loss term clip/s1 has been exactly 0" in text
    assert "/data/images/5.png: damaged; and 2 more" in text and "6.png" not in text


def test_a_run_that_has_only_just_begun(tmp_path):
    folder = make_run(tmp_path / "run", evaluated=False)
    (folder / "metrics.jsonl").write_text("")
    page = open_page(write_report(folder))
    assert page.sections == ["about"]
    assert "Nothing has been logged yet" in page.text


def test_an_evaluation_alone(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "metrics.jsonl").unlink()
    (folder / "config.yaml").unlink()
    page = open_page(write_report(folder))
    assert page.sections == ["headline", "about", "classes", "confusion", "panels"]
    assert "no config.yaml" in page.text


def test_a_last_line_cut_short_is_passed_over(run_folder):
    begun = '{"kind": "start", "seed": 7}\n{"kind": "train", "st'
    (run_folder / "metrics.jsonl").write_text(begun)
    path = write_report(run_folder)
    assert path == run_folder / "report.html"
    assert "seed 7" in open_page(path).text


def test_names_are_escaped(tmp_path):
    folder = make_run(tmp_path / "run", steps=0)
    content = json.loads((folder / "eval.json").read_text())
    content["classes"][0]["name"] = "<b>field"
    (folder / "eval.json").write_text(json.dumps(content))
    assert "<b>field" not in write_report(folder).read_text()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.yaml", "a: [", r"config\.yaml is not YAML"),
        ("eval.json", "{", r"eval\.json is not JSON"),
        ("eval.json", "[]", r"eval\.json: expected an evaluation"),
        ("metrics.jsonl", "{\n{}\n", r"metrics\.jsonl, line 1: not JSON"),
        ("metrics.jsonl", "{}\n\xff\n{}\n", r"metrics\.jsonl, line 2: not JSON"),
        ("metrics.jsonl", "{}\n[3]\n", r"metrics\.jsonl, line 2: expected a record, found \[3\]"),
        *[
            ("metrics.jsonl", f'{{}}\n{{"step": {step}}}\n{{}}\n',
             rf"metrics\.jsonl, line 2: step: expected a whole number, found {found}")
            for step, found in (('"5"', "'5'"), ("null", "None"), ("true", "True"), ("5.0", "5.0"))
        ],
        *[
            ("metrics.jsonl", f'{{"kind": "eval", "step": 7, "students": {students}}}\n{{}}\n',
             r"metrics\.jsonl, line 1: students: expected values by student, found")
            for students in ("[]", "null", "3", '{"clip": 3}')
        ],
    ],
)
def test_damaged_files_are_named(run_folder, name, content, said):
    (run_folder / name).write_text(content, encoding="latin-1")
    with pytest.raises(DataError, match=said):
        write_report(run_folder)


def test_what_is_no_run_folder_is_refused(tmp_path):
    with pytest.raises(UsageError, match="expected a run folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="found none of them"):
        write_report(tmp_path)


def test_pseudo_labels_by_class_and_agreement_are_shown(run_folder):
    page = open_page(write_report(run_folder))
    text = html.unescape(page.text)
    assert "Pixels the students agree on, %" in text
    assert "the class's share of them" in text
    rows = text.partition("the class's share of them")[2].partition("Loss terms")[0]
    assert "field 75.0 62.5 75.0 62.5" in rows and "road 0.0 n/a 0.0 n/a" in rows
    assert "wood 25.0 87.5 25.0 88.5" in rows
