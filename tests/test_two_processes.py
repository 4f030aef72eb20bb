"""Two gloo processes: the nearest thing to two GPUs that every machine has."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sae_zoo import load_sae
from sae_zoo.records import read_record


@pytest.mark.parametrize("sae", ["jumprelu", "topk"])
def test_two_processes_train_what_one_does(tmp_path, sae):
    rng = np.random.default_rng(0)
    codes = (rng.random((6000, 40)) < 0.1) * rng.random((6000, 40))
    np.save(tmp_path / "acts.npy", (codes @ rng.normal(size=(40, 16))).astype("float32"))
    # beta1 = 0 and a large epsilon: Adam divides by the gradient's size, which turns rounding into whole steps where a
    # gradient is almost zero.
    common = [f"sae={sae}", "l0_target=4", "d_sae=64", "recipe.n_steps=30", "recipe.batch_size=256", "data=file",
              f"data.path={tmp_path / 'acts.npy'}", "trainer.accelerator=cpu", "trainer.progress_bar=false",
              "trainer.validation_every=10", "recipe.adam_eps=1e-3", "recipe.dead_after_tokens=2000"]
    runs = {}
    for devices in (1, 2):
        command = [sys.executable, "-m", "sae_zoo.train", *common, f"trainer.devices={devices}", f"sweep=d{devices}",
                   f"output_dir={tmp_path}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parent.parent,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        (runs[devices],) = (p for p in (tmp_path / "runs" / f"d{devices}").iterdir() if p.is_dir())
    one, two = (read_record(runs[n]) for n in (1, 2))
    assert two["status"] == "finished" and two["fvu"] == pytest.approx(one["fvu"], rel=1e-3)
    assert two["l0"] == pytest.approx(one["l0"], rel=1e-3)
    a, b = (load_sae(runs[n]) for n in (1, 2))
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3, msg=lambda m, name=name: f"{name}: {m}")
