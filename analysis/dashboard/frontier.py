"""Where runs stand among all runs of their sweeps, from records: the frontier as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sae_zoo.frontier.pareto import group_seeds, is_curve, label_of
from sae_zoo.frontier.plot import PANELS
from sae_zoo.frontier.runs import COMPARABLE, Record, read_runs, run_name
from sae_zoo.frontier.style import can_draw, styles


def _key(record: Record) -> tuple:
    return tuple(record.get(key) for key in COMPARABLE)


def frontier(shown: Sequence[Record]) -> dict[str, Any]:
    """The frontier of the finished runs of the sweeps of ``shown`` (their folders are beside one another) that may be
    compared with one of these: another width or number of training tokens is another frontier.

    Returns:
        ``styles``: label -> colour and marker; ``panels``, one a metric that was measured: its ``title``, ``points``
        (``label``, ``l0``, ``value``, ``name``, and ``shown``, the position in ``shown`` or None) and ``lines`` (a list
        of (L0, value) for each label whose runs are a curve).
    """
    folders = {Path(record["run_dir"]).resolve(): i for i, record in enumerate(shown)}
    _, finished, _ = read_runs(sorted({folder.parent for folder in folders}))
    finished = [record for record in finished if _key(record) in map(_key, shown)]
    groups = group_seeds(finished)
    panels = []
    for key, title in PANELS.items():
        points = [{"label": label_of(run), "l0": run["l0"], "value": run[key], "name": run_name(run),
                   "shown": folders.get(Path(run["run_dir"]).resolve())}
                  for run in finished if can_draw(run.get("l0"), run.get(key))]
        lines = {}
        for label in sorted({group.label for group in groups}):
            own = [group for group in groups if group.label == label]
            means = sorted(point for group in own if can_draw(*(point := (group.mean("l0"), group.mean(key)))))
            if is_curve(own) and len({_key(run) for group in own for run in group.runs}) == 1:
                lines[label] = means
        if points:
            panels.append({"title": title, "points": points, "lines": lines})
    look = styles(label_of(record) for record in finished)
    return {"styles": {label: {"color": style.color, "marker": style.marker} for label, style in look.items()},
            "panels": panels}
