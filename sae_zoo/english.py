"""``python -m sae_zoo.english [folder]``: make the English corpus ahead of the first run that reads it."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from sae_zoo.data.english.make import make_english


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sae_zoo.english", description=__doc__.partition(": ")[2])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("outputs/corpus/english"),
                        help="where to write it; corpus.folder is where runs look (default: %(default)s)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        make_english(arguments.folder)
    except (OSError, ValueError) as error:
        print(f"sae_zoo.english: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(arguments.folder)


if __name__ == "__main__":
    main()
