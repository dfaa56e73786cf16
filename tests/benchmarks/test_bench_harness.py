"""Timing, the agreement check and peak memory, on a section whose results are known."""

from __future__ import annotations

import math

import pytest
import torch
import toy_section
from jsonschema import Draft202012Validator

from benchmarks import harness, memory, throughput

CPU = torch.device("cpu")


def case(name: str) -> harness.Case:
    return next(c for c in toy_section.cases(CPU, True) if c.name == name)


def test_percentiles_interpolate():
    assert harness.percentiles([3.0, 1.0, 2.0]) == pytest.approx((2.0, 1.4, 2.6))
    assert harness.percentiles([5.0]) == (5.0, 5.0, 5.0)


def test_every_provider_gets_every_round_and_every_mode():
    found = harness.measure(case("squares"), CPU, repeats=4)
    assert set(found.samples) == {"eager", "same"}
    for modes in found.samples.values():
        assert set(modes) == {"forward", "backward", "both"}
        assert all(len(samples) == 4 for samples in modes.values())
        for forward, backward, both in zip(*modes.values(), strict=True):
            assert both == pytest.approx(forward + backward)


def test_turns_rotate(monkeypatch):
    order = []
    monkeypatch.setattr(
        harness, "_sampler", lambda workload, flush: lambda: order.append(workload) or {}
    )
    harness.measure(case("squares"), CPU, repeats=2)
    first, second, third, fourth = map(id, order)
    assert (first, second) == (fourth, third)


class FakeEvent:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        pass

    def elapsed_time(self, other):
        return 5.0  # milliseconds that the sleep before took


@pytest.mark.parametrize(("launch_s", "wanted_s"), [(0.0, 0.005), (0.02, 0.03), (0.06, 0.05)])
def test_a_gpu_waits_until_a_pass_is_launched(launch_s, wanted_s, monkeypatch):
    slept, clock = [], [7.0]
    monkeypatch.setattr(harness.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    workload = harness.Workload(lambda: clock.append(clock.pop() + launch_s))
    cycles = harness._head_start(workload)
    assert slept == [harness._CLOCK_CYCLES]
    assert cycles * 0.005 / slept[0] == pytest.approx(wanted_s)


def test_a_wrong_provider_is_named_and_not_timed():
    found = harness.measure(case("squares"), CPU, repeats=1)
    assert "off" not in found.samples
    assert "differs from eager by 0.01" in found.wrong["off"]


def test_an_absent_provider_is_listed_with_its_reason():
    found = harness.measure(case("squares"), CPU, repeats=1)
    assert found.absent == {"absent": "it is absent for a reason"}


def test_disagreement_never_passes_nan_or_another_shape():
    ones = [torch.ones(3)]
    assert harness.disagreement(ones, ones) == 0
    assert harness.disagreement([torch.tensor([1.0, math.nan, 1.0])], ones) == math.inf
    assert harness.disagreement([torch.ones(4)], ones) == math.inf


def test_reference_gets_fewer_rounds():
    build = case("squares").build
    many = harness.Case("c", ("eager", "reference"), lambda p, d: build("eager", d))
    found = harness.measure(many, CPU, repeats=5)
    assert len(found.samples["eager"]["both"]) == 5
    assert len(found.samples["reference"]["both"]) == harness.REFERENCE_REPEATS


@pytest.mark.skipif(memory.unavailable(CPU) is not None, reason="peak memory needs /proc")
def test_peak_memory_counts_what_a_pass_takes():
    peak = memory.peak_extra_bytes("toy_section", case("memory"), "hungry", CPU, True)
    # Pages of other libraries may come and go beside it.
    assert peak == pytest.approx(toy_section.HUNGRY_MIB << 20, abs=6 << 20)


@pytest.mark.skipif(memory.unavailable(CPU) is not None, reason="peak memory needs /proc")
def test_peak_memory_passes_on_what_went_wrong():
    with pytest.raises(RuntimeError, match="absent for a reason"):
        memory.peak_extra_bytes("toy_section", case("squares"), "absent", CPU, True)


def test_rows_of_a_measured_case_fit_the_schema(schema):
    validator = Draft202012Validator({**schema["$defs"]["row"], "$defs": schema["$defs"]})
    rows, _ = throughput.measure_case(toy_section, case("squares"), CPU, 3, True, copy_rate=1e9)
    for row in rows:
        validator.validate(row)
        assert row["p20"] <= row["median"] <= row["p80"]
    metrics = {(r["metric"], r["mode"]) for r in rows}
    assert {("time", "both"), ("bandwidth_share", "both"), ("bytes_moved", "both")} <= metrics
    moved = {r["mode"]: r["median"] for r in rows if r["metric"] == "bytes_moved"}
    assert moved == {"forward": 32, "backward": 64, "both": 96}


def test_memory_and_rates_become_rows():
    rows, _ = throughput.measure_case(toy_section, case("memory"), CPU, 3, True, copy_rate=None)
    by_metric = {r["metric"]: r for r in rows}
    assert set(by_metric) == {"time", "images_per_s", "peak_memory"}
    rate, seconds = by_metric["images_per_s"]["median"], by_metric["time"]["median"]
    assert rate == pytest.approx(4 / seconds)
