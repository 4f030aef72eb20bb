"""``python -m analysis.claims SWEEP... [--json]``: which of the paper's claims do these runs bear out?

Reads nothing but run records, and ``ste.json`` and ``step.json`` where the folders hold them. C6 and C7 of the paper
(interpretability) are not judged: they need raters.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from analysis.claims.evidence import Evidence
from analysis.claims.report import (
    as_json,
    format_by_l0,
    format_by_lm,
    format_notes,
    format_table,
    judge,
    judge_by_lm,
)
from sae_zoo.command_line import OneLineParser


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake ends in one line on stderr and exit status 2."""
    parser = OneLineParser(prog="analysis.claims", description="The paper's claims as verdicts on finished runs.")
    parser.add_argument("directories", nargs="+", metavar="DIR", help="a run or a sweep, e.g. outputs/runs/<sweep>")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parsed = parser.parse_args(arguments)
    with parser.mistakes():
        evidence = Evidence(parsed.directories)
        findings = judge(evidence)
        by_lm = judge_by_lm(evidence)
    tables = [format_table(findings), format_by_l0(findings), format_by_lm(by_lm),
              *(format_by_l0(own, lm) for lm, own in by_lm.items()), format_notes(findings, evidence)]
    print("\n\n".join(filter(None, tables)))
    if parsed.json:
        print(json.dumps(as_json(findings, by_lm, evidence), allow_nan=False))


if __name__ == "__main__":
    main()
