import itertools
import os
import shutil
import signal
import zipfile
import zlib

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.kills import plain
from sae_zoo.lm.pretraining_data import SeededRows, StepDataModule
from sae_zoo.running.checkpoints import CheckpointFiles, Checkpoints, newest_checkpoint
from sae_zoo.running.curves import Curves

ROWS = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
N_STEPS = 20


class Noisy(pl.LightningModule):
    """Its loss depends on everything that has to survive: weights, momentum, batches, random numbers, held-out rows."""

    def __init__(self, events=None):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = torch.nn.Linear(3, 1)
        self.register_buffer("measured", torch.zeros(()))
        self.events = events or {}

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)

    def training_step(self, batch, _):
        self.events.get(self.global_step, lambda: None)()
        loss = (torch.dropout(self.layer(batch), 0.3, True) - 1).square().mean() * (1 + self.measured)
        if (self.global_step + 1) % 3 == 0:
            self.log("loss", loss)
        return loss

    def validation_step(self, batch, _):
        self.measured.add_(self.layer(batch).square().mean() / 100)
        self.log("measured", self.measured)


def train(folder, *, every=4, events=None):
    """Returns the module as it is when training ends; goes on from what is in ``folder``."""
    torch.manual_seed(1)
    curves = Curves(folder / "metrics.csv")
    checkpoints = Checkpoints(folder / "checkpoints", every=every, curves=curves)
    trainer = pl.Trainer(max_steps=N_STEPS, accelerator="cpu", logger=curves, log_every_n_steps=3, val_check_interval=8,
                         num_sanity_val_steps=0, callbacks=[checkpoints], plugins=[CheckpointFiles()],
                         enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder)
    module = Noisy(events)
    data = StepDataModule(SeededRows(ROWS, 8, N_STEPS, seed=0), torch.utils.data.DataLoader(ROWS, 20))
    checkpoints.fit(trainer, module, data, newest_checkpoint(checkpoints.folder))
    return module


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def final_state(folder):
    state = torch.load(folder / f"checkpoints/{N_STEPS:09d}.ckpt", weights_only=True)
    return {key: plain(state[key]) for key in ("state_dict", "optimizer_states", "lr_schedulers", "callbacks")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train(folder)
    return folder


class PowerCut(Exception):
    pass


def cut():
    raise PowerCut


def test_the_last_two_are_kept(whole):
    assert names(whole) == ["000000016.ckpt", "000000020.ckpt"]


@pytest.mark.parametrize("steps", [[0], [3], [4], [7], [8], [9], [16], [19], [5, 6, 13, 19]])
def test_an_interrupted_run_ends_as_if_it_had_not_been(whole, tmp_path, steps):
    for step in steps:
        with pytest.raises(PowerCut):
            train(tmp_path, events={step: cut})
    train(tmp_path)
    assert final_state(tmp_path) == final_state(whole)
    assert (tmp_path / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()
    assert names(tmp_path) == names(whole)


def test_another_distance_between_checkpoints_changes_nothing(whole, tmp_path):
    with pytest.raises(PowerCut):
        train(tmp_path, every=3, events={11: cut})
    train(tmp_path, every=7)
    assert final_state(tmp_path) == final_state(whole)


def test_a_finished_training_is_not_repeated(whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    module = train(tmp_path, events=dict.fromkeys(range(N_STEPS + 1), cut))
    assert plain(dict(module.state_dict())) == final_state(whole)["state_dict"]


def test_a_checkpoint_cut_short_is_said_and_the_one_before_is_used(whole, tmp_path, caplog):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "checkpoints/000000020.ckpt"
    newest.write_bytes(newest.read_bytes()[:-100])
    (tmp_path / "checkpoints/000000024.ckpt.tmp").write_bytes(b"half")
    train(tmp_path)
    (line,) = [record.message for record in caplog.records if "damaged" in record.message]
    assert "000000020.ckpt is damaged (File is not a zip file); going back to the one before it" in line
    assert final_state(tmp_path) == final_state(whole) and names(tmp_path) == names(whole)


def test_without_a_whole_checkpoint_it_starts_again(whole, tmp_path, caplog):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    for file in (tmp_path / "checkpoints").iterdir():
        file.write_bytes(b"")
    train(tmp_path)
    assert sum("is damaged" in record.message for record in caplog.records) == 2
    assert final_state(tmp_path) == final_state(whole) and names(tmp_path) == names(whole)


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    state = {"weights": torch.arange(30.0), "optimizer": [{"step": 3, "lr": 0.1}], "buffer": torch.tensor(2.5).double()}
    CheckpointFiles().save_checkpoint(state, folder / "000000001.ckpt")
    return folder, (folder / "000000001.ckpt").read_bytes(), plain(state)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_or_a_cut_is_found_or_harmless(small_checkpoint, data):
    folder, content, state = small_checkpoint
    damaged = bytearray(content)
    if data.draw(st.booleans()):
        damaged[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del damaged[data.draw(st.integers(0, len(content) - 1)) :]
    (folder / "000000001.ckpt").write_bytes(damaged)
    found = newest_checkpoint(folder)
    if found is not None:
        assert plain(torch.load(found, weights_only=True)) == state
        assert len(damaged) == len(content)


def test_a_part_that_says_it_is_compressed_is_passed_over(small_checkpoint, monkeypatch, caplog):
    """As one flipped bit in the header of a stored part does."""
    folder, content, _ = small_checkpoint
    (folder / "000000001.ckpt").write_bytes(content)

    def inflate(archive):
        raise zlib.error("Error -3 while decompressing data: invalid stored block lengths")

    monkeypatch.setattr(zipfile.ZipFile, "testzip", inflate)
    assert newest_checkpoint(folder) is None and "is damaged (Error -3 while decompressing" in caplog.text


def test_a_pickled_object_is_no_checkpoint(tmp_path):
    torch.save({"module": torch.nn.Linear(2, 2)}, tmp_path / "000000001.ckpt")
    assert newest_checkpoint(tmp_path) is None


def test_a_full_disk_leaves_the_last_checkpoint(small_disk, tmp_path, whole):
    disk = small_disk(1_000_000)
    left = []

    def fill():
        left.append(names(disk))
        with (open(disk / "filler", "wb", buffering=0) as file,
              pytest.raises(OSError, match="No space left on device")):
            file.writelines(itertools.repeat(b"0" * 512))

    with pytest.raises(OSError, match=r"000000012.ckpt cannot be written: .+") as error:
        train(disk, events={9: fill})
    assert "\n" not in str(error.value)
    assert names(disk) == left[0] == ["000000004.ckpt", "000000008.ckpt"]
    (disk / "filler").unlink()
    train(disk)
    assert final_state(disk) == final_state(whole)
    assert (disk / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_stops_after_the_step_with_a_checkpoint(whole, tmp_path, capfd):
    with pytest.raises(KeyboardInterrupt, match="interrupted after step 6"):
        train(tmp_path, events={5: interrupt})
    assert names(tmp_path) == ["000000004.ckpt", "000000006.ckpt"]
    assert "stopping after this step; Ctrl-C again stops at once" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train(tmp_path)
    assert final_state(tmp_path) == final_state(whole)
    assert (tmp_path / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()


def test_ctrl_c_twice_stops_at_once(whole, tmp_path):
    reached = []
    with pytest.raises(KeyboardInterrupt, match="interrupted"):
        train(tmp_path, events={5: lambda: (interrupt(), interrupt(), reached.append(1))})
    assert not reached and names(tmp_path) == ["000000004.ckpt"]
    train(tmp_path)
    assert final_state(tmp_path) == final_state(whole)


def test_ctrl_c_in_the_last_step(tmp_path):
    with pytest.raises(KeyboardInterrupt, match=f"interrupted after step {N_STEPS}"):
        train(tmp_path, events={N_STEPS - 1: interrupt})
    assert f"{N_STEPS:09d}.ckpt" in names(tmp_path)


def test_bad_distance(tmp_path):
    with pytest.raises(ValueError, match="checkpoint_every is 0; it must be at least 1"):
        train(tmp_path, every=0)
