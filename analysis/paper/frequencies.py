"""How often latents fire: a histogram a label, one panel a (site, layer), dead latents apart on the left."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis.paper.page import SIZE, lay_out
from analysis.paper.runs import NotMeasured, Place, Runs
from sae_zoo.frontier.pareto import SeedGroup
from sae_zoo.frontier.runs import run_name, some
from sae_zoo.frontier.style import FAINT, TEXT

LATENTS = "latents.csv"
BINS_A_DECADE = 4


@dataclass(frozen=True)
class Histogram:
    """Firing frequencies of all latents of one group of seeds.

    Attributes:
        edges: [bins + 1] log10 of the frequency.
        shares: [bins] share of the latents, mean over seeds.
        dead: share of latents that never fired; ``shares`` and ``dead`` sum to one.
    """

    edges: np.ndarray
    shares: np.ndarray
    dead: float


def histogram(frequencies: np.ndarray, lowest: int) -> Histogram:
    """Of ``frequencies`` [latents] (shares of tokens, 0 where a latent is dead), from 10^``lowest`` to 1."""
    edges = np.linspace(lowest, 0, -lowest * BINS_A_DECADE + 1)
    counts, _ = np.histogram(np.log10(frequencies[frequencies > 0]), edges)
    return Histogram(edges, counts / len(frequencies), float((frequencies == 0).mean()))


def _targeted(groups: list[SeedGroup]) -> list[SeedGroup]:
    return [group for group in groups if group.l0_target is not None and group.setting[1] is None]


def common_target(runs: Runs) -> float:
    """The middle one of the L0 targets that every label has at every place where it was trained.

    Raises:
        NotMeasured: if there is none.
    """
    sets = [{group.l0_target for group in _targeted(groups) if group.label == label}
            for groups in runs.places.values() for label in {group.label for group in groups}]
    common = sorted(set.intersection(*sets))
    if not common:
        raise NotMeasured("no L0 target is common to all variants, sites and layers")
    return common[len(common) // 2]


def _chosen(runs: Runs) -> dict[tuple[Place, str], list[Path]]:
    """The latents.csv, there or not, of every seed at the common target, by place and label."""
    target, chosen = common_target(runs), {}
    for place, groups in runs.places.items():
        for group in _targeted(groups):
            if group.l0_target == target:
                chosen.setdefault((place, group.label), []).extend(Path(r["run_dir"]) / LATENTS for r in group.runs)
    return chosen


def _read(path: Path) -> np.ndarray:
    try:
        frequencies = pd.read_csv(path, usecols=["frequency"])["frequency"].to_numpy(float)
        if not len(frequencies) or not ((frequencies >= 0) & (frequencies <= 1)).all():
            raise ValueError("a share of tokens for each latent is expected")
        return frequencies
    except ValueError as error:  # also what pandas raises for a file that is empty or cannot be parsed
        raise ValueError(f"{path} has no frequencies: {error}; evaluate that run again") from None


def histograms(runs: Runs) -> dict[tuple[Place, str], Histogram]:
    """The histogram of each label at each place, at the common target; none where a seed has no latents.csv.

    Raises:
        NotMeasured: if there is no common target, or no file.
        ValueError: if a file is not as written by an evaluation.
    """
    found = {key: [_read(path) for path in paths] for key, paths in _chosen(runs).items()
             if all(path.exists() for path in paths)}
    if not found:
        raise NotMeasured(f"no {LATENTS} beside the records of L0 target {common_target(runs):g}")
    lowest = min(float(seed[seed > 0].min(initial=0.1)) for seeds in found.values() for seed in seeds)
    lowest = math.floor(np.log10(lowest))
    result = {}
    for key, seeds in found.items():
        own = [histogram(frequencies, lowest) for frequencies in seeds]
        result[key] = Histogram(own[0].edges, np.mean([h.shares for h in own], axis=0),
                                float(np.mean([h.dead for h in own])))
    return result


def draw_frequencies(runs: Runs) -> Figure:
    """Histograms of firing frequencies at the common target, a row a label.

    Raises:
        NotMeasured, ValueError: as :func:`histograms`.
    """
    of = histograms(runs)
    look = {label: style for label, style in runs.look.items() if label in {label for _, label in of}}
    places = [place for place in runs.places if place in {place for place, _ in of}]
    lowest = int(next(iter(of.values())).edges[0])
    scale = 0.9 / max(h.shares.max() for h in of.values())
    page = lay_out(
        places, f"Firing frequency of latents, at L0 target {common_target(runs):g}", runs.setting,
        panel=(2.6 if len(places) == 1 else 1.9, 0.32 * len(look)), left=0.25 + 0.075 * max(map(len, look)),
        x_label="share of tokens on which a latent fires (%)",
        foot=[f"height: share of all latents in a quarter of a decade (top of a row: {1 / scale:.0%}), mean over seeds",
              "left: dead latents, a bar no higher than its row"])
    dead_at = lowest - 1.0
    for place, axes in page.axes.items():
        for row, (label, style) in enumerate(look.items()):
            base = len(look) - 1 - row
            axes.axhline(base, color=FAINT, linewidth=0.5, zorder=1)
            if (place, label) not in of:
                continue
            own = of[place, label]
            axes.stairs(base + scale * own.shares, own.edges, baseline=base, fill=True, color=style.color, alpha=0.35)
            axes.stairs(base + scale * own.shares, own.edges, baseline=base, color=style.color, linewidth=0.9)
            axes.bar(dead_at, min(scale * own.dead, 0.9), 0.6, base, color=style.color, linewidth=0)
            axes.annotate(f"{own.dead:.1%}", (dead_at, base + min(scale * own.dead, 0.9)), xytext=(0, 1),
                          textcoords="offset points", ha="center", fontsize=SIZE - 2, color=TEXT)
        axes.set_xlim(lowest - 1.6, 0)
        axes.set_ylim(0, len(look) + 0.1)
        decades = range(0, lowest - 1, -2)  # every second one: their numbers and "dead" must fit
        axes.set_xticks([dead_at, *decades], ["dead", *(f"{100 * 10.0**decade:.6g}" for decade in decades)])
        axes.set_xticks(range(lowest, 1), minor=True)
        axes.set_yticks([len(look) - 1 - row + 0.25 for row in range(len(look))], list(look))
        axes.tick_params(which="both", color=FAINT, labelcolor=TEXT, labelsize=SIZE)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        # A panel beside another has no labels.
        for text, style in zip(axes.get_yticklabels(), look.values(), strict=False):
            text.set(color=style.color, fontweight="bold")
    return page.figure


def notes_on_frequencies(runs: Runs) -> list[str]:
    """A line for the runs at the common target that have no latents.csv, and one for those that missed that target."""
    try:
        paths = [path for paths in _chosen(runs).values() for path in paths]
    except NotMeasured:
        return []
    notes = []
    without = ["/".join(path.parts[-3:-1]) for path in paths if not path.exists()]
    if 0 < len(without) < len(paths):
        notes.append(f"note: {len(without)} of {len(paths)} runs at L0 target {common_target(runs):g} have no "
                     f"{LATENTS}; their variants have no histogram there: {some(without)}")
    parents = {path.parent for path in paths}
    missed = [f"{run_name(run)} (L0 {run['l0']:.1f})" for run in runs.finished
              if Path(run["run_dir"]) in parents and run.get("l0_missed")]
    if missed:
        notes.append(f"note: missed the L0 target {common_target(runs):g} of the histograms: {some(missed)}")
    return notes
