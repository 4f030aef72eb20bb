"""L0 control: a multiplier on the sparsity term that is driven by the measured L0.

At the optimum every threshold balances reconstruction against the multiplier, so the multiplier has to settle where L0
meets its target; a fixed large one saturates under Adam, which normalises its size away. The logarithm of the
multiplier follows the logarithm of L0 over its target (dual ascent with a damping term: PI control in velocity form).
It works for any variant whose L0 falls when its coefficient rises.

Between the multiplier and a JumpReLU's thresholds stands Adam, which moves them at its own pace whatever the gradient's
size: alone, the multiplier winds up where L0 is far off (d_sae 256, target 40: to 10, and L0 190). There thresholds are
shifted directly (:func:`threshold_shift`).
"""

from __future__ import annotations

import math

# Errors beyond a factor of 1.6 count as that: early L0 can be off by orders of magnitude, and follows slowly.
LARGEST_ERROR = 0.5
# Errors of L0, as a logarithm, that the coefficient corrects alone.
_LEFT_TO_COEFFICIENT = 0.1
# The largest error that the coefficient of thresholds which are shifted sees. More winds it up while the encoder
# starts, when L0 multiplies in a few steps; it then presses L0 below the target (FVU on validation rows, built-in
# residual.3, d_sae 1,024, 1,000 x 512, L0 80: with a half 0.0858, with a fifth 0.0837).
LARGEST_BESIDE_SHIFTS = 0.2


def l0_error(l0: float, target: float, *, largest: float = LARGEST_ERROR) -> float:
    """Cut log(l0 / target) at plus and minus ``largest``; a silent SAE (l0 = 0) has the largest negative error."""
    if l0 <= 0:
        return -largest
    return max(-largest, min(largest, math.log(l0 / target)))


def threshold_shift(error: float, *, share: float, always: bool) -> float:
    """Multiple of its mean excess by which every threshold is raised in a step.

    Where excesses are exponentially distributed, which they nearly are, raising a threshold by its mean excess divides
    the latent's frequency by e, so the gain from this to log L0 is minus one for any variant, width and data.

    Args:
        error: :func:`l0_error` of this step.
        share: of the error that is taken at once.
        always: False leaves errors up to a tenth to the coefficient, which alone finds how L0 is best dealt out among
            latents: thresholds that always follow cost JumpReLU 5 % of FVU at L0 80 of 256 dimensions.
    """
    beyond = error if always else math.copysign(max(0.0, abs(error) - _LEFT_TO_COEFFICIENT), error)
    return share * beyond


def next_log_coefficient(log_coefficient: float, *, error: float, previous_error: float, proportional: float,
                         integral: float) -> float:
    """One step of control.

    Args:
        log_coefficient: natural logarithm of the coefficient now.
        error, previous_error: :func:`l0_error` now and one step ago.
        proportional: gain on the change of the error (damps).
        integral: gain on the error itself, a step (drives it to zero).
    """
    return log_coefficient + proportional * (error - previous_error) + integral * error
