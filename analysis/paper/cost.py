"""What training costs, per variant: a step beside its encoder GEMM where that was measured, else the runs' seconds."""

from __future__ import annotations

import json
from typing import Any

from matplotlib.figure import Figure

from analysis.paper.curves import draw_curves
from analysis.paper.page import LINE, SIZE, add_axes, blank, say, say_lines, wrap
from analysis.paper.runs import Runs
from sae_zoo.frontier.runs import some
from sae_zoo.frontier.style import FAINT, TEXT, styles

STEP = "step.json"


def read_step(runs: Runs) -> dict[str, Any] | None:
    """The ``step.json`` in or below the runs' folders: what ``python -m benchmarks step --json`` printed last.

    Returns:
        None where there is no such file.

    Raises:
        ValueError: if there are several, or it is something else.
    """
    paths = sorted({path.resolve() for directory in runs.directories for path in directory.rglob(STEP)})
    if not paths:
        return None
    if len(paths) > 1:
        raise ValueError(f"there are {len(paths)} {STEP}: {some([str(path) for path in paths])}; one machine's figures "
                         "are drawn at a time, take the others away")
    try:
        step = json.loads(paths[0].read_text())
        step["shape"] = tuple(map(int, step["shape"]))
        step["ratios"] = {name: float(variant["ratio"]) for name, variant in step["variants"].items()}
        if len(step["shape"]) != 4 or not step["ratios"]:
            raise ValueError("a shape of four numbers and at least one variant are expected")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{paths[0]} is not the JSON line of benchmarks step: {error!r}; write it again with "
                         f"python -m benchmarks step --json | tail -n 1 > {STEP}") from None
    return step


def draw_cost(runs: Runs) -> Figure:
    """A whole training step of each variant in units of its encoder GEMM; without ``step.json`` seconds against L0.

    Raises:
        NotMeasured: if there is neither.
        ValueError: as :func:`read_step`.
    """
    step = read_step(runs)
    if step is None:
        return draw_curves(runs, "seconds_training")
    ratios = dict(sorted(step["ratios"].items()))
    look = styles(ratios)
    d_in, d_sae, batch, l0 = step["shape"]
    left, width, height = 0.25 + 0.075 * max(map(len, ratios)), 2.5, 0.26 * len(ratios)
    foot = wrap(["forward, backward, optimiser, decoder constraint; median over interleaved rounds"],
                left + width + 0.15)
    bottom = 0.3 + LINE * len(foot)
    figure = blank(left + width + 0.35, bottom + height + 0.6)
    top = figure.get_figheight()
    say(figure, "Training step (encoder GEMM = 1)", 0.1, top - 0.08, SIZE + 1.5, fontweight="bold")
    say(figure, f"d_in {d_in:,}  ·  d_sae {d_sae:,}  ·  batch {batch:,}  ·  L0 {l0:,}", 0.1, top - 0.3, SIZE - 1)
    axes = add_axes(figure, left, bottom, width, height)
    rows = range(len(ratios))
    axes.barh(rows, list(ratios.values()), height=0.62, color=[look[name].color for name in ratios])
    for row, ratio in zip(rows, ratios.values(), strict=True):
        axes.annotate(f"{ratio:.2f}", (ratio, row), xytext=(3, 0), textcoords="offset points", va="center",
                      fontsize=SIZE, color=TEXT)
    axes.axvline(1, color="white", linewidth=1.0, linestyle=(0, (3, 2)))
    axes.set_yticks(rows, list(ratios))
    axes.set_ylim(len(ratios) - 0.5, -0.5)
    axes.set_xlim(0, 1.04 * max(ratios.values()))
    axes.tick_params(color=FAINT, labelcolor=TEXT, labelsize=SIZE, length=2.5)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    for text, style in zip(axes.get_yticklabels(), look.values(), strict=True):
        text.set(color=style.color, fontweight="bold")
    say_lines(figure, foot, 0.1, 0.04 + LINE * len(foot))
    return figure
