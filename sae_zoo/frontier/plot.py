"""The plot of a frontier, beside its table: ``frontier.csv`` (one row a run), ``frontier.png`` and ``frontier.svg``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sae_zoo.frontier.pareto import SeedGroup, front_of_curves, group_seeds, is_curve, label_of
from sae_zoo.frontier.runs import Record, check_comparable, read_runs
from sae_zoo.frontier.style import (
    FONT_SIZE,
    FRONT,
    TEXT,
    Style,
    can_draw,
    draw_curve,
    label_curves,
    label_log_axes,
    save_figure,
    styles,
)
from sae_zoo.frontier.table import format_table, left_out, notes

PANELS = {"delta_lm_loss": "delta LM loss (nats per token)", "fvu": "FVU"}
_CSV_COLUMNS = (
    "label", "variant", "l0_target", "sparsity_coefficient", "l0", "l0_missed", "fvu", "delta_lm_loss",
    "loss_recovered", "dead_fraction", "seconds", "seed", "mse", "relative_reconstruction_bias", "lm", "hook",
    "data_id", "cache_id", "d_in", "d_sae", "n_tokens", "n_steps", "batch_size", "config_hash", "status", "error",
    "run_dir",
)


@dataclass(frozen=True)
class FrontierResult:
    """Result of :func:`draw_frontier`.

    Attributes:
        runs: one row a run, failed ones included; what ``csv`` holds.
        text: the table, the failed runs and the notes, to be printed.
        csv, png, svg: the files written.
    """

    runs: pd.DataFrame
    text: str
    csv: Path
    png: Path
    svg: Path


def _draw_panel(axes: Axes, groups: list[SeedGroup], key: str, look: dict[str, Style]) -> None:
    """One log-log panel: every run a marker, a line a label through its means over seeds, the front of all of them."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    curves, ends = [], {}
    for label, style in look.items():
        own = [group for group in groups if group.label == label]
        means, runs = draw_curve(axes, own, key, style)
        if not runs:
            continue
        curves += [means] if means and is_curve(own) else [[point] for point in means]
        ends[label] = max(means or runs)
    # From where every curve has begun: a worse one that was measured at a slightly lower L0 is no frontier.
    start = max((min(curve)[0] for curve in curves if len(curve) > 1), default=0)
    front = [point for point in front_of_curves(curves) if point[0] >= start]
    axes.plot(*zip(*front, strict=True), color=FRONT, linewidth=8, solid_capstyle="round", solid_joinstyle="round",
              zorder=1)
    axes.margins(0.07)
    axes.set_xlim(*axes.get_xlim())
    axes.set_ylim(*axes.get_ylim())
    label_log_axes(axes)
    axes.set_xlabel("L0 (active latents per token)", fontsize=FONT_SIZE + 1, color=TEXT)
    axes.set_title(PANELS[key], loc="left", fontsize=FONT_SIZE + 1, color=TEXT)
    label_curves(axes, ends, look)


def _draw(finished: list[Record], groups: list[SeedGroup], keys: list[str]) -> Figure:
    """The figure: a panel a metric, with the settings that all runs share as its title."""
    look = styles(group.label for group in groups)
    # In inches: what stands left of a panel, the panel, and the labels right of it.
    left, width, labels, bottom, height, top = 0.65, 3.9, 0.3 + 0.1 * max(map(len, look)), 0.85, 3.7, 1.05
    total_width, total_height = len(keys) * (left + width + labels), bottom + height + top
    figure = Figure(figsize=(total_width, total_height), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    for i, key in enumerate(keys):
        x = i * (left + width + labels) + left
        axes = figure.add_axes((x / total_width, bottom / total_height, width / total_width, height / total_height))
        _draw_panel(axes, groups, key, look)
    shared = finished[0]
    source = f"data {str(shared['data_id'])[:12]}" if shared["lm"] is None else shared["lm"]
    title = "  ·  ".join([source, *([] if shared["hook"] is None else [shared["hook"]])])
    say: dict[str, Any] = {"x": left / total_width, "color": TEXT}
    figure.text(s=title, y=1 - 0.18 / total_height, va="top", fontsize=FONT_SIZE + 3, fontweight="bold", **say)
    figure.text(s=f"d_sae {shared['d_sae']:,}  ·  {shared['n_tokens']:,} training tokens", y=1 - 0.47 / total_height,
                va="top", fontsize=FONT_SIZE, **say)
    figure.text(s="marker: a run    line: mean over seeds    grey: Pareto frontier (lower left is better)",
                y=0.14 / total_height, va="bottom", fontsize=FONT_SIZE - 2, **say)
    return figure


def draw_frontier(directories: Sequence[Path | str] | Path | str, output: Path | str | None = None) -> FrontierResult:
    """Table and plot of all runs in and below ``directories``.

    Args:
        directories: one or more run or sweep folders.
        output: folder for the files; by default the first of ``directories``.

    Raises:
        ValueError: if a folder does not exist or holds no record, no run has finished, the finished runs are not
            comparable, or there is nothing to draw.
    """
    directories = [directories] if isinstance(directories, (str, Path)) else list(directories)
    records, finished, failed = read_runs(directories)
    check_comparable(finished)
    groups = group_seeds(finished)

    keys = [key for key in PANELS if any(record.get(key) is not None for record in finished)]
    lines = [format_table(groups), "", *notes(finished, groups), *filter(None, (left_out(finished, k) for k in keys))]
    if failed:
        lines += [f"failed ({len(failed)}):", *(f"  {line}" for line in failed)]
    keys = [key for key in keys if any(can_draw(r.get("l0"), r.get(key)) for r in finished)]
    if not keys:
        raise ValueError(f"nothing to draw: no run in {directories[0]} has a positive L0 and a positive FVU")

    rows = [{**record, "label": label_of(record) if record in finished else record.get("label")} for record in records]
    runs = pd.DataFrame(rows, columns=list(_CSV_COLUMNS))
    folder = Path(directories[0] if output is None else output)
    folder.mkdir(parents=True, exist_ok=True)
    csv = folder / "frontier.csv"
    runs.to_csv(csv, index=False)
    png, svg = save_figure(_draw(finished, groups, keys), folder / "frontier")
    return FrontierResult(runs, "\n".join(lines).rstrip(), csv, png, svg)
