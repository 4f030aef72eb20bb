"""``python -m analysis.frontier outputs/runs/<sweep>``: the table and the plot of one or several sweeps.

Reads nothing but run records, and writes ``frontier.csv`` (one row a run), ``frontier.png`` and ``frontier.svg``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from analysis.pareto import SeedGroup, front_of_curves, group_seeds, is_curve, label_of
from analysis.style import (
    FONT_SIZE, FRONT, TEXT, Style, can_draw, draw_curve, label_curves, label_log_axes, save_figure, styles,
)
from sae_zoo.records import FINISHED, read_records

Record = dict[str, Any]

# Runs are compared on one plot only if they agree on all of these.
COMPARABLE = ("lm", "hook", "data_id", "d_in", "d_sae", "n_tokens")
PANELS = {"delta_lm_loss": "delta LM loss (nats per token)", "fvu": "FVU"}
_CSV_COLUMNS = (
    "label", "variant", "l0_target", "sparsity_coefficient", "l0", "l0_missed", "fvu", "delta_lm_loss",
    "loss_recovered", "dead_fraction", "seconds", "seed", "mse", "relative_reconstruction_bias", "lm", "hook",
    "data_id", "cache_id", "d_in", "d_sae", "n_tokens", "n_steps", "batch_size", "config_hash", "status", "error",
    "run_dir",
)


@dataclass(frozen=True)
class FrontierResult:
    """What :func:`draw_frontier` made.

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


def run_name(record: Record) -> str:
    """A run's name for people: the last two parts of its folder, ``<sweep>/<job>``."""
    return "/".join(Path(record["run_dir"]).parts[-2:])


def some(names: Sequence[str]) -> str:
    """The first few of ``names``, and how many more there are."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def check_comparable(finished: Iterable[Record], keys: Iterable[str] = COMPARABLE) -> None:
    """Refuse runs that must not share a plot.

    Raises:
        ValueError: if they differ in one of ``keys``; it names the keys, the values and the runs.
    """
    finished = list(finished)
    differences = []
    for key in keys:
        runs_of: dict[Any, list[str]] = {}
        for record in finished:
            runs_of.setdefault(record.get(key), []).append(run_name(record))
        if len(runs_of) > 1:
            values = " against ".join(f"{value} ({some(names)})" for value, names in runs_of.items())
            differences.append(f"{key} differs: {values}")
    if differences:
        raise ValueError("these runs cannot share a frontier; draw them separately: " + "; ".join(differences))


def read_runs(directories: Iterable[Path | str]) -> tuple[list[Record], list[Record], list[str]]:
    """All runs in and below ``directories``, those that have finished, and a line for each that has not.

    A folder given twice, or with one inside the other, does not count its runs twice.

    Raises:
        ValueError: if a folder does not exist or holds no record, or no run has finished.
    """
    directories = list(directories)
    records = list({Path(record["run_dir"]).resolve(): record for record in read_records(directories)}.values())
    finished = [record for record in records if record.get("status") == FINISHED]
    failed = [f"{run_name(record)}: {' '.join(str(record.get('error')).split())}"
              for record in records if record.get("status") != FINISHED]
    if not finished:
        raise ValueError(f"no run has finished in {some([str(d) for d in directories])}; {len(failed)} failed, "
                         f"the first with {failed[0]}")
    return records, finished, failed


def _number(value: float | None, form: str, spread: float | None = None) -> str:
    if value is None:
        return "-"
    return f"{value:{form}}" + ("" if spread is None else f" ± {spread:{form}}")


def format_table(groups: Iterable[SeedGroup]) -> str:
    """Groups as aligned plain text: one row a group, means over seeds with their standard deviation."""
    groups = list(groups)

    def row(group: SeedGroup) -> list[str]:
        missed = "*" if any(run.get("l0_missed") for run in group.runs) else ""
        seed = str(group.runs[0].get("seed")) if len(group.runs) == 1 else f"{len(group.runs)} seeds"
        return [
            group.label,
            _number(group.l0_target, "g"),
            _number(group.mean("l0"), ".1f", group.spread("l0")) + missed,
            _number(group.mean("fvu"), ".4f", group.spread("fvu")),
            _number(group.mean("delta_lm_loss"), ".4f", group.spread("delta_lm_loss")),
            _number(group.mean("loss_recovered"), ".4f"),
            _number(group.mean("dead_fraction"), ".1%"),
            _number(group.mean("seconds"), ".0f"),
            seed,
        ]

    header = ["variant", "target L0", "measured L0", "FVU", "delta LM loss", "loss recovered", "dead share", "seconds",
              "seed"]
    rows = [header, *map(row, groups)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join([cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:]))]).rstrip()
             for cells in rows]
    rule = "-" * max(map(len, lines))
    for i in range(len(groups) - 1, 0, -1):  # an empty line between labels, where a label has several rows
        if groups[i].label != groups[i - 1].label and len(groups) > len({group.label for group in groups}):
            lines.insert(i + 1, "")
    return "\n".join([lines[0], rule, *lines[1:]])


def _notes(finished: list[Record], groups: list[SeedGroup]) -> list[str]:
    """What a reader of the table must know besides its numbers, a line each."""
    notes = []
    missed = [f"{run_name(r)} (L0 {_number(r.get('l0'), '.1f')} for {_number(r.get('l0_target'), 'g')})"
              for r in finished if r.get("l0_missed")]
    if missed:
        notes.append(f"* missed its target L0: {', '.join(missed)}")
    notes += [f"note: {run_name(r)} {r['notes']}" for r in finished if "collapsed" in (r.get("notes") or "")]
    for label in sorted({group.label for group in groups}):
        own = [group for group in groups if group.label == label]
        if not is_curve(own):
            notes.append(f"note: no line joins the runs of {label}: some have the same target and seed, or the same "
                         "L0; they differ in more than their seed, so they are not averaged")
    return notes


def _left_out(finished: list[Record], key: str) -> str | None:
    left_out = [f"{run_name(r)} (L0 {_number(r.get('l0'), 'g')}, {_number(r.get(key), 'g')})" for r in finished
                if not can_draw(r.get("l0"), r.get(key))]
    if not left_out:
        return None
    return f"note: not above 0 or missing, so left out of the log-log panel of {key}: {', '.join(left_out)}"


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
    axes.plot(*zip(*front), color=FRONT, linewidth=8, solid_capstyle="round", solid_joinstyle="round",
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
    say = {"x": left / total_width, "color": TEXT}
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
    lines = [format_table(groups), "", *_notes(finished, groups), *filter(None, (_left_out(finished, k) for k in keys))]
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


class OneLineParser(argparse.ArgumentParser):
    """A command line whose user's mistakes end in one line on stderr and exit status 2."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")

    @contextmanager
    def mistakes(self) -> Iterator[None]:
        """Takes what the work itself finds wrong, a ValueError or OSError, for a mistake of the user's."""
        try:
            yield
        except (ValueError, OSError) as error:
            self.error(" ".join(str(error).split()))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake ends in one line on stderr and exit status 2."""
    parser = OneLineParser(prog="analysis.frontier", description="Table and plot of the frontier of finished runs.")
    parser.add_argument("directories", nargs="+", metavar="DIR", help="a run or a sweep, e.g. outputs/runs/<sweep>")
    parser.add_argument("--output", metavar="DIR", help="folder for the files; by default the first DIR")
    parsed = parser.parse_args(arguments)
    with parser.mistakes():
        result = draw_frontier(parsed.directories, parsed.output)
    print(result.text)
    print(f"\n{result.png}")


if __name__ == "__main__":
    main()
