"""The comparison of a plan with its run, on a run so small that only what is counted is tested, never a time."""

import json
import types

import numpy as np
import pytest
import torch

from benchmarks import forecast
from sae_zoo.running import job as running_job


def test_flops_by_hand_with_a_gradient_that_is_asked_for():
    """[3, 4] @ [4, 5], and the gradient of the left factor: [3, 5] @ [5, 4]."""
    a, b = torch.randn(3, 4, requires_grad=True), torch.randn(4, 5)
    with forecast._Flops() as flops:
        torch.autograd.grad((a @ b).sum(), a)
    assert flops.total == 2 * 3 * 4 * 5 * 2


def test_phases_of_a_run(enter, tmp_path, monkeypatch, capfd):
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).normal(size=(2000, 16)).astype("float32"))
    for name in forecast._PHASES:
        # What forecast puts there is taken away again.
        monkeypatch.setattr(running_job, name, getattr(running_job, name))
    overrides = ["data=file", f"data.path={tmp_path / 'rows.npy'}", "d_sae=64", "l0_target=4", "recipe.n_steps=20",
                 "recipe.batch_size=64", "trainer.accelerator=cpu", "trainer.progress_bar=false",
                 f"output_dir={tmp_path}"]
    planned = {phase: {"seconds": 2.0, "host_bytes": 10**9, "flops": 1.0} for phase in ("training", "evaluation")}

    def output(*arguments):
        if "sae_zoo.plan" in arguments:
            assert arguments[2:-1] == tuple(overrides)
            return json.dumps({"phases": planned})
        main = types.SimpleNamespace(
            __name__="forecast", main=lambda: forecast._train(tmp_path / "found.json", overrides))
        assert enter(main)[0] == 0
        (type(tmp_path)(arguments[2])).write_text((tmp_path / "found.json").read_text())
        return ""

    monkeypatch.setattr(forecast, "_output", output)
    rows = forecast.run(types.SimpleNamespace(overrides=overrides, threads=None))["rows"]
    kinds = {(row["phase"], row["quantity"]): row for row in rows}
    assert {phase for phase, _ in kinds} == {"training", "evaluation"}  # of a file there is no harvest
    assert ("training", "flops") not in kinds
    for row in rows:
        assert row["real"] > 0 and row["ratio"] == pytest.approx(row["planned"] / row["real"])
    assert "planned / real" in capfd.readouterr().out


def test_what_failed_is_said_in_its_own_words():
    with pytest.raises(ValueError, match=r"failed: .*no_such_module"):
        forecast._output("-m", "no_such_module")
