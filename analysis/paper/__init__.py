"""The paper's figures (arXiv 2407.14435), from run records: ``python -m analysis.paper SWEEP... [--output DIR]``.

In a notebook each figure is a function of the runs that gives a matplotlib ``Figure``:

    from analysis.paper import FIGURES, load_runs
    runs = load_runs(["outputs/runs/builtin-residual.3"])
    FIGURES["fvu"](runs)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from analysis.paper.advantage import draw_advantage
from analysis.paper.cost import draw_cost
from analysis.paper.curves import draw_curves, notes_on_curves
from analysis.paper.frequencies import draw_frequencies, notes_on_frequencies
from analysis.paper.runs import NotMeasured, Runs, load_runs
from analysis.paper.threshold_figure import draw_thresholds
from analysis.paper.windows import draw_windows
from sae_zoo.frontier.style import save_figure

__all__ = ["FIGURES", "NotMeasured", "PaperResult", "Runs", "draw_paper", "load_runs"]

# What each figure is drawn by; a function raises NotMeasured where the runs lack what it shows.
FIGURES: dict[str, Callable[[Runs], Figure]] = {
    "delta_lm_loss": partial(draw_curves, key="delta_lm_loss"),
    "fvu": partial(draw_curves, key="fvu"),
    "advantage": draw_advantage,
    "windows": lambda runs: draw_windows(),
    "thresholds": draw_thresholds,
    "above_1pct": partial(draw_curves, key="fraction_above_1pct"),
    "above_10pct": partial(draw_curves, key="fraction_above_10pct"),
    "frequencies": draw_frequencies,
    "shrinkage": partial(draw_curves, key="relative_reconstruction_bias"),
    "dead": partial(draw_curves, key="dead_fraction"),
    "r_l0": partial(draw_curves, key="r_l0"),
    "cost": draw_cost,
}


@dataclass(frozen=True)
class PaperResult:
    """What :func:`draw_paper` made.

    Attributes:
        text: a line a figure (its PNG, or why it was not drawn), then what a reader must know, to be printed.
        files: the PNG and the SVG of each figure that was drawn, by its name.
    """

    text: str
    files: dict[str, tuple[Path, Path]]


def draw_paper(directories: Iterable[Path | str], output: Path | str | None = None) -> PaperResult:
    """Draw every figure that the runs in and below ``directories`` have the numbers for.

    Args:
        directories: run or sweep folders, of one language model; of several sites, layers and seeds as they are.
        output: folder for ``fig_<name>.png`` and ``.svg``; by default the first of ``directories``.

    Raises:
        ValueError: as :func:`load_runs`, or if a latents.csv, step.json or thresholds.json is damaged; nothing is
            written then.
    """
    runs = load_runs(directories)
    figures: dict[str, Figure | NotMeasured] = {}
    for name, draw in FIGURES.items():  # all before the first is written: a mistake leaves no half of them
        try:
            figures[name] = draw(runs)
        except NotMeasured as why:
            figures[name] = why
    folder = runs.directories[0] if output is None else Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: save_figure(figure, folder / f"fig_{name}") for name, figure in figures.items()
             if isinstance(figure, Figure)}
    lines = [str(files[name][0]) if name in files else f"fig_{name}: not drawn: {why}" for name, why in figures.items()]
    notes = [*runs.notes, *notes_on_curves(runs), *notes_on_frequencies(runs)]
    if runs.failed:
        notes += [f"failed ({len(runs.failed)}):", *(f"  {line}" for line in runs.failed)]
    return PaperResult("\n".join([*lines, *([""] if notes else []), *notes]), files)
