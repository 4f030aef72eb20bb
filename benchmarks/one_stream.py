"""``python -m benchmarks one_stream [OVERRIDE ...]``: what SAEs that train on one stream save.

The same SAEs (the variants, each at the first target of L0, then at the next) one after the other and together; what is
timed is what a sweep does before it scores: opening the activations (with ``data=cache`` or ``online`` that loads the
language model) and training. Overrides are those of ``sae_zoo.train``: ``data=online`` runs the language model.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality import align
from benchmarks.step import Trainee, synthetic
from sae_zoo.config import compose_config
from sae_zoo.process import prepare_process
from sae_zoo.running.fitting import fit
from sae_zoo.running.settings import TrainSettings
from sae_zoo.running.sources import open_source
from sae_zoo.running.turns import current, train_together
from sae_zoo.saes import variants

TARGETS = (40, 20, 80)


def _counts(text: str) -> list[int]:
    counts = [int(part) if part.isdigit() else 0 for part in text.split(",")]
    most = len(TARGETS) * len(variants())
    if not 1 <= min(counts) <= max(counts) <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers from 1 to {most}")
    return counts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="as sae_zoo.train takes them: d_sae=1024")
    parser.add_argument("--saes", type=_counts, default=[1, 4, 12], metavar="N,N,...", help="how many train together")
    parser.add_argument("--steps", type=int, default=100, help="of each training")
    parser.add_argument("--rounds", type=int, default=3)


class _Trial:
    """Attributes: ``opening``, ``total``: seconds."""

    def __init__(self, jobs: list[TrainSettings], *, together: bool):
        self.opening, started = 0.0, time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            tasks = [partial(self._train, settings, Path(folder) / str(i)) for i, settings in enumerate(jobs)]
            if together:
                train_together(tasks)
            else:
                for task in tasks:
                    task()
        self.total = time.perf_counter() - started

    def _open(self, settings: TrainSettings):
        started = time.perf_counter()
        source = open_source(settings.source, settings.trainer.device, progress_bar=False)
        self.opening += time.perf_counter() - started
        return source

    def _train(self, settings: TrainSettings, folder: Path) -> None:
        fit(settings, current().open(partial(self._open, settings)), folder)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The benchmark; prints its table and returns what ``--json`` shows."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    prepare_process()
    jobs = [TrainSettings.of(compose_config("train", [
        *args.overrides, f"sae={variant}", f"l0_target={target}", f"recipe.n_steps={args.steps}",
        "trainer.progress_bar=false"])) for target, variant in product(TARGETS, variants())]
    for variant in variants():
        Trainee(variant, 64, 4, synthetic(256, 16), beta1=0.9).step()  # compile everything
    _Trial(jobs[:1], together=False)  # harvests what is missing, and reads the files into the system's cache
    rows = []
    for count in args.saes:
        # The two trials of a round stand beside each other in time, so what else the machine does divides out.
        rounds = [(_Trial(jobs[:count], together=False), _Trial(jobs[:count], together=True))
                  for _ in range(args.rounds)]
        rows.append({
            "saes": count,
            **{f"{name}_seconds": statistics.median(pair[i].total for pair in rounds)
               for i, name in enumerate(("apart", "together"))},
            **{f"{name}_opening_seconds": statistics.median(pair[i].opening for pair in rounds)
               for i, name in enumerate(("apart", "together"))},
            "ratio": statistics.median(together.total / apart.total for apart, together in rounds),
            "training_ratio": statistics.median((together.total - together.opening) / (apart.total - apart.opening)
                                                for apart, together in rounds)})
    print(align([["SAEs", "apart s", "opening", "together s", "opening", "together / apart", "training alone"], *(
        [str(row["saes"]), *(f"{row[f'{name}_{what}']:.1f}" for name in ("apart", "together")
                             for what in ("seconds", "opening_seconds")),
         f"{row['ratio']:.2f}", f"{row['training_ratio']:.2f}"] for row in rows)]))
    return {"overrides": args.overrides, "steps": args.steps, "threads": torch.get_num_threads(), "rows": rows}
