import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_zoo.data.permutation import Permutation, draws


@settings(deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(-5, 2**40))
def test_is_a_bijection(n, seed):
    assert np.array_equal(np.sort(Permutation(n, seed)(np.arange(n))), np.arange(n))


@settings(deadline=None)
@given(n=st.integers(1, 2**50), seed=st.integers(0, 9), data=st.data())
def test_an_element_goes_to_the_same_place_whatever_it_is_asked_with(n, seed, data):
    indices = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20))
    permutation = Permutation(n, seed)
    together = permutation(np.array(indices))
    assert together.dtype == np.int64 and together.min() >= 0 and together.max() < n
    assert [int(permutation(np.array(i))) for i in indices] == together.tolist()
    assert len(set(together.tolist())) == len(set(indices))


def test_is_the_same_for_ever():
    # Caches are named by what decides their bytes, and this decides them: changing it needs a new format version.
    assert Permutation(10, 0)(np.arange(10)).tolist() == [2, 7, 8, 5, 4, 0, 3, 1, 6, 9]
    large = Permutation(10**12, 3, 1)(np.array([0, 1, 10**12 - 1]))
    assert large.tolist() == [493667477131, 821625712512, 445203307196]


def test_seeds_differ():
    n = 5000
    orders = [Permutation(n, *seed)(np.arange(n)) for seed in ((0,), (1,), (0, 0), (0, 1), (1, 0))]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).sum() < 12  # two random orders agree in one place on average


@pytest.mark.parametrize("n", [4096, 20_000, 99_991])
def test_looks_random(n):
    order = Permutation(n, 7)(np.arange(n))
    standard_error = n**-0.5
    ranks = np.arange(n)
    assert abs(np.corrcoef(ranks, order)[0, 1]) < 4 * standard_error
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 4 * standard_error
    assert abs(np.abs(order - ranks).mean() / n - 1 / 3) < 4 * standard_error  # E|U - V| of two uniforms is 1/3
    assert abs(np.abs(np.diff(order)).mean() / n - 1 / 3) < 4 * standard_error
    # Neighbours are spread over all parts: chi-square of where the first tenth goes, 15 degrees of freedom.
    counts = np.bincount(order[: n // 10] * 16 // n, minlength=16)
    assert ((counts - counts.mean()) ** 2).sum() / counts.mean() < 45


def test_over_seeds_every_order_of_four_is_about_equally_frequent():
    counts = {}
    for seed in range(4800):
        order = tuple(Permutation(4, seed)(np.arange(4)))
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    assert min(counts.values()) > 100 and max(counts.values()) < 320  # 200 on average


def test_bad_arguments():
    with pytest.raises(ValueError, match="at least 1"):
        Permutation(0, 1)
    for index in (-1, 5):
        with pytest.raises(ValueError, match=r"\[0, 5\)"):
            Permutation(5, 1)(np.array([0, index]))


@settings(deadline=None)
@given(n=st.integers(1, 2**32 - 1), first=st.integers(0, 2**60), seed=st.integers(0, 2**40), data=st.data())
def test_a_draw_is_the_same_whatever_it_is_asked_with(n, first, seed, data):
    together = draws(n, first, 30, seed)
    assert together.dtype == np.int64 and together.min() >= 0 and together.max() < n
    i = data.draw(st.integers(0, 29))
    assert np.array_equal(draws(n, first + i, 30 - i, seed), together[i:])


def test_draws_are_uniform_and_know_nothing_of_their_neighbours_or_of_another_seed():
    n = 64_000
    values = draws(64, 0, n, 3)
    counts = np.bincount(values, minlength=64)
    assert ((counts - n / 64) ** 2).sum() / (n / 64) < 63 + 4 * 126**0.5  # chi-square, 63 degrees of freedom
    pairs = np.bincount(values[:-1] * 64 + values[1:], minlength=64 * 64)
    assert ((pairs - n / 4096) ** 2).sum() / (n / 4096) < 4095 + 4 * 8190**0.5
    assert abs((values == draws(64, 0, n, 4)).mean() - 1 / 64) < 4 * (1 / 64 / n) ** 0.5


def test_draws_are_the_same_for_ever():
    assert draws(1000, 5, 4, 7, 1).tolist() == [760, 217, 405, 682]  # a run that goes on draws what it had drawn
