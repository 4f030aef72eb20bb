"""A metric against L0, one panel a (site, layer)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from analysis.paper.page import SIZE, lay_out
from analysis.paper.runs import NotMeasured, Runs
from sae_zoo.frontier.pareto import is_curve
from sae_zoo.frontier.runs import Record, run_name, some
from sae_zoo.frontier.style import FAINT, can_draw, draw_curve, label_curves, label_log_axes, readable_ticks


@dataclass(frozen=True)
class Metric:
    """How a metric is drawn.

    Attributes:
        title: of the figure.
        scale: of y: ``linear``; ``log``; or ``log_or_0``, where 0 is a finding: if there is one, the axis is linear
            from 0 to one latent, and logarithmic above it.
        percent: the record has a share, the axis says percent; unless it is logarithmic it begins at 0.
        level: a value that means something, as a line.
        note: what a reader must know, for the foot of the figure.
    """

    title: str
    scale: Literal["linear", "log", "log_or_0"] = "linear"
    percent: bool = False
    level: float | None = None
    note: str = ""

    def has(self, run: Record, key: str) -> bool:
        """Whether ``run`` has a value that can be drawn."""
        return can_draw(run.get("l0"), run.get(key), log=self.scale == "log")


METRICS = {
    "delta_lm_loss": Metric("Delta LM loss (nats per token)", "log"),
    "fvu": Metric("Fraction of variance unexplained", "log"),
    "fraction_above_1pct": Metric("Latents that fire on > 1 % of tokens (%)", "log_or_0", percent=True),
    "fraction_above_10pct": Metric("Latents that fire on > 10 % of tokens (%)", "log_or_0", percent=True),
    "relative_reconstruction_bias": Metric("Relative reconstruction bias", level=1.0,
                                           note="dashed: no bias; below it reconstructions are too short"),
    "dead_fraction": Metric("Dead latents (%)", percent=True, note="dead: fired on none of the evaluation tokens"),
    "r_l0": Metric("Uniformity of attributed effect, r_L0"),
    "seconds_training": Metric("Training time (seconds a run, as recorded)"),
}


def draw_curves(runs: Runs, key: str) -> Figure:
    """``key`` of :data:`METRICS` against L0: runs as markers, a line through means over seeds.

    Raises:
        NotMeasured: if no run has a value that can be drawn.
    """
    metric, look = METRICS[key], runs.look
    places = [place for place, groups in runs.places.items()
              if any(metric.has(run, key) for group in groups for run in group.runs)]
    if not places:
        raise NotMeasured(f"no run has {key}" + (" above 0" if metric.scale == "log" else ""))
    scale, foot = metric.scale, ["marker: a run    line: mean over seeds", *filter(None, [metric.note])]
    if scale == "log_or_0":
        scale = "symlog" if any(run.get(key) == 0 for run in runs.finished) else "log"
    if scale == "symlog":
        foot.append("the axis is logarithmic down to a single latent")
    alone = len(places) == 1 and len(look) <= 12  # more labels than that do not fit beside a panel
    page = lay_out(
        places, metric.title, runs.setting, panel=(2.35, 2.0) if alone else (1.9, 1.45), left=0.48,
        right=0.2 + 0.085 * max(map(len, look)) if alone else 0.12, legend=None if alone else look,
        x_label="L0 (active latents per token)", foot=foot)
    ends, one_latent, factor = {}, 1 / runs.finished[0]["d_sae"], 100 if metric.percent else 1
    for place, axes in page.axes.items():
        axes.set_xscale("log")
        axes.set_yscale(scale, **({"linthresh": one_latent, "linscale": 0.4} if scale == "symlog" else {}))
        if metric.level is not None:
            axes.axhline(metric.level, color=FAINT, linewidth=0.9, linestyle=(0, (4, 2)), zorder=1.5)
        for label, style in look.items():
            own = [group for group in runs.places[place] if group.label == label]
            means, drawn = draw_curve(axes, own, key, style, marker_size=4.4 if alone else 3.8)
            if drawn:
                ends[label] = max(means or drawn)
        axes.margins(0.07)
    for axes in page.axes.values():  # all is drawn, so the limits that panels share are final
        axes.set_xlim(*axes.get_xlim())
        low, high = axes.get_ylim()
        axes.set_ylim(0 if metric.percent and scale != "log" else low, high)
        if scale == "linear":
            axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        elif scale == "symlog":
            axes.yaxis.set_major_locator(FixedLocator([0, *readable_ticks(one_latent, max(high, 10 * one_latent))]))
        label_log_axes(axes, SIZE)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{factor * value:.6g}"))
    if alone:
        label_curves(axes, ends, look, SIZE)
    return page.figure


def notes_on_curves(runs: Runs) -> list[str]:
    """A line for each metric that some runs have and others lack, and for runs that no line joins."""
    notes = []
    for key, metric in METRICS.items():
        lack = [run_name(run) for run in runs.finished if not metric.has(run, key)]
        if 0 < len(lack) < len(runs.finished):
            notes.append(f"note: {key} is missing{' or not above 0' if metric.scale == 'log' else ''} in "
                         f"{len(lack)} of {len(runs.finished)} runs, left out of its figure: {some(lack)}")
    for (site, layer), groups in runs.places.items():
        for label in sorted({group.label for group in groups}):
            if not is_curve([group for group in groups if group.label == label]):
                where = f" at {site}.{layer}" if site else ""
                notes.append(f"note: no line joins the runs of {label}{where}: some have the same target and seed, or "
                             "the same L0; they differ in more than their seed, so they are not averaged")
    return notes
