"""``python -m analysis.dashboard RUN... [--output FILE] [--latents N]``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.dashboard.content import gather
from analysis.dashboard.page import render
from analysis.latents import open_runs
from sae_zoo.command_line import OneLineParser

# Every latent of two runs of the default width, in a file of less than 10 MB.
_LATENTS = 8192


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake ends in one line on stderr and exit status 2."""
    parser = OneLineParser(prog="analysis.dashboard", description="One HTML file to browse the latents of runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="outputs/runs/<sweep>/<job>; several on the same "
                        "activations stand side by side")
    parser.add_argument("--output", type=Path, metavar="FILE", help="by default dashboard.html in the first RUN")
    parser.add_argument("--latents", type=int, default=_LATENTS, metavar="N", help="how many, of all runs together, "
                        "are shown with their text, evenly from all frequencies; 1 kB each (default: %(default)s)")
    parsed = parser.parse_args(arguments)
    output = parsed.output or Path(parsed.runs[0]) / "dashboard.html"
    with parser.mistakes():
        if not output.parent.is_dir():  # known now, not after minutes
            raise ValueError(f"--output is {output}, but {output.parent} is no folder; make it first")
        runs = open_runs(parsed.runs, progress_bar=sys.stderr.isatty())
        page = render(gather(runs, n_latents=parsed.latents, progress_bar=sys.stderr.isatty()))
        output.write_text(page)
    print(f"{output}  ({len(page) / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
