"""The paper's figures that are no curves: frequencies from latents.csv, the windows' formulas, the cost of a step."""

import json
import math
import random

import numpy as np
import pytest
import torch

from analysis.paper import FIGURES, NotMeasured, load_runs
from analysis.paper.frequencies import common_target, draw_frequencies, histogram, notes_on_frequencies
from analysis.paper.windows import BANDWIDTH, THRESHOLD, draw_windows
from sae_zoo.frontier.style import STYLES
from sae_zoo.functional.activations import heaviside, jumprelu
from sae_zoo.functional.kernel_widths import KERNEL_STD


def record(label="topk", target=20, seed=0, **values):
    return {
        "status": "finished", "error": None, "variant": label, "label": label, "l0_target": target,
        "sparsity_coefficient": None, "l0": target * (1 + 0.01 * seed), "fvu": 1 / target, "seconds_training": 60.0,
        "d_in": 64, "d_sae": 4096, "n_tokens": 1000, "seed": seed, "lm": "builtin", "hook": "residual.3",
        "data_id": "d", **values,
    }


def grid(labels=("jumprelu", "topk"), targets=(10, 40, 160), seeds=(0, 1)):
    return [record(v, t, s) for v in labels for t in targets for s in seeds]


def latents(seed, n=400, dead=0.1):
    by = random.Random(seed)
    return [0.0 if by.random() < dead else round(10 ** by.uniform(-4.9, -0.1), 5) for _ in range(n)]


# JumpReLU's advantage.


def test_the_advantage_at_each_l0_with_its_interval(sweep):
    factors = {"topk": {10: 1.25, 40: 0.8}, "gated": {10: 2.0, 40: 2.0}, "gated_ri_l1": {10: 1.6, 40: 2.5},
               "jumprelu": {}}
    records = [record(label, target, seed, l0=target,
                      fvu=factor.get(target, 1) / target * (1 + 0.01 * seed * (label == "topk")))
               for label, factor in factors.items() for target in (10, 40) for seed in range(3)]
    (axes,) = (figure := FIGURES["advantage"](load_runs([sweep(*records)]))).axes  # none of them has a delta LM loss
    assert axes.get_title(loc="left") == "FVU: JumpReLU / other"
    mean = 1.01 * 1.02
    expected = {"topk": [0.8 / mean ** (1 / 3), 1.25 / mean ** (1 / 3)],
                "gated": [1 / 1.6, 1 / 2]}  # Gated's better form
    for label, ratios in expected.items():
        own = [line for line in axes.lines if line.get_color() == STYLES[label].color]
        (means,) = (line for line in own if line.get_marker() == STYLES[label].marker)
        points = list(zip(*means.get_data(), strict=True))
        drawn = [ratio for x, ratio in points if min(abs(x / target - 1) for target in (10, 40)) < 0.03]
        assert len(points) == 3 and drawn == pytest.approx(ratios, rel=1e-6)  # at 20 between the two
        bars = [line.get_ydata() for line in own if line is not means]
        assert len(bars) == 3
        assert all(low <= middle <= high for (low, high), middle in zip(bars, means.get_ydata(), strict=True))
    assert any("3 pairs" in text.get_text() for text in figure.texts)


def test_no_advantage_without_a_variant_to_compare_with(sweep):
    with pytest.raises(NotMeasured, match="no curves of JumpReLU and TopK or Gated"):
        FIGURES["advantage"](load_runs([sweep(*grid(("jumprelu", "relu")))]))


# Frequencies.


def test_histogram_counts_each_latent_once():
    frequencies = [0.0, 0.0, 1e-5, 1e-3, 0.001, 0.00177, 0.00178, 0.5, 0.9999, 1.0]  # 10^-2.75 = 0.001778...
    made = histogram(np.array(frequencies), -5)
    assert made.dead == 0.2 and len(made.shares) == 20 == len(made.edges) - 1
    expected = [0.0] * 20
    for frequency in filter(None, frequencies):
        expected[min(19, math.floor(4 * (math.log10(frequency) + 5) + 1e-6))] += 0.1
    assert made.shares == pytest.approx(expected)
    assert made.shares[8] == pytest.approx(0.3) and made.shares[9] == pytest.approx(0.1)  # 0.001 opens its bin


def test_frequencies_are_drawn_at_the_middle_target_with_the_dead_apart(sweep):
    records = [{**r, "frequencies": latents(f"{r['label']} {r['seed']}", dead=0.1 if r["label"] == "topk" else 0.6)}
               if r["l0_target"] == 40 else r for r in grid(targets=(10, 40, 160))]
    records += grid(["jumprelu"], targets=(5, 320))  # which topk does not have
    runs = load_runs([sweep(*records)])
    assert common_target(runs) == 40
    (axes,) = draw_frequencies(runs).axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["jumprelu", "topk"]
    dead = {label: np.mean([np.mean(np.array(r["frequencies"]) == 0) for r in records
                            if r["label"] == label and "frequencies" in r]) for label in ("jumprelu", "topk")}
    assert [text.get_text() for text in axes.texts] == [f"{dead['jumprelu']:.1%}", f"{dead['topk']:.1%}"]
    bars = {patch.get_y(): patch for patch in axes.patches if hasattr(patch, "get_height")}
    steps = [patch for patch in axes.patches if hasattr(patch, "get_data") and patch.get_fill()]
    scale = {}
    for base, label, step in zip((1, 0), ("jumprelu", "topk"), steps, strict=True):
        values, edges, baseline = step.get_data()
        assert baseline == base and edges[0] == -5 and edges[-1] == 0
        own = [r["frequencies"] for r in records if r["label"] == label and "frequencies" in r]
        shares = np.zeros(20)
        for frequencies in own:
            for frequency in filter(None, frequencies):
                shares[min(19, math.floor(4 * (math.log10(frequency) + 5) + 1e-6))] += 1 / len(frequencies) / len(own)
        scale[label] = (values - base).max() / shares.max()
        assert values - base == pytest.approx(scale[label] * shares)
        assert bars[base].get_height() == pytest.approx(min(scale[label] * dead[label], 0.9))
        assert bars[base].get_x() + bars[base].get_width() < edges[0]  # left of the histogram
    assert scale["topk"] == pytest.approx(scale["jumprelu"])  # the same height is the same share


def test_without_a_common_target_or_with_a_fixed_coefficient_there_are_no_histograms(sweep):
    runs = load_runs([sweep(record("topk", 20), record("jumprelu", 40))])
    with pytest.raises(NotMeasured, match="no L0 target is common"):
        draw_frequencies(runs)
    assert notes_on_frequencies(runs) == []
    fixed = sweep(record("topk", 20), record("jumprelu", 20, sparsity_coefficient=0.1), name="fixed")
    with pytest.raises(NotMeasured, match="no L0 target is common"):
        draw_frequencies(load_runs([fixed]))


def test_a_missing_latents_file_and_a_missed_target_are_said(sweep):
    records = [record("topk", 20, 0, frequencies=latents(0)), record("topk", 20, 1),
               record("jumprelu", 20, frequencies=latents(2), l0=33.3, l0_missed=True)]
    runs = load_runs([sweep(*records)])
    (axes,) = draw_frequencies(runs).axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["jumprelu"]
    without, missed = notes_on_frequencies(runs)
    assert "1 of 3 runs at L0 target 20 have no latents.csv" in without and "sweep/job001" in without
    assert missed == "note: missed the L0 target 20 of the histograms: sweep/job002 (L0 33.3)"


@pytest.mark.parametrize("text", ["", "latent,share\n0,0.5\n", "latent,frequency\n0,often\n", "latent,frequency\n",
                                  "latent,frequency\n0,1.5\n", "latent,frequency\n0,\n"])
def test_a_latents_file_of_another_kind_is_an_error(sweep, text):
    folder = sweep(record())
    (folder / "job000" / "latents.csv").write_text(text)
    with pytest.raises(ValueError, match=r"job000/latents\.csv has no frequencies: .*evaluate that run again"):
        draw_frequencies(load_runs([folder]))


# Windows and cost.


def test_windows_are_what_the_straight_through_estimators_compute():
    top_jump, bottom_jump, top_step, bottom_step = draw_windows().axes
    for top, bottom, function in ((top_jump, bottom_jump, jumprelu), (top_step, bottom_step, heaviside)):
        (line,) = top.lines
        z, values = line.get_data()
        z, expected = torch.tensor(z), function(torch.tensor(z), torch.tensor(THRESHOLD), bandwidth=1.0)
        is_jump = np.isnan(values)
        assert is_jump.sum() == 1 and np.allclose(values[~is_jump], expected[~is_jump])
        assert {curve.get_label().lower() for curve in bottom.lines} == KERNEL_STD.keys()
        for curve in bottom.lines:
            name = curve.get_label().lower()
            z, drawn = map(torch.tensor, curve.get_data())
            threshold = torch.full_like(z, THRESHOLD, requires_grad=True)
            bandwidth = BANDWIDTH * KERNEL_STD["rectangle"] / KERNEL_STD[name]
            function(z, threshold, bandwidth=bandwidth, kernel=name).sum().backward()
            same = (threshold.grad - drawn).abs() < 1e-3
            assert (~same).sum() <= 2  # the rectangle's edges, in float32


def test_windows_have_one_area_and_one_variance():
    for axes, area in zip(draw_windows().axes[1::2], (THRESHOLD, 1.0), strict=True):
        for curve in axes.lines:
            z, drawn = curve.get_data()
            assert -np.trapezoid(drawn, z) == pytest.approx(area, rel=2e-3)
            variance = -np.trapezoid(drawn * (z - THRESHOLD) ** 2, z) / area
            assert variance == pytest.approx(BANDWIDTH**2 / 12, rel=0.01)


STEP = {"shape": [384, 8192, 4096, 40], "encoder_gemm_ms": 98.0,
        "variants": {"topk": {"ms": 162.0, "ratio": 1.65}, "gated": {"ms": 175.0, "ratio": 1.79}}, "peers": {}}


def test_cost_is_of_the_step_where_it_was_measured(sweep):
    folder = sweep(*grid())
    runs = load_runs([folder, folder])
    assert any("seconds" in text.get_text() for text in FIGURES["cost"](runs).texts)
    (folder / "machine").mkdir()
    (folder / "machine" / "step.json").write_text(json.dumps(STEP))
    figure = FIGURES["cost"](runs)
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["gated", "topk"]
    assert [bar.get_width() for bar in axes.patches] == [1.79, 1.65]
    assert [text.get_text() for text in axes.texts] == ["1.79", "1.65"]
    assert any("d_in 384" in text.get_text() and "L0 40" in text.get_text() for text in figure.texts)
    (folder / "step.json").write_text(json.dumps(STEP))
    with pytest.raises(ValueError, match=r"there are 2 step\.json"):
        FIGURES["cost"](runs)


@pytest.mark.parametrize("text", ["{", "[]", "{}", *(json.dumps({**STEP, **part}) for part in (
    {"shape": [1]}, {"variants": {}}, {"variants": {"topk": {}}}))])
def test_a_step_file_of_another_kind_is_an_error(sweep, text):
    folder = sweep(record())
    (folder / "step.json").write_text(text)
    with pytest.raises(ValueError, match=r"step\.json is not the JSON line of benchmarks step") as error:
        FIGURES["cost"](load_runs([folder]))
    assert "\n" not in str(error.value)
