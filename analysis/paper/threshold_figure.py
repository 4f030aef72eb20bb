"""The loss against single thresholds of a trained JumpReLU SAE, and its slope as the straight-through gradient has it.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from analysis.paper.page import LINE, SIZE, add_axes, blank, say, say_lines, wrap
from analysis.paper.runs import NotMeasured, Runs
from sae_zoo.frontier.runs import some
from sae_zoo.frontier.style import FAINT, STYLES, TEXT

THRESHOLDS = "thresholds.json"


def read_thresholds(runs: Runs) -> dict[str, Any]:
    """The ``thresholds.json`` in or below the runs' folders: what ``python -m analysis.thresholds`` wrote.

    Raises:
        NotMeasured: if there is none, or more than one.
        ValueError: if it is something else.
    """
    paths = sorted({path.resolve() for directory in runs.directories for path in directory.rglob(THRESHOLDS)})
    if not paths:
        raise NotMeasured(f"no {THRESHOLDS} beside the records; python -m analysis.thresholds RUN writes it")
    if len(paths) > 1:
        raise NotMeasured(f"there are {len(paths)} {THRESHOLDS}: {some([str(path) for path in paths])}; one run's is "
                          "drawn at a time, take the others away")
    try:
        found = json.loads(paths[0].read_text())
        for latent in found["latents"]:
            columns = [np.array(latent[key], float) for key in ("thresholds", "loss", "gradient")]
            if (len({len(column) for column in columns}) > 1 or not np.isfinite(columns).all()
                    or latent["threshold"] <= 0):
                raise ValueError("equally many finite thresholds, losses and gradients are expected")
        if not found["latents"] or not found["bandwidth"] > 0:
            raise ValueError("a bandwidth and at least one latent are expected")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{paths[0]} is not what analysis.thresholds writes: {error!r}; write it again") from None
    return found


def window_slope(thresholds: np.ndarray, loss: np.ndarray, bandwidth: float) -> tuple[np.ndarray, np.ndarray]:
    """Differences of a loss over windows of one bandwidth: where (their middles) and how steep."""
    inside = (thresholds - bandwidth / 2 >= thresholds[0]) & (thresholds + bandwidth / 2 <= thresholds[-1])
    at = thresholds[inside]
    ends = [np.interp(at + side * bandwidth / 2, thresholds, loss) for side in (-1, 1)]
    return at, (ends[1] - ends[0]) / bandwidth


def draw_thresholds(runs: Runs) -> Figure:
    """A column a latent: above the loss, below its slope.

    Raises:
        NotMeasured, ValueError: as :func:`read_thresholds`.
    """
    found = read_thresholds(runs)
    latents, color = found["latents"], STYLES["jumprelu"].color
    width, height, left, gap = 1.75, 1.1, 0.62, 0.5
    page_width = left + len(latents) * (width + gap) - gap + 0.15
    foot = wrap([f"units in which E||x||² is 1; all else as trained; bandwidth {found['bandwidth']:g}, "
                 f"{found['kernel']}; dots: differences of the loss above over one bandwidth",
                 "dashed: where training left the threshold"], page_width - 0.2)
    bottom = 0.5 + LINE * len(foot)
    figure = blank(page_width, bottom + 2 * height + 1.25)
    top = figure.get_figheight()
    say(figure, "Loss against one latent's threshold, and its slope", 0.1, top - 0.08, SIZE + 1.5, fontweight="bold")
    say(figure, f"{found['hook']}  ·  JumpReLU at L0 {found['l0']:.1f}, d_sae {found['d_sae']:,}  ·  "
                f"{found['n_rows']:,} held-out tokens", 0.1, top - 0.3, SIZE - 1)
    for i, latent in enumerate(latents):
        x = left + i * (width + gap)
        theta, loss, gradient = (np.array(latent[key]) for key in ("thresholds", "loss", "gradient"))
        above = add_axes(figure, x, bottom + height + 0.35, width, height)
        above.plot(theta, 1e6 * (loss - loss.min()), color=color, linewidth=1.6)
        above.set_title(f"latent {latent['latent']}, on {latent['frequency']:.2%}", loc="left", fontsize=SIZE,
                        color=TEXT)
        below = add_axes(figure, x, bottom, width, height)
        below.axhline(0, color=FAINT, linewidth=0.6)
        at, slope = window_slope(theta, loss, found["bandwidth"])
        below.plot(at, 1e4 * slope, ".", color=TEXT, markersize=2.5, label="differences of the loss")
        below.plot(theta, 1e4 * gradient, color=color, linewidth=1.4, label="straight-through gradient")
        for axes in (above, below):
            axes.axvline(latent["threshold"], color=TEXT, linewidth=0.8, linestyle=(0, (3, 2)))
            axes.set_xlim(theta[0], theta[-1])
            axes.tick_params(color=FAINT, labelcolor=TEXT, labelsize=SIZE, length=2.5)
            axes.tick_params(labelbottom=axes is below)
            axes.spines[["top", "right"]].set_visible(False)
            axes.spines[["left", "bottom"]].set_color(FAINT)
    say(figure, "loss above its least (millionths)", 0.1, bottom + 2 * height + 0.72, SIZE - 1)
    say(figure, "slope (ten-thousandths)", 0.1, bottom + height + 0.22, SIZE - 1)
    say(figure, "threshold", left, bottom - 0.2)
    handles, labels = below.get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right", ncols=2, frameon=False, fontsize=SIZE - 1, labelcolor=TEXT,
                  borderpad=0, borderaxespad=0, handlelength=1.6, bbox_to_anchor=(0.99, (bottom + height + 0.24) / top))
    say_lines(figure, foot, 0.1, 0.04 + LINE * len(foot))
    return figure
