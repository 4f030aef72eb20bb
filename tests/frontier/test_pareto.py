"""The frontier's mathematics against hand-made cases, brute force and closed forms."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_zoo.frontier.pareto import front_of_curves, group_seeds, interpolate_at, is_curve, label_of, pareto_front

# Few distinct values, so that ties and duplicates are common.
coordinates = st.sampled_from([1.0, 2.0, 3.0, 4.5, 7.0])
positive = st.floats(1e-3, 1e3)


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([], []),
        ([(5, 5)], [True]),
        ([(10, 3), (20, 2), (40, 1)], [True, True, True]),
        ([(10, 3), (20, 4), (40, 1)], [True, False, True]),
        ([(40, 1), (20, 2), (10, 3), (30, 2)], [True, True, True, False]),  # any order; a tie in loss
        ([(20, 2), (20, 1)], [False, True]),  # a tie in L0
        ([(20, 2), (20, 2), (30, 3), (30, 3)], [True, True, False, False]),  # copies share their fate
    ],
)
def test_hand_made_fronts(points, expected):
    assert pareto_front(points) == expected


@given(st.lists(st.tuples(coordinates, coordinates), max_size=12))
def test_front_is_what_no_other_point_beats(points):
    def beats(a, b):
        return a[0] <= b[0] and a[1] <= b[1] and (a[0] < b[0] or a[1] < b[1])

    assert pareto_front(points) == [not any(beats(other, point) for other in points) for point in points]


@pytest.mark.parametrize("bad", [(None, 1.0), (1.0, None), (float("nan"), 1.0), (1.0, float("nan")), (float("inf"), 1)])
def test_front_refuses_what_is_not_a_point(bad):
    with pytest.raises(ValueError, match="finite"):
        pareto_front([(1.0, 1.0), bad])


@given(positive, st.floats(-3, 3), st.lists(st.floats(1, 500), min_size=2, max_size=6, unique_by=lambda x: round(x, 2)),
       st.floats(0, 1))
def test_interpolation_is_exact_on_a_power_law(scale, exponent, l0s, where):
    at = min(l0s) ** (1 - where) * max(l0s) ** where
    value = interpolate_at(l0s, [scale * l0**exponent for l0 in l0s], at)
    assert value == pytest.approx(scale * at**exponent, rel=1e-6)


def test_interpolation_between_neighbours_by_hand():
    # Halfway in log L0 between 20 and 80 is 40, halfway in log value between 0.4 and 0.1 is 0.2, in any order.
    assert interpolate_at([80, 320, 20], [0.1, 0.09, 0.4], 40) == pytest.approx(0.2)
    assert interpolate_at([80, 320, 20], [0.1, 0.09, 0.4], 160) == pytest.approx(math.sqrt(0.1 * 0.09))
    assert interpolate_at([80, 320, 20], [0.1, 0.09, 0.4], 80) == pytest.approx(0.1)
    assert interpolate_at([20], [0.4], 20) == pytest.approx(0.4)


@pytest.mark.parametrize("at", [19.9, 80.1])
def test_interpolation_never_extrapolates(at):
    with pytest.raises(ValueError, match="outside the curve, which was measured from 20 to 80"):
        interpolate_at([20, 40, 80], [0.4, 0.2, 0.1], at)


@pytest.mark.parametrize(
    ("l0s", "values", "match"),
    [
        ([], [], "at least one"),
        ([20, 40], [0.4], "as many"),
        ([20, 20, 40], [0.4, 0.4, 0.1], "same L0"),
        ([20, 40], [0.4, 0.0], "positive"),
        ([20, 40], [0.4, -0.1], "positive"),
        ([20, 40], [0.4, float("nan")], "positive"),
        ([20, 40], [0.4, None], "positive"),
        ([0, 40], [0.4, 0.1], "positive"),
    ],
)
def test_interpolation_refuses(l0s, values, match):
    with pytest.raises(ValueError, match=match):
        interpolate_at(l0s, values, 30)


def test_front_of_curves_leaves_a_worse_curve_out_although_its_points_are_sparser():
    better, worse = [(10, 1.0), (41, 0.25), (90, 0.1)], [(10.5, 1.3), (40, 0.33), (89, 0.13)]
    assert pareto_front([*better, *worse])[4]  # by its points alone, (40, 0.33) would be on the front
    front = front_of_curves([better, worse])
    for l0, value in front:
        assert value == pytest.approx(interpolate_at(*zip(*better, strict=True), l0))
    assert set(better) <= set(front)


def test_front_of_crossing_curves_is_the_lower_one_of_each_side():
    flat, steep, alone = [(10, 0.4), (160, 0.1)], [(10, 0.8), (160, 0.05)], [(20, 0.9)]
    crossing = 40.0  # 0.4 (l0/10)^-1/2 = 0.8 (l0/10)^-1 where (l0/10)^1/2 = 2
    front = front_of_curves([flat, steep, alone])
    assert min(l0 for l0, _ in front) == 10 and max(l0 for l0, _ in front) == 160
    for l0, value in front:
        below = flat if l0 < crossing else steep
        assert value == pytest.approx(interpolate_at(*zip(*below, strict=True), l0))


def run(label, target, seed, **values):
    return {"variant": "v", "label": label, "l0_target": target, "seed": seed, "l0": target, **values}


def test_seeds_are_averaged_within_label_and_target():
    records = [run("b", 20, 0, fvu=0.3), run("a", 40, 0, fvu=0.2), run("b", 20, 1, fvu=0.4), run("a", 20, 0, fvu=0.5)]
    groups = group_seeds(records)
    assert [(g.label, g.l0_target, len(g.runs)) for g in groups] == [("a", 20, 1), ("a", 40, 1), ("b", 20, 2)]
    assert groups[2].mean("fvu") == pytest.approx(0.35)
    assert groups[2].spread("fvu") == pytest.approx(statistics.stdev([0.3, 0.4]))
    assert groups[0].mean("fvu") == 0.5 and groups[0].spread("fvu") is None


def test_a_missing_value_is_not_averaged_away():
    (group,) = group_seeds([run("a", 20, 0, delta_lm_loss=0.3), run("a", 20, 1, delta_lm_loss=None)])
    assert group.mean("delta_lm_loss") is None and group.spread("delta_lm_loss") is None


def test_runs_of_one_seed_are_no_repeats():
    groups = group_seeds([run("a", 20, 0, fvu=0.3), run("a", 20, 0, fvu=0.4), run("a", 40, 0, fvu=0.2)])
    assert [g.mean("fvu") for g in groups] == [0.3, 0.4, 0.2]
    assert not is_curve(groups)
    assert is_curve(groups[1:])


def test_explicit_coefficients():
    known = [run("a", None, seed, l0=l0, sparsity_coefficient=c)
             for c, seed, l0 in [(1.0, 0, 60.0), (1.0, 1, 62.0), (2.0, 0, 30.0)]]
    assert [(g.mean("l0"), len(g.runs)) for g in group_seeds(known)] == [(30.0, 1), (61.0, 2)]
    unknown = [run("a", None, 0, l0=60.0), run("a", None, 1, l0=62.0)]
    assert [g.mean("l0") for g in group_seeds(unknown)] == [60.0, 62.0]
    assert is_curve(group_seeds(unknown))
    assert not is_curve(group_seeds([run("a", None, 0, l0=60.0), run("a", None, 1, l0=60.0)]))


def test_label_falls_back_to_the_variant():
    assert label_of({"label": "gated_ri_l1", "variant": "gated"}) == "gated_ri_l1"
    assert label_of({"variant": "gated"}) == label_of({"variant": "gated", "label": None}) == "gated"
    with pytest.raises(ValueError, match="neither"):
        label_of({"run_dir": "sweep/job"})
