"""The notebooks are executed, from analysis/ as their working directory: on records written by hand, latents.ipynb on a
small run."""

import json
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from sae_zoo.records import read_record, write_record

ANALYSIS = Path(__file__).resolve().parents[2] / "analysis"
# What a user sets: the variable of the first code cell, and that of the environment.
SETTINGS = {"pareto": ("sweep", "SAE_ZOO_SWEEP"), "paper": ("sweeps", "SAE_ZOO_SWEEP"),
            "latents": ("run_dir", "SAE_ZOO_RUN"), "theory": None}


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Runs a notebook; returns it with its outputs."""

    def execute(name, **environment):
        # The packages as an editable install has them, also where the tests run from a plain checkout.
        path = os.pathsep.join([str(ANALYSIS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        for key, value in {"PYTHONPATH": path, "IPYTHONDIR": tmp_path / "ipython", **environment}.items():
            monkeypatch.setenv(key, str(value))
        notebook = nbformat.read(ANALYSIS / f"{name}.ipynb", as_version=4)
        NotebookClient(notebook, timeout=120, kernel_name="python3",
                       resources={"metadata": {"path": str(ANALYSIS)}}).execute()
        return notebook

    return execute


def outputs(notebook, kind):
    """All outputs of a kind: ``text/plain``, ``image/png``, ..., or ``stream`` for what was printed."""
    found = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    if kind == "stream":
        return [output.text for output in found if output.output_type == "stream" and output.name == "stdout"]
    return [output.data[kind] for output in found if kind in output.get("data", {})]


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


@pytest.mark.parametrize("file", sorted(ANALYSIS.glob("*.ipynb")), ids=lambda file: file.stem)
def test_shipped_notebooks_are_valid_and_have_no_outputs(file):
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    if SETTINGS[file.stem] is not None:
        variable, setting = SETTINGS[file.stem]
        assert f'{variable} = os.environ.get("{setting}", "' in code[0].source


@pytest.mark.parametrize("lm", ["builtin", None])
def test_pareto(tmp_path, execute, lm):
    write_sweep(tmp_path / "sweep", lm)
    notebook = execute("pareto", SAE_ZOO_SWEEP=tmp_path / "sweep")
    shown = json.dumps([cell.outputs for cell in notebook.cells if cell.cell_type == "code"])
    assert "12 of 12 runs have finished" in shown and "2 seeds" in shown and "image/png" in shown
    assert (tmp_path / "sweep" / "frontier.png").exists()
    last = notebook.cells[-1].outputs[0].data["text/plain"]
    # topk's curve is exactly twice jumprelu's at every matched L0.
    assert [row.split()[1:] for row in last.splitlines()[2:]] == [["0.0", "100.0"]] * 3


def test_paper(tmp_path, execute):
    for name, hook in (("one", "residual.1"), ("two", "residual.3")):  # two sweeps
        write_sweep(tmp_path / name, "builtin")
        for job in (tmp_path / name).iterdir():
            write_record(job, {**read_record(job), "data_id": name, "hook": hook})
    notebook = execute("paper", SAE_ZOO_SWEEP=os.pathsep.join(str(tmp_path / name) for name in ("one", "two")))
    figures, claims, notes = outputs(notebook, "stream")
    drawn = [line for line in figures.splitlines() if line.endswith(".png")]
    assert "fig_r_l0: not drawn" in figures and str(tmp_path / "one" / "fig_fvu.png") in drawn
    assert len(outputs(notebook, "image/png")) == len(drawn)
    # topk loses twice as much as jumprelu at every L0: at least as good holds.
    assert re.search(r"^C2 .* holds +24 ", claims, re.MULTILINE)
    assert re.search(r"^C3 .* not measured ", claims, re.MULTILINE)
    assert notes.startswith("caveats:")


def test_latents(trained, execute):
    notebook = execute("latents", SAE_ZOO_RUN=trained / "jumprelu")
    record = read_record(trained / "jumprelu")
    (printed,) = outputs(notebook, "stream")
    assert f"L0 {record['l0']:.1f}, FVU {record['fvu']:.4f}" in printed
    assert f"{record['n_eval_tokens']:,} held-out tokens" in printed
    (shown,) = [page for page in outputs(notebook, "text/html") if "<h4>" in page]
    assert [kind for kind in ("top", "middle", "bottom") if f"<h4>{kind}</h4>" in shown] == ["top", "middle", "bottom"]
    numbers = [float(value) for value in re.findall(r"<b>([\d.e+-]+)</b>", shown)]
    assert len(numbers) == 16 and numbers[0] == max(numbers) and min(numbers) == numbers[-1]
    assert shown.count("border-bottom") == 16 and shown.count("background:rgba") >= 16
    assert len(outputs(notebook, "image/png")) == 2


def test_theory(execute):
    printed = "".join(outputs(notebook := execute("theory"), "stream"))
    assert float(re.search(r"differs from the gradient by at most ([\d.]+)", printed)[1]) < 0.01
    biases = [abs(float(bias)) for bias in re.findall(r"bias ([+-][\d.]+)", printed)]
    assert len(biases) == 5 and biases[0] > 0.005 and biases[-1] < 0.003  # the widest, the narrowest window
    assert float(re.search(r"fitted slope (-[\d.]+)", printed)[1]) == pytest.approx(-0.5, abs=0.05)
    rows = re.findall(r"L0 ([\d.]+) +best ReLU \(slope [\d.]+\) ([\d.]+) +JumpReLU ([\d.]+)", printed)
    # As the last cell says: which is better changes at L0 0.57.
    assert len(rows) == 5 and all((float(relu) > float(jump)) == (float(l0) < 0.57) for l0, relu, jump in rows)
    assert len(outputs(notebook, "image/png")) == 5
