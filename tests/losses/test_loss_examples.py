"""The examples run, and replacing the loss lines leaves losses and gradients equal."""

from __future__ import annotations

import importlib
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NAMES = ["losses_unimatch", "losses_fixmatch", "losses_mean_teacher"]


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def pair(module):
    if hasattr(module, "before"):
        return module.before(), module.after()
    return module.losses_before, module.losses_after


@pytest.mark.parametrize("name", NAMES)
def test_losses_and_gradients_are_equal(name, load):
    tiny, module = load("tiny"), load(name)
    results = []
    for losses in pair(module):
        torch.manual_seed(0)
        model = tiny.Segmenter()
        steps = []
        for step in range(3):  # the mean teacher's weights lag behind from the second step on
            model.zero_grad()
            torch.manual_seed(step)  # dropout
            loss = losses(model, tiny.random_batch(step))
            loss.backward()
            steps.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(
                        torch.randn(p.shape, generator=torch.Generator().manual_seed(step)) * 0.1
                    )
        results.append(steps)
    for before, after in zip(*results, strict=True):
        for expected, ours in zip(before, after, strict=True):
            # Float32 on both sides, in another order of summation.
            scale = float(expected.abs().max())
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5 * scale)
        assert before[0] > 0 and all(gradient.any() for gradient in before[1:])


@pytest.mark.parametrize("name", NAMES)
def test_unsupervised_term_takes_part(name, load):
    """The comparison above means something only if confident pixels exist, and not only those."""
    tiny, module = load("tiny"), load(name)
    torch.manual_seed(0)
    model = tiny.Segmenter()
    batch = tiny.random_batch(0)
    confidence, _ = module.softmax_confidence(model(batch.weak), (tiny.SIDE, tiny.SIDE))
    share = (confidence >= module.THRESHOLD).float().mean()
    assert 0.02 < share < 0.98


def check_output(text):
    before, after = ([float(x) for x in line.split()[1:]] for line in text.splitlines()[1:])
    assert len(before) == 5
    assert after == pytest.approx(before, rel=1e-4)


@pytest.mark.parametrize("name", NAMES[1:])
def test_example_runs(name, load, capsys):
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    check_output(capsys.readouterr().out)


def test_example_runs_as_a_command():
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{NAMES[0]}.py")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    check_output(done.stdout)
