"""JumpReLU and the Heaviside step with their pseudo-derivatives: formulas, no runs."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure

from analysis.paper.page import SIZE, add_axes, blank, say
from sae_zoo.frontier.style import FAINT, STYLES, TEXT

THRESHOLD, BANDWIDTH = 1.0, 0.8  # of the rectangle; wide enough to be seen

# K(u), its standard deviation, and how it is drawn (in none of the variants' colours). Each integrates to one.
KERNELS = {
    "rectangle": (lambda u: (np.abs(u) < 0.5) * 1.0, 12**-0.5, TEXT, "-"),
    "triangle": (lambda u: np.maximum(1 - np.abs(u), 0), 6**-0.5, "#E69F00", (0, (5, 1.5))),
    "Epanechnikov": (lambda u: np.maximum(0.75 * (1 - u**2), 0), 5**-0.5, "#CC79A7", (0, (1, 1))),
    "Gaussian": (lambda u: np.exp(-0.5 * u**2) / math.sqrt(2 * math.pi), 1.0, "#56B4E9", (0, (5, 1.5, 1, 1.5))),
}


def window(z: np.ndarray, kernel: str) -> np.ndarray:
    """(1 / eps) K((z - theta) / eps), with an eps at which the kernel has the rectangle's
    variance."""
    function, std, *_ = KERNELS[kernel]
    bandwidth = BANDWIDTH * KERNELS["rectangle"][1] / std
    return function((z - THRESHOLD) / bandwidth) / bandwidth


def draw_windows() -> Figure:
    """The two functions, and below each its pseudo-derivative with respect to the threshold, for every kernel."""
    width, height, left, gap = 2.1, 1.15, 0.5, 0.62
    figure = blank(left + 2 * width + gap + 0.12, 3.95)
    say(figure, "JumpReLU, the Heaviside step, and their pseudo-derivatives", 0.1, 3.87, SIZE + 1.5, fontweight="bold")
    say(figure, "kernels at equal variance; grey: the window of the rectangle, θ ± ε/2", 0.1, 3.65, SIZE - 1)
    z = np.linspace(0, 2 * THRESHOLD, 2001)
    on = np.where(z > THRESHOLD, 1.0, 0.0)
    on[np.argmax(on)] = np.nan  # a jump is not joined
    edges = [THRESHOLD - BANDWIDTH / 2, THRESHOLD, THRESHOLD + BANDWIDTH / 2]
    columns = (
        ("JumpReLU$_θ$(z) = z H(z − θ)", z * on, (0, THRESHOLD), ("0", "θ"),
         "∂/∂θ :=  −(θ/ε) K((z − θ)/ε)", THRESHOLD, "−θ/ε"),
        ("H(z − θ)", on, (0, 1), ("0", "1"), "∂/∂θ :=  −(1/ε) K((z − θ)/ε)", 1.0, "−1/ε"),
    )
    for i, (name, values, at, names, below, factor, deepest) in enumerate(columns):
        x = left + i * (width + gap)
        top = add_axes(figure, x, 2.1, width, height)
        top.plot(z, values, color=STYLES["jumprelu"].color, linewidth=1.8)
        top.set_yticks(at, names)
        top.set_title(name, loc="left", fontsize=SIZE, color=TEXT)
        bottom = add_axes(figure, x, 0.55, width, height)
        for kernel, (_, _, color, dashes) in KERNELS.items():
            bottom.plot(z, -factor * window(z, kernel), color=color, linestyle=dashes, linewidth=1.4, label=kernel)
        bottom.set_yticks([-factor / BANDWIDTH, 0], [deepest, "0"])
        bottom.set_title(below, loc="left", fontsize=SIZE, color=TEXT)
        for axes in (top, bottom):
            axes.axvspan(edges[0], edges[2], color="#F0F0F0", zorder=0, linewidth=0)
            axes.set_xlim(0, 2 * THRESHOLD)
            axes.set_xticks([0, *edges], ["0", "θ − ε/2", "θ", "θ + ε/2"] if axes is bottom else [])
            axes.tick_params(color=FAINT, labelcolor=TEXT, labelsize=SIZE, length=2.5)
            axes.spines[["top", "right"]].set_visible(False)
            axes.spines[["left", "bottom"]].set_color(FAINT)
    handles, labels = bottom.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower left", ncols=len(labels), frameon=False, fontsize=SIZE, labelcolor=TEXT,
                  handlelength=2.6, borderpad=0, borderaxespad=0,
                  bbox_to_anchor=(left / figure.get_figwidth(), 0.1 / figure.get_figheight()))
    return figure
