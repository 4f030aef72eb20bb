"""Schedules: pure functions of the step."""

from __future__ import annotations

import math


def lr_factor(step: int, *, n_steps: int, warmup_steps: int, start_factor: float, decay_fraction: float) -> float:
    """Share of the peak learning rate at ``step``.

    A cosine from ``start_factor`` to 1 over ``warmup_steps`` (Gemma Scope's recipe: from 0.1 over 1,000), then 1, then
    a linear fall to 0 over the last ``decay_fraction`` of ``n_steps``.
    """
    if step < warmup_steps:
        return start_factor + (1 - start_factor) * 0.5 * (1 - math.cos(math.pi * step / warmup_steps))
    if not decays(step, n_steps=n_steps, decay_fraction=decay_fraction):
        return 1.0
    return (n_steps - step) / (decay_fraction * n_steps)


def decays(step: int, *, n_steps: int, decay_fraction: float) -> bool:
    """Whether ``step`` lies in the last ``decay_fraction`` of ``n_steps``, in which the learning rate falls."""
    return decay_fraction > 0 and n_steps - step <= decay_fraction * n_steps


def warmup_factor(step: int, warmup_steps: int) -> float:
    """Linear from 0 to 1 over ``warmup_steps``, then 1."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def auxk_factor(n_steps: int, full_steps: int | None) -> float:
    """Factor of the AuxK loss in a run of ``n_steps``: 1 from ``full_steps`` on, ``full_steps / n_steps`` in a shorter
    run, at most 4; 1 where ``full_steps`` is None.

    Adam divides the gradient of a latent that died by what it was while it lived, for about 1 / (1 - beta2) steps:
    without more weight, most of a short run is over before such a latent has moved. A long run has the time, and there
    a high weight pulls rare latents, which are silent for a while and then useful, off their features.
    """
    return 1.0 if full_steps is None else max(1.0, min(4.0, full_steps / n_steps))
