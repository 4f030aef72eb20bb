"""``python -m analysis.paper SWEEP... [--output DIR]``."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.paper import draw_paper
from sae_zoo.command_line import OneLineParser


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake ends in one line on stderr and exit status 2."""
    parser = OneLineParser(prog="analysis.paper", description="The paper's figures, from the records of finished runs.")
    parser.add_argument("directories", nargs="+", metavar="SWEEP", help="a run or a sweep, e.g. outputs/runs/<sweep>")
    parser.add_argument("--output", metavar="DIR", help="folder for the figures; by default the first SWEEP")
    parsed = parser.parse_args(arguments)
    with parser.mistakes():
        result = draw_paper(parsed.directories, parsed.output)
    print(result.text)


if __name__ == "__main__":
    main()
