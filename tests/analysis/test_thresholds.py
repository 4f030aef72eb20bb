import json
import shutil

import numpy as np
import pytest
import torch

from analysis import thresholds
from analysis.paper import FIGURES, NotMeasured, load_runs
from analysis.paper.threshold_figure import window_slope
from sae_zoo.saes import variant_class

LATENT, COEFFICIENT, BANDWIDTH = 7, 0.4, 0.3


@pytest.fixture
def sae():
    """As it is loaded from disk: raw thresholds, no input scale."""
    torch.manual_seed(0)
    sae = variant_class("jumprelu")(d_in=6, d_sae=20, threshold_as="raw", subtract_b_dec=False)
    with torch.no_grad():
        sae.threshold_parameter.uniform_(0.2, 0.5)
        sae.b_dec.uniform_(-0.2, 0.2)
        sae.b_enc.uniform_(-0.1, 0.1)
    return sae.eval().requires_grad_(False)


def test_against_the_whole_sae_with_that_threshold(sae):
    x = torch.randn(400, 6, generator=torch.Generator().manual_seed(0)) * 2 + 1
    at = torch.tensor([0.1, 0.3, 0.6, 1.2])
    found = thresholds.against_thresholds(sae, x.split(150), {LATENT: at, LATENT + 1: at + 1}, coefficient=COEFFICIENT,
                                          bandwidth=BANDWIDTH, kernel="rectangle")
    losses, gradients = found[LATENT]
    whole, slopes, direction = [], [], sae.W_dec[LATENT]
    for threshold in at:
        sae.threshold_parameter[LATENT] = threshold
        latents = sae.encode(x)
        error = x - sae.decode(latents)
        whole.append(error.square().sum(1).mean().item() + COEFFICIENT * (latents > 0).sum(1).float().mean().item())
        # The paper's pseudo-derivatives, (theta / eps) K of the latent and (1 / eps) K of the step, times what they
        # lead to.
        z = x @ sae.W_enc[:, LATENT] + sae.b_enc[LATENT]
        in_window = ((z - threshold).abs() < BANDWIDTH / 2) / BANDWIDTH
        slopes.append((in_window * (2 * threshold * (error @ direction) - COEFFICIENT)).mean().item())
    assert np.diff(losses) == pytest.approx(np.diff(whole), abs=2e-5) and np.ptp(whole) > 0.01
    assert gradients.tolist() == pytest.approx(slopes, rel=1e-3, abs=1e-6)


def test_slope_over_a_window():
    at = np.linspace(0, 2, 41)
    middles, slope = window_slope(at, at**2, 0.4)
    assert middles[0] == pytest.approx(0.2) and middles[-1] == pytest.approx(1.8)
    assert slope == pytest.approx(2 * middles, abs=1e-9)


def test_from_a_run_to_its_figure(trained, tmp_path, capsys):
    run = tmp_path / "sweep" / "jumprelu"
    shutil.copytree(trained / "jumprelu", run)
    said = r"no thresholds\.json beside the records; python -m analysis\.thresholds RUN"
    with pytest.raises(NotMeasured, match=said):
        FIGURES["thresholds"](load_runs([run]))
    thresholds.main([str(run)])
    assert "trained threshold" in capsys.readouterr().out
    found = json.loads((run / "thresholds.json").read_text())
    assert [len(latent["loss"]) for latent in found["latents"]] == [len(thresholds.GRID)] * len(thresholds.QUANTILES)
    assert np.isfinite([latent["gradient"] for latent in found["latents"]]).all()
    figure = FIGURES["thresholds"](load_runs([run]))
    assert len(figure.axes) == 2 * len(thresholds.QUANTILES)

    shutil.copytree(run, run.parent / "again")
    with pytest.raises(NotMeasured, match=r"there are 2 thresholds\.json"):
        FIGURES["thresholds"](load_runs([run.parent]))
    (run / "thresholds.json").write_text('{"latents": [], "bandwidth": 1}')
    with pytest.raises(ValueError, match=r"is not what analysis\.thresholds writes: .*at least one latent"):
        FIGURES["thresholds"](load_runs([run]))


def test_another_variant_is_refused_in_one_line(trained, capsys):
    with pytest.raises(SystemExit) as stop:
        thresholds.main([str(trained / "topk")])
    assert stop.value.code == 2
    assert "variant topk; the loss by threshold is that of a run with jumprelu" in capsys.readouterr().err
