"""The figure of `co2s-fast attention`: each head's map over the image, student by student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from co2s_fast.data.writing import replacing
from co2s_fast.engine.attention import Attention
from co2s_fast.models.attention_maps import AttentionMaps

NAMES = {"clip": "CLIP student", "ssm": "SSM student"}
COLUMNS = 7  # twelve heads and their mean in two rows
CELL = 1.75  # inches, the longer side of a head's map
GAP, LABEL, HEADER, MARGIN, FOOT = 0.1, 0.24, 0.42, 0.25, 0.45
COLOURS = "magma"
INK, FAINT = "#1d2129", "#5b6270"


def draw_attention(found: Attention, out: Path) -> Path:
    """Draw one layer of each student: its heads in a grid, and their mean, over the image.

    Every map has a scale of its own, from 0 to its largest value, and says what share of the head's
    attention lies on patches.

    Args:
        found: what to draw.
        out: file ending in .png, .pdf or .svg; it appears whole.

    Returns:
        `out`.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 8}):
        page = _Page(found, Figure)
        page.draw()
        with replacing(out) as temporary:
            kind = out.suffix[1:].lower()
            metadata = {"png": {"Software": None}, "pdf": {"CreationDate": None},
                        "svg": {"Date": None}}[kind]  # fmt: skip
            page.figure.savefig(temporary, format=kind, dpi=160, metadata=metadata)
    return out


class _Page:
    """Places everything in inches from the top left corner."""

    def __init__(self, found: Attention, figure: Any) -> None:
        self.found = found
        height, width = found.image.shape[:2]
        self.cell = tuple(max(CELL * n / max(height, width), 0.7) for n in (width, height))
        self.whole = (2 * self.cell[0], 2 * self.cell[1])
        heads = {name: each.maps.shape[1] for name, each in found.students.items()}
        self.columns = min(COLUMNS, max(heads.values()) + 1)
        self.rows = {name: -(-(count + 1) // self.columns) for name, count in heads.items()}
        blocks = sum(HEADER + rows * self._row for rows in self.rows.values())
        self.width = max(MARGIN + self.whole[0] + 0.35
                         + self.columns * (self.cell[0] + GAP) + MARGIN, 7.5)  # fmt: skip
        self.height = HEADER + max(blocks, self.whole[1] + 0.6) + FOOT
        self.figure = figure(figsize=(self.width, self.height), facecolor="white")

    @property
    def _row(self) -> float:
        return self.cell[1] + LABEL + GAP

    def draw(self) -> None:
        """Everything."""
        self._text(MARGIN, 0.27, self.found.title, size=10, weight="bold")
        axes = self._axes(MARGIN, HEADER + LABEL, *self.whole)
        axes.imshow(self.found.image)
        self._mark(axes, 9)
        self._scale(HEADER + LABEL + self.whole[1] + 0.2)
        top = HEADER
        left = MARGIN + self.whole[0] + 0.35
        for name, each in self.found.students.items():
            self._student(name, each, left, top)
            top += HEADER + self.rows[name] * self._row
        self._text(
            MARGIN, self.height - 0.17,
            "%: share of the attention on patches; the rest is on class and register tokens",
            size=7.5, color=FAINT,
        )  # fmt: skip

    def _student(self, name: str, each: AttentionMaps, left: float, top: float) -> None:
        layer = self.found.layers[name]
        note = "" if layer < each.used else "; not used by the student (value path)"
        title = (f"{NAMES.get(name, name)}: block {layer} of 0-{len(each.maps) - 1}, "
                 f"attention of the {each.query}{note}")  # fmt: skip
        self._text(left, top + 0.2, title, size=9, weight="bold")
        maps, shares = each.maps[layer].cpu().numpy(), each.on_patches[layer].tolist()
        cells = [(f"head {i}", m, s) for i, (m, s) in enumerate(zip(maps, shares, strict=True))]
        cells.append(("mean of the heads", maps.mean(0), float(np.mean(shares))))
        for index, (label, values, share) in enumerate(cells):
            row, column = divmod(index, self.columns)
            x = left + column * (self.cell[0] + GAP)
            y = top + HEADER - 0.1 + row * self._row
            self._text(x, y + LABEL - 0.06, f"{label} · {100 * share:.0f} %", size=7.5, color=FAINT)
            self._map(self._axes(x, y + LABEL, *self.cell), values, each.covers)

    def _map(
        self, axes: Any, values: NDArray[np.float32], covers: tuple[int, int]
    ) -> None:
        """A map over the greyed image, without its part over the padding."""
        height, width = self.found.image.shape[:2]
        axes.imshow(self.found.image.mean(2), cmap="gray", vmin=0, vmax=255)
        smooth = Image.fromarray(values).resize(covers[::-1], Image.Resampling.BILINEAR)
        axes.imshow(np.asarray(smooth)[:height, :width], cmap=COLOURS, alpha=0.7, vmin=0,
                    vmax=float(values.max()) or 1.0)  # fmt: skip
        self._mark(axes, 6)

    def _mark(self, axes: Any, size: float) -> None:
        if self.found.point is not None:
            x, y = self.found.point
            axes.plot(x, y, "+", color="#00e5ff", markersize=size, markeredgewidth=1.6)

    def _scale(self, top: float) -> None:
        """The colours from 0 to a head's largest weight."""
        axes = self._axes(MARGIN, top, self.whole[0], 0.1)
        axes.imshow(np.linspace(0, 1, 256)[None], cmap=COLOURS, aspect="auto")
        self._text(MARGIN, top + 0.25, "0", size=7.5, color=FAINT)
        self._text(MARGIN + self.whole[0], top + 0.25, "each map's largest weight", size=7.5,
                   color=FAINT, align="right")  # fmt: skip

    def _axes(self, x: float, y: float, width: float, height: float) -> Any:
        box = (x / self.width, 1 - (y + height) / self.height, width / self.width,
               height / self.height)  # fmt: skip
        axes = self.figure.add_axes(box)
        axes.set_xticks([])
        axes.set_yticks([])
        for side in axes.spines.values():
            side.set_visible(False)
        return axes

    def _text(self, x: float, y: float, text: str, *, size: float, color: str = INK,
              weight: str = "normal", align: str = "left") -> None:  # fmt: skip
        self.figure.text(x / self.width, 1 - y / self.height, text, fontsize=size, color=color,
                         weight=weight, ha=align, va="baseline")  # fmt: skip
