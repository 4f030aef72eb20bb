"""``python -m benchmarks whole``: what runs from scratch cost, against as many warm steps.

Early in training the active set is large. The run is a real one, through Lightning, with its control, counters, looks
at held-out rows and checkpoints, on synthetic activations of the shape.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from benchmarks.step import Trainee, shape_argument, synthetic, variants_argument
from sae_zoo.config import compose_config
from sae_zoo.data.array_file import FileActivations
from sae_zoo.process import prepare_process
from sae_zoo.running.fitting import fit
from sae_zoo.running.settings import TrainSettings
from sae_zoo.running.sources import Source

# Warm steps are the last ones, when the target of L0 is where it stays.
_WARM_SHARE = 0.2
_ROWS_A_BATCH = 40  # batches of rows that the run goes over again and again


class _Clock(pl.Callback):
    def __init__(self):
        self.times: list[float] = []

    def on_train_batch_end(self, *_: object) -> None:
        self.times.append(time.perf_counter())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    shape_argument(parser)
    variants_argument(parser)
    parser.add_argument("--steps", type=int, default=600, help="of each run")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The benchmark; prints its table and returns what ``--json`` shows."""
    d_in, d_sae, batch, l0 = args.shape
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    prepare_process()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.npy"
        np.save(path, synthetic(_ROWS_A_BATCH * batch, d_in).numpy())
        source = Source(FileActivations(path), None, None)
        for variant in args.variants:
            Trainee(variant, 64, 4, synthetic(256, 16), beta1=0.9).step()  # compile everything
            settings = TrainSettings.of(compose_config("train", [
                f"sae={variant}", f"d_sae={d_sae}", f"l0_target={l0}", f"recipe.n_steps={args.steps}",
                f"recipe.batch_size={batch}", "trainer.progress_bar=false"]))
            clock, start = _Clock(), time.perf_counter()
            fit(settings, source, Path(folder) / variant, callbacks=[clock])
            seconds = time.perf_counter() - start
            steps = np.diff(clock.times)
            warm = statistics.median(steps[-max(1, int(_WARM_SHARE * args.steps)):])
            results[variant] = {"seconds": seconds, "warm_step_ms": 1e3 * warm, "ratio": seconds / (args.steps * warm),
                                "first_tenth_ratio": statistics.median(steps[: max(1, args.steps // 10)]) / warm}
    result = {"shape": list(args.shape), "steps": args.steps, "threads": torch.get_num_threads(), "variants": results}
    print(f"{'variant':10}{'seconds':>9}{'warm step ms':>14}{'run / warm steps':>18}{'first tenth / warm':>20}")
    for variant, r in results.items():
        print(f"{variant:10}{r['seconds']:9.1f}{r['warm_step_ms']:14.1f}{r['ratio']:18.2f}{r['first_tenth_ratio']:20.2f}")
    return result
