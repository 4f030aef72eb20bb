"""``python -m sae_zoo.plan`` as a user runs it, in process, beside the run that it speaks of."""

import json
from dataclasses import replace

import pytest

from sae_zoo import plan, train
from sae_zoo.data.cache import open_cache
from sae_zoo.records import read_record

SMALL = ["data.n_tokens={train: 6000, validation: 2000, test: 2000}", "d_sae=512", "recipe.n_steps=50", "sae=topk",
         "l0_target=10", "recipe.batch_size=256", "evaluation.n_lm_tokens=1024", "trainer.progress_bar=false"]


@pytest.fixture
def run(tmp_path, enter):
    """Runs an entry point with overrides; returns (exit status, stdout, stderr)."""

    def call(*arguments, module=plan):
        return enter(module, *arguments, f"output_dir={tmp_path / 'outputs'}")

    return call


@pytest.fixture(autouse=True)
def rates(request, monkeypatch):
    """Times are one test's alone; elsewhere no machine is timed."""
    if request.function is not test_a_plan_and_the_run_it_speaks_of:
        of_sae = {"encode": 1e-9, "entry": 1e-7, "parameter": 1e-9, "selected": 1.0}
        monkeypatch.setattr(plan, "sae_rates", lambda *_, **__: of_sae)
        monkeypatch.setattr(plan, "lm_rate", lambda *_, **__: 1e-10)
        monkeypatch.setattr(plan, "disk_rates", lambda _: dict.fromkeys(("write", "read", "digest"), 1e-9))


@pytest.fixture
def small_machine(monkeypatch):
    """Takes part of this machine's memory or disk away."""

    def shrink(**sizes):
        whole = plan.this_machine
        monkeypatch.setattr(plan, "this_machine", lambda *where: replace(whole(*where), **sizes))

    return shrink


def last_line(printed):
    return json.loads(printed.strip().splitlines()[-1])


def test_a_plan_and_the_run_it_speaks_of(run, tmp_path):
    status, printed, _ = run("--json", *SMALL)
    assert status == 0 and not (tmp_path / "outputs").exists()
    planned = last_line(printed)
    assert list(planned["phases"]) == ["harvest", "training", "evaluation"] and planned["refused"] == []
    assert all(0 < phase["seconds"] < 3600 and phase["flops"] > 0 for phase in planned["phases"].values())
    for words in ("10,000 tokens x 256 x float32 = 9.77 MiB", "harvest", "training", "evaluation", "Assumed: "):
        assert words in printed

    assert run(*SMALL, module=train)[0] == 0
    (cache,) = (open_cache(manifest.parent) for manifest in (tmp_path / "outputs/cache").glob("*/manifest.json"))
    rows = sum(cache.n_rows(split) for split in ("train", "validation", "test"))
    assert planned["activation_bytes"] == pytest.approx(rows * 256 * 4, rel=0.02)  # rows of tokens are dealt whole
    assert 2 * cache.n_bytes < planned["disk_bytes"] < 3 * cache.n_bytes  # its shard of train twice, and checkpoints
    (record,) = (read_record(file.parent) for file in (tmp_path / "outputs/runs").rglob("record.json"))
    print(f"training took {record['seconds_training']} s, planned {planned['phases']['training']['seconds']:.1f}; "
          f"all {record['seconds']} s, planned {planned['seconds']:.1f}")

    status, printed, _ = run("--json", *SMALL)  # the cache is there now
    assert status == 0 and "on the disk already" in printed and "harvest" not in last_line(printed)["phases"]
    assert last_line(printed)["disk_bytes"] < planned["disk_bytes"] - cache.n_bytes


def test_a_sweep_is_summed_and_harvests_once_for_each_hook_point(run):
    status, printed, _ = run("--json", "-m", *SMALL, "seed=0,1", "hook.layer=1,3")
    sweep = last_line(printed)
    assert status == 0 and "\n4 jobs: " in printed and len(sweep["jobs"]) == 4
    for name, jobs in (("harvest", sweep["jobs"][::3]), ("training", sweep["jobs"])):
        of_jobs = [job["phases"][name] for job in jobs]
        assert sweep["phases"][name]["flops"] == pytest.approx(sum(phase["flops"] for phase in of_jobs))
        assert sweep["phases"][name]["seconds"] == pytest.approx(sum(phase["seconds"] for phase in of_jobs))
    assert sweep["activation_bytes"] == 2 * 10_000 * 256 * 4


def test_hook_points_of_one_pass(run):
    status, printed, _ = run("--json", *SMALL, "hook.harvest_together={layers: [1, 3], sites: [residual, mlp]}")
    assert status == 0 and last_line(printed)["activation_bytes"] == 4 * 10_000 * 256 * 4


def test_too_small_a_disk_is_refused_with_what_would_fit(run, small_machine):
    small_machine(free_disk_bytes=20_000_000)
    status, printed, error = run("--json", *SMALL)
    assert status == 2 and error.count("\n") == 1 and error.startswith("sae_zoo.plan: error: ")
    assert "of disk are needed, 19.1 MiB are free" in error and last_line(printed)["refused"]
    remedy = error.partition("data.n_tokens.train=")[2].split()[0]
    assert 500 < int(remedy) < 6000
    assert run(*SMALL[1:], f"data.n_tokens={{train: {remedy}, validation: 2000, test: 2000}}")[0] == 0
    assert run(*SMALL[1:], f"data.n_tokens={{train: {int(1.2 * int(remedy))}, validation: 2000, test: 2000}}")[0] == 2


def test_too_little_memory_is_refused_with_what_would_fit(run, small_machine):
    big = [*SMALL, "d_sae=32768", "lm.batch_size=1"]
    training = last_line(run("--json", *big)[1])["phases"]["training"]["host_bytes"]
    small_machine(host_bytes=int(training) - 50_000_000)
    status, _, error = run(*big)
    assert status == 2 and error.count("\n") == 1 and "training needs" in error
    remedy = error.partition("training needs")[2].partition("; ")[2].split()[0]
    assert remedy == "d_sae=16384"
    small_machine(host_bytes=1_000_000)
    assert "no smaller d_sae or data.rows_per_shard or recipe.batch_size would" in run(*SMALL)[2]


def test_saes_on_one_stream_are_in_memory_together(run, small_machine):
    sweep = ["-m", *SMALL[:1], *SMALL[2:], "d_sae=32768", "seed=0", "l0_target=10,20,40"]
    apart, together = (last_line(run("--json", *sweep, *more)[1]) for more in ([], ["hydra/launcher=one_stream"]))
    an_sae = 3 * 32768 * 256 * 2 * 4  # its weights; their gradients and the optimiser's first moments are as large

    def more(phase):
        of_apart, of_together = (planned["phases"][phase]["host_bytes"] - planned["machine"]["process_bytes"]
                                 for planned in (apart, together))  # each plan is made in a larger process here
        return of_together - of_apart

    assert more("harvest") == 0
    assert more("training") == more("evaluation") == pytest.approx(2 * an_sae, rel=0.05)
    assert run(*sweep, "seed=0,1", "hydra/launcher=one_stream")[0] == 0  # two streams, one after the other
    small_machine(host_bytes=int(together["phases"]["training"]["host_bytes"]) - 50_000_000,
                  process_bytes=together["machine"]["process_bytes"])
    status, _, error = run(*sweep, "hydra/launcher=one_stream")
    assert status == 2 and error.count("\n") == 1
    assert "training needs" in error and "fewer jobs at once, or leave hydra/launcher=one_stream out" in error
    assert run(*sweep)[0] == 0


def test_copies_of_a_cache_that_lies_elsewhere_take_disk(run, small_machine):
    elsewhere = [*SMALL, "data.remote.path=memory://plan/cache"]
    whole, some = (last_line(run("--json", *elsewhere, *more)[1])["disk_bytes"] for more in ([], [
        "data.remote.copy_gb=0.004"]))
    assert whole - some == pytest.approx(10_000 * 256 * 4 - 4e6, rel=0.05)  # the cache has more than its activations
    small_machine(free_disk_bytes=whole - 2_000_000)
    status, _, error = run(*elsewhere, "data.rows_per_shard=1000")
    remedy = error.partition("; ")[2].split()[0]
    assert status == 2 and error.count("\n") == 1 and remedy.startswith("data.remote.copy_gb=0.00")
    assert run(*elsewhere, remedy)[0] == 0


def test_processes_share_a_batch(run):
    long = [*SMALL, "recipe.n_steps=5000"]
    one, two, four = (last_line(run("--json", *long, *more)[1])["jobs"][0]["phases"]["training"] for more in (
        [], ["trainer.devices=2"], ["trainer.devices=2", "trainer.num_nodes=2"]))
    assert two["flops"] == pytest.approx(one["flops"], rel=0.01) and two["host_bytes"] > 1.5 * one["host_bytes"]
    # Each machine starts, and looks at all validation rows.
    assert one["flops"] / 2 < four["flops"] < 0.6 * one["flops"]


def test_own_activations_need_no_language_model(run, tmp_path):
    import numpy as np

    np.save(tmp_path / "acts.npy", np.zeros((5000, 16), "float32"))
    status, printed, _ = run("--json", "data=file", f"data.path={tmp_path / 'acts.npy'}", *SMALL[1:])
    assert status == 0 and list(last_line(printed)["phases"]) == ["training", "evaluation"]
    assert last_line(printed)["activation_bytes"] == 0


def test_on_the_fly_only_held_out_rows_are_stored_and_the_language_model_reads_while_training(run):
    ways = [], ["data=online", "data.buffer_rows=1024"]
    cached, online = (last_line(run("--json", *SMALL, *way)[1]) for way in ways)
    assert online["activation_bytes"] == 4001 * 256 * 4 and online["disk_bytes"] < cached["disk_bytes"]
    of_lm = cached["phases"]["harvest"]["flops"] / 10_000  # a token
    extra = online["phases"]["training"]["flops"] - cached["phases"]["training"]["flops"]
    assert extra == pytest.approx((50 * 256 + 1024 + 2 * 6000) * of_lm, rel=1e-3)


BAD = {
    ("sae=banana",): "banana",
    ("hook.layer=6",): "the model has 6 layers, 0 to 5",
    ("l0_target=0",): "l0_target is 0; it must be",
    ("lm=hf", "lm.path=acme/nothing-there"): "no config.json within reach",
    ("data.n_tokens.train=0",): "it must be at least 1",
    ("recipe.lr=-1",): "recipe.lr is -1",
}


@pytest.mark.parametrize("overrides", BAD, ids="_".join)
def test_a_mistake_is_one_clear_line(run, overrides):
    status, _, error = run(*overrides)
    lines = [line for line in error.splitlines() if line.startswith("sae_zoo.plan: error: ")]
    assert status == 2 and len(lines) == 1 and BAD[overrides] in lines[0] and "Traceback" not in error
