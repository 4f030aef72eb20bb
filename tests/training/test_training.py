import math

import pytest
import yaml

from sae_zoo.config import CONFIG_DIR
from sae_zoo.running.settings import recipe_of
from sae_zoo.training.control import l0_error, next_log_coefficient
from sae_zoo.training.schedules import auxk_factor, decays, lr_factor, warmup_factor


def test_learning_rate():
    shape = {"n_steps": 1000, "warmup_steps": 100, "start_factor": 0.1, "decay_fraction": 0.2}
    assert lr_factor(0, **shape) == pytest.approx(0.1)
    assert lr_factor(50, **shape) == pytest.approx(0.55)
    assert lr_factor(100, **shape) == lr_factor(799, **shape) == 1
    assert lr_factor(900, **shape) == pytest.approx(0.5)
    assert lr_factor(999, **shape) == pytest.approx(0.005)
    assert lr_factor(999, **shape | {"decay_fraction": 0.0}) == 1
    assert [decays(s, n_steps=1000, decay_fraction=0.2) for s in (0, 799, 800, 1000)] == [False, False, True, True]
    assert not decays(1000, n_steps=1000, decay_fraction=0.0)


def test_other_schedules():
    assert [warmup_factor(s, 4) for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert warmup_factor(0, 0) == 1


def test_auxk_weighs_more_in_a_short_run():
    assert [auxk_factor(n, 2000) for n in (1, 500, 1000, 2000, 10**6)] == [4, 4, 2, 1, 1] and auxk_factor(1, None) == 1


def test_error_is_symmetric_and_cut():
    assert l0_error(44, 40) == pytest.approx(math.log(1.1)) == pytest.approx(-l0_error(40, 44))
    assert l0_error(0, 40) == -0.5 and l0_error(4000, 40) == 0.5
    assert l0_error(0.8, 1) == pytest.approx(math.log(0.8))
    cut = [l0_error(40 * math.exp(e), 40, largest=0.2) for e in (-0.5, -0.2, 0.02, 0.21)]
    assert cut == pytest.approx([-0.2, -0.2, 0.02, 0.2]) and l0_error(0, 40, largest=0.2) == -0.2


@pytest.mark.parametrize("start", [1e-6, 1.0])
@pytest.mark.parametrize("exponent", [0.3, 1.0])
def test_control_settles_a_slow_plant_on_its_target(start, exponent):
    """A plant whose L0 follows coefficient^-exponent with a lag of 30 steps, as an SAE's does."""
    log_coefficient, l0, previous = math.log(start), 200.0, None
    for _ in range(2000):
        l0 += (40 * (math.exp(log_coefficient) / 1e-3) ** -exponent - l0) / 30
        error = l0_error(l0, 40)
        log_coefficient = next_log_coefficient(log_coefficient, error=error, previous_error=previous or error,
                                               proportional=0.5, integral=0.02)
        previous = error
    assert l0 == pytest.approx(40, rel=0.02)


def test_recipes_are_valid_and_bad_values_are_named():
    for name in ("short", "paper"):
        recipe = yaml.safe_load((CONFIG_DIR / "recipe" / f"{name}.yaml").read_text())
        recipe_of(recipe)
    for change, message in (({"lr": 0}, "recipe.lr is 0; it must be positive"),
                            ({"beta1": 1.5}, "recipe.beta1 is 1.5; it must be at least 0 and below 1"),
                            ({"beta2": 1}, "recipe.beta2 is 1; it must be at least 0 and below 1"),
                            ({"beta1": -0.1}, "recipe.beta1 is -0.1; it must be at least 0"),
                            ({"lr_start_factor": 1.1}, "recipe.lr_start_factor is 1.1; it must be between 0 and 1"),
                            ({"lr_decay_fraction": -1}, "recipe.lr_decay_fraction is -1; it must be between 0 and 1"),
                            ({"control_shift": -1}, "recipe.control_shift is -1; it must not be negative"),
                            ({"lr_warmup_steps": -5}, "recipe.lr_warmup_steps is -5; it must not be negative"),
                            ({"second_moment": "column"}, "recipe.second_moment is 'column'; choose element or row$"),
                            ({"lr_l0": 0}, "recipe.lr_l0 is 0; it must be positive or null"),
                            ({"b_dec_start": "median"}, "recipe.b_dec_start is 'median'; choose zero or mean"),
                            ({"threshold_start": "4"}, "recipe.threshold_start is '4'; choose fixed or quantile"),
                            ({"decoder_start": "pca"}, "recipe.decoder_start is 'pca'; choose random or data")):
        with pytest.raises(ValueError, match=message):
            recipe_of({**recipe, **change})


@pytest.mark.parametrize("change", [{"lr_decay_fraction": 1}, {"lr_start_factor": 1}, {"lr_start_factor": 0},
                                    {"lr_decay_fraction": 0}, {"beta1": 0}, {"control_shift": 0}, {"lr_l0": None}])
def test_bounds_belong_to_the_range(change):
    recipe = yaml.safe_load((CONFIG_DIR / "recipe" / "short.yaml").read_text())
    assert recipe_of({**recipe, **change})


def test_the_paper_recipe_is_the_papers():
    recipe = recipe_of(yaml.safe_load((CONFIG_DIR / "recipe" / "paper.yaml").read_text()))
    assert (recipe.lr, recipe.beta1, recipe.beta2, recipe.batch_size) == (7e-5, 0, 0.999, 4096)
    assert (recipe.lr_warmup_steps, recipe.coefficient_warmup_steps, recipe.threshold_start) == (1000, 10000, "fixed")
