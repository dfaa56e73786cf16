"""What finished runs hold, and the check that a run which was cut in two holds the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from co2s_fast.engine import checkpoint
from co2s_fast.engine.config import RunConfig
from co2s_fast.engine.runs import checkpoint_folder
from co2s_fast.engine.trainer import train

Arrays = dict[str, torch.Tensor]


def arrays(folder: Path, stem: str) -> Arrays:
    """A file of a run's last checkpoint."""
    source = checkpoint_folder(folder, "last")
    return checkpoint.read_arrays(source, checkpoint.read_state(source), stem)


def assert_resumed_exactly(
    content: dict[str, Any], stop_after: Callable[..., None], folder: Path, steps: int, *stems: str
) -> tuple[Path, Arrays]:
    """Train a run at once, and another in two parts that are cut after some steps.

    Returns:
        The folder of the whole run, and what the method had kept where the other was cut; empty
        where it keeps nothing.
    """
    whole = train(RunConfig.model_validate(content), progress=False)
    cut = RunConfig.model_validate(content | {"out": str(folder)})
    stop_after(steps, cut)
    state = checkpoint.read_state(checkpoint_folder(folder, "last"))
    half = arrays(folder, "method") if "method" in state["files"] else {}
    train(cut, resume=True, progress=False)
    for stem in stems:
        found, wanted = arrays(folder, stem), arrays(whole, stem)
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert torch.equal(found[key], value), (stem, key)
    return whole, half
