"""pareto.ipynb is executed, from analysis/ as its working directory, on records written by hand."""

import json
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from sae_zoo.records import write_record

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "analysis" / "pareto.ipynb"


def write_sweep(folder, lm):
    for variant, scale in (("topk", 1.0), ("jumprelu", 0.5)):
        for target in (20, 40, 80):
            for seed in (0, 1):
                write_record(folder / f"{variant}-{target}-{seed}", {
                    "status": "finished", "error": None, "variant": variant, "label": variant, "l0_target": target,
                    "l0": target * (1 + 0.01 * seed), "l0_missed": False, "fvu": scale * 4 / target, "mse": 1.0,
                    "delta_lm_loss": None if lm is None else scale * 8 / target, "relative_reconstruction_bias": 1.0,
                    "loss_recovered": None if lm is None else 0.9, "dead_fraction": 0.1, "d_in": 8, "d_sae": 64,
                    "n_tokens": 1000, "n_steps": 10, "batch_size": 100, "seed": seed, "lm": lm, "hook": None,
                    "data_id": "x", "cache_id": None, "config_hash": "x", "seconds": 1.0,
                })


def test_shipped_notebook_is_valid_and_has_no_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert "SAE_ZOO_SWEEP" in code[0].source and 'sweep = ' in code[0].source


@pytest.mark.parametrize("lm", ["builtin", None])
def test_notebook_runs(tmp_path, monkeypatch, lm):
    write_sweep(tmp_path / "sweep", lm)
    monkeypatch.setenv("SAE_ZOO_SWEEP", str(tmp_path / "sweep"))
    # The packages as an editable install has them, also where the tests run from a plain checkout.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=120, kernel_name="python3",
                   resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    shown = json.dumps([cell.outputs for cell in notebook.cells if cell.cell_type == "code"])
    assert "12 of 12 runs have finished" in shown and "2 seeds" in shown and "image/png" in shown
    assert (tmp_path / "sweep" / "frontier.png").exists()
    last = notebook.cells[-1].outputs[0].data["text/plain"]
    # topk's curve is exactly twice jumprelu's at every matched L0.
    assert [row.split()[1:] for row in last.splitlines()[2:]] == [["0.0", "100.0"]] * 3
