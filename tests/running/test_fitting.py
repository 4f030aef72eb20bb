"""What training says of itself while it runs."""

import re

import numpy as np
import pytest

from sae_zoo.config import compose_config
from sae_zoo.data.array_file import FileActivations
from sae_zoo.running.fitting import fit
from sae_zoo.running.settings import TrainSettings
from sae_zoo.running.sources import Source
from sae_zoo.saes import lightning


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """2,000 rows of 16 numbers, among which 20 are a hundred times as long."""
    x = np.random.default_rng(0).normal(size=(2000, 16)).astype("float32")
    x[::100] *= 100
    path = tmp_path_factory.mktemp("rows") / "rows.npy"
    np.save(path, x)
    return path


@pytest.mark.parametrize(("max_norm", "cause"), [
    (4, "rates that are too high for this place: try half of recipe.lr and the other rates"),
    (None, r"rows of up to \d+ times the median norm: try data.max_norm=4, or half of recipe.lr"),
])
def test_a_collapse_is_said_once_with_its_likely_cause(rows, max_norm, cause, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(lightning, "collapse", lambda **_: "21% of the latents are dead, 0% were before")
    settings = TrainSettings.of(compose_config("train", [
        "data=file", f"data.path={rows}", f"data.max_norm={'null' if max_norm is None else max_norm}", "sae=topk",
        "d_sae=32", "l0_target=4", "recipe.n_steps=40", "recipe.batch_size=64", "trainer.log_every_n_steps=10",
        "trainer.accelerator=cpu", "trainer.progress_bar=false"]))
    activations = FileActivations(rows)
    activations.leave_out(max_norm)
    sae, _ = fit(settings, Source(activations, None, None), tmp_path)
    (note,) = sae.notes
    assert note.startswith("collapsed at step 10: 21% of the latents are dead, 0% were before; likely ")
    assert re.search(cause, note)
    assert [record.getMessage() for record in caplog.records if "collapsed" in record.getMessage()] == [note]
