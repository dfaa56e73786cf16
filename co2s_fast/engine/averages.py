"""Students whose weights are averages over the steps of a run."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from co2s_fast.engine.checkpoint import load_weights, read_arrays
from co2s_fast.models import Student


class Averages:
    """Exponential moving averages of the students' weights (Tarvainen & Valpola, NeurIPS 2017).

    After step n an average keeps min(`decay`, n / (n + 1)) of itself, so that it is the plain mean
    of a run's first steps. What is not trained, and buffers, are the students' own. (torch's
    `AveragedModel` reads a counter off the device at every step, and has one decay.)

    Args:
        students: the students that train, on their device, not compiled.
        decay: in (0, 1).

    Attributes:
        students: name -> averaged student, in evaluation mode, without gradients.
    """

    def __init__(self, students: Mapping[str, Student], decay: float) -> None:
        self.decay = decay
        self.trained = students
        self.students = {
            name: copy.deepcopy(student).eval().requires_grad_(False)
            for name, student in students.items()
        }

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Take in the students as they are after `steps` steps; nothing is synchronised."""
        keep = min(self.decay, steps / (steps + 1))
        for name, student in self.trained.items():
            average = self.students[name]
            pairs = [pair for pair in zip(average.parameters(), student.parameters(), strict=True)
                     if pair[1].requires_grad]
            get_ema_multi_avg_fn(keep)(*map(list, zip(*pairs, strict=True)), None)
            for mine, own in zip(average.buffers(), student.buffers(), strict=True):
                mine.copy_(own, non_blocking=True)

    def arrays(self) -> dict[str, dict[str, torch.Tensor]]:
        """Files of a checkpoint: stem -> named tensors."""
        return {average_stem(name): dict(average.state_dict())
                for name, average in self.students.items()}

    def restore(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, whose students are loaded: from its averages, if it has steps.

        Raises:
            DataError: it has no averages, or of other shapes.
        """
        for name, average in self.students.items():
            average.load_state_dict(self.trained[name].state_dict())
            average.provenance = self.trained[name].provenance
            if state["step"] > 0:
                weights = read_arrays(folder, state, average_stem(name))
                load_weights(average, weights, f"checkpoint {folder}")


def average_stem(student: str) -> str:
    """File stem of a student's average in a checkpoint, beside the student's own."""
    return f"{student}-average"
