"""Pseudo-labels that all become one class, and loss terms that are silently zero: said in time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

DOMINANT = 0.95
"""Share of a student's pseudo-labels from which one class dominates them."""

EXPECTED = 0.8
"""Share of the labelled pixels from which a class may dominate."""

DOMINANT_WINDOWS = 3
ZERO_WINDOWS = 10


class CollapseWatch:
    """Looks at every log window; a warning comes once, and again only after things were well.

    Args:
        classes: their names.
        pixels: labelled pixels of each.
    """

    def __init__(self, classes: Sequence[str], pixels: Sequence[int]) -> None:
        self.classes = list(classes)
        total = max(sum(pixels), 1)
        self.shares = [count / total for count in pixels]
        self._running: dict[str, int] = {}  # what goes on -> log windows so far

    def look(self, steps: int, terms: Mapping[str, float],
             pseudo: Mapping[str, Sequence[float]]) -> list[str]:
        """The warnings of one window.

        Args:
            steps: in the window.
            terms: mean of each loss term, "<student>/<term>".
            pseudo: pseudo-labelled pixels of each class, by student.
        """
        found = {**self._dominance(pseudo), **self._zeros(terms, pseudo, steps)}
        self._running = {key: self._running.get(key, 0) + 1 for key in found}
        return [text for key, (windows, text) in found.items() if self._running[key] == windows]

    def _dominance(self, pseudo: Mapping[str, Sequence[float]]) -> dict[str, tuple[int, str]]:
        found = {}
        for student, counts in pseudo.items():
            total = sum(counts)
            top = max(range(len(counts)), key=counts.__getitem__)
            if not total or counts[top] < DOMINANT * total or self.shares[top] > EXPECTED:
                continue
            found[f"{student} {self.classes[top]}"] = DOMINANT_WINDOWS, (
                f"student {student}: {100 * counts[top] / total:.1f} % of its pseudo-labels are "
                f"of class {self.classes[top]} for {DOMINANT_WINDOWS} log windows, which has "
                f"{100 * self.shares[top]:.1f} % of the labelled pixels: they are collapsing. "
                "--class-weight balanced, --sampling class-aware or a higher method.threshold "
                "work against it")
        return found

    def _zeros(self, terms: Mapping[str, float], pseudo: Mapping[str, Sequence[float]],
               steps: int) -> dict[str, tuple[int, str]]:
        found = {}
        for key, value in terms.items():
            if value != 0:
                continue
            student, term = key.rsplit("/", 1)
            unsure = term != "x" and student in pseudo and not sum(pseudo[student])
            reason = (": no pixel of the weak view reaches method.threshold" if unsure else "")
            found[key] = ZERO_WINDOWS, (
                f"loss term {key} has been exactly 0 for {ZERO_WINDOWS} log windows "
                f"({ZERO_WINDOWS * steps} steps){reason}")
        return found

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return dict(self._running)

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on where a checkpoint was."""
        self._running = dict(state)
