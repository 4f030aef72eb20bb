import json

import pytest

from analysis import theory


def test_closed_forms_against_samples_and_finite_differences():
    z, target = theory.samples(2_000_000, seed=1)
    for threshold in (0.5, 1.0, 1.7):
        f = z * (z > threshold)
        loss = float((f - target).double().square().mean() + 0.3 * (z > threshold).double().mean())
        assert theory.expected_loss(threshold, 0.3) == pytest.approx(loss, abs=3e-3)
        step = 1e-4
        slope = (theory.expected_loss(threshold + step, 0.3) - theory.expected_loss(threshold - step, 0.3)) / (2 * step)
        assert theory.expected_gradient(threshold, 0.3) == pytest.approx(slope, rel=1e-4)
        assert theory.l0(threshold) == pytest.approx(float((z > threshold).double().mean()), abs=2e-3)
        relu = float((1.5 * (z - threshold).clamp_min(0) - target).double().square().mean())
        assert theory.relu_error(threshold, 1.5) == pytest.approx(relu, abs=3e-3)


def test_straight_through_gradient_has_a_bias_that_falls_with_bandwidth_and_a_variance_that_rises():
    found = theory.estimate(bandwidths=(0.4, 0.1, 0.025), n=250_000, repeats=12)
    errors = [abs(mean - found["analytic"]) for _, mean, _, _ in found["estimates"]]
    spreads = [spread for *_, spread in found["estimates"]]
    assert errors[0] > 2 * errors[1] and errors[2] < 3 * found["estimates"][2][2] < errors[0]
    # One over N eps: four times narrower, twice the standard deviation. Twelve repeats know it to a fifth.
    assert 1.3 < spreads[1] / spreads[0] < 3.2 and 1.3 < spreads[2] / spreads[1] < 3.2
    fewer = theory.estimate(bandwidths=(0.1,), n=62_500, repeats=12)
    assert 1.3 < fewer["estimates"][0][3] / spreads[1] < 3.2


def test_jumprelu_beats_the_best_relu_where_the_latent_is_sparse_enough():
    for threshold in (1.2, 1.5):
        assert theory.expected_loss(threshold, 0.0) < 0.85 * theory.best_slope(threshold)[1]
    assert theory.expected_loss(0.5, 0.0) > theory.best_slope(0.5)[1], "where it is not, shrinking is the better way"


def test_command_writes_what_claims_reads(tmp_path, monkeypatch, capsys):
    found = {"analytic": 1.0, "n_samples": 5, "estimates": [[0.1, 1.0, 0.1, 0.3]]}
    monkeypatch.setattr(theory, "estimate", lambda: found)
    theory.main([str(tmp_path)])
    assert json.loads((tmp_path / "ste.json").read_text())["analytic"] == 1.0
    assert "best ReLU" in capsys.readouterr().out
