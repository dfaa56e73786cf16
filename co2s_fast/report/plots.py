"""Curves as SVG pictures that a page carries inside itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

# Okabe and Ito's colours: apart for readers with any form of colour blindness.
STUDENT_COLORS = {"clip": "#0072b2", "clip2": "#d55e00", "ssm": "#d55e00", "ssm2": "#0072b2",
                  "both": "#1a1a1a"}  # fmt: skip
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#1a1a1a", "#8c6d31")
MAX_POINTS = 600


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        x, y: points; a None in y breaks the line.
        color: of the line.
        smooth: draw a running mean over the faint points.
        low, high: the edges of a band around the line.
        width: of the line, in points.
        alpha: its opacity.
    """

    x: Sequence[float]
    y: Sequence[float | None]
    color: str
    smooth: bool = False
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    width: float = 1.8
    alpha: float = 1.0


def color_of(name: str, index: int = 0) -> str:
    """A student's colour."""
    return STUDENT_COLORS.get(name, COLORS[index % len(COLORS)])


def series(
    records: Iterable[dict[str, Any]], *path: str, scale: float = 1.0
) -> tuple[list[float], list[float]]:
    """Steps and values of the records that have a number at the nested key `path`."""
    steps, values = [], []
    for record in records:
        value: Any = record
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, int | float):
            steps.append(record["step"])
            values.append(value * scale)
    return steps, values


def curve(
    lines: Sequence[Line],
    *,
    y_from_zero: bool = False,
    y_top: float | None = None,
    log: bool = False,
    size: tuple[float, float] = (4.6, 2.7),
) -> str:
    """Draw lines over steps and return an SVG data URI.

    Args:
        lines: what to draw.
        y_from_zero: start the vertical axis at 0.
        y_top: upper end of the vertical axis.
        log: logarithmic vertical axis.
        size: in inches; the page scales it.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    style = {
        "font.family": "DejaVu Sans", "font.size": 9, "axes.edgecolor": "#b8bcc4",
        "axes.linewidth": 0.8, "xtick.color": "#5b6270", "ytick.color": "#5b6270",
        "svg.hashsalt": "co2s-fast", "path.simplify": True,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, facecolor="none")
        # Fixed margins: fitting them to the text doubles the time a picture takes.
        axes = figure.add_axes((0.125, 0.165, 0.86, 0.8), facecolor="none")
        for line in lines:
            _draw(axes, line)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.grid(axis="y", color="#e6e8ec", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, pad=5)
        if log:
            axes.set_yscale("log")
        if y_from_zero:
            axes.set_ylim(bottom=0)
        if y_top is not None:
            axes.set_ylim(top=y_top)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        if not log:
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _steps(x)))
        axes.set_xlabel("step", color="#5b6270", labelpad=2)
        content = io.BytesIO()
        FigureCanvasSVG(figure).print_svg(content, metadata={"Date": None})
    return data_uri(content.getvalue(), "image/svg+xml")


def data_uri(content: bytes, kind: str) -> str:
    """Bytes as an address that needs no file and no network."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def running_mean(values: Sequence[float], share: float = 0.06) -> list[float]:
    """Centred mean over `share` of the points, narrower towards the ends."""
    reach = int(len(values) * share / 2)
    means = []
    for index in range(len(values)):
        width = min(reach, index, len(values) - 1 - index)
        part = values[index - width : index + width + 1]
        means.append(sum(part) / len(part))
    return means


def _draw(axes: Any, line: Line) -> None:
    every = max(len(line.x) // MAX_POINTS, 1)
    x = list(line.x)
    y = [float("nan") if value is None else value for value in line.y]
    if line.low is not None and line.high is not None:
        axes.fill_between(x, line.low, line.high, color=line.color, alpha=0.15, linewidth=0)
    if line.smooth and len(x) > 12:
        axes.plot(x[::every], y[::every], color=line.color, alpha=0.22, linewidth=0.8)
        y = running_mean(y)
    marker = "o" if len(x) <= 12 and line.alpha == 1 else None
    axes.plot(
        x[::every], y[::every], color=line.color, linewidth=line.width, alpha=line.alpha,
        marker=marker, markersize=3.5, solid_capstyle="round",
    )  # fmt: skip


def _steps(value: float) -> str:
    if value >= 10_000 and value % 1000 == 0:
        return f"{value / 1000:.0f}k"
    return f"{value:,.0f}" if value == int(value) else ""
