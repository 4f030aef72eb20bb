"""The table of a frontier, as plain text, and what its reader must know besides the numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sae_zoo.frontier.pareto import SeedGroup, is_curve
from sae_zoo.frontier.runs import Record, run_name
from sae_zoo.frontier.style import can_draw


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
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([cells[0].ljust(widths[0]),
                        *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]).rstrip()
             for cells in rows]
    rule = "-" * max(map(len, lines))
    for i in range(len(groups) - 1, 0, -1):  # an empty line between labels, where a label has several rows
        if groups[i].label != groups[i - 1].label and len(groups) > len({group.label for group in groups}):
            lines.insert(i + 1, "")
    return "\n".join([lines[0], rule, *lines[1:]])


def notes(finished: Sequence[Record], groups: Sequence[SeedGroup]) -> list[str]:
    """Notes that a reader of the table must know besides its numbers, a line each."""
    found = []
    missed = [f"{run_name(r)} (L0 {_number(r.get('l0'), '.1f')} for {_number(r.get('l0_target'), 'g')})"
              for r in finished if r.get("l0_missed")]
    if missed:
        found.append(f"* missed its target L0: {', '.join(missed)}")
    found += [f"note: {run_name(r)} {r['notes']}" for r in finished if "collapsed" in (r.get("notes") or "")]
    for label in sorted({group.label for group in groups}):
        own = [group for group in groups if group.label == label]
        if not is_curve(own):
            found.append(f"note: no line joins the runs of {label}: some have the same target and seed, or the same "
                         "L0; they differ in more than their seed, so they are not averaged")
    return found


def left_out(finished: Sequence[Record], key: str) -> str | None:
    """A line on the runs that the log-log panel of ``key`` cannot show; None where it shows all."""
    names = [f"{run_name(r)} (L0 {_number(r.get('l0'), 'g')}, {_number(r.get(key), 'g')})" for r in finished
                if not can_draw(r.get("l0"), r.get(key))]
    if not names:
        return None
    return f"note: not above 0 or missing, so left out of the log-log panel of {key}: {', '.join(names)}"
