"""``python -m analysis.theory DIR``: the paper's theory in numbers: is the straight-through gradient that of the
expected loss (claim C3), and what can a JumpReLU do that a ReLU cannot?

The toy is that of Rajamanoharan et al. 2024 (arXiv 2404.16014, appendix F): one latent with pre-activation
z = 2 + Z / 2 where its feature is on, with probability 1/2, and z = Z where it is off, Z ~ N(0, 1); the latent should
be z where the feature is on, and 0 elsewhere. Everything about it is known in closed form; from an L0 of 0.57 down the
JumpReLU's error is lower than that of the best ReLU. The command writes ``ste.json``, which ``analysis.claims`` reads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import integrate, optimize, stats
from torch import Tensor

from sae_zoo.command_line import OneLineParser
from sae_zoo.functional.activations import heaviside, jumprelu
from sae_zoo.records import write_json

ON, OFF = stats.norm(2, 0.5), stats.norm(0, 1)
# Where the gradient is estimated: on the side of the minimum on which training starts, far from a zero of the gradient.
THRESHOLD, COEFFICIENT = 0.8, 0.05
BANDWIDTHS = (0.4, 0.2, 0.1, 0.05, 0.02)
N_SAMPLES, N_REPEATS = 1_000_000, 16
THRESHOLDS = (0.5, 0.8, 1.0, 1.2, 1.5)


def density(z: np.ndarray | float) -> np.ndarray | float:
    """Of the pre-activation."""
    return (ON.pdf(z) + OFF.pdf(z)) / 2


def _second_moment(distribution: Any, low: float, high: float) -> float:
    return integrate.quad(lambda z: z * z * distribution.pdf(z), low, high)[0]


def expected_loss(threshold: float, coefficient: float) -> float:
    """E[(JumpReLU(z) - target)^2] + coefficient * E[L0]."""
    wrongly_on, wrongly_off = _second_moment(OFF, threshold, np.inf), _second_moment(ON, -np.inf, threshold)
    return (wrongly_on + wrongly_off + coefficient * (ON.sf(threshold) + OFF.sf(threshold))) / 2


def expected_gradient(threshold: float, coefficient: float) -> float:
    """The derivative of :func:`expected_loss` by the threshold."""
    return threshold**2 * (ON.pdf(threshold) - OFF.pdf(threshold)) / 2 - coefficient * density(threshold)


def samples(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pre-activations and targets, [n] each."""
    generator = torch.Generator().manual_seed(seed)
    on = torch.rand(n, generator=generator) < 0.5
    noise = torch.randn(n, generator=generator)
    z = torch.where(on, 2 + noise / 2, noise)
    return z, torch.where(on, z, 0.0)


def ste_gradient(threshold: float, coefficient: float, *, bandwidth: float, n: int, seed: int,
                 kernel: str = "rectangle") -> float:
    """The gradient by the threshold that a training step on ``n`` samples takes."""
    z, target = samples(n, seed)
    theta = torch.tensor(threshold, requires_grad=True)
    f = jumprelu(z, theta, bandwidth=bandwidth, kernel=kernel)
    l0 = heaviside(z, theta, bandwidth=bandwidth, kernel=kernel)
    ((f - target).square().mean() + coefficient * l0.mean()).backward()
    return theta.grad.item()


def estimate(*, bandwidths: tuple[float, ...] = BANDWIDTHS, n: int = N_SAMPLES,
             repeats: int = N_REPEATS) -> dict[str, Any]:
    """``analytic`` gradient, and ``estimates``: [bandwidth, mean of the straight-through gradients, its standard error,
    standard deviation of one of them] for each bandwidth.
    """
    rows = []
    for bandwidth in bandwidths:
        found = [ste_gradient(THRESHOLD, COEFFICIENT, bandwidth=bandwidth, n=n, seed=seed) for seed in range(repeats)]
        rows.append([bandwidth, float(np.mean(found)), float(stats.sem(found)), float(np.std(found, ddof=1))])
    return {"threshold": THRESHOLD, "coefficient": COEFFICIENT, "n_samples": n, "n_repeats": repeats,
            "analytic": float(expected_gradient(THRESHOLD, COEFFICIENT)), "estimates": rows}


def relu_error(threshold: float, slope: float) -> float:
    """E[(slope * ReLU(z - threshold) - target)^2]."""
    def error(z: float) -> float:
        f = slope * max(0.0, z - threshold)
        return (ON.pdf(z) * (f - z) ** 2 + OFF.pdf(z) * f**2) / 2

    return integrate.quad(error, -8, threshold)[0] + integrate.quad(error, threshold, 8)[0]


def l0(threshold: float) -> float:
    """Share of samples on which a latent with this threshold is on, whatever its activation function."""
    return float(ON.sf(threshold) + OFF.sf(threshold)) / 2


def best_slope(threshold: float) -> tuple[float, float]:
    """Slope and error of the ReLU with this threshold that reconstructs the toy best."""
    found = optimize.minimize_scalar(lambda slope: relu_error(threshold, slope), bounds=(0.1, 10), method="bounded")
    return float(found.x), float(found.fun)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = OneLineParser(prog="analysis.theory", description="Write ste.json into a folder.")
    parser.add_argument("folder", type=Path, metavar="DIR")
    folder = parser.parse_args(arguments).folder
    with parser.mistakes():
        found = estimate()
        write_json(folder / "ste.json", found)
    print(f"gradient of the expected loss at threshold {THRESHOLD:g}: {found['analytic']:.5f}")
    for bandwidth, mean, error, spread in found["estimates"]:
        print(f"  straight through, bandwidth {bandwidth:<5g} {mean:.5f} ± {error:.5f}   one of {N_SAMPLES:,} samples: "
              f"± {spread:.5f}")
    print("squared error of the toy at the same threshold, so at the same L0:")
    for threshold in THRESHOLDS:
        slope, error = best_slope(threshold)
        print(f"  threshold {threshold:<5g} L0 {l0(threshold):.3f}   best ReLU (slope {slope:.2f}) {error:.4f}   "
              f"JumpReLU {expected_loss(threshold, 0.0):.4f}")


if __name__ == "__main__":
    main()
