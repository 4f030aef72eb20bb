"""What can go wrong under a training run, through its entry point: one clear line, nothing finished lost."""

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.kills import plain
from sae_zoo import train
from sae_zoo.records import read_record
from sae_zoo.running import job as running_job

ROOT = Path(__file__).parents[2]
N_STEPS = 60


@pytest.fixture(scope="module")
def acts(tmp_path_factory):
    rng = np.random.default_rng(0)
    codes = (rng.random((4000, 40)) < 0.1) * rng.random((4000, 40))
    file = tmp_path_factory.mktemp("acts") / "acts.npy"
    np.save(file, (codes @ rng.normal(size=(40, 16))).astype("float32"))
    return file


@pytest.fixture
def run(acts, enter):
    """Trains with overrides below an ``output_dir``; returns (exit status, lines of the error, everything printed)."""

    def call(output_dir, *overrides):
        status, out, err = enter(train, *overrides, *arguments(acts, output_dir))
        printed = out + err
        assert "Traceback" not in printed
        return status, [line for line in printed.splitlines() if line.startswith("sae_zoo.train: ")], printed

    return call


def arguments(acts, output_dir):
    return ["data=file", f"data.path={acts}", "l0_target=4", "d_sae=64", f"recipe.n_steps={N_STEPS}", "sweep=s",
            "recipe.batch_size=256", "trainer.progress_bar=false", "trainer.checkpoint_every=20",
            "trainer.accelerator=cpu", "trainer.validation_every=20", "trainer.log_every_n_steps=7",
            f"output_dir={output_dir}"]


def results(output_dir, job="jumprelu-l0_4-seed_0"):
    """What a finished run leaves, without the times of its record."""
    folder = output_dir / "runs/s" / job
    record = {k: v for k, v in read_record(folder).items() if not k.startswith("seconds")}
    files = {path.name: path.read_bytes() for path in folder.iterdir()
             if path.is_file() and path.name not in ("record.json", "config.yaml", ".lock")}
    return record, files


@pytest.fixture(scope="module")
def whole(acts, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("whole")
    subprocess.run([sys.executable, "-m", "sae_zoo.train", *arguments(acts, output_dir)], cwd=ROOT, check=True,
                   capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return results(output_dir)


def at_step(monkeypatch, step, event):
    """``event()`` happens in that training step, once."""
    from sae_zoo.saes.jumprelu import JumpReLUSAE

    honest, waiting = JumpReLUSAE.loss, [event]

    def loss(self, x, **kwargs):
        if self.global_step == step and waiting:
            waiting.pop()()
        return honest(self, x, **kwargs)

    monkeypatch.setattr(JumpReLUSAE, "loss", loss)


def fill(disk):
    with (open(disk / "filler", "wb", buffering=0) as file,
          pytest.raises(OSError, match="No space left on device")):
        file.writelines(itertools.repeat(b"0" * 1024))


def checkpoints(output_dir):
    return sorted(p.name for p in output_dir.glob("runs/s/*/checkpoints/*"))


def test_ctrl_c_once(run, tmp_path, monkeypatch, whole):
    at_step(monkeypatch, 33, lambda: os.kill(os.getpid(), signal.SIGINT))
    status, lines, _ = run(tmp_path)
    assert status == 130
    assert lines == ["sae_zoo.train: interrupted after step 34; the same command goes on from what is finished"]
    assert checkpoints(tmp_path) == ["000000020.ckpt", "000000034.ckpt"]
    assert run(tmp_path)[0] == 0 and results(tmp_path) == whole and not checkpoints(tmp_path)
    record = read_record(tmp_path / "runs/s/jumprelu-l0_4-seed_0")
    assert record["seconds"] is record["seconds_training"] is None  # the first part's are not known any more


def test_random_numbers_are_the_seeds_whatever_the_process_did_before(run, tmp_path, monkeypatch):
    states = []
    for i, seed in enumerate((0, 0, 1)):
        torch.manual_seed(i)
        at_step(monkeypatch, 33, lambda: os.kill(os.getpid(), signal.SIGINT))
        run(tmp_path / str(i), f"seed={seed}")
        (newest,) = (tmp_path / str(i)).glob("runs/s/*/checkpoints/000000034.ckpt")
        states.append(plain(torch.load(newest, weights_only=True)["callbacks"]))
    assert states[0] == states[1] != states[2]


def test_ctrl_c_twice_stops_at_once(run, tmp_path, monkeypatch, whole):
    at_step(monkeypatch, 33, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    assert run(tmp_path)[0] == 130
    assert checkpoints(tmp_path) == ["000000020.ckpt"]
    assert run(tmp_path)[0] == 0 and results(tmp_path) == whole


def test_ctrl_c_stops_a_sweep(run, tmp_path, monkeypatch):
    at_step(monkeypatch, 10, lambda: os.kill(os.getpid(), signal.SIGINT))
    status, lines, printed = run(tmp_path, "-m", "seed=0,1")
    assert status == 130 and len(lines) == 1 and "seed_1" not in printed
    assert [p.name for p in (tmp_path / "runs/s").iterdir() if p.is_dir()] == ["jumprelu-l0_4-seed_0"]


def test_ctrl_c_while_it_evaluates(run, tmp_path, monkeypatch, whole):
    with monkeypatch.context() as patch:
        patch.setattr(running_job, "evaluate_sae", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        status, lines, _ = run(tmp_path)
    assert status == 130 and lines == ["sae_zoo.train: interrupted; the same command goes on from what is finished"]
    monkeypatch.setattr("sae_zoo.saes.jumprelu.JumpReLUSAE.loss", None)  # it does not train again
    assert run(tmp_path)[0] == 0 and results(tmp_path) == whole


def test_a_checkpoint_cut_short(run, tmp_path, monkeypatch, whole):
    at_step(monkeypatch, 47, lambda: os.kill(os.getpid(), signal.SIGINT))
    run(tmp_path)
    (newest,) = tmp_path.glob("runs/s/*/checkpoints/000000048.ckpt")
    os.truncate(newest, newest.stat().st_size // 2)
    status, _, printed = run(tmp_path)
    assert status == 0 and "000000048.ckpt is damaged" in printed and "going on from" in printed
    assert "000000040.ckpt" in printed and results(tmp_path) == whole


def test_a_full_disk_at_a_checkpoint(run, small_disk, monkeypatch, whole):
    disk = small_disk(8_000_000)
    at_step(monkeypatch, 30, lambda: fill(disk))
    status, lines, _ = run(disk)
    assert status == 2 and len(lines) == 1 and "cannot be written: " in lines[0]
    assert checkpoints(disk) == ["000000020.ckpt"]
    (disk / "filler").unlink()
    assert run(disk)[0] == 0 and results(disk) == whole


def test_a_full_disk_at_the_record(run, small_disk, monkeypatch, whole):
    disk = small_disk(8_000_000)
    honest = running_job.save_sae

    def save_and_fill(*args, **kwargs):
        honest(*args, **kwargs)
        fill(disk)

    with monkeypatch.context() as patch:
        patch.setattr(running_job, "save_sae", save_and_fill)
        status, lines, _ = run(disk)
    assert status == 2 and len(lines) == 1 and "record.json cannot be written: No space left on device" in lines[0]
    assert "000000060.ckpt" in checkpoints(disk)
    (disk / "filler").unlink()
    monkeypatch.setattr("sae_zoo.saes.jumprelu.JumpReLUSAE.loss", None)  # it does not train again
    assert run(disk)[0] == 0 and results(disk) == whole


def test_a_read_only_output_directory(run, small_disk, tmp_path):
    disk = small_disk(8_000_000)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for output_dir in (disk, disk / "new"):
        status, lines, _ = run(output_dir)
        assert status == 2 and len(lines) == 1 and "Read-only file system" in lines[0]


def test_a_loss_that_explodes(run, tmp_path):
    rates = [f"recipe.{name}=1e30" for name in ("lr", "decoder_lr", "free_decoder_lr", "threshold_lr", "bias_lr")]
    status, lines, _ = run(tmp_path, *rates, "recipe.lr_warmup_steps=0")
    assert status == 2 and len(lines) == 1 and "; lower recipe.lr (1e+30) or check the activations" in lines[0]
    (record,) = map(read_record, (tmp_path / "runs/s").iterdir())
    assert record["status"] == "failed" and "loss is" in record["error"]


def test_two_processes_at_once(acts, tmp_path, whole):
    command = [sys.executable, "-m", "sae_zoo.train", *arguments(acts, tmp_path)]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                             env={**os.environ, "OMP_NUM_THREADS": "1"}) for _ in range(2)]
    printed = sorted((process.communicate(timeout=300)[0] for process in both), key=lambda text: "skipped" in text)
    assert [process.returncode for process in both] == [0, 0]
    assert "skipped" not in printed[0] and "is finished; skipped" in printed[1]
    assert results(tmp_path) == whole


def test_a_checkpoints_folder_left_behind_by_a_finished_run_goes(run, tmp_path):
    run(tmp_path)
    (job,) = (tmp_path / "runs/s").iterdir()
    (job / "checkpoints").mkdir()
    assert run(tmp_path)[0] == 0 and not (job / "checkpoints").exists()


def test_tokens_are_in_no_file_and_no_output(run, tmp_path, monkeypatch):
    secret = "0123456789abcdef0123456789abcdef0123feed"
    for name in ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv("WANDB_MODE", "offline")
    status, _, printed = run(tmp_path, "logger=wandb")
    assert status == 0 and secret not in printed
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert not [path for path in files if secret.encode() in path.read_bytes()]
