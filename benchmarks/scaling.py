"""``python -m benchmarks scaling``: how the cost of a training step grows with d_sae and with L0.

For each variant a power law, ms = c * d_sae^a * L0^b, is fitted to the medians by least squares on log axes. The
encoder GEMM alone has a = 1 and b = 0.
"""

from __future__ import annotations

import argparse
import statistics
from itertools import product
from typing import Any

import numpy as np
import torch

from benchmarks.quality import align
from benchmarks.step import Trainee, gemm_timer, milliseconds, synthetic, variants_argument
from sae_zoo.process import keep_freed_memory


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    variants_argument(parser)
    parser.add_argument("--d-in", type=int, default=384)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--d-sae", type=_numbers, default=[2048, 8192, 32768, 131072], metavar="N,N,...")
    parser.add_argument("--l0", type=_numbers, default=[20, 80, 320], metavar="N,N,...")
    parser.add_argument("--rounds", type=int, default=5)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The benchmark; prints its table and returns what ``--json`` shows."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    keep_freed_memory()
    x, rows = synthetic(args.batch, args.d_in), []
    for d_sae, l0 in product(args.d_sae, args.l0):
        gemm = gemm_timer(x, d_sae)
        for variant in args.variants:
            trainee = Trainee(variant, d_sae, l0, x, beta1=0.0)
            trainee.step()
            pairs = [(gemm(), milliseconds(trainee.step, x.device)) for _ in range(args.rounds)]
            rows.append({"variant": variant, "d_sae": d_sae, "l0": l0, "ms": statistics.median(ms for _, ms in pairs),
                         "ratio": statistics.median(ms / base for base, ms in pairs)})
    exponents = {}
    for variant in args.variants:
        own = [row for row in rows if row["variant"] == variant]
        design = np.array([[1, np.log(row["d_sae"]), np.log(row["l0"])] for row in own])
        fit, *_ = np.linalg.lstsq(design, np.log([row["ms"] for row in own]), rcond=None)
        exponents[variant] = {"d_sae": float(fit[1]), "l0": float(fit[2])}
    print(align([["variant", "d_sae", "L0", "step ms", "/ GEMM"], *(
        [row["variant"], str(row["d_sae"]), str(row["l0"]), f"{row['ms']:.1f}", f"{row['ratio']:.2f}"]
        for row in rows)]))
    for variant, exponent in exponents.items():
        print(f"{variant}: ms ~ d_sae^{exponent['d_sae']:.2f} * L0^{exponent['l0']:.2f}")
    return {"d_in": args.d_in, "batch": args.batch, "threads": torch.get_num_threads(), "rows": rows,
            "exponents": exponents}
