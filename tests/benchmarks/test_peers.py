"""Workers, the weights that come back from them, and the peers themselves where they are installed."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks import peers
from benchmarks.__main__ import main
from benchmarks.peers import PEERS, Peer, PeerAbsent, PeerFailed, Worker, install, read_export

ROOT = Path(__file__).parents[2]
D_IN, D_SAE, K = 6, 20, 3


# Neutral weights, against the formulas written out in float64.


def brute_force(variant, w, x, apply_b_dec, k):
    latents = np.zeros((len(x), D_SAE))
    for row in range(len(x)):
        centred = x[row] - w["b_dec"] if apply_b_dec else x[row]
        for i in range(D_SAE):
            gate = sum(centred[j] * w["W_enc"][j, i] for j in range(D_IN))
            if variant == "gated":
                magnitude = np.exp(w["r_mag"][i]) * gate + w["b_mag"][i]
                latents[row, i] = max(magnitude, 0.0) if gate + w["b_gate"][i] > 0 else 0.0
            else:
                pre = gate + w["b_enc"][i]
                threshold = w["threshold"][i] if variant == "jumprelu" else 0.0
                latents[row, i] = pre if pre > threshold else (pre if variant == "topk" else 0.0)
        if variant == "topk":
            kept = np.argsort(latents[row])[-k:]
            latents[row] = [max(v, 0.0) if i in kept else 0.0 for i, v in enumerate(latents[row])]
    return latents, latents @ w["W_dec"] + w["b_dec"]


def export(folder, variant, apply_b_dec, *, change=lambda w: None):
    """What a worker leaves behind; ``change`` spoils the weights after the peer's own output was taken."""
    rng = np.random.default_rng(0)
    shapes = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    names = {"gated": ("b_gate", "b_mag", "r_mag"), "jumprelu": ("b_enc", "threshold")}.get(variant, ("b_enc",))
    w = {name: rng.normal(size=shape) for name, shape in shapes.items()} | {
        name: rng.normal(size=D_SAE) * 0.5 for name in names}
    if variant == "jumprelu":
        w["threshold"] = np.abs(w["threshold"])
    x = rng.normal(size=(64, D_IN)) * 3 + 1
    latents, x_hat = brute_force(variant, w, x, apply_b_dec, K)
    change(w)
    save_file({name: torch.from_numpy(value).float().contiguous() for name, value in w.items()},
              folder / "weights.safetensors")
    np.savez(folder / "check.npz", x=x.astype(np.float32), latents=latents.astype(np.float32),
             x_hat=x_hat.astype(np.float32))
    (folder / "meta.json").write_text(json.dumps({
        "variant": variant, "d_in": D_IN, "d_sae": D_SAE, "k": K if variant == "topk" else None,
        "apply_b_dec_to_input": apply_b_dec}))
    return x, latents, x_hat


@pytest.mark.parametrize("apply_b_dec", [False, True])
@pytest.mark.parametrize("variant", ["topk", "jumprelu", "relu", "gated"])
def test_weights_are_read_as_the_formulas_say(tmp_path, variant, apply_b_dec):
    x, latents, x_hat = export(tmp_path, variant, apply_b_dec)
    sae = read_export(tmp_path)
    x = torch.from_numpy(x).float()
    assert 0.5 < (latents > 0).sum(1).mean() < D_SAE  # the formulas do something
    np.testing.assert_allclose(sae.encode(x).numpy(), latents, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(sae.encode_sparse(x).to_dense().numpy(), latents, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(sae.reconstruct(x).numpy(), x_hat, rtol=1e-3, atol=1e-3)


def spoil(name, factor):
    def change(w):
        w[name] *= factor

    return change


@pytest.mark.parametrize("variant, name, factor", [
    ("topk", "b_dec", 1.02), ("topk", "W_enc", -1.0), ("jumprelu", "threshold", 1.5), ("relu", "W_dec", 1.01),
    ("gated", "r_mag", 1.1), ("gated", "b_gate", 0.0), ("gated", "b_mag", 0.9), ("relu", "b_enc", float("nan")),
])
def test_weights_that_are_not_what_the_peer_uses_are_refused(tmp_path, variant, name, factor):
    export(tmp_path, variant, True, change=spoil(name, factor))
    with pytest.raises(ValueError, match=r"differ from the peer's own in .* of 64 rows.*nothing is scored"):
        read_export(tmp_path)


def test_a_flag_or_a_k_that_is_wrong_is_refused(tmp_path):
    export(tmp_path, "topk", True)
    meta = json.loads((tmp_path / "meta.json").read_text())
    for wrong in ({"apply_b_dec_to_input": False}, {"k": K + 1}):
        (tmp_path / "meta.json").write_text(json.dumps(meta | wrong))
        with pytest.raises(ValueError, match="differ from the peer's own"):
            read_export(tmp_path)


def test_one_broken_tie_is_excused_and_two_are_not(tmp_path):
    export(tmp_path, "relu", True)
    check = dict(np.load(tmp_path / "check.npz"))
    for n_rows in (1, 2):
        check["latents"][n_rows - 1, 0] += 1.0
        np.savez(tmp_path / "check.npz", **check)
        if n_rows == 1:
            read_export(tmp_path)
        else:
            with pytest.raises(ValueError, match="in 2 of 64 rows"):
                read_export(tmp_path)


# The protocol, with a worker that is honest about what it was given.

TINY_WORKER = """
import os, sys
sys.path.insert(0, {workers!r})
from protocol import Trained, open_channel, serve
CHANNEL = open_channel()
print("noise from python", flush=True)
os.system("echo noise from a child")
import torch

def fit(run, batches):
    seen = []
    for x in batches:
        print("a step")
        if run.lr == 13.0:
            raise ArithmeticError("diverged\\nbadly")
        seen.append(x.clone())
        x.zero_()  # must not reach the file
    return torch.cat(seen)

def export(run, seen):
    eye = torch.eye(run.d_in)
    weights = {{"W_enc": eye, "W_dec": eye, "b_enc": torch.zeros(run.d_in), "b_dec": torch.zeros(run.d_in)}}
    return Trained(weights=weights, apply_b_dec_to_input=False, k=None, settings={{"seen": seen.tolist()}},
                   notes=["tiny"], encode=torch.relu, reconstruct=torch.relu)

serve(CHANNEL, packages=["torch"], variants={{"relu": {{"control": "coefficient", "start": 1.0}}}}, fit=fit,
      export=export)
"""


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A peer named tiny, installed in tmp_path."""
    script = tmp_path / "tiny_worker.py"
    script.write_text(TINY_WORKER.format(workers=str(ROOT / "benchmarks/workers")))
    python = tmp_path / "tiny" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setitem(PEERS, "tiny", Peer(str(script)))
    rows = tmp_path / "rows.npy"
    np.save(rows, np.arange(1, 49, dtype=np.float32).reshape(12, 4))
    np.save(tmp_path / "check.npy", np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32))
    return tmp_path


SHAPE = {"d_sae": 4, "batch": 3}
TRAIN = {**SHAPE, "seed": 0, "lr": None, "sparsity": None, "defaults": False}


def test_a_worker_trains_on_the_rows_in_their_order(tiny):
    rows = np.load(tiny / "rows.npy")
    with Worker("tiny", tiny, threads=1) as worker:
        assert worker.versions == {"torch": torch.__version__} and set(worker.variants) == {"relu"}
        sae, told = worker.train("relu", tiny / "rows.npy", tiny / "check.npy", tiny / "out", steps=3, **TRAIN)
        np.testing.assert_array_equal(told["settings"]["seen"], rows[:9])
        _, told = worker.train("relu", tiny / "rows.npy", tiny / "check.npy", tiny / "out", steps=6, **TRAIN)
        np.testing.assert_array_equal(told["settings"]["seen"], np.concatenate([rows, rows[:6]]))  # a second pass
    assert told["seconds"] > 0 and told["notes"] == ["tiny"]
    x = torch.randn(5, 4)
    torch.testing.assert_close(sae.reconstruct(x), x.relu())
    np.testing.assert_array_equal(np.load(tiny / "rows.npy"), rows)


def test_a_worker_times_steps_of_one_run_on_and_on(tiny):
    with Worker("tiny", tiny, threads=1) as worker:
        with pytest.raises(PeerFailed, match="time was asked for before time_setup"):
            worker.time(1)
        for _ in range(2):  # a second setup ends the first
            worker.time_setup("relu", tiny / "rows.npy", **SHAPE, l0=2)
            for n in (1, 5):
                milliseconds = worker.time(n)
                assert len(milliseconds) == n and all(0 < ms < 5_000 for ms in milliseconds)


def test_a_failed_run_is_said_in_one_line_and_ends_nothing(tiny):
    with Worker("tiny", tiny, threads=1) as worker:
        with pytest.raises(PeerFailed, match=r"tiny: ArithmeticError: diverged badly; see .*tiny\.log$"):
            worker.train("relu", tiny / "rows.npy", tiny / "check.npy", tiny / "out", steps=2, **(TRAIN | {"lr": 13.0}))
        worker.train("relu", tiny / "rows.npy", tiny / "check.npy", tiny / "out", steps=2, **TRAIN)
    assert "noise from a child" in worker.log.read_text()


def test_a_peer_that_is_absent_says_why(tiny):
    with pytest.raises(PeerAbsent, match=r"not installed in .*sae-lens; run python -m benchmarks install"):
        Worker("sae-lens", tiny, threads=None)
    (tiny / "tiny_worker.py").write_text("import a_package_that_is_not_there")
    with pytest.raises(PeerAbsent, match=r"it does not start: the worker of tiny has ended; see .*tiny\.log"):
        Worker("tiny", tiny, threads=None)
    for call in (lambda: Worker("saelens", tiny, threads=None), lambda: install(["saelens"], tiny)):
        with pytest.raises(ValueError, match="peer 'saelens' is unknown; choose from sae-lens"):
            call()


def test_every_peer_has_a_worker_and_pinned_requirements():
    for name, peer in peers.PEERS.items():
        folder = ROOT / "benchmarks"
        assert (folder / "workers" / peer.worker).is_file()
        lines = [line for line in (folder / "requirements" / f"{name}.txt").read_text().splitlines() if line[:1] != "#"]
        assert all(line.count("==") == 1 for line in lines) and "torch==2.13.0" in lines
        assert any(line.startswith(f"{name}==") for line in lines)


# The peers themselves.


@pytest.mark.parametrize("name", [n for n in PEERS])
def test_a_peer_trains_and_is_read_back_exactly(name, tmp_path):
    peers_dir = ROOT / "outputs/peers"
    if not (peers_dir / name / "bin/python").exists():
        pytest.skip(f"{name} is not installed: python -m benchmarks install --peers {name}")
    rng = np.random.default_rng(0)
    np.save(tmp_path / "rows.npy", (rng.normal(size=(40 * 64, 16)) @ rng.normal(size=(16, 16)) + 2).astype(np.float32))
    np.save(tmp_path / "check.npy", np.load(tmp_path / "rows.npy")[:64])
    shape = {"d_sae": 48, "batch": 64}
    with Worker(name, peers_dir, threads=1) as worker:
        assert next(iter(worker.versions)) == name and worker.versions["torch"].startswith("2.13.0")
        for variant, control in worker.variants.items():
            sparsity = control.get("start", 4)
            worker.time_setup(variant, tmp_path / "rows.npy", **shape, l0=4)
            assert all(ms > 0 for ms in worker.time(2))
            for defaults in (False, True):
                asked = None if defaults and control["control"] == "coefficient" else sparsity
                sae, told = worker.train(variant, tmp_path / "rows.npy", tmp_path / "check.npy", tmp_path / variant,
                                         **shape, steps=40, seed=1, lr=None if defaults else 1e-2, sparsity=asked,
                                         defaults=defaults)  # raises where the weights are not what the peer uses
                assert told["seconds"] > 0 and told["settings"]["lr"] == pytest.approx(
                    1e-2 if not defaults else told["settings"]["lr"])
                assert sae.variant == variant and sae.W_enc.shape == (16, 48)
            if control["control"] == "k":
                x = torch.from_numpy(np.load(tmp_path / "check.npy"))
                assert int((sae.encode(x) > 0).sum(1).max()) <= 4


@pytest.mark.parametrize("arguments, message", [
    (["quality", "--variants", "topk,other"], "'other' is unknown; choose from topk"),
    (["quality", "--threads", "0"], "'0' is not a number of threads"),
    (["quality", "--cache", "."], "is not a cache"),
    (["quality"], "there is no cache in outputs/cache; make the README's by python -m sae_zoo.harvest"),
    (["install", "--peers", "saelens"], "peer 'saelens' is unknown"),
    (["other"], "invalid choice: 'other'"),
])
def test_the_command_line_says_what_is_wrong_in_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
