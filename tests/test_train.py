"""The entry points as a user runs them, in process: real built-in language model, real harvest, short training."""

import json
import re
import sys
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir

from sae_zoo import evaluate, harvest, load_sae, train
from sae_zoo.config import CONFIG_DIR
from sae_zoo.data.cache import open_cache
from sae_zoo.frontier import plot
from sae_zoo.records import read_record
from sae_zoo.running.scoring import notes_on
from sae_zoo.saes import variant_class

ROOT = Path(__file__).parents[1]
SMALL = ["data.n_tokens={train: 6000, validation: 2000, test: 2000}", "d_sae=512", "recipe.n_steps=100",
         "recipe.batch_size=256", "evaluation.n_lm_tokens=1024", "trainer.progress_bar=false",
         "trainer.checkpoint_every=20", "trainer.validation_every=20"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture
def run(root, enter):
    """Runs an entry point with overrides; returns (exit status, everything it printed)."""

    def call(*overrides, module=train, small=True):
        where = [] if module is evaluate else [f"output_dir={root}"]
        status, out, err = enter(module, *overrides, *where, *(SMALL if small else []))
        return status, out + err

    return call


@pytest.fixture(scope="module")
def sweep(root):
    return root / "runs" / "demo"


def test_a_sweep_ends_with_its_table_and_plot(run, sweep):
    status, printed = run("-m", "sweep=demo", "sae=jumprelu,topk", "l0_target=10,20")
    assert status == 0, printed
    jobs = sorted(p.name for p in sweep.iterdir() if p.is_dir())
    assert len(jobs) == 4 and jobs[0] == "jumprelu-l0_10-seed_0"
    for job in jobs:
        record = read_record(sweep / job)
        assert record["status"] == "finished" and record["error"] is None
        assert 0 < record["fvu"] < 1 and record["delta_lm_loss"] > 0 and 0 < record["loss_recovered"] < 1
        assert record["l0_missed"] == (abs(record["l0"] / record["l0_target"] - 1) > 0.05)
        for key in ("variant", "mse", "relative_reconstruction_bias", "dead_fraction", "d_in", "d_sae", "n_tokens",
                    "seed", "lm", "hook", "cache_id", "config_hash", "versions", "seconds", "cosine", "kl",
                    "fraction_above_1pct", "r_l0", "sae.auxk_coefficient", "recipe.lr"):
            assert record[key] is not None, key
        assert {"config.yaml", "record.json", "sae.safetensors", "sae.json", "latents.csv"} <= {
            p.name for p in (sweep / job).iterdir()}
        latents = pd.read_csv(sweep / job / "latents.csv")
        assert len(latents) == 512 and latents.frequency.sum() == pytest.approx(record["l0"], rel=1e-3)
    assert "jumprelu" in printed and "delta LM" in printed
    last = printed.strip().splitlines()[-1]
    assert last == str(sweep / "frontier.png") and Path(last).stat().st_size > 10_000
    assert len(pd.read_csv(sweep / "frontier.csv")) == 4


def test_a_second_time_everything_is_skipped(run, sweep):
    before = {p: p.stat().st_mtime_ns for p in sweep.rglob("record.json")}
    status, printed = run("-m", "sweep=demo", "sae=jumprelu,topk", "l0_target=10,20")
    assert status == 0 and printed.count("is finished; skipped") == 4
    assert before == {p: p.stat().st_mtime_ns for p in sweep.rglob("record.json")}


def test_a_frontier_that_fails_is_one_line_after_a_finished_sweep(run, sweep, monkeypatch):
    def fails(folder):
        raise RuntimeError("no font\nfound")

    monkeypatch.setattr(plot, "draw_frontier", fails)
    status, printed = run("-m", "sweep=demo", "sae=topk", "l0_target=10,20")
    assert status == 1 and "Traceback" not in printed
    assert f"no frontier of {sweep}: no font found" in printed.strip().splitlines()[-1]
    assert read_record(sweep / "topk-l0_10-seed_0")["status"] == "finished"


def test_another_config_in_the_same_folder_is_refused(run, sweep):
    status, printed = run("sweep=demo", "sae=topk", "l0_target=10", "lm.context_size=64")
    assert status == 2 and "holds a finished run of another config" in printed
    assert read_record(sweep / "topk-l0_10-seed_0")["status"] == "finished"


def test_a_named_sweep_over_places_has_a_folder_for_each(run, root):
    status, printed = run("-m", "sweep=places", "sae=topk", "l0_target=10", "hook.layer=1,3", "recipe.n_steps=2")
    assert status == 0, printed
    for layer in (1, 3):
        folder = root / f"runs/places/builtin-residual.{layer}"
        assert read_record(folder / "topk-l0_10-seed_0")["hook"] == f"residual.{layer}"
        assert (folder / "frontier.png").exists()


def test_a_failing_job_leaves_its_record_and_the_rest_goes_on(run, root):
    status, printed = run("-m", "sweep=failing", "sae=topk", "l0_target=9999,10")
    assert status == 2 and "l0_target is 9999; topk needs a whole number from 1 to d_sae = 512" in printed
    failed = read_record(root / "runs/failing/topk-l0_9999-seed_0")
    assert failed["status"] == "failed" and "9999" in failed["error"] and "Traceback" in failed["traceback"]
    assert read_record(root / "runs/failing/topk-l0_10-seed_0")["status"] == "finished"


def test_a_nan_stops_the_run_and_keeps_the_last_good_checkpoint(run, root, monkeypatch):
    from sae_zoo.saes.topk import TopKSAE

    honest = TopKSAE.loss

    def broken(self, x, **kwargs):
        return honest(self, x * float("nan") if self.global_step == 30 else x, **kwargs)

    monkeypatch.setattr(TopKSAE, "loss", broken)
    status, printed = run("sweep=nan", "sae=topk", "l0_target=10")
    job = root / "runs/nan/topk-l0_10-seed_0"
    assert status == 2 and "loss is nan at step 30; lower recipe.lr" in printed
    assert read_record(job)["status"] == "failed"
    checkpoint = torch.load(job / "checkpoints/000000020.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 20 and checkpoint["state_dict"]["W_dec"].isfinite().all()
    status, printed = run("sweep=nan", "sae=topk", "l0_target=10", "lm.context_size=64")
    assert status == 2 and "holds a half-trained run of another config" in printed


@pytest.mark.parametrize("sae", ["jumprelu", "topk"])
def test_an_interrupted_run_ends_bit_identical(run, root, sweep, monkeypatch, sae):
    cls = variant_class(sae)
    honest = cls.loss

    def dies(self, x, **kwargs):
        if self.global_step == 47:
            raise RuntimeError("power cut")
        return honest(self, x, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(cls, "loss", dies)
        with pytest.raises(RuntimeError, match="power cut"):
            run("sweep=cut", f"sae={sae}", "l0_target=20")
    status, printed = run("sweep=cut", f"sae={sae}", "l0_target=20")
    assert status == 0 and "going on from" in printed
    whole, resumed = (load_sae(folder / f"{sae}-l0_20-seed_0") for folder in (sweep, root / "runs/cut"))
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_explicit_coefficient_turns_control_off(run, root):
    status, _ = run("sweep=fixed", "sae.sparsity_coefficient=0.5")
    (job,) = (root / "runs/fixed").iterdir()
    record = read_record(job)
    assert status == 0 and record["l0_missed"] is None
    assert record["coefficient"] == record["sparsity_coefficient"] == 0.5


def test_the_progress_bar_is_of_training_and_says_nothing_of_the_looks_at_held_out_rows(run):
    status, printed = run("sweep=bar", "sae=topk", "l0_target=10", *(o for o in SMALL if "progress_bar" not in o),
                          small=False)
    assert status == 0 and "training: 100%" in printed and "heldout_L0=" in printed and "Validation" not in printed


def test_own_activations_have_no_lm_metrics(run, root, tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "acts.npy", (rng.random((5000, 30)) < 0.1).astype("float32") @ rng.normal(size=(30, 16)))
    status, printed = run("data=file", f"data.path={tmp_path / 'acts.npy'}", "sae=topk", "l0_target=4", "d_sae=64",
                          "recipe.n_steps=40", "trainer.progress_bar=false", small=False)
    assert status == 0, printed
    (record,) = (read_record(p.parent) for p in (root / "runs").rglob("record.json") if "acts" in str(p))
    assert record["fvu"] < 1
    assert record["delta_lm_loss"] is None and record["lm"] is None and record["loss_recovered"] is None


def test_evaluate_shows_the_sanity_rows(run, sweep):
    status, printed = run(f"run={sweep / 'topk-l0_20-seed_0'}", "progress_bar=false", "n_lm_tokens=1024",
                          module=evaluate, small=False)
    assert status == 0, printed
    rows = {line.split("  ")[0]: line.split() for line in printed.splitlines()
            if "predictor" in line or "identity" in line}
    assert float(rows["mean predictor"][3]) == pytest.approx(1, abs=1e-3)
    assert float(rows["identity"][2]) == 0 and abs(float(rows["identity"][5])) < 1e-6


def test_harvest_makes_several_caches_in_one_pass(run, root):
    status, printed = run("layers=[1,3]", "sites=[residual,attention]", SMALL[0], "progress_bar=false", module=harvest,
                          small=False)
    assert status == 0, printed
    caches = [open_cache(p.parent, verify="hashes") for p in (root / "cache").glob("*/manifest.json")]
    assert {c.cache_id.split("-")[1] for c in caches} == {"residual.1", "residual.3", "attention.1", "attention.3"}


BAD = {
    ("sae=banana",): "banana",
    ("lm=banana",): "banana",
    ("hook.site=banana",): "'banana' is unknown; choose from residual, mlp, attention",
    ("banana=1",): "banana",
    ("hook.layer=6",): "the model has 6 layers, 0 to 5",
    ("l0_target=0",): "l0_target is 0; it must be above 0",
    ("l0_target=513",): "l0_target is 513; it must be above 0 and at most d_sae = 512",
    ("lm=hf", "lm.path={tmp}"): "an LM folder without weights",
    ("corpus=text_files", "corpus.paths={tmp}/nothing/*.txt"): "matches no file",
    ("corpus=text_files", "corpus.paths={tmp}/short.txt"): "give",
    ("data=file", "data.path={tmp}/one_dimensional.npy"): "dimension",
    ("data=file", "data.path={tmp}/nan.npy"): "17",
    ("recipe.lr=-1",): "recipe.lr is -1",
    ("logger.name=banana",): "choose csv or wandb",
    ("data=file",): "data.path has no value; give data.path=...",
    ("corpus=text_files",): "corpus.paths has no value; give corpus.paths=...",
}


@pytest.mark.parametrize("overrides", BAD, ids="_".join)
def test_bad_input_is_one_clear_line(run, tmp_path, overrides):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "short.txt").write_text("two words")
    np.save(tmp_path / "one_dimensional.npy", np.zeros(5, "float32"))
    bad = np.zeros((100, 4), "float32")
    bad[17, 2] = np.nan
    np.save(tmp_path / "nan.npy", bad)
    sweep = [] if overrides == ("data=file",) else ["sweep=bad"]  # the name of the file names the sweep
    status, printed = run(*(o.format(tmp=tmp_path) for o in overrides), *sweep,
                          small=not any("data=" in o for o in overrides))
    lines = [line for line in printed.splitlines() if line.startswith("sae_zoo.train: error: ")]
    assert status == 2 and len(lines) == 1 and BAD[overrides] in lines[0], printed
    assert "Traceback" not in printed


@pytest.mark.parametrize("damage", [lambda b: b[:-100], lambda b: b[:-100] + bytes([b[-100] ^ 1]) + b[-99:]],
                         ids=["truncated", "bit-flipped"])
def test_a_damaged_cache_is_said(run, root, damage):
    shard = next((root / "cache").glob("*residual.3*/train/00000.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(damage(content))
    try:
        status, printed = run(f"sweep=damaged{len(damage(content))}", "sae=topk", "l0_target=10")
    finally:
        shard.write_bytes(content)
    assert status == 2 and "is damaged" in printed and "delete the folder to harvest it again" in printed


def test_wandb_offline(run, root, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    status, printed = run("-m", "sweep=wandb", "sae=topk", "l0_target=10,11", "logger=wandb")
    assert status == 0, printed
    for target in (10, 11):  # each job has a run of its own
        assert list((root / f"runs/wandb/topk-l0_{target}-seed_0").glob("wandb/offline-run-*/*.wandb"))


def test_wandb_is_not_imported_otherwise():
    import subprocess

    code = "import sys, sae_zoo.train; print('wandb' in sys.modules, 'datasets' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]


def test_the_readme_snippet_runs(sweep):
    readme = (ROOT / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    path = "outputs/runs/builtin-residual.3/jumprelu-l0_40-seed_0"
    assert path in snippet
    names = {}
    exec(snippet.replace(path, str(sweep / "jumprelu-l0_10-seed_0")), names)
    torch.testing.assert_close(names["sae"](names["x"]).x_hat, names["x_hat"])
    torch.testing.assert_close(names["code"].to_dense(), names["latents"])


def test_gradients_are_clipped(run, sweep):
    status, printed = run("sweep=clip", "sae=topk", "l0_target=10", "trainer.gradient_clip_val=1e-12")
    assert status == 0, printed
    record = read_record(sweep.parent / "clip" / "topk-l0_10-seed_0-trainer.gradient_clip_val=1e-12")
    whole = read_record(sweep / "topk-l0_10-seed_0")
    assert record["fvu"] > 1.05 * whole["fvu"]  # far below Adam's epsilon nothing moves
    status, printed = run("sweep=clip", "sae=topk", "l0_target=10", "trainer.gradient_clip_val=0")
    assert status == 2 and "trainer.gradient_clip_val is 0; it must be positive, or null for none" in printed


def test_the_snippet_of_the_docs_trains(tmp_path, monkeypatch):
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "configs.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {}
    small = ", ".join(f'"{override}"' for override in SMALL if not override.startswith("recipe.n_steps"))
    exec(snippet.replace('"recipe.n_steps=100"', f'"recipe.n_steps=20", {small}'), names)
    assert names["record"]["status"] == "finished" and (tmp_path / "outputs/mine/record.json").exists()


def test_the_commands_of_readme_and_docs_compose():
    text = "\n".join(path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))).replace("\\\n", " ")
    commands = set(re.findall(r"-m sae_zoo\.(\w+)([^#\n`&]*)", text))
    assert len(commands) > 30
    for entry, overrides in commands:
        if entry == "english":  # takes no config
            continue
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            for override in overrides.split():
                if override.startswith(("sae=", "l0_target=", "seed=")):  # swept
                    for value in override.split("=")[1].split(","):
                        compose(entry, [f"{override.split('=')[0]}={value}"])
            mine = "--config-dir=mine" in overrides  # the experiment is the reader's own
            compose(entry, [o for o in overrides.split() if not o.startswith("-") and "," not in o.replace("],", "")
                            and not o.startswith("run=") and not (mine and o.startswith("experiment="))])


def test_records_are_plain_json(sweep):
    text = (sweep / "topk-l0_10-seed_0" / "record.json").read_text()
    assert all(not isinstance(v, (list,)) for v in json.loads(text).values())


def test_a_collapse_is_told_with_how_the_run_ended():
    sae = types.SimpleNamespace(notes=["collapsed at step 420: 21% of the latents are dead"])
    record = {"l0_missed": False, "fvu": 0.2362, "dead_fraction": 0.035}
    assert notes_on(sae, None, record) == [
        "collapsed at step 420: 21% of the latents are dead; at the end 3.5% of the latents are silent, FVU is 0.236"]
