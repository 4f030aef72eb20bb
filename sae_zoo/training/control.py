"""L0 control: a multiplier on the sparsity term that is driven by the measured L0.

At the optimum every threshold balances reconstruction against the multiplier, so the multiplier has to settle where L0
meets its target; a fixed large one saturates under Adam, which normalises its size away. The logarithm of the
multiplier follows the logarithm of L0 over its target (dual ascent with a damping term: PI control in velocity form,
which cannot wind up). It works for any variant whose L0 falls when its coefficient rises.
"""

from __future__ import annotations

import math

# Errors beyond a factor of 1.6 count as that: early L0 can be off by orders of magnitude, and follows slowly.
_LARGEST_ERROR = 0.5


def l0_error(l0: float, target: float) -> float:
    """log(l0 / target), cut at plus and minus a half; a silent SAE (l0 = 0) has the largest negative error."""
    if l0 <= 0:
        return -_LARGEST_ERROR
    return max(-_LARGEST_ERROR, min(_LARGEST_ERROR, math.log(l0 / target)))


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
