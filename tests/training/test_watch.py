"""When a training counts as collapsed."""

import math

import pytest

from sae_zoo.training.control import l0_error, threshold_shift
from sae_zoo.training.watch import collapse


@pytest.mark.parametrize("dead, least, fvu, before, words", [
    (0.25, 0.04, 0.3, 0.3, "25% of the latents are dead, 4% were before"),
    (0.2, 0.0, 0.3, 0.3, "20% of the latents are dead"),
    (0.19, 0.0, 0.3, 0.3, None),
    (0.0, 0.0, 0.41, 0.2, "FVU jumped from 0.200 to 0.410"),
    (0.0, 0.0, 0.29, 0.2, None),  # by less than a factor of 1.5
    (0.0, 0.0, 0.05, 0.01, None),  # by less than 0.1
    (0.0, 0.0, 0.75, 0.5, None),  # by just a factor of 1.5, and by more than 0.1
    (0.0, 0.0, 0.65, 0.5, None),  # by less than a factor of 1.5, though by more than 0.1
    (0.0, 0.0, 0.19, 0.1, None),  # by less than 0.1, though by more than a factor of 1.5
    (0.0, 0.0, 0.125, 0.025, None),  # by just 0.1
    (0.0, 1.0, 0.3, math.nan, None),  # the first look
])
def test_collapse(dead, least, fvu, before, words):
    found = collapse(dead=dead, least_dead=least, fvu=fvu, fvu_before=before)
    assert found is None if words is None else words in found


def test_small_errors_are_the_coefficients_unless_rates_fall():
    assert threshold_shift(0.09, share=0.05, always=False) == 0
    assert threshold_shift(0.3, share=0.05, always=False) == pytest.approx(0.05 * 0.2)
    assert threshold_shift(-0.3, share=0.05, always=False) == pytest.approx(-0.05 * 0.2)
    assert threshold_shift(0.09, share=0.05, always=True) == pytest.approx(0.05 * 0.09)
    assert threshold_shift(l0_error(0, 40), share=0.05, always=False) < 0
