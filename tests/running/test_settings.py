"""Whatever a user writes into a config is either meant so, or ends in one clear line."""

import pytest
import torch
from hydra.errors import HydraException
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from omegaconf.errors import OmegaConfBaseException

from sae_zoo.config import CONFIG_DIR, compose_config
from sae_zoo.running.settings import TrainSettings, config_hash

USERS_MISTAKES = (ValueError, OSError, HydraException, OmegaConfBaseException)  # what an entry point shows as one line
VARIANTS = sorted(path.stem for path in (CONFIG_DIR / "sae").glob("*.yaml"))
VALUES = ["null", "-1", "0", "0.5", "1e400", "nan", "abc", "''", "true", "[1,2]", "{a: 1}", "1000000000000", "-inf",
          "2"]


def leaves(config, prefix=""):
    for key, value in config.items():
        yield from leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + str(key)]


KEYS = sorted(key for key in leaves(compose_config("train", []))
              if key in ("l0_target", "seed", "d_sae") or key.split(".")[0] in (
                  "sae", "recipe", "data", "lm", "hook", "trainer", "corpus", "evaluation", "logger"))


def build(overrides):
    """All that can be built of a config without data: what is wrong with it is said here, before any work."""
    config = compose_config("train", ["d_sae=8", "l0_target=2", *overrides])
    config_hash(config)
    settings = TrainSettings.of(config)
    if any(override.startswith("corpus") for override in overrides):  # finding all files of the default one takes long
        settings.source.data.corpus()
    assert settings.trainer.device.type in ("cpu", "cuda") and settings.trainer.n_processes
    return settings.sae(d_in=4, input_scale=1.0)


NO_SHRINKING = [phase for phase in Phase if phase is not Phase.shrink]  # each example composes a config


def complaint(overrides) -> str | None:
    """What a user is told whose overrides are wrong; None if nothing is."""
    try:
        build(overrides)
    except USERS_MISTAKES as error:
        return str(error)
    return None


@settings(phases=NO_SHRINKING, max_examples=40, deadline=None)
@given(sae=st.sampled_from(VARIANTS), recipe=st.sampled_from(["short", "paper"]),
       changes=st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from(VALUES)), min_size=1, max_size=3))
def test_bad_values_end_in_one_line(sae, recipe, changes):
    overrides = [f"{key}={value}" for key, value in changes if not (key == "d_sae" and value == "1000000000000")]
    assert complaint([f"sae={sae}", f"recipe={recipe}", *overrides]) != ""


@settings(phases=NO_SHRINKING, max_examples=15, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["C"]), max_size=20), min_size=1, max_size=3))
def test_bad_text_ends_in_one_line(overrides):
    assert complaint(overrides) != ""


@pytest.mark.parametrize("sae", VARIANTS)
def test_what_is_right_is_built(sae):
    built = build([f"sae={sae}"])
    assert built.d_sae == 8 and isinstance(built(torch.zeros(1, 4)).x_hat, torch.Tensor)


@pytest.mark.parametrize("override, message", [
    ("recipe.n_steps=abc", "recipe.n_steps is 'abc'; it must be a whole number"),
    ("recipe.lr=true", "recipe.lr is True; it must be a number"),
    ("recipe.lr_l0=abc", "recipe.lr_l0 is 'abc'; it must be a number or null"),
    ("d_sae=null", "d_sae is None; it must be a whole number"),
    ("data.n_tokens.train=null", "data.n_tokens is .*; it must be a mapping of names to a whole number"),
    ("data.remote.path=5", "data.remote.path is 5; it must be text or null"),
    ("data.remote=x", "data.remote is 'x'; it must be"),
    ("+sae.banana=1", "sae.banana is unknown here; leave it out"),
    ("trainer.checkpoint_every=0", "trainer.checkpoint_every is 0; it must be at least 1"),
    ("evaluation.n_rows=1.5", "evaluation.n_rows is 1.5; it must be a whole number"),
    ("~recipe.lr", "recipe.lr is missing; leave it in the config"),
    ("~data.seed", "data.seed is missing"),
    ("~trainer.precision", "trainer.precision is missing"),
    ("~sae.variant", "sae.variant is missing; leave it in the config"),
    ("~trainer", "trainer is missing"),
    ("lm.revision=1234567", "lm.revision is 1234567; it must be text or null"),
    ("lm.sites=5", "lm.sites is 5; it must be text or a mapping"),
    ("+lm.made=x", "lm.made is unknown here"),
    ("hook.layer=deep", "hook.layer is 'deep'; it must be a whole number"),
    ("hook.harvest_together={layers: all, sites: [mlp]}",
     "hook.harvest_together.layers is 'all'; it must be a list of"),
    ("logger.name=tensorboard", "logger.name is 'tensorboard'; choose csv or wandb"),
    ("data.max_norm=far", "data.max_norm is 'far'; it must be a number or null"),
])
def test_types_are_said_by_name(override, message):
    with pytest.raises(ValueError, match=message):
        build([override])
