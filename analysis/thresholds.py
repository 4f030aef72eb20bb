"""``python -m analysis.thresholds RUN``: what the loss would be at other thresholds of single latents of a trained
JumpReLU SAE, and what the straight-through gradient says of its slope there (figure 4 of arXiv 2407.14435).

Writes ``thresholds.json`` into the run's folder, from which ``analysis.paper`` draws its figure. Everything is in units
in which E||x||^2 of the training rows is 1, as in training.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from analysis.latents import open_runs
from sae_zoo.command_line import OneLineParser
from sae_zoo.evaluation.suite import HeldOutRows
from sae_zoo.functional.activations import heaviside, jumprelu
from sae_zoo.records import write_json
from sae_zoo.saes import SAE

FILE = "thresholds.json"
N_ROWS = 100_000  # held-out rows, at most
# Latents are taken at these quantiles of the frequencies of those that fire, rare ones left out: they cross too little.
QUANTILES = (0.5, 0.8, 0.95)
# Thresholds that are looked at, in units of the trained one.
GRID = torch.linspace(0.1, 2.5, 49)


def against_thresholds(sae: SAE, rows: Iterable[Tensor], thresholds: Mapping[int, Tensor], *, coefficient: float,
                       bandwidth: float, kernel: str) -> dict[int, tuple[Tensor, Tensor]]:
    """Squared error + coefficient * L0 of a trained SAE at other thresholds of one latent, all else as it is, and the
    straight-through gradient by that threshold; for several latents, each on its own.

    Args:
        sae: a JumpReLU SAE as :func:`sae_zoo.saes.io.load_sae` gives it: raw activations in, raw latents out.
        rows: pieces of raw activations [n, d_in].
        thresholds: by latent; [m], raw, as are ``coefficient`` (of an error that is not normalised) and ``bandwidth``.

    Returns:
        By latent: loss [m] (mean over tokens, less that of everything but this latent, which is the same at all
        thresholds), and gradient [m]; float64.
    """
    found = {latent: torch.zeros(2, len(of_latent), dtype=torch.float64) for latent, of_latent in thresholds.items()}
    n = 0
    for x in rows:
        error, n = x - sae.reconstruct(x), n + len(x)
        for latent, sums in found.items():
            direction = sae.W_dec[latent]
            square = direction.square().sum()
            z = (x @ sae.W_enc[:, latent] + sae.b_enc[latent]).contiguous()
            others = error @ direction + z * (z > sae.threshold[latent]) * square  # what the others leave to it
            for i, threshold in enumerate(thresholds[latent].tolist()):
                theta = torch.tensor(threshold, device=x.device, requires_grad=True)
                f = jumprelu(z, theta, bandwidth=bandwidth, kernel=kernel)
                l0 = heaviside(z, theta, bandwidth=bandwidth, kernel=kernel)
                loss = (f * (f * square - 2 * others) + coefficient * l0).sum()
                loss.backward()
                sums[0, i] += loss.item()
                sums[1, i] += theta.grad.item()
    return {latent: tuple(sums / n) for latent, sums in found.items()}


def measure(run: Any, *, progress_bar: bool = False) -> dict[str, Any]:
    """What ``thresholds.json`` holds, of a run as :func:`analysis.latents.open_runs` gives it.

    Raises:
        ValueError: if the run is no JumpReLU with a plain L0 loss, or none of its latents fires.
    """
    record, sae, activations = run.record, run.sae, run.source.activations
    expected = {"variant": "jumprelu", "sae.penalty": "l0", "sae.sparsity_loss": "l0"}
    for key, value in expected.items():
        if record.get(key) != value:
            raise ValueError(f"{record['run_dir']} has {key} {record.get(key)}; the loss by threshold is that of a run "
                             f"with {value}, give another")
    frequency = pd.read_csv(Path(record["run_dir"]) / "latents.csv")["frequency"]
    alive = frequency[frequency > 0].sort_values()
    if alive.empty:
        raise ValueError(f"no latent of {record['run_dir']} fires; give another run")
    scale, device = record["input_scale"], sae.W_dec.device
    square = scale**2
    chosen = [int(alive.index[int(quantile * (len(alive) - 1))]) for quantile in QUANTILES]
    trained = {latent: sae.threshold[latent].item() for latent in chosen}
    rows = HeldOutRows(activations, "test", N_ROWS, device=device, progress_bar=progress_bar)
    found = against_thresholds(
        sae, rows, {latent: GRID * threshold for latent, threshold in trained.items()},
        coefficient=record["coefficient"] * square, bandwidth=record["sae.bandwidth"] * scale,
        kernel=record["sae.kernel"])
    latents = [{"latent": latent, "frequency": float(frequency[latent]), "threshold": threshold / scale,
                "thresholds": (GRID * threshold / scale).tolist(), "loss": (found[latent][0] / square).tolist(),
                "gradient": (found[latent][1] / scale).tolist()} for latent, threshold in trained.items()]
    return {"hook": record["hook"], "l0": record["l0"], "d_sae": record["d_sae"], "coefficient": record["coefficient"],
            "bandwidth": record["sae.bandwidth"], "kernel": record["sae.kernel"],
            "n_rows": min(N_ROWS, activations.n_rows("test")), "latents": latents}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake ends in one line on stderr and exit status 2."""
    parser = OneLineParser(prog="analysis.thresholds",
                           description="The loss by single thresholds of a trained JumpReLU.")
    parser.add_argument("run", type=Path, metavar="RUN", help="outputs/runs/<sweep>/<job>")
    run_dir = parser.parse_args(arguments).run
    with parser.mistakes():
        found = measure(open_runs([run_dir])[0], progress_bar=sys.stderr.isatty())
        write_json(run_dir / FILE, found)
    for latent in found["latents"]:
        best = min(zip(latent["loss"], latent["thresholds"], strict=True))[1]
        print(f"latent {latent['latent']}, on {latent['frequency']:.2%} of tokens: trained threshold "
              f"{latent['threshold']:.4f}, that of the least loss {best:.4f}")
    print(run_dir / FILE)


if __name__ == "__main__":
    main()
