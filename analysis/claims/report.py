"""All claims on one body of evidence: judged, as a table for people, as plain values."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from analysis.claims import ablations, frontiers, measurements
from analysis.claims.evidence import Evidence
from analysis.claims.finding import NOT_MEASURED, Check, Finding, unique

_CHECKS = frontiers.CHECKS | ablations.CHECKS | measurements.CHECKS
CHECKS: dict[str, Check] = {name: _CHECKS[name] for name in sorted(_CHECKS, key=lambda name: int(name[1:]))}
WIDTH = 118
_SHOWN = 12  # lines of what was left out; --json has all


def judge(evidence: Evidence) -> dict[str, Finding]:
    """Every claim's finding, by its name in the paper's list.

    Raises:
        ValueError: if a measured file is something else.
    """
    return {name: check.judge(evidence) for name, check in CHECKS.items()}


def judge_by_lm(evidence: Evidence) -> dict[str, dict[str, Finding]]:
    """The findings on runs of each language model alone, of the claims on runs; empty where there is one only."""
    parts = {lm: evidence.of_lm(lm) for lm in evidence.lms} if len(evidence.lms) > 1 else {}
    return {lm: {name: check.judge(part) for name, check in CHECKS.items() if name not in measurements.CHECKS}
            for lm, part in parts.items()}


def as_json(findings: Mapping[str, Finding], by_lm: Mapping[str, Mapping[str, Finding]],
            evidence: Evidence) -> dict[str, Any]:
    """What ``--json`` prints."""
    claims = {name: {**found.as_json(), "statement": CHECKS[name].statement, "rule": CHECKS[name].rule}
              for name, found in findings.items()}
    alone = {lm: {name: found.as_json() for name, found in own.items()} for lm, own in by_lm.items()}
    return {"claims": claims, "left_out": evidence.left_out, **({"by_lm": alone} if alone else {})}


def format_table(findings: Mapping[str, Finding]) -> str:
    """A row a claim, in at most WIDTH columns; the effect on as many lines as it takes."""
    statements = max(len(CHECKS[name].statement) for name in findings)
    head = f"{'':5}{'claim':{statements + 2}}{'verdict':14}{'runs':>5}"
    lines = [f"{head}  effect [95 % interval]", "-" * WIDTH]
    for name, found in findings.items():
        effect = textwrap.wrap(found.words, WIDTH - len(head) - 2)
        row = f"{name:5}{CHECKS[name].statement:{statements + 2}}{found.verdict:14}{found.n_runs:5}"
        lines.append(f"{row}  {effect[0]}")
        lines += [" " * (len(head) + 2) + line for line in effect[1:]]
    return "\n".join(lines)


def format_by_lm(by_lm: Mapping[str, Mapping[str, Finding]]) -> str:
    """A row for each claim that two language models or more have the same measure of, a column for each of these: what
    depends on the language model? Empty where there is none.
    """
    measured = {name: [own[name].metric for own in by_lm.values() if name in own and own[name].verdict != NOT_MEASURED]
                for name in CHECKS}
    names = [name for name, metrics in measured.items() if len(metrics) > 1 and len({*metrics}) == 1]
    rows = [("", *by_lm)] + [(name, *(_shown_finding(own[name]) for own in by_lm.values())) for name in names]
    return "\n".join(["each language model alone:", *(
        f"{name:>6}  " + "  ".join(f"{cell:42}" for cell in cells).rstrip() for name, *cells in rows)]) if names else ""


def _shown_finding(found: Finding) -> str:
    shown = {"effect": found.effect, "interval": found.interval}
    return found.verdict if found.effect is None else f"{found.verdict:14} {_shown(shown)}"


def format_by_l0(findings: Mapping[str, Finding], lm: str | None = None) -> str:
    """A row for each L0 at which the claims on losses were compared, a column for each claim and loss; empty where
    there is nothing of it. ``lm``: the language model whose runs these are alone.
    """
    columns = {(name, metric): ratios for name, found in findings.items()
               for metric, ratios in found.details.get("by_l0", {}).items() if ratios}
    if not columns:
        return ""
    rows = [("L0", *(f"{name} {frontiers.LOSSES[metric]}" for name, metric in columns))]
    rows += [(str(at), *(_shown(ratios.get(at)) for ratios in columns.values()))
             for at in sorted({at for ratios in columns.values() for at in ratios})]
    of_lm = f" of {lm} alone" if lm else ""
    return "\n".join([f"ratios at single L0s{of_lm}, below 1 where JumpReLU is better:", *(
        f"{at:>6}" + "".join(f"  {cell:24}" for cell in cells).rstrip() for at, *cells in rows)])


def _shown(ratio: Mapping[str, Any] | None) -> str:
    if ratio is None:
        return "-"
    interval = ratio["interval"]
    return f"{ratio['effect']:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def format_notes(findings: Mapping[str, Finding], evidence: Evidence) -> str:
    """Caveats, each with the claims that it is one of, and what was left out."""
    lines = ["caveats:"]
    for caveat in unique(line for found in findings.values() for line in found.caveats if line != found.words):
        names = ", ".join(name for name, found in findings.items() if caveat in found.caveats)
        lines += textwrap.wrap(f"{names}: {caveat}", WIDTH, initial_indent="  ", subsequent_indent="    ")
    left_out = unique([*evidence.left_out, *(line for found in findings.values() for line in found.left_out)])
    if left_out:
        lines += ["", f"left out ({len(left_out)}):"]
        for line in left_out[:_SHOWN]:
            lines += textwrap.wrap(line, WIDTH, initial_indent="  ", subsequent_indent="    ")
        if len(left_out) > _SHOWN:
            lines.append(f"  and {len(left_out) - _SHOWN} more, which --json tells")
    return "\n".join(lines)
