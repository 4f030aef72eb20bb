"""How every plot looks: one colour and marker a variant (its config says which), plain numbers on log axes, labels
beside the curves, the same bytes from the same runs.

Colours are Okabe and Ito's (https://jfly.uni-koeln.de/color/), which stay apart under the common colour blindnesses;
markers differ as well, so that a grey print is readable. Their yellow is left out: it vanishes on white paper.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter

from sae_zoo.frontier.labels import DISPLAYS
from sae_zoo.frontier.pareto import SeedGroup, is_curve

FONT_SIZE = 10.0
TEXT = "#333333"
FAINT = "#888888"
FRONT = "#DADADA"


@dataclass(frozen=True)
class Style:
    color: str
    marker: str


STYLES = {label: Style(display["color"], display["marker"]) for label, display in DISPLAYS.items()}
# For other names. The two lengths have no common divisor, so that all their pairs come before one returns.
_COLORS = ("#CC79A7", "#E69F00", "#56B4E9", "#777777")
_MARKERS = ("p", "<", "*", ">", "h")


def styles(labels: Iterable[str]) -> dict[str, Style]:
    """A style for each label: its config's own, and for other names the next of a fixed cycle, in order of name."""
    labels = set(labels)
    others = sorted(labels - STYLES.keys())
    cycle = {name: Style(_COLORS[i % len(_COLORS)], _MARKERS[i % len(_MARKERS)]) for i, name in enumerate(others)}
    return {label: STYLES.get(label) or cycle[label] for label in sorted(labels)}


def readable_ticks(low: float, high: float) -> list[float]:
    """A few round numbers, at least two, between ``low`` and ``high`` (both positive) for the labels of a log axis."""
    decades = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 2, 4, 8), (1, 2, 3, 4, 6, 8)):
        ticks = [digit * 10.0**decade for decade in decades for digit in digits]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            return ticks
    # Less than about half a decade: log and linear hardly differ there.
    linear = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [float(tick) for tick in linear if low <= tick <= high]


def label_log_axes(axes: Axes, size: float = FONT_SIZE) -> None:
    """Plain numbers on the log axes of ``axes`` (20, 40, 80), whose limits are final, over faint grid lines."""
    for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        if axis.get_scale() == "log":
            axis.set_major_locator(FixedLocator(readable_ticks(*limits)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
            axis.set_minor_formatter(NullFormatter())
    axes.grid(which="major", color="#EBEBEB", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(which="both", color=FAINT, labelcolor=TEXT, labelsize=size)


def can_draw(l0: float | None, value: float | None, *, log: bool = True) -> bool:
    """Whether a point can be shown: L0 is always on a log axis, and the value is where ``log``."""
    return l0 is not None and value is not None and l0 > 0 and (value > 0 or not log)


def draw_curve(axes: Axes, groups: Sequence[SeedGroup], key: str, style: Style, *, marker_size: float = 6.5
               ) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """One label's metric against L0: every run a marker, a line through its means over seeds where they are a curve.

    Args:
        axes: their scales are final; what they cannot show (see :func:`can_draw`) is left out.
        groups: of one label.
        key: the metric's key in a record.

    Returns:
        (means by rising L0, runs), the (l0, value) points that can be shown.
    """
    log = axes.get_yscale() == "log"
    means: list[Any] = sorted(
        point for group in groups if can_draw(*(point := (group.mean("l0"), group.mean(key))), log=log))
    runs: list[Any] = [
        point for group in groups for run in group.runs
        if can_draw(*(point := (run.get("l0"), run.get(key))), log=log)]
    if runs and means and is_curve(groups):
        axes.plot(*zip(*means, strict=True), color=style.color, linewidth=0.25 * marker_size, zorder=2)
    if runs:
        axes.plot(*zip(*runs, strict=True), color=style.color, linestyle="none", marker=style.marker,
                  markersize=marker_size, markeredgecolor="white", markeredgewidth=0.11 * marker_size, zorder=3,
                  clip_on=False)
    return means, runs


def spread_apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions in the order of ``wanted``, at least ``gap`` apart, in [low, high], nearest to ``wanted`` (squares).

    Where n positions do not fit, the gap becomes what does. With the gaps taken off this is an isotonic regression,
    solved by pooling neighbours that are out of order.
    """
    n = len(wanted)
    gap = min(gap, (high - low) / max(n - 1, 1))
    order = sorted(range(n), key=wanted.__getitem__)
    pools: list[tuple[float, int]] = []  # (mean, size)
    for rank, i in enumerate(order):
        mean, size = wanted[i] - rank * gap, 1
        while pools and pools[-1][0] > mean:
            other_mean, other_size = pools.pop()
            mean, size = (mean * size + other_mean * other_size) / (size + other_size), size + other_size
        pools.append((mean, size))
    flat = np.repeat([mean for mean, _ in pools], [size for _, size in pools])
    placed = np.clip(flat, low, high - gap * (n - 1)) + gap * np.arange(n)
    return [float(placed[order.index(i)]) for i in range(n)]


def label_curves(axes: Axes, ends: dict[str, tuple[float, float]], look: dict[str, Style],
                 size: float = FONT_SIZE) -> None:
    """Write each curve's name right of ``axes``, whose limits are final, with a dotted line to where the curve ends.

    Args:
        axes: their scales and place in the figure are final too.
        ends: label -> (x, y) of the curve's last point.
        look: label -> style.
    """
    if not ends:
        return
    to_axes = axes.transData + axes.transAxes.inverted()
    height = axes.get_window_extent().height / axes.figure.dpi * 72  # points
    wanted = [float(to_axes.transform(end)[1]) for end in ends.values()]
    placed = spread_apart(wanted, 1.35 * size / height, 0.0, 1.0)
    for (label, end), y in zip(ends.items(), placed, strict=True):
        axes.annotate(
            label, xy=end, xytext=(1.04, y), textcoords="axes fraction", va="center", fontsize=size,
            color=look[label].color, fontweight="bold", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "linestyle": (0, (1, 2)), "linewidth": 1.0, "color": look[label].color,
                        "relpos": (0.0, 0.5), "shrinkA": 2, "shrinkB": 6},
        )


def save_figure(figure: Figure, path: Path) -> tuple[Path, Path]:
    """Write ``figure`` to ``path`` + .png and + .svg, the same bytes for the same figure; returns both paths."""
    png, svg = path.with_name(path.name + ".png"), path.with_name(path.name + ".svg")
    figure.savefig(png)
    with matplotlib.rc_context({"svg.hashsalt": "sae_zoo"}):  # ids within the file would be random
        figure.savefig(svg, metadata={"Date": None})
    return png, svg
