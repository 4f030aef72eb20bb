"""Claims on JumpReLU's choices (C10 to C13), on the estimator (C3) and on cost (C8), on records with known answers."""

import json
import math
import re

import numpy as np
import pytest
from scipy import stats

from analysis.claims.evidence import Evidence
from analysis.claims.finding import FAILS, HOLDS, NOT_MEASURED, UNDECIDED
from analysis.claims.report import judge
from analysis.theory import estimate
from sae_zoo.functional.kernel_widths import KERNEL_STD
from tests.analysis.test_claims import SITES, curve, judged, run


def sweep(options, *, sites=SITES[:3], seeds=(0, 1, 2), noise=0.002, label="jumprelu"):
    """Curves for each of ``options``: (options, FVU scale or one of each site)."""
    rng = np.random.default_rng(0)
    return [record for hook in sites for seed in seeds for values, scale in options for record in curve(
        label, seed, hook, **values,
        fvu=(scale if isinstance(scale, float) else scale[sites.index(hook)]) * math.exp(noise * rng.normal()))]


# C10


def bandwidths(scales, **more):
    return sweep([({"sae.bandwidth": b, "recipe.bandwidth": b}, scale) for b, scale in scales.items()], **more)


@pytest.mark.parametrize(("scales", "verdict", "chosen", "worst"), [
    ({0.001: 1.2, 0.01: 1.0, 0.1: 1.3}, HOLDS, 0.01, 1.0),
    ({0.001: (1.0, 1.01, 1.2), 0.01: (1.01, 1.0, 1.0), 0.1: 1.3}, HOLDS, 0.01, 1.01),
    ({0.001: (1.0, 1.0, 1.5), 0.01: (1.3, 1.3, 1.0)}, FAILS, 0.01, 1.3),  # each fails somewhere
    ({0.001: (1.0, 1.0, 1.03), 0.01: (1.3, 1.3, 1.0)}, FAILS, 0.001, 1.03),
])
def test_one_bandwidth(scales, verdict, chosen, worst):
    found = judged(bandwidths(scales))["C10"]
    assert (found.verdict, found.details["bandwidth"]) == (verdict, chosen) and found.n_runs == 27 * len(scales)
    assert found.details["worst_effect"] == pytest.approx(worst, abs=5e-3)
    at_sites = {b: np.broadcast_to(scale, 3) for b, scale in scales.items()}
    to_best = at_sites[0.001] / np.min(list(at_sites.values()), axis=0)
    assert found.details["by_bandwidth"]["0.001"]["effect"] == pytest.approx(stats.gmean(to_best), abs=6e-3)


def test_one_bandwidth_needs_sites_seeds_and_all_else_equal():
    one_site = judged(bandwidths({0.001: 1.2, 0.01: 1.0}, sites=SITES[:1]))["C10"]
    assert one_site.verdict == UNDECIDED and "One site/layer, and the claim speaks of several." in one_site.caveats
    assert judged(bandwidths({0.001: 1.2, 0.01: 1.0}, sites=SITES[:2], seeds=(0,)))["C10"].verdict == UNDECIDED
    assert judged(bandwidths({0.01: 1.0}))["C10"].verdict == NOT_MEASURED
    two = bandwidths({0.001: 1.0, 0.01: 1.2})
    other_recipe = [r | ({"recipe.lr": 0.1} if r["sae.bandwidth"] == 0.01 else {}) for r in two]
    assert judged(other_recipe)["C10"].verdict == NOT_MEASURED
    untold = [{k: v for k, v in r.items() if k != "sae.bandwidth"} for r in two]
    assert judged(untold)["C10"].verdict == NOT_MEASURED
    narrow = judged(bandwidths({0.01: 1.0, 0.02: 1.01}))["C10"]
    assert narrow.verdict == HOLDS and "The bandwidths span a factor of 2 only." in narrow.caveats


def test_a_sweep_beside_the_main_comparison_leaves_it_alone():
    main = sweep([({}, 0.9)], sites=SITES) + sweep([({}, 1.0)], sites=SITES, label="gated")
    found = judged(main + bandwidths({0.001: 5.0, 0.1: 7.0}))
    assert found["C1"].effect == pytest.approx(0.9, abs=2e-3) and found["C1"].n_runs == 162
    assert found["C10"].details["bandwidth"] == 0.01 and found["C10"].n_runs == 81  # with the main one as one of three


# C11


def kernels(scales, *, stretch=1.0):
    widths = {kernel: 0.01 * (12 * KERNEL_STD[kernel] ** 2) ** -0.5 * (stretch if kernel != "rectangle" else 1)
              for kernel in scales}
    return sweep([({"sae.kernel": kernel, "sae.bandwidth": widths[kernel]}, scale) for kernel, scale in scales.items()])


@pytest.mark.parametrize(("scales", "stretch", "verdict", "effect"), [
    ({"rectangle": 1.0, "triangle": 1.0, "epanechnikov": 0.995, "gaussian": 1.005}, 1.0, HOLDS, 1.005),
    ({"rectangle": 1.0, "triangle": 1.0, "epanechnikov": 0.995, "gaussian": 1.05}, 1.005, FAILS, 1.05),
    ({"rectangle": 1.0, "triangle": 0.95}, 1.0, FAILS, 0.95),
    ({"rectangle": 1.0, "triangle": 1.0}, 1.0, UNDECIDED, 1.0),  # two of four
    ({"rectangle": 1.0, "gaussian": 1.5}, 1.1, NOT_MEASURED, None),  # not at the same variance
    ({"triangle": 1.0, "gaussian": 1.5}, 1.0, NOT_MEASURED, None),
])
def test_kernel_shape(scales, stretch, verdict, effect):
    found = judged(kernels(scales, stretch=stretch))["C11"]
    assert found.verdict == verdict
    assert found.effect == effect if effect is None else found.effect == pytest.approx(effect, abs=4e-3)


# C12


@pytest.mark.parametrize(("miss", "scale", "verdict"), [
    (0.02, 1.0, HOLDS), (0.02, 0.9, HOLDS), (0.1, 1.0, FAILS), (0.02, 1.05, FAILS)])
def test_target_l0_loss(miss, scale, verdict):
    # Either side of the target by the same share, on the law FVU = 2 scale L0^-0.7 of the other runs.
    rng = np.random.default_rng(0)
    targeted = [run("jumprelu", t, seed, hook, l0=t * (1 + sign * miss * (1 + 0.01 * rng.normal())), fvu=scale,
                    sparsity_coefficient=1.0, **{"sae.sparsity_loss": "l0_target"})
                for hook in SITES[:3] for seed in (0, 1, 2) for t, sign in ((15, 1), (30, -1))]
    found = judged([*sweep([({}, 1.0)]), *targeted])["C12"]
    assert found.verdict == verdict and found.effect == pytest.approx(miss, rel=0.02)
    assert found.details["fvu_ratio"]["effect"] == pytest.approx(scale, abs=5e-3)


def test_target_l0_loss_off_the_frontiers_range_or_alone():
    targeted = [run("jumprelu", t, seed, SITES[0], l0=1.001 * t, sparsity_coefficient=1.0,
                    **{"sae.sparsity_loss": "l0_target"})
                for seed in (0, 1, 2) for t in (80, 160)]
    assert judged(targeted)["C12"].verdict == NOT_MEASURED
    found = judged([*sweep([({}, 1.0)]), *targeted])["C12"]
    assert found.verdict == UNDECIDED and found.details["fvu_ratio"] is None
    assert any("2 runs of the target-L0 loss" in line and "outside 10.1 to 40.4" in line for line in found.left_out)
    assert judged([*sweep([({}, 1.0)]), *targeted])["C4"].n_runs == 27  # and they are in no arm of the main comparison


# C13


def needed(ste=None, **square):
    records = sweep([({"sae.penalty": "l0"}, 1.0)])
    if ste:
        records += sweep([({"sae.penalty": "l0", "sae.ste_into_pre_acts": True}, ste)])
    for name, scale in square.items():
        label, penalty = name.split("_")
        records += sweep([({"sae.penalty": penalty}, scale)], label=label)
    return records


@pytest.mark.parametrize(("records", "verdict", "effect"), [
    (needed(1.1, jumprelu_l1=1.3, relu_l0=1.2, relu_l1=1.5), HOLDS, 1.1),
    (needed(1.1, jumprelu_l1=1.3, relu_l0=0.9), FAILS, 1.1),
    (needed(0.95, jumprelu_l1=1.3, relu_l0=1.2), FAILS, 0.95),
    (needed(1.1), UNDECIDED, 1.1),
    (needed(0.9), FAILS, 0.9),
    (needed(jumprelu_l1=1.3, relu_l0=1.2), UNDECIDED, 1.3),
    (needed(), NOT_MEASURED, None),
])
def test_what_is_needed(records, verdict, effect):
    found = judged(records)["C13"]
    assert found.verdict == verdict
    assert found.effect == effect if effect is None else found.effect == pytest.approx(effect, abs=5e-3)
    if verdict == UNDECIDED:
        assert any("is not measured, and the claim speaks of it" in caveat for caveat in found.caveats)


def test_records_without_the_penalty_are_no_square():
    assert judged(sweep([({}, 1.0)]) + sweep([({}, 2.0)], label="relu"))["C13"].verdict == NOT_MEASURED


# C3


def test_what_analysis_theory_writes_is_read(tmp_path):
    content = estimate(bandwidths=(0.8, 0.4, 0.1), n=200_000, repeats=4)
    (tmp_path / "ste.json").write_text(json.dumps(content))
    found = judge(Evidence([tmp_path]))["C3"]  # a folder without a record
    eps, mean, error, _ = content["estimates"][-1]
    assert eps == 0.1 and found.effect == pytest.approx(mean / content["analytic"])
    low, high = found.interval
    assert high - low == pytest.approx(2 * 1.96 * error / abs(content["analytic"]), rel=1e-3)
    within = abs(mean - content["analytic"]) <= 2 * error
    assert found.verdict == (HOLDS if within else UNDECIDED)


@pytest.mark.parametrize(("means", "verdict"), [
    ((1.3, 1.1, 1.01), HOLDS), ((0.7, 0.9, 0.99), HOLDS), ((1.3, 1.1, 1.05), UNDECIDED), ((1.0, 1.1, 1.3), FAILS),
    ((1.3, 1.5, 1.0), FAILS), ((1.1, 1.12, 1.0), HOLDS)])  # the last rises by less than the errors
def test_bias_must_fall_with_the_bandwidth(tmp_path, means, verdict):
    rows = [[eps, -2 * mean, 0.02, 0.1] for eps, mean in zip((0.2, 0.1, 0.05), means, strict=True)]
    (tmp_path / "ste.json").write_text(json.dumps({"analytic": -2.0, "n_samples": 10, "estimates": rows[::-1]}))
    found = judge(Evidence([tmp_path]))["C3"]
    assert found.verdict == verdict and found.effect == pytest.approx(means[-1])
    assert found.interval == pytest.approx((means[-1] - 0.0196, means[-1] + 0.0196), abs=1e-4)


def test_two_different_estimates_are_none(tmp_path):
    for i in range(3):
        (tmp_path / str(i)).mkdir()
        rows = [[0.1, 1.1, 0.1, 1], [0.05, 1.0, 0.1, 1]]
        (tmp_path / str(i) / "ste.json").write_text(json.dumps({"analytic": 1.0 + (i == 2), "estimates": rows}))
    assert judge(Evidence([tmp_path / "0", tmp_path / "1"]))["C3"].verdict == HOLDS  # a copy
    found = judge(Evidence([tmp_path]))["C3"]
    assert found.verdict == NOT_MEASURED and "Several ste.json that differ" in found.caveats[0]


# C8


def benchmarks(folder, *ratios):
    for i, (jumprelu, gated, topk) in enumerate(ratios):
        (folder / str(i)).mkdir(parents=True)
        variants = {"jumprelu": jumprelu, "gated": gated, "gated_ri_l1": gated and 2 * gated, "topk": topk, "relu": 1.6}
        measured = {name: {"ms": 9.0, "ratio": ratio} for name, ratio in variants.items() if ratio}
        (folder / str(i) / "step.json").write_text(json.dumps({
            "shape": [384, 8192, 4096, 40], "device": "cpu", "variants": measured}))
    return folder


@pytest.mark.parametrize(("ratios", "verdict", "effect"), [
    ([(1.6, 1.8, 1.9), (1.61, 1.8, 1.9), (1.59, 1.8, 1.9)], HOLDS, 1.6 / 1.8),
    ([(1.6, 1.8, 1.5), (1.61, 1.8, 1.5), (1.59, 1.8, 1.5)], FAILS, 1.6 / 1.8),
    ([(1.6, 1.8, 1.9)], UNDECIDED, 1.6 / 1.8),
    ([(1.6, 1.8, None), (1.61, 1.8, None), (1.59, 1.8, None)], UNDECIDED, 1.6 / 1.8),
    ([(None, 1.8, 1.9)], NOT_MEASURED, None),
])
def test_cost_of_a_step(tmp_path, ratios, verdict, effect):
    found = judge(Evidence([benchmarks(tmp_path, *ratios)]))["C8"]
    assert found.verdict == verdict and found.n_runs == 0
    assert found.effect == effect if effect is None else found.effect == pytest.approx(effect, rel=1e-3)


def test_seconds_of_runs_are_a_remark_only():
    records = [r | {"seconds_training": 150.0 if r["label"] == "jumprelu" else 100.0}
               for r in (*curve("jumprelu"), *curve("topk"))]
    records += [run("jumprelu", 20, seconds_training=900.0, **{"sae.kernel": "gaussian"})]  # an ablation
    found = judged(records)["C8"]
    assert found.verdict == NOT_MEASURED and found.effect is None
    assert any("took 1.50 times as long as TopK's (median, 3 compared); no evidence" in c for c in found.caveats)


@pytest.mark.parametrize(("name", "content"), [
    ("ste.json", {"analytic": 1.0}),
    ("ste.json", {"analytic": 1.0, "estimates": [[0.1, 1.0, 0.1], [0.2, 1.0, 0.1]]}),
    ("ste.json", {"analytic": 0.0, "estimates": [[0.1, 1.0, 0.1, 1], [0.2, 1.0, 0.1, 1]]}),
    ("step.json", []), ("step.json", {"variants": {"topk": {"ratio": "fast"}}}),
    ("step.json", {"variants": {"topk": 1}})])
def test_files_that_are_something_else_are_refused(tmp_path, name, content):
    (tmp_path / name).write_text(json.dumps(content))
    again = r"write it again with python -m (analysis\.theory|benchmarks step)"
    with pytest.raises(ValueError, match=f"{re.escape(name)} is not .*{again}"):
        judge(Evidence([tmp_path]))
