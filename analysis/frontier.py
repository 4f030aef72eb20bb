"""``python -m analysis.frontier outputs/runs/<sweep>``: the table and the plot of one or several sweeps.

Reads nothing but run records, and writes ``frontier.csv`` (one row a run), ``frontier.png`` and ``frontier.svg``.
"""

from __future__ import annotations

from collections.abc import Sequence

from sae_zoo.command_line import OneLineParser
from sae_zoo.frontier.plot import draw_frontier


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
