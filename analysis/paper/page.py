"""A page of small multiples: a head, a panel a (site, layer), sites down and layers across, at the size of print."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.paper.runs import Place
from sae_zoo.frontier.style import FAINT, TEXT, Style

SIZE = 8.0  # points, of most text: three panels fill the text width of a paper, one a column of it
LINE = 0.15  # inches, of a line of text
_CHARACTER = 0.05  # inches, about, of text in SIZE - 1


@dataclass(frozen=True)
class Page:
    """A figure with its panels.

    Attributes:
        axes: by place, in rows of sites and columns of layers; x is shared by all, y by a row.
    """

    figure: Figure
    axes: dict[Place, Axes]


def blank(width: float, height: float) -> Figure:
    """An empty figure of that many inches."""
    figure = Figure(figsize=(width, height), dpi=200, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def add_axes(figure: Figure, x: float, y: float, width: float, height: float, **kwargs) -> Axes:
    """Axes whose lower left corner is at (x, y); all in inches."""
    page_width, page_height = figure.get_size_inches()
    return figure.add_axes((x / page_width, y / page_height, width / page_width, height / page_height), **kwargs)


def say(figure: Figure, text: str, x: float, y: float, size: float = SIZE, **kwargs) -> None:
    """A line of text whose upper left corner is at (x, y) inches."""
    width, height = figure.get_size_inches()
    figure.text(x / width, y / height, text, fontsize=size, va="top", color=TEXT, **kwargs)


def say_lines(figure: Figure, lines: Sequence[str], x: float, y: float) -> None:
    """Lines of small print below each other, the first at (x, y) inches."""
    for i, line in enumerate(lines):
        say(figure, line, x, y - i * LINE, SIZE - 1)


def wrap(parts: Iterable[str], width: float) -> list[str]:
    """Each of ``parts`` as lines of small print that fit into ``width`` inches."""
    return [line for part in parts for line in textwrap.wrap(part, int(width / _CHARACTER))]


def lay_out(places: Iterable[Place], title: str, setting: str, *, panel: tuple[float, float], left: float,
            right: float = 0.12, legend: dict[str, Style] | None = None, x_label: str, foot: Sequence[str]) -> Page:
    """An empty page.

    Args:
        places: (site, layer) of each panel.
        title: what the panels show.
        setting: what all runs share.
        panel: (width, height) of a panel in inches.
        left, right: inches for what stands left and right of the panels.
        legend: label -> style, between head and panels; None for labels beside the curves.
        x_label: of all panels.
        foot: how the panels are to be read, in small print.
    """
    places = list(places)
    sites, layers = list(dict.fromkeys(site for site, _ in places)), sorted({layer for _, layer in places})
    gap_x, gap_y = 0.16, 0.36
    width, height = panel
    page_width = max(left + len(layers) * (width + gap_x) - gap_x + right, 3.5)  # so that titles fit
    heads, feet = wrap([setting], page_width - 0.2), wrap(foot, page_width - 0.2)
    columns = max(1, int((page_width - 0.2) / (0.38 + 0.075 * max(map(len, legend))))) if legend else 1
    legend_height = 0.06 + LINE * -(-len(legend) // columns) if legend else 0.0
    top = 0.3 + LINE * len(heads) + legend_height + 0.26
    bottom = 0.48 + LINE * len(feet)
    page_height = top + len(sites) * (height + gap_y) - gap_y + bottom
    figure = blank(page_width, page_height)
    say(figure, title, 0.1, page_height - 0.08, SIZE + 1.5, fontweight="bold")
    say_lines(figure, heads, 0.1, page_height - 0.3)
    say(figure, x_label, left, bottom - 0.25)
    say_lines(figure, feet, 0.1, 0.04 + LINE * len(feet))
    if legend:
        handles = [Line2D([], [], color=style.color, marker=style.marker, markersize=4.5, linewidth=1.2,
                          markeredgecolor="white", markeredgewidth=0.4, label=label) for label, style in legend.items()]
        figure.legend(handles=handles, loc="upper left", ncols=min(columns, len(legend)), frameon=False,
                      fontsize=SIZE, labelcolor=TEXT, handlelength=1.8, handletextpad=0.5, columnspacing=1.2,
                      borderpad=0.0, borderaxespad=0.0, labelspacing=0.25,
                      bbox_to_anchor=(0.1 / page_width, 1 - (0.34 + LINE * len(heads)) / page_height))
    axes: dict[Place, Axes] = {}
    for site, layer in places:
        row, column = sites.index(site), layers.index(layer)
        in_row = next((panel for (other, _), panel in axes.items() if other == site), None)
        axes[site, layer] = own = add_axes(
            figure, left + column * (width + gap_x), bottom + (len(sites) - 1 - row) * (height + gap_y), width, height,
            sharex=next(iter(axes.values()), None), sharey=in_row)
        if site:
            own.set_title(f"{site}, layer {layer}", loc="left", fontsize=SIZE, color=TEXT, pad=3)
        below = any(other in sites[row + 1:] and at == layer for other, at in places)
        own.tick_params(labelbottom=not below, labelleft=in_row is None, length=2.5, pad=2)
        own.tick_params(which="minor", length=1.5)
        own.spines[["top", "right"]].set_visible(False)
        own.spines[["left", "bottom"]].set_color(FAINT)
    return Page(figure, axes)
