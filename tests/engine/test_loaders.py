"""Runs by each input pipeline: they go on exactly, say what fed them, and do not wait for it."""

from __future__ import annotations

import importlib.util
import os
import signal
import time

import pytest
import torch
from click.testing import CliRunner

from co2s_fast.cli import main
from co2s_fast.engine import trainer as trainers
from co2s_fast.engine.config import RunConfig
from co2s_fast.engine.interrupt import Interrupted
from co2s_fast.engine.log import read_metrics
from co2s_fast.engine.runs import load_run
from co2s_fast.engine.trainer import Trainer, train
from co2s_fast.errors import UsageError

needs_dali = pytest.mark.skipif(
    importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None,
    reason="DALI is not installed: pip install 'co2s-fast[dali]'",
)
LOADERS = {
    "dali": {"loader": "dali", "workers": 1},
    "torch": {"loader": "torch", "workers": 1},
    "strong on the device": {"loader": "torch", "workers": 1, "strong_on_device": True},
}
WAIT = 0.02


@pytest.fixture(params=[
    pytest.param("dali", marks=needs_dali), "torch", "strong on the device",
])
def content(request, run_content, tmp_path):
    """A run of six steps fed by one of the pipelines, as nested dictionaries, and its folder."""
    def build(folder="run", **train):
        whole = run_content(**train)
        return {**whole, "data": {**whole["data"], **LOADERS[request.param]},
                "out": str(tmp_path / folder)}

    build.name = request.param
    return build


def start(content, **options):
    return train(RunConfig.model_validate(content), progress=False, **options)


def losses(folder):
    return [(r["step"], {k: v for k, v in r.items() if k.startswith("loss/")})
            for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "train"]


def test_a_stopped_run_goes_on_exactly(content, monkeypatch):
    whole = start(content("whole", log_every=1))
    make_step = Trainer._make_step

    def stop_after_three(self, batch):
        make_step(self, batch)
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(trainers.Trainer, "_make_step", stop_after_three)
    with pytest.raises(Interrupted):
        start(content("broken", log_every=1))
    monkeypatch.undo()
    broken = start(content("broken", log_every=1), resume=True)
    assert losses(broken) == losses(whole) and len(losses(whole)) == 6
    (_, _, one), (_, _, other) = load_run(whole, "last"), load_run(broken, "last")
    for name, student in one.items():
        for key, value in student.state_dict().items():
            assert torch.equal(value, other[name].state_dict()[key]), key
    expected = {"dali": "dali on the cpu", "torch": "torch"}.get(
        content.name, "torch, strong views on the device")
    assert read_metrics(whole / "metrics.jsonl")[0]["loader"] == expected


@pytest.mark.slow
def test_no_step_waits_for_data_once_warm(content, monkeypatch):
    """The log's data wait stays under two hundredths of the time of the steps.

    Steps take a while elsewhere, as on a GPU, so that the test does not measure how its threads
    share the cores with others'; of the windows, the median. `benchmarks/data_wait.py` measures
    runs on the CPU.
    """
    if content.name == "strong on the device":
        pytest.skip("its strong views are work of the device, which here is the CPU")
    make_step = Trainer._make_step

    def make_long_step(self, batch):
        make_step(self, batch)
        time.sleep(0.15)

    monkeypatch.setattr(trainers.Trainer, "_make_step", make_long_step)
    folder = start(content(steps=24, log_every=3, eval_every=24))
    records = [r for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "train"]
    images = 3 * 2 * 4
    shares = sorted(r["data_wait_s"] * r["images_per_s"] / images for r in records[1:])
    assert len(shares) == 7 and shares[len(shares) // 2] < WAIT, shares


def test_the_option_of_train(stripes, tmp_path, monkeypatch):
    command = ["train", "--dataset", str(stripes / "stripes.yaml"), "--data-root", str(stripes),
               "--split", str(stripes / "split"), "--dry-run", "--out", str(tmp_path / "run"),
               "--set", "train.device=cpu", "--set", "data.batch_size=4"]
    accepted = CliRunner().invoke(main, [*command, "--loader", "torch"])
    assert accepted.exit_code == 0, accepted.output
    monkeypatch.setattr("co2s_fast.data.loader.dali_is_installed", lambda: False)
    refused = CliRunner().invoke(main, [*command, "--loader", "dali"])
    assert refused.exit_code == UsageError.exit_code
    assert "co2s-fast[dali]" in refused.output and "Traceback" not in refused.output
