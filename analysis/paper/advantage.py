"""How much better JumpReLU is than TopK and Gated at the same L0, and how sure that is."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from analysis.claims.compare import ratios_by_l0
from analysis.claims.evidence import Evidence
from analysis.claims.frontiers import LOSSES
from analysis.claims.intervals import Estimate
from analysis.paper.page import LINE, SIZE, add_axes, blank, say, say_lines, wrap
from analysis.paper.runs import NotMeasured, Runs
from sae_zoo.frontier.labels import NAMES
from sae_zoo.frontier.style import STYLES, TEXT, label_log_axes

# Those of claims C1 and C2; of Gated's two forms the better at each L0. ReLU is so far away that it would hide the
# rest.
OTHERS = {"topk": ("topk",), "gated": ("gated", "gated_ri_l1")}
_BESIDE = 1.04  # between the bars of two variants at one L0


def ratios(runs: Runs) -> dict[str, dict[str, dict[int, Estimate]]]:
    """JumpReLU over the others: metric -> label -> L0 -> geometric mean ratio over sites, layers and seeds.

    Raises:
        NotMeasured: if there are no curves of JumpReLU and one of them.
    """
    evidence = Evidence(runs.directories)
    found = {metric: {label: ratios_by_l0(evidence, evidence.arm("jumprelu"), [evidence.arm(form) for form in forms],
                                          metric)
                      for label, forms in OTHERS.items()} for metric in LOSSES}
    found = {metric: own for metric, of_labels in found.items()
             if (own := {label: ratio for label, ratio in of_labels.items() if ratio})}
    if not found:
        raise NotMeasured("no curves of JumpReLU and TopK or Gated at the same site, layer and seed")
    return found


def draw_advantage(runs: Runs) -> Figure:
    """A panel a metric: ratio against L0, a bar for its 95 % interval.

    Raises:
        NotMeasured: as :func:`ratios`.
    """
    found = ratios(runs)
    width, height, left, gap = 2.6, 2.1, 0.5, 0.5
    page_width = left + len(found) * (width + gap) - gap + 0.15
    pairs = max(ratio.n_pairs for of_labels in found.values() for own in of_labels.values() for ratio in own.values())
    foot = wrap([f"geometric mean over up to {pairs} pairs of site/layer and seed; bar: 95 % interval, where there are "
                 "three or more; of Gated's forms the better"], page_width - 0.2)
    bottom = 0.5 + LINE * len(foot)
    figure = blank(page_width, bottom + height + 0.95)
    top = figure.get_figheight()
    say(figure, "JumpReLU's loss over that of TopK and Gated, at the same L0", 0.1, top - 0.08, SIZE + 1.5,
        fontweight="bold")
    say(figure, runs.setting, 0.1, top - 0.3, SIZE - 1)
    handles = {}
    for i, (metric, of_labels) in enumerate(found.items()):
        axes = add_axes(figure, left + i * (width + gap), bottom, width, height)
        axes.set(xscale="log", yscale="log")
        axes.axhline(1, color=TEXT, linewidth=0.8, linestyle=(0, (3, 2)))
        for j, (label, own) in enumerate(of_labels.items()):
            style, l0s = STYLES[label], [at * _BESIDE ** (j - (len(of_labels) - 1) / 2) for at in own]
            means = [ratio.effect for ratio in own.values()]
            (handles[NAMES[label]],) = axes.plot(l0s, means, color=style.color, marker=style.marker, markersize=4,
                                                 markeredgecolor="white", markeredgewidth=0.4, linewidth=1.1)
            for at, ratio in zip(l0s, own.values(), strict=True):
                if ratio.interval is not None:
                    axes.plot([at, at], ratio.interval, color=style.color, linewidth=1.1)
        axes.margins(0.06)
        axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())
        label_log_axes(axes, SIZE)
        l0s = sorted({at for own in of_labels.values() for at in own})
        axes.xaxis.set_major_locator(FixedLocator(l0s))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_title(f"{LOSSES[metric]}: JumpReLU / other", loc="left", fontsize=SIZE, color=TEXT)
    say(figure, "L0 (active latents per token); below the dashed line JumpReLU is better", left, bottom - 0.25)
    figure.legend(handles.values(), handles, loc="upper right", ncols=len(handles), frameon=False, fontsize=SIZE,
                  labelcolor=TEXT, borderpad=0, borderaxespad=0, handlelength=1.6, bbox_to_anchor=(0.99, 1 - 0.4 / top))
    say_lines(figure, foot, 0.1, 0.04 + LINE * len(foot))
    return figure
