"""Sweeps on one stream, as a user starts them: every file of a run must be that of the same job on its own."""

import logging
import os
import signal
import sys
import time

import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from hydra_plugins.sae_zoo_one_stream import _groups
from sae_zoo import harvest, train
from sae_zoo.config import compose_config
from sae_zoo.data.array_file import FileActivations
from sae_zoo.records import read_record
from sae_zoo.running import job as running_job
from sae_zoo.running import scoring, turns
from sae_zoo.saes.jumprelu import JumpReLUSAE
from sae_zoo.saes.topk import TopKSAE

N_STEPS, EVERY = 60, 20
QUICK = ["trainer.accelerator=cpu", "trainer.progress_bar=false", f"trainer.checkpoint_every={EVERY}",
         "trainer.validation_every=15", "trainer.log_every_n_steps=7", f"recipe.n_steps={N_STEPS}"]
FOUR = "sae=topk,jumprelu,gated,relu"
STREAM = "hydra/launcher=one_stream"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Overrides for activations of 16 dimensions, made of 40 features."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("rows") / "acts.npy"
    codes = (rng.random((4000, 40)) < 0.1) * rng.random((4000, 40))
    np.save(path, (codes @ rng.normal(size=(40, 16))).astype("float32"))
    return ["data=file", f"data.path={path}", "d_sae=64", "l0_target=4", "recipe.batch_size=128", *QUICK]


def start(arguments, module=train):
    """The exit status of an entry point."""
    GlobalHydra.instance().clear()
    train._swept.clear()
    logging.getLogger().handlers.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__name__, *arguments])
        try:
            module.main()
        except SystemExit as stop:
            return stop.code
    return 0


@pytest.fixture(scope="module")
def alone(rows, tmp_path_factory):
    """The folder of four jobs that ran one after the other."""
    root = tmp_path_factory.mktemp("alone")
    assert start(["-m", *rows, FOUR, f"output_dir={root}", "sweep=s"]) == 0
    return root / "runs/s"


@pytest.fixture
def sweep(rows, tmp_path):
    """Starts a sweep on one stream with further overrides; its exit status and its folder."""

    def call(*overrides):
        return start(["-m", STREAM, *rows, *overrides, f"output_dir={tmp_path}", "sweep=s"]), tmp_path / "runs/s"

    return call


def job(folder, sae, l0=4):
    return folder / f"{sae}-l0_{l0}-seed_0"


def assert_equal(one, other):
    """Two folders of a job hold the same but for times."""
    for name in ("sae.safetensors", "sae.json", "latents.csv", "metrics.csv"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), f"{one}/{name}"
    a, b = ({k: v for k, v in read_record(folder).items() if "seconds" not in k} for folder in (one, other))
    assert a == b and a["status"] == "finished"
    assert {p.name for p in one.iterdir()} == {p.name for p in other.iterdir()}


def dies_at(step, honest):
    """A loss that ends at a step as it is told."""

    def loss(self, x, **kwargs):
        if self.global_step == step:
            raise RuntimeError("power cut")
        return honest(self, x, **kwargs)

    return loss


def interrupts_at(step, *, times, honest=JumpReLUSAE.loss):
    def loss(self, x, **kwargs):
        if self.global_step == step:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
        return honest(self, x, **kwargs)

    return loss


def checkpoints(folder):
    return sorted(int(path.stem) for path in folder.glob("checkpoints/*.ckpt"))


def test_two_together_end_as_alone_with_a_language_model(tmp_path, capfd):
    small = ["data.n_tokens={train: 3000, validation: 1000, test: 1000}", "d_sae=256", "l0_target=10", "sweep=s",
             "recipe.batch_size=128", "evaluation.n_lm_tokens=256", *QUICK, "sae=topk,jumprelu"]
    (tmp_path / "cache").mkdir()
    for name, launcher in (("alone", []), ("together", [STREAM])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cache").symlink_to(tmp_path / "cache")
        assert start(["-m", *launcher, *small, f"output_dir={tmp_path / name}"]) == 0
    assert "Launching 2 jobs locally, on 1 streams" in (printed := capfd.readouterr().out)
    assert printed.strip().splitlines()[-1] == str(tmp_path / "together/runs/s/frontier.png")
    for sae in ("topk", "jumprelu"):
        one, other = (job(tmp_path / name / "runs/s", sae, 10) for name in ("alone", "together"))
        assert_equal(one, other)
        assert read_record(other)["delta_lm_loss"] > 0


def test_every_batch_is_read_once_and_the_source_opened_once(sweep, alone, monkeypatch):
    read, opened, held_out = [], [], []
    honest_stream, honest_rows, honest_open = FileActivations.stream, FileActivations.rows, running_job.open_source

    def rows(self, split, start, stop):
        held_out.append((split, start))
        return honest_rows(self, split, start, stop)

    def stream(self, split, seed):
        inner = honest_stream(self, split, seed)

        class Counted:
            def read(self, first, count):
                read.append((split, first))
                return inner.read(first, count)

        return Counted()

    monkeypatch.setattr(FileActivations, "stream", stream)
    monkeypatch.setattr(FileActivations, "rows", rows)
    monkeypatch.setattr(running_job, "open_source", lambda *a, **k: opened.append(1) or honest_open(*a, **k))
    status, folder = sweep(FOUR)
    assert status == 0 and len(opened) == 1
    assert read == [("train", 128 * step) for step in range(N_STEPS)]
    assert held_out.count(("validation", 0)) == 1  # they stay in memory while the stream runs
    for one in sorted(p for p in alone.iterdir() if p.is_dir()):
        assert_equal(one, folder / one.name)


def test_a_sweep_of_several_streams_and_jobs_that_are_finished(sweep, capfd):
    status, folder = sweep("sae=topk", "seed=0,1", "recipe.lr=0.004,0.008")
    printed = capfd.readouterr().out
    assert status == 0 and "Launching 4 jobs locally, on 2 streams" in printed
    records = {p: p.stat().st_mtime_ns for p in folder.rglob("record.json")}
    assert len(records) == 4 and all(read_record(p.parent)["status"] == "finished" for p in records)
    assert sweep("sae=topk", "seed=0,1", "recipe.lr=0.004,0.008")[0] == 0
    assert capfd.readouterr().out.count("is finished; skipped") == 4
    assert records == {p: p.stat().st_mtime_ns for p in folder.rglob("record.json")}
    assert HydraConfig.instance().cfg is None


def test_jobs_join_the_stream_at_the_steps_of_their_checkpoints(sweep, rows, alone, tmp_path, monkeypatch, capfd):
    for cls, sae, step in ((TopKSAE, "topk", 47), (JumpReLUSAE, "jumprelu", 33)):
        with monkeypatch.context() as patch:
            patch.setattr(cls, "loss", dies_at(step, honest=cls.loss))
            with pytest.raises(RuntimeError, match="power cut"):
                start([*rows, f"sae={sae}", f"output_dir={tmp_path}", "sweep=s"])
    steps = []
    honest = turns._Member.wait
    monkeypatch.setattr(turns._Member, "wait", lambda self, step: steps.append(step) or honest(self, step))
    status, folder = sweep("sae=topk,jumprelu")
    assert status == 0 and capfd.readouterr().out.count("going on from") == 2
    assert sorted(steps) == sorted([*range(20, N_STEPS), *range(40, N_STEPS)])
    assert steps[:22] == [20, 40, *range(21, 41)]  # the one behind trains until they meet
    for sae in ("topk", "jumprelu"):
        assert_equal(job(alone, sae), job(folder, sae))


def test_a_killed_sweep_goes_on(sweep, alone, tmp_path, capfd):
    child = os.fork()
    if not child:
        try:
            sweep(FOUR)
        finally:
            os._exit(0)
    while not any((tmp_path / "runs").rglob("000000020.ckpt")):
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    status, folder = sweep(FOUR)
    assert status == 0 and "going on from" in capfd.readouterr().out
    for sae in ("topk", "jumprelu", "gated", "relu"):
        assert_equal(job(alone, sae), job(folder, sae))


def test_a_job_that_fails_leaves_its_record_and_the_others_go_on(sweep, alone, monkeypatch, capfd):
    honest = TopKSAE.loss
    monkeypatch.setattr(TopKSAE, "loss", lambda self, x, **k: honest(
        self, x * float("nan") if self.global_step == 30 else x, **k))
    status, folder = sweep(FOUR)
    printed = capfd.readouterr()
    assert status == 2 and "sae_zoo.train: error: loss is nan at step 30" in printed.err
    failed = read_record(job(folder, "topk"))
    assert failed["status"] == "failed" and "loss is nan at step 30" in failed["error"]
    for sae in ("jumprelu", "gated", "relu"):
        assert_equal(job(alone, sae), job(folder, sae))


def test_what_is_wrong_with_a_batch_every_job_says(sweep, monkeypatch):
    honest = FileActivations.stream

    def stream(self, split, seed):
        inner = honest(self, split, seed)

        class Damaged:
            def read(self, first, count):
                if first == 25 * count:
                    raise ValueError("the file ends here")
                return inner.read(first, count)

        return Damaged()

    monkeypatch.setattr(FileActivations, "stream", stream)
    status, folder = sweep("sae=topk,relu")
    assert status == 2
    for sae in ("topk", "relu"):
        assert read_record(job(folder, sae))["error"] == "the file ends here"
        assert checkpoints(job(folder, sae)) == [20]


def test_ctrl_c_stops_all_after_the_step_with_a_checkpoint(sweep, alone, capfd):
    before = signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JumpReLUSAE, "loss", interrupts_at(30, times=1))
        status, folder = sweep(FOUR)
    printed = capfd.readouterr()
    assert status == 130 and "interrupted after step 30; the same command goes on" in printed.err
    assert printed.err.count("stopping after this step") == 1 and "frontier" not in printed.out
    for sae, step in (("gated", 31), ("jumprelu", 31), ("relu", 30), ("topk", 30)):  # it came in jumprelu's turn
        assert checkpoints(job(folder, sae)) == [20, step]
        assert read_record(job(folder, sae))["error"] == "interrupted"
    assert signal.getsignal(signal.SIGINT) is before
    status, folder = sweep(FOUR)
    assert status == 0
    for sae in ("topk", "jumprelu", "gated", "relu"):
        assert_equal(job(alone, sae), job(folder, sae))


def test_ctrl_c_twice_stops_all_at_once(sweep, monkeypatch):
    monkeypatch.setattr(JumpReLUSAE, "loss", interrupts_at(30, times=2))
    status, folder = sweep("sae=topk,jumprelu,gated")
    assert status == 130
    for sae in ("topk", "jumprelu", "gated"):
        assert checkpoints(job(folder, sae)) == [20]
        assert read_record(job(folder, sae))["error"] == "interrupted"


def test_ctrl_c_while_one_is_scored_stops_the_rest(sweep, alone):
    def interrupted(*_, **__):
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("Python's own handler would have raised")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "score_sae", interrupted)
        status, folder = sweep("sae=topk,relu")
    assert status == 130 and checkpoints(job(folder, "relu")) == [40, N_STEPS]
    assert checkpoints(job(folder, "topk")) == [40, N_STEPS - 1]  # its last turn had not come yet
    status, folder = sweep("sae=topk,relu")
    assert status == 0
    for sae in ("topk", "relu"):
        assert_equal(job(alone, sae), job(folder, sae))


def test_the_same_job_twice_waits_for_no_lock_of_its_own(sweep, capfd):
    status, _ = sweep("sae=topk", "l0_target=4,4")
    assert status == 0 and capfd.readouterr().out.count("is finished; skipped") == 1


def config(*overrides, folder="a"):
    return OmegaConf.create({"hydra": {"sweep": {"dir": "s", "subdir": folder}}, **compose_config("train", overrides)})


def test_groups():
    same = [config("sae=topk", "l0_target=20", folder="b"), config("sae=relu", "recipe.lr=1", "d_sae=9", folder="a")]
    others = [config(override, folder=override) for override in (
        "seed=1", "recipe.n_steps=7", "recipe.batch_size=8", "hook.layer=1", "corpus=english",
        "data.n_tokens.train=9")]
    assert _groups([*same, *others]) == [[1, 0], *([2 + i] for i in range(len(others)))]
    assert _groups([same[0], same[1], same[0], same[0]]) == [[1, 0], [2], [3]]


def test_other_entry_points_are_refused(tmp_path, capfd):
    status = start(["-m", STREAM, "layers=[1],[3]", f"output_dir={tmp_path}", f"hydra.sweep.dir={tmp_path}"], harvest)
    assert status == 2
    assert "sae_zoo.harvest: error: hydra/launcher is one_stream, which trains SAEs" in capfd.readouterr().err


def test_seconds_are_of_own_turns():
    clocks = []

    def task(sleep):
        member = turns.current()
        before = member.clock()
        for _ in turns._Turns(member, 0, 3):
            time.sleep(sleep)
        clocks.append(member.clock() - before)
        return sleep

    def with_reader(sleep):
        turns.current().reader = lambda: [torch.zeros(1)] * 3
        return task(sleep)

    assert turns.train_together([lambda: with_reader(0.05), lambda: with_reader(0.0)]) == [0.05, 0.0]
    assert sorted(clocks)[0] < 0.05 <= 0.15 <= sorted(clocks)[1]
    assert isinstance(turns.current(), turns.Alone) and turns.current().leads
