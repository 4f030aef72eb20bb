"""``python -m benchmarks step | scaling | whole | sound | forecast | reading | one_stream | quality | frontier | kills
| install``."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

COMMANDS = {
    "step": "milliseconds of a training step, beside the encoder GEMM alone and the peers",
    "scaling": "how the cost of a step grows with d_sae and L0",
    "whole": "what runs from scratch cost, against as many warm steps",
    "reading": "bandwidth of reading batches beside reading files, and how well they are shuffled",
    "forecast": "what sae_zoo.plan says of a run, beside what it takes",
    "sound": "does every arm train soundly wherever one looks",
    "one_stream": "what SAEs that train together on one stream save",
    "quality": "FVU and delta LM loss at the same L0, everybody at their best learning rate",
    "frontier": "wall-clock to a six-point frontier, and how good its points are",
    "kills": "an entry point killed at random moments and started again: does it end with the same bytes",
}


def _threads(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of threads; give 1 or more")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake ends in one line on stderr and exit status 2."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        prog="benchmarks", description="what trains, times or kills sae_zoo, and the public SAE trainers beside it")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, purpose in COMMANDS.items():
        command = subparsers.add_parser(name, help=purpose, description=purpose)
        command.add_argument("--json", action="store_true", help="print one JSON object as the last line")
        command.add_argument("--threads", type=_threads, help="of torch, for everybody; by default torch's own choice")
        _add_peers_dir(command)
        if arguments[:1] == [name]:  # only the module that is asked for is imported
            importlib.import_module(f"benchmarks.{name}").add_arguments(command)
    command = subparsers.add_parser("install", help="an environment for each peer")
    command.add_argument("--peers", default="sae-lens,dictionary-learning,eai-sparsify", metavar="NAME,NAME,...")
    _add_peers_dir(command)
    args = parser.parse_args(arguments)
    try:
        if args.command == "install":
            from benchmarks.peers import install

            install(args.peers.split(","), args.peers_dir)
            return
        result = importlib.import_module(f"benchmarks.{args.command}").run(args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"benchmarks {args.command}: error: {' '.join(str(error).split())}\n")
    except subprocess.CalledProcessError as error:
        parser.exit(1, f"benchmarks install: error: {' '.join(map(str, error.cmd))} failed\n")
    if args.json:
        print(json.dumps(result))


def _add_peers_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--peers-dir", type=Path, default=Path("outputs/peers"), metavar="DIR",
                        help="where the peers are installed")


if __name__ == "__main__":
    main()
