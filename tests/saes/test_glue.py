"""What stands between the pure functions of training and Lightning, against values worked out by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sae_zoo.config import compose_config
from sae_zoo.running.settings import TrainSettings
from sae_zoo.saes import variant_class, variants

D_IN, D_SAE, TARGET = 12, 60, 5


def build(name, *overrides, step=0):
    """An SAE whose trainer stands at ``step``."""
    overrides = [f"sae={name}", f"d_sae={D_SAE}", f"l0_target={TARGET}", *overrides]
    settings = TrainSettings.of(compose_config("train", overrides))
    sae = settings.sae(d_in=D_IN, input_scale=1.0)
    sae.trainer = SimpleNamespace(global_step=step, log_every_n_steps=1, is_global_zero=True)
    return sae


# Rates and schedules.


@pytest.mark.parametrize("name", variants())
def test_every_parameter_has_its_own_rate_and_schedule(name):
    rates = {"recipe.lr": 1.0, "recipe.decoder_lr": 2.0, "recipe.free_decoder_lr": 3.0, "recipe.threshold_lr": 4.0,
             "recipe.bias_lr": 5.0, "recipe.lr_l0": 1.0, "recipe.lr_warmup_steps": 0, "recipe.n_steps": 1000,
             "recipe.lr_decay_fraction": 0.5}
    sae = build(name, *(f"{key}={value}" for key, value in rates.items()))
    made = sae.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    assert made["lr_scheduler"]["interval"] == "step"
    # Above lr_l0 times the variant's multiple, all rates but those of thresholds fall in proportion to the target.
    multiple = variant_class(name).lr_l0_multiple
    share = 1.0 if multiple is None else min(1.0, multiple * 1.0 / TARGET)

    def rate_of(parameter_name):
        if parameter_name == "W_dec":
            return share * (2.0 if sae.unit_norm_decoder else 3.0)
        if "threshold" in parameter_name:
            return 4.0
        return share * (1.0 if parameter_name in ("W_enc", "b_dec") else 5.0)

    def rates_now():
        return {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}

    wanted = {parameter_name: rate_of(parameter_name) for parameter_name, _ in sae.named_parameters()}
    for step, factor in ((0, 1.0), (500, 1.0), (750, 0.5)):
        schedule.last_epoch = step - 1
        schedule.step()
        found = {parameter_name: rates_now()[id(p)] for parameter_name, p in sae.named_parameters()}
        assert found == {key: pytest.approx(factor * value) for key, value in wanted.items()}, step


def test_the_coefficient_warms_up():
    overrides = ["recipe=paper", "sae.sparsity_coefficient=0.3"]  # over 10,000 steps
    for step, coefficient in ((0, 3e-5), (4999, 0.15), (9999, 0.3), (20_000, 0.3)):
        assert build("jumprelu", *overrides, step=step).coefficient == pytest.approx(coefficient)
    assert build("jumprelu", step=0).coefficient == pytest.approx(1e-3)  # the short recipe has none


# L0 control.


def controlled(name="jumprelu", *, step=0, average=math.nan, ratio=1.0, error=math.nan):
    sae = build(name, "recipe.n_steps=1000", "recipe.lr_decay_fraction=0.2", "recipe.control_proportional=0.5",
                "recipe.control_integral=0.02", "recipe.control_shift=0.1", step=step)
    sae.l0_average.fill_(average)
    sae.heldout_l0_ratio.fill_(ratio)
    sae.control_error.fill_(error)
    return sae


@pytest.mark.parametrize("ratio", [1.0, 0.9])
def test_control_looks_at_a_running_l0_times_the_held_out_ratio(ratio):
    """20 batches' worth of running mean: 5.0 -> 5.05 when a batch has 6.0."""
    sae = controlled(average=5.0, ratio=ratio, error=0.01)
    before = float(sae.log_coefficient)
    sae._control(6.0)
    assert float(sae.l0_average) == pytest.approx(5.05)
    error = math.log(5.05 * ratio / TARGET)
    assert float(sae.control_error) == pytest.approx(error)
    assert float(sae.log_coefficient) - before == pytest.approx(0.5 * (error - 0.01) + 0.02 * error)


def test_the_first_batch_starts_the_running_l0():
    sae = controlled()
    before = float(sae.log_coefficient)
    sae._control(5.5)
    assert float(sae.l0_average) == 5.5
    # No change of the error yet.
    assert float(sae.log_coefficient) - before == pytest.approx(0.02 * math.log(5.5 / TARGET))


@pytest.mark.parametrize(("name", "step", "l0", "error"), [
    ("jumprelu", 100, 5.25, 0.0),  # less than a tenth is the coefficient's
    ("jumprelu", 100, 6.0, math.log(1.2 * 0.95) - 0.1),
    ("jumprelu", 900, 5.25, math.log(1.05 * 0.95)),  # while rates fall, all of it
    ("gated", 100, 6.0, 0.0),  # biases are left to the coefficient before that
    ("gated", 900, 6.0, math.log(1.2 * 0.95)),
])
def test_thresholds_are_shifted_by_the_l0_of_the_batch(name, step, l0, error):
    sae = controlled(name, step=step, average=5.0, ratio=0.95)
    sae._control(l0)
    assert sae._shift == pytest.approx(0.1 * error)


@pytest.mark.parametrize("name", ["jumprelu", "gated", "relu"])
def test_a_fixed_coefficient_stays(name):
    sae = build(name, "sae.sparsity_coefficient=0.02")
    state = {key: value.clone() for key, value in sae.state_dict().items()}
    sae._control(50.0)
    assert sae._shift == 0 and all(torch.equal(value, state[key]) for key, value in sae.state_dict().items()
                                   if not torch.isnan(value).any())


def test_the_held_out_ratio_follows_by_half_of_what_is_measured(monkeypatch):
    sae = build("jumprelu")
    monkeypatch.setattr(sae, "log", lambda *_, **__: None)
    sae.l0_average.fill_(5.0)
    sae._heldout = [(30.0, 10), (60.0, 10)]  # 4.5 a token
    sae.on_validation_epoch_end()
    assert float(sae.heldout_l0_ratio) == pytest.approx(1 + 0.5 * (0.9 - 1)) and not sae._heldout
    sae._heldout = [(0.0, 10)]  # a silent SAE says nothing of the ratio
    sae.on_validation_epoch_end()
    assert float(sae.heldout_l0_ratio) == pytest.approx(0.95)


# What is logged.


@pytest.mark.parametrize("name", variants())
def test_logged_metrics_are_those_of_the_batch(name, monkeypatch):
    x = 3 * torch.randn(300, D_IN, generator=torch.Generator().manual_seed(1)) @ torch.randn(
        D_IN, D_IN, generator=torch.Generator().manual_seed(2)) + 5
    sae = build(name, "recipe.error_bound=null")
    sae.initialise(x)
    logged = {}
    monkeypatch.setattr(sae, "log_dict", lambda values, **_: logged.update(values))
    monkeypatch.setattr(sae, "optimizers", lambda: SimpleNamespace(param_groups=[{"lr": 0.125}]))
    with torch.no_grad():
        target = x / sae.input_scale - sae.b_dec
        loss = sae.loss(x, sparse=False)
        pre_acts = sae.run(target, loss.selection, sparse=False, error_bound=torch.tensor(math.inf)).latents
        error = float((pre_acts @ sae.W_dec - target).square().sum())
        variance = float((x - x.mean(0)).square().sum() / sae.input_scale**2)
        active = float((pre_acts > 0).sum())
    sae.training_step(x, 0)
    assert logged["L0"] == pytest.approx(active / 300, rel=1e-5)
    assert logged["FVU"] == pytest.approx(error / variance, rel=1e-4)
    assert logged["loss"] == pytest.approx(float(loss.total), rel=1e-5) and logged["lr"] == 0.125
    assert logged["density"] == pytest.approx(float(sae.density)) and logged["dead_fraction"] == 0


def test_steps_without_a_log_line_log_nothing(monkeypatch):
    x = torch.randn(50, D_IN, generator=torch.Generator().manual_seed(1))
    sae = build("topk")
    sae.trainer.log_every_n_steps = 10
    monkeypatch.setattr(sae, "log_dict", lambda *_, **__: pytest.fail("logged"))
    sae.training_step(x, 0)


def test_a_loss_that_is_not_finite_stops_the_run():
    sae = build("topk")
    nn.init.constant_(sae.W_enc, math.nan)
    with pytest.raises(ValueError, match=r"loss is nan at step 0; lower recipe\.lr"):
        sae.training_step(torch.randn(50, D_IN), 0)
