"""Jobs on several devices: two gloo processes, the nearest thing to two GPUs that every machine has."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from sae_zoo import harvest, load_sae, train
from sae_zoo.config import compose_config
from sae_zoo.records import read_record
from sae_zoo.running.devices import devices_of, in_this_process, place_of_process
from sae_zoo.running.job import run_job
from sae_zoo.running.settings import TrainSettings

ROOT = Path(__file__).parents[2]
# beta1 = 0 and a large epsilon: Adam divides by the gradient's size, which turns rounding into whole steps where a
# gradient is almost zero.
SMALL = ["l0_target=4", "d_sae=64", "recipe.batch_size=256", "data=file", "trainer.accelerator=cpu",
         "trainer.progress_bar=false", "trainer.validation_every=10", "trainer.log_every_n_steps=5",
         "recipe.adam_eps=1e-3"]


def start(*arguments, module="sae_zoo.train", **options):
    return subprocess.Popen([sys.executable, "-m", *module.split(), *map(str, arguments)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                            **options)


def run(*arguments, **options):
    process = start(*arguments, **options)
    out, err = process.communicate(timeout=300)
    return process.returncode, out + err


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    rng = np.random.default_rng(0)
    codes = (rng.random((6000, 40)) < 0.1) * rng.random((6000, 40))
    path = tmp_path_factory.mktemp("rows") / "acts.npy"
    np.save(path, (codes @ rng.normal(size=(40, 16))).astype("float32"))
    return path


@pytest.fixture(scope="module")
def swept(rows, tmp_path_factory):
    """A sweep on two devices, and the same jobs on one; so wide that some latents are silent: AuxK has work."""
    root = tmp_path_factory.mktemp("swept")
    overrides = [*(o.replace("d_sae=64", "d_sae=512") for o in SMALL), f"data.path={rows}", "recipe.n_steps=30",
                 "recipe.dead_after_tokens=300"]
    status, printed = run("-m", "sae=jumprelu,topk", *overrides, "trainer.devices=2", "sweep=two", f"output_dir={root}")
    assert status == 0, printed
    assert (root / "runs" / "two" / "frontier.png").exists()
    for variant in ("jumprelu", "topk"):
        config = compose_config("train", [f"sae={variant}", *overrides])
        run_job(TrainSettings.of(config), root / "runs" / "one" / variant)
    return root / "runs"


def assert_same_runs(one, two):
    a, b = read_record(one), read_record(two)
    assert b["status"] == "finished" and b["config_hash"] == a["config_hash"]
    assert b["fvu"] == pytest.approx(a["fvu"], rel=1e-5) and b["l0"] == pytest.approx(a["l0"], rel=1e-3)
    curves = [pd.read_csv(run_dir / "metrics.csv") for run_dir in (one, two)]
    assert len(curves[0]) >= 6
    for name in ("step", "loss", "L0", "FVU", "dead_fraction", "heldout_L0", "coefficient", "density", "lr"):
        np.testing.assert_allclose(curves[0][name], curves[1][name], rtol=1e-5, atol=1e-7, err_msg=name)
    weights = load_sae(one), load_sae(two)
    for (name, x), y in zip(weights[0].named_parameters(), weights[1].parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    return curves[0]


@pytest.mark.parametrize("variant", ["jumprelu", "topk"])
def test_two_processes_train_what_one_does(swept, variant):
    curve = assert_same_runs(swept / "one" / variant, next((swept / "two").glob(f"{variant}-*")))
    assert variant != "topk" or curve["dead_fraction"].max() > 0  # AuxK is on


def test_torchrun_with_a_loss_that_is_no_mean_over_tokens(rows, tmp_path):
    overrides = ["sae=jumprelu", "sae.sparsity_loss=l0_target", "sae.sparsity_coefficient=0.3", *SMALL,
                 f"data.path={rows}", "recipe.n_steps=30"]
    run_job(TrainSettings.of(compose_config("train", overrides)), tmp_path / "one")
    status, printed = run("--nproc-per-node=2", "--master-port=29555", "-m", "sae_zoo.train", *overrides,
                          "trainer.devices=2", f"output_dir={tmp_path}", module="torch.distributed.run")
    assert status == 0, printed
    assert_same_runs(tmp_path / "one", next(p for p in tmp_path.glob("runs/*/*") if p.is_dir()))


def processes_below(pid):
    """Processes that ``pid`` has started, and is still waiting for."""
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(condition, seconds=120):
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)
    return found


@pytest.fixture
def long_run(rows, tmp_path):
    """Starts a run that takes a while on two devices and waits for a checkpoint; returns its process and its folder."""
    started = []

    def begin():
        known = {path.name for path in tmp_path.glob("runs/*/*/checkpoints/*.ckpt")}
        process = start("sae=topk", *SMALL, f"data.path={rows}", "recipe.n_steps=1000", "trainer.checkpoint_every=25",
                        "trainer.devices=2", f"output_dir={tmp_path}")
        started.append(process)
        wait_for(lambda: process.poll() is not None
                 or {path.name for path in tmp_path.glob("runs/*/*/checkpoints/*.ckpt")} - known)
        assert process.poll() is None, process.communicate()
        return process, next(tmp_path.glob("runs/*/*/checkpoints")).parent

    yield begin
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_an_interrupt_a_device_that_dies_and_a_run_that_goes_on(long_run):
    process, run_dir = long_run()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted after step" in err and "Traceback" not in err
    step = int(err.split("interrupted after step ")[1].split(";")[0])
    assert (run_dir / "checkpoints" / f"{step:09d}.ckpt").exists()

    process, _ = long_run()
    first, second = processes_below(process.pid)
    os.kill(second, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "the process of device 1 was ended by SIGKILL" in err
    assert not Path(f"/proc/{first}").exists()
    record = read_record(run_dir)
    assert record["status"] == "failed" and "device 1 was ended by SIGKILL" in record["error"]

    process, _ = long_run()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "going on from" in out + err
    assert read_record(run_dir)["status"] == "finished"


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_devices_do_not_outlive_who_started_them(long_run):
    process, _ = long_run()
    children = processes_below(process.pid)
    assert len(children) == 2
    process.kill()
    wait_for(lambda: not any(Path(f"/proc/{child}").exists() for child in children), seconds=30)


def test_a_mistake_is_said_once_and_recorded(enter, rows, tmp_path):
    bad = np.load(rows)
    bad[:] = 0
    np.save(tmp_path / "zero.npy", bad)
    status, out, err = enter(train, "sae=topk", *SMALL, f"data.path={tmp_path / 'zero.npy'}", "recipe.n_steps=30",
                             "trainer.devices=2", f"output_dir={tmp_path}")
    printed = out + err
    assert status == 2 and printed.count("error:") == 1 and "Traceback" not in printed
    (run_dir,) = (p for p in tmp_path.glob("runs/*/*") if p.is_dir())
    assert read_record(run_dir)["status"] == "failed" and read_record(run_dir)["error"] in printed


def test_two_processes_harvest_the_bytes_of_one(enter, tmp_path):
    def made(n):
        root = tmp_path / str(n)
        status, *printed = enter(
            harvest, "layers=[1,3]", "sites=[residual]", "data.n_tokens={train: 9000, validation: 1500, test: 2000}",
            "data.rows_per_shard=2048", "accelerator=cpu", "progress_bar=false", f"output_dir={root}", f"devices={n}")
        assert status == 0, printed
        files = sorted(root.glob("cache/*/**/*"))
        return {path.relative_to(root): path.read_bytes() for path in files if path.is_file()}

    one, two = made(1), made(2)
    assert len(one) > 10 and one == two
    assert not list((tmp_path / "2" / "cache").glob(".*.partial"))


@pytest.mark.parametrize("launcher, n_devices", [("submitit_local", 2), ("joblib", 1)])
def test_jobs_in_processes_of_their_own(rows, tmp_path, launcher, n_devices):
    """Hydra's launchers for SLURM (its local double; the job on two devices) and for many runs on one machine."""
    seeds = (0,) if n_devices == 2 else (0, 1)
    status, printed = run("-m", f"hydra/launcher={launcher}", "sae=topk", f"seed={','.join(map(str, seeds))}", *SMALL,
                          f"data.path={rows}", "recipe.n_steps=30", "sweep=s", f"output_dir={tmp_path}",
                          f"trainer.devices={n_devices}")
    assert status == 0, printed
    records = [read_record(next((tmp_path / "runs" / "s").glob(f"topk-l0_4-seed_{seed}*"))) for seed in seeds]
    assert all(record["status"] == "finished" for record in records)
    assert len({record["fvu"] for record in records}) == len(seeds)


def test_what_started_this_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    assert place_of_process() == (0, 1) and in_this_process(1) and not in_this_process(2)
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_NTASKS", "8")  # a batch script's own
    assert place_of_process() == (0, 1)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    assert place_of_process() == (3, 8) and in_this_process(8)
    with pytest.raises(ValueError, match=r"8 processes were started, but .* is 2; make them equal"):
        in_this_process(2)


@pytest.mark.parametrize("devices", [0, "x", [], -2, None])
def test_devices_that_are_not_there(devices):
    with pytest.raises(ValueError, match=r"^trainer\.devices is "):
        devices_of("cpu", devices)


def test_devices_by_number():
    assert devices_of("cpu", 3) == devices_of("cpu", "3") == [0, 1, 2] and devices_of("cpu", "auto") == [0]
