"""Runs by each input pipeline: they go on exactly, say what fed them, and do not wait for it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import time
import weakref

import pytest
import torch
from click.testing import CliRunner

from co2s_fast.cli import main
from co2s_fast.data.ahead import Ahead
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
LONGEST_BATCH_S = 60.0


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


def test_a_batch_is_freed_with_its_step(content, monkeypatch):
    made, kept = [], []
    make_step, after_step = Trainer._make_step, Trainer._after_step

    def remember(self, batch):
        made.append(weakref.ref(batch))
        make_step(self, batch)

    def look(self, bar):
        kept.append(made[-1]())
        after_step(self, bar)

    monkeypatch.setattr(trainers.Trainer, "_make_step", remember)
    monkeypatch.setattr(trainers.Trainer, "_after_step", look)
    start(content())
    assert kept == [None] * 6


class Counted:
    """A loader that counts the batches it has made."""

    def __init__(self, loader):
        self.loader, self.made = loader, 0

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        with contextlib.closing(iter(self.loader)) as batches:
            for batch in batches:
                self.made += 1
                yield batch


@pytest.mark.slow
def test_no_step_waits_for_data_once_warm(content, monkeypatch):
    """The log's data wait stays under two hundredths of the time of the steps.

    Steps take a while elsewhere, as on a GPU, and end a while after the next batch was made:
    without a thread that does so meanwhile, never. How long a batch takes depends on what else the
    machine does; `benchmarks/data_wait.py` measures that. Of the windows, the median.
    """
    if content.name == "strong on the device":
        pytest.skip("its strong views are work of the device, which here is the CPU")
    steps, counted, make_step = 24, [], Trainer._make_step

    def ahead_of_counted(loader, *args, **options):
        counted.append(Counted(loader))
        return Ahead(counted[-1], *args, **options)

    def make_long_step(self, batch):
        make_step(self, batch)
        deadline = time.monotonic() + LONGEST_BATCH_S
        while counted[0].made < min(self.step + 1, steps):
            assert time.monotonic() < deadline, f"no batch was made during step {self.step}"
            time.sleep(0.01)
        time.sleep(0.15)

    monkeypatch.setattr("co2s_fast.data.loader.Ahead", ahead_of_counted)
    monkeypatch.setattr(trainers.Trainer, "_make_step", make_long_step)
    folder = start(content(steps=steps, log_every=3, eval_every=steps))
    records = [r for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "train"]
    images = 3 * 2 * 4
    shares = sorted(r["data_wait_s"] * r["images_per_s"] / images for r in records[1:])
    assert len(counted) == 1
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
