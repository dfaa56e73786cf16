"""Result files fit the schema, tables come from them alone, and bounds are kept."""

from __future__ import annotations

import copy
import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from click import UsageError
from click.testing import CliRunner
from jsonschema import Draft202012Validator, ValidationError

from benchmarks import results, tables, throughput

ROOT = Path(__file__).resolve().parents[2]
RESULTS = sorted(results.FOLDER.glob("*.json"))
NAME = "loss_section/128to512/both/time/eager:cpp"


def test_schemas_are_schemas(schema, accuracy_schema):
    Draft202012Validator.check_schema(schema)
    Draft202012Validator.check_schema(accuracy_schema)


def test_invented_results_fit_and_broken_ones_do_not(schema, invented):
    validator = Draft202012Validator(schema)
    validator.validate(invented)
    for path, value in (("header", {}), ("rows", [{"section": "x"}]), ("schema_version", 2)):
        broken = copy.deepcopy(invented)
        broken[path] = value
        with pytest.raises(ValidationError):
            validator.validate(broken)


def test_stored_results_fit_the_schema(schema, accuracy_schema):
    for path in RESULTS:
        accuracy = path.name.startswith("accuracy_")
        content = json.loads(path.read_text())
        Draft202012Validator(accuracy_schema if accuracy else schema).validate(content)
        if not accuracy:
            assert not content["wrong"], f"{path.name} holds wrong results"
            assert re.fullmatch(r"[a-z0-9-]+-\d+-threads", path.stem)


@pytest.mark.parametrize("document", tables.DOCUMENTS, ids=lambda path: path.name)
def test_tables_are_what_the_results_say(document):
    text = document.read_text()
    assert tables.MARKER.search(text)
    assert tables.render(text, results.FOLDER) == text


def test_documents_tell_of_every_result_file():
    told = "".join(document.read_text() for document in tables.DOCUMENTS)
    sections = {match["name"].partition("@")[0] for match in tables.MARKER.finditer(told)}
    for path in RESULTS:
        rows = json.loads(path.read_text()).get("rows", ())
        in_a_table = sections & {row["section"] for row in rows}
        assert in_a_table or path.stem.removeprefix("accuracy_") in told, path.name


def test_header_of_this_machine_fits(schema):
    header = results.make_header(torch.device("cpu"), repeats=1, quick=True)
    header |= {"load_after": header["load_before"], "seconds": 0.0}
    part = {**schema["properties"]["header"], "$defs": schema["$defs"]}
    Draft202012Validator(part).validate(header)


def test_slug_is_a_plain_name(monkeypatch):
    monkeypatch.setattr(results, "cpu_name", lambda: "Intel(R) Xeon(R) CPU E5-2680 v4 @ 2.40GHz")
    assert results.slug(torch.device("cpu"), 2) == "intel-xeon-e5-2680-v4-2-threads"


def test_ratios_and_goals(invented):
    ratios = results.ratios(invented)
    assert ratios[NAME] == pytest.approx(18)
    assert ratios["loss_section/128to512/both/peak_memory/eager:cpp"] == pytest.approx(10)
    states = {name: value for name, _, value in results.goals(invented)}
    assert states[NAME] == pytest.approx(18)
    assert states["loss_section/512/both/time/eager:cpp"] is None
    lines = {line[0]: line[1] for line in tables.goal_lines(invented)[1]}
    assert lines[NAME] == "reached"
    assert lines["loss_section/128to512/both/peak_memory/eager:cpp"] == "missed"
    assert lines["step/tiny/step/time/eager:ours"] == "not measured"


def test_rates_count_the_other_way(invented):
    rate = invented["rows"][0] | {"section": "input", "case": "512", "mode": "load"}
    rate |= {"metric": "images_per_s", "unit": "1/s"}
    rows = [
        rate | {"provider": "pil", "median": 10.0},
        rate | {"provider": "torch", "median": 25.0},
    ]
    found = results.ratios({**invented, "rows": rows})
    assert found == {"input/512/load/images_per_s/pil:torch": pytest.approx(2.5)}


@pytest.fixture
def folder(tmp_path, invented) -> Path:
    results.save(tmp_path / "some-cpu-2-threads.json", invented)
    return tmp_path


def test_render_writes_losing_rows_and_absences(folder):
    before = "# A\n<!-- benchmark:loss_section -->\nold\n<!-- /benchmark -->\nend\n"
    after = tables.render(before, folder)
    assert "old" not in after and after.endswith("<!-- /benchmark -->\nend\n")
    assert "| 128to512 | torch.compile | 1200 (1080-1320) | 0.75x | 700 |" in after
    assert "| 128to512 | cpp | 50 (45-55) | 18x | 40 |" in after
    assert "cuda not measured (128to512): torch sees no CUDA GPU" in after
    assert tables.render(after, folder) == after


def test_render_goals_and_one_device(folder):
    text = "<!-- benchmark:goals@some-cpu-2-threads -->\n<!-- /benchmark -->\n"
    assert f"| {NAME} | reached | 15 | 18 |" in tables.render(text, folder)
    with pytest.raises(ValueError, match="no file in"):
        tables.render(text.replace("some-cpu", "other"), folder)


def test_goals_of_two_files(folder, invented):
    step = invented["rows"][0] | {"section": "step", "case": "tiny", "mode": "step"}
    rows = [step | {"provider": "eager", "median": 3.0}, step | {"provider": "ours", "median": 2.0}]
    results.save(folder / "step-some-cpu-2-threads.json", {**invented, "rows": rows})
    name = "goals@some-cpu-2-threads+step-some-cpu-2-threads"
    after = tables.render(f"<!-- benchmark:{name} -->\n<!-- /benchmark -->\n", folder)
    assert f"| {NAME} | reached | 15 | 18 |" in after
    assert "| step/tiny/step/time/eager:ours | reached | 1.5 | 1.5 |" in after
    assert "| input/512/load/images_per_s/pil:torch | not measured | 1.5 | - |" in after
    assert after.count(invented["header"]["device"]) == 2
    assert tables.render(after, folder) == after
    with pytest.raises(ValueError, match="not a readable result file"):
        tables.render(after.replace("+step-some-cpu-2-threads", "+other"), folder)


def test_render_refuses_an_open_marker(folder):
    with pytest.raises(ValueError, match="no <!-- /benchmark -->"):
        tables.render("<!-- benchmark:loss_section -->\n", folder)


def test_check_notices_stale_tables(folder, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("<!-- benchmark:loss_section -->\n<!-- /benchmark -->\n")
    arguments = [str(readme), "--results", str(folder)]
    runner = CliRunner()
    assert runner.invoke(tables.main, [*arguments, "--check"]).exit_code == 1
    assert runner.invoke(tables.main, arguments).exit_code == 0
    assert runner.invoke(tables.main, [*arguments, "--check"]).exit_code == 0


def test_named_bounds(invented):
    assert throughput.regressions(invented, None, (f"{NAME}=15",)) == []
    (line,) = throughput.regressions(invented, None, (f"{NAME}=20",))
    assert "18 is under 20" in line
    (line,) = throughput.regressions(invented, None, ("no/such/ratio=1",))
    assert "not measured" in line


def test_bounds_against_an_earlier_file(invented):
    slower = copy.deepcopy(invented)
    slower["rows"][2]["median"] *= 2
    assert throughput.regressions(invented, slower, ("0.9",)) == []
    failed = throughput.regressions(slower, invented, ("0.9",))
    assert len(failed) == 2 and all("0.50 of it" in line for line in failed)
    with pytest.raises(UsageError, match="needs --compare"):
        throughput.regressions(invented, None, ("0.9",))


def test_bad_bound_is_a_usage_error():
    run = CliRunner().invoke(throughput.main, ["--fail-below", "fast"])
    assert run.exit_code == 2 and "expected a number" in run.output


def test_an_unknown_provider_is_not_left_out():
    run = CliRunner().invoke(throughput.main, ["--section", "cutmix", "--without", "eagre"])
    assert run.exit_code == 2 and "--without eagre: expected one of cpp, cuda, eager" in run.output


def test_load_refuses_other_files(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("[]")
    with pytest.raises(ValueError, match="schema_version is None"):
        results.load(path)


def test_throughput_writes_a_valid_file(tmp_path, schema):
    out = tmp_path / "out.json"
    arguments = ["--section", "cutmix", "--device", "cpu", "--repeats", "1", "--out", str(out)]
    run = CliRunner().invoke(throughput.main, arguments)
    assert run.exit_code == 0, run.output
    assert "No GPU was measured" in run.output
    content = json.loads(out.read_text())
    Draft202012Validator(schema).validate(content)
    seen = {r["provider"] for r in content["rows"]} | {
        r["provider"] for r in content["not_measured"]
    }
    assert seen == {"eager", "reference", "cpp", "triton", "cuda"}


def test_gpu_suite_goes_on_and_fails_in_the_end(tmp_path):
    """With an interpreter that always fails, every part is tried and the exit code says so."""
    done = subprocess.run(
        [ROOT / "benchmarks" / "gpu_suite.sh", tmp_path / "out", "build", "tests", "throughput"],
        env={"PATH": "/usr/bin:/bin", "PYTHON": "/bin/false"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    summary = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    assert [line.split()[0] for line in summary] == ["build", "tests", "throughput"]
    assert all("exit   1" in line for line in summary)
    assert len(list((tmp_path / "out").iterdir())) <= 8
