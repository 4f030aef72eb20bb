"""``python -m analysis.claims SWEEP... [--json]``: which of the paper's claims do these runs bear out?

Reads nothing but run records, and ``ste.json`` and ``step.json`` where the folders hold them. C6 and C7 of the paper
(interpretability) are not judged: they need raters.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from analysis.claims.evidence import Evidence
from analysis.claims.report import as_json, format_by_l0, format_notes, format_table, judge
from analysis.frontier import OneLineParser


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake ends in one line on stderr and exit status 2."""
    parser = OneLineParser(prog="analysis.claims", description="The paper's claims as verdicts on finished runs.")
    parser.add_argument("directories", nargs="+", metavar="DIR", help="a run or a sweep, e.g. outputs/runs/<sweep>")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parsed = parser.parse_args(arguments)
    with parser.mistakes():
        evidence = Evidence(parsed.directories)
        findings = judge(evidence)
    print(format_table(findings))
    print()
    if by_l0 := format_by_l0(findings):
        print(f"{by_l0}\n")
    print(format_notes(findings, evidence))
    if parsed.json:
        print(json.dumps(as_json(findings, evidence), allow_nan=False))


if __name__ == "__main__":
    main()
