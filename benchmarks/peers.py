"""The peers: public SAE trainers, each in a virtual environment and a process of its own, and their weights read back.

A peer's process is a worker (``workers/``); its protocol is described in ``workers/protocol.py``. Whatever a worker has
trained comes back as weights on raw activations together with what the peer itself makes of some rows, and is refused
unless our reading of the weights gives the same.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_zoo.records import write_json
from sae_zoo.saes import SAE
from sae_zoo.saes.io import CONFIG, WEIGHTS, load_sae

_HERE = Path(__file__).resolve().parent
# Of one row, between what the peer gives and what the weights give here.
_TOLERANCE = 1e-3
# Rounding may break a tie between two latents of a row either way; in more than one of the rows it does not.
_ROWS_EXCUSED = 1


@dataclass(frozen=True)
class Peer:
    """A public trainer.

    Attributes:
        worker: file in ``workers/``.
        unwanted: what its requirements pull in and nothing here uses, and which must go.
    """

    worker: str
    unwanted: tuple[str, ...] = ()


PEERS = {
    "sae-lens": Peer("sae_lens_worker.py"),
    # nnsight asks for torchvision; the usual build of it, next to a torch for CPUs, breaks the import of transformers.
    "dictionary-learning": Peer("dictionary_learning_worker.py", unwanted=("torchvision",)),
    "eai-sparsify": Peer("sparsify_worker.py"),
}


class PeerAbsent(ValueError):
    """A peer is not installed, or does not start."""


class PeerFailed(RuntimeError):
    """A peer did not do what it was asked for."""


def known_peers(names: Iterable[str]) -> list[str]:
    """``names``, checked.

    Raises:
        ValueError: if one is no peer.
    """
    names = list(names)
    for name in names:
        if name not in PEERS:
            raise ValueError(f"peer {name!r} is unknown; choose from {', '.join(PEERS)}")
    return names


def install(names: Iterable[str], peers_dir: Path) -> None:
    """Make a virtual environment ``peers_dir/<name>`` for each peer, with the versions of ``requirements/<name>.txt``.

    Raises:
        ValueError: if a name is unknown.
        subprocess.CalledProcessError: if pip fails; it has said why.
    """
    for name in known_peers(names):
        folder = peers_dir / name
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [folder / "bin" / "python", "-m", "pip"]
        subprocess.run([*pip, "install", "-r", _HERE / "requirements" / f"{name}.txt"], check=True)
        if PEERS[name].unwanted:
            subprocess.run([*pip, "uninstall", "-y", *PEERS[name].unwanted], check=True)


class Worker:
    """A running worker; use it in a ``with`` block.

    Args:
        name: of the peer.
        peers_dir: where :func:`install` made its environment.
        threads: of torch; None leaves torch's own choice.

    Attributes:
        versions: of the peer (first), torch and numpy in its environment.
        variants: what it can train: ``{variant: {"control": "k" | "target" | "coefficient", ...}}``.
        log: the file that has everything which the peer prints.

    Raises:
        ValueError: if the name is unknown.
        PeerAbsent: if it is not installed, or its worker does not start.
    """

    def __init__(self, name: str, peers_dir: Path, *, threads: int | None):
        known_peers([name])
        python = Path(peers_dir) / name / "bin" / "python"
        if not python.exists():
            raise PeerAbsent(f"not installed in {python.parent.parent}; run python -m benchmarks install "
                             f"--peers {name}")
        self.name, self._threads = name, threads
        self.log = Path(peers_dir) / f"{name}.log"
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        with open(self.log, "w") as log:
            self._process = subprocess.Popen([python, _HERE / "workers" / PEERS[name].worker], env=environment,
                                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            hello = self._ask("hello")
        except PeerFailed as error:
            self.close()
            raise PeerAbsent(f"it does not start: {error}") from None
        self.versions: dict[str, str] = hello["versions"]
        self.variants: dict[str, dict[str, Any]] = hello["variants"]

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def time_setup(self, variant: str, activations: Path, *, d_sae: int, batch: int, l0: int, seed: int = 0) -> None:
        """Build a trainer and warm it up, on the rows of a ``.npy`` file, float32 [n, d_in].

        Variants that take an L0 take ``l0``; those with a coefficient are timed at the peer's default one, wherever its
        L0 is: the steps of these trainers are dense, and cost the same at every L0.
        """
        sparsity = None if self.variants[variant]["control"] == "coefficient" else l0
        self._ask("time_setup", variant=variant, activations=str(activations), d_sae=d_sae, batch=batch,
                  sparsity=sparsity, seed=seed, lr=None, defaults=False)

    def time(self, steps: int) -> list[float]:
        """Milliseconds of each of the next training steps."""
        return self._ask("time", steps=steps)["all_ms"]

    def train(self, variant: str, activations: Path, check: Path, out: Path, *, d_sae: int, batch: int, steps: int,
              seed: int, lr: float | None, sparsity: float | None, defaults: bool) -> tuple[SAE, dict[str, Any]]:
        """Train on the rows of ``activations`` in their order; see ``workers/protocol.py``.

        Args:
            check: ``.npy`` of some held-out rows, on which the peer's output is compared with ours.
            out: folder for the weights.

        Returns:
            The SAE, and what the worker says of the run: ``seconds``, ``settings``, ``notes``.

        Raises:
            PeerFailed: if it breaks off.
            ValueError: if the weights are not what the peer uses.
        """
        self._ask("train", variant=variant, activations=str(activations), check=str(check), out=str(out), d_sae=d_sae,
                  batch=batch, steps=steps, seed=seed, lr=lr, sparsity=sparsity, defaults=defaults)
        return read_export(out), json.loads((out / "meta.json").read_text())

    def _ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        request = {"command": command, "threads": self._threads, **arguments}
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; the empty answer says so
        line = self._process.stdout.readline()
        if not line:
            raise PeerFailed(f"the worker of {self.name} has ended; see {self.log}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerFailed(f"{self.name}: {answer['error']}; see {self.log}")
        return answer


def read_export(folder: Path) -> SAE:
    """The SAE of a worker's ``weights.safetensors``, ``meta.json`` and ``check.npz``.

    Raises:
        ValueError: if it does not give the peer's own latents and reconstructions.
    """
    meta, weights = json.loads((folder / "meta.json").read_text()), load_file(folder / "weights.safetensors")
    if meta["apply_b_dec_to_input"]:
        shift = weights["b_dec"].double() @ weights["W_enc"].double()
        if meta["variant"] == "gated":
            weights["b_gate"] = (weights["b_gate"].double() - shift).float()
            weights["b_mag"] = (weights["b_mag"].double() - shift * weights["r_mag"].double().exp()).float()
        else:
            weights["b_enc"] = (weights["b_enc"].double() - shift).float()
    options = {"topk": {"k": meta["k"]}, "jumprelu": {"threshold_as": "raw"}}.get(meta["variant"], {})
    save_file(weights, folder / WEIGHTS)
    write_json(folder / CONFIG, {"variant": meta["variant"], "d_in": meta["d_in"], "d_sae": meta["d_sae"],
                                 "options": options})
    sae = load_sae(folder)
    check = {name: torch.from_numpy(values) for name, values in np.load(folder / "check.npz").items()}
    with torch.no_grad():
        _compare("latents", sae.encode(check["x"]), check["latents"], folder)
        _compare("x_hat", sae.reconstruct(check["x"]), check["x_hat"], folder)
    return sae


def _compare(what: str, ours: Tensor, theirs: Tensor, folder: Path) -> None:
    errors = torch.linalg.vector_norm(ours - theirs, dim=1) / torch.linalg.vector_norm(theirs, dim=1).clamp_min(1e-12)
    n_off = int((~(errors <= _TOLERANCE)).sum())
    if n_off > _ROWS_EXCUSED:
        raise ValueError(f"{folder}: {what} of the exported weights differ from the peer's own in {n_off} of "
                         f"{len(errors)} rows, by up to {float(errors.max()):.2g} of their norm; at most "
                         f"{_TOLERANCE:g} is allowed, so the export is wrong and nothing is scored")
