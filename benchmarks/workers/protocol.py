"""What every worker does alike; runs inside a peer's environment, so it imports nothing of sae_zoo.

A worker is a process that holds one peer and answers requests: one JSON object a line on stdin, one a line on stdout.

* ``hello``: versions, and for each variant what sets its sparsity (``k`` and ``target``: an L0; ``coefficient``: that
  of the penalty, with the peer's default under ``start``).
* ``time_setup``, then any number of ``time``: milliseconds of full training steps.
* ``train``: a whole run; leaves ``weights.safetensors``, ``meta.json`` and ``check.npz`` in its folder.

Timing runs the same loop of the peer's as training does, in a thread, fed one batch at a time: a step is what happens
between two batches (forward, backward, optimiser, constraint, the loop's own accounts), reading the data excluded.
"""

from __future__ import annotations

import json
import os
import platform
import queue
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

# As far as schedules are concerned, a timed run never ends.
_STEPS_OF_TIMING = 100_000
_WARM_STEPS = 3


@dataclass(frozen=True)
class Run:
    """What is to be trained.

    Attributes:
        variant: ``topk``, ``jumprelu``, ``relu`` or ``gated``.
        rows: float32 [n, d_in] raw training activations, in the order in which they are consumed.
        d_sae, batch, steps, seed: as everywhere.
        sparsity: an L0 or a coefficient, as ``hello`` says of the variant; None for the peer's default.
        lr: peak learning rate; None for the peer's default.
        defaults: leave every other setting at the peer's default too.
        scratch: an empty folder.
    """

    variant: str
    rows: np.ndarray
    d_sae: int
    batch: int
    steps: int
    seed: int
    sparsity: float | None
    lr: float | None
    defaults: bool
    scratch: Path

    @property
    def d_in(self) -> int:
        return self.rows.shape[1]

    def batches(self) -> Iterator[Tensor]:
        """The batches [batch, d_in] of the run from its start, each a copy; again from the first row after the last."""
        n = len(self.rows) // self.batch
        for i in range(self.steps):
            start = i % n * self.batch
            yield torch.from_numpy(np.array(self.rows[start : start + self.batch], dtype=np.float32))


@dataclass(frozen=True)
class Trained:
    """What came out, acting on raw activations.

    Attributes:
        weights: float32 tensors. ``W_enc`` [d_in, d_sae], ``W_dec`` [d_sae, d_in], ``b_dec`` [d_in], ``b_enc`` [d_sae]
            (gated: ``b_gate``, ``b_mag``, ``r_mag`` instead), jumprelu: ``threshold`` [d_sae].
        apply_b_dec_to_input: whether the encoder reads x - b_dec.
        k: latents a token, of topk, picked among the pre-activations before a ReLU.
        settings: every effective setting.
        notes: what a reader of the table must know of how the peer was driven.
        encode, reconstruct: the peer's own inference on raw [n, d_in]: dense latents [n, d_sae] and x_hat.
    """

    weights: dict[str, Tensor]
    apply_b_dec_to_input: bool
    k: int | None
    settings: dict[str, Any]
    notes: list[str]
    encode: Callable[[Tensor], Tensor]
    reconstruct: Callable[[Tensor], Tensor]


# Trains on the batches of the iterator (not those of the run) by the peer's loop, and returns whatever export needs.
Fit = Callable[[Run, Iterator[Tensor]], Any]


def open_channel() -> TextIO:
    """The real stdout; from here on everything that is printed goes to stderr, also by C code."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return channel


def _run_of(request: dict[str, Any], *, steps: int, scratch: Path) -> Run:
    return Run(
        variant=request["variant"], rows=np.load(request["activations"], mmap_mode="r"), d_sae=request["d_sae"],
        batch=request["batch"], steps=steps, seed=request["seed"], sparsity=request["sparsity"], lr=request["lr"],
        defaults=request["defaults"], scratch=scratch,
    )


class _Stepper:
    """A training run that advances by as many steps as it is asked for."""

    def __init__(self, fit: Fit, run: Run, threads: int | None):
        self._asked: queue.Queue[int | None] = queue.Queue()
        self._answers: queue.Queue[list[float] | BaseException] = queue.Queue()
        self._run = run
        self._thread = threading.Thread(target=self._fit, args=(fit, threads), daemon=True)
        self._thread.start()
        self.step(_WARM_STEPS)

    def _fit(self, fit: Fit, threads: int | None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)  # holds for the thread that calls it
        try:
            fit(self._run, self._batches())
        except BaseException as error:  # handed to whoever waits for the step
            self._answers.put(error)

    def _batches(self) -> Iterator[Tensor]:
        batches = self._run.batches()
        while (n := self._asked.get()) is not None:
            seconds = []
            for _ in range(n):
                x = next(batches)
                start = time.perf_counter()
                yield x
                seconds.append(time.perf_counter() - start)
            self._answers.put(seconds)

    def step(self, n: int) -> list[float]:
        """Seconds of each of the next ``n`` steps."""
        self._asked.put(n)
        answer = self._answers.get()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def close(self) -> None:
        self._asked.put(None)
        self._thread.join()


def _train(fit: Fit, export: Callable[[Run, Any], Trained], request: dict[str, Any], scratch: Path) -> dict[str, Any]:
    run = _run_of(request, steps=request["steps"], scratch=scratch)
    start = time.perf_counter()
    handle = fit(run, run.batches())
    seconds = time.perf_counter() - start
    with torch.no_grad():
        trained = export(run, handle)
        x = torch.from_numpy(np.load(request["check"]))
        latents, x_hat = trained.encode(x), trained.reconstruct(x)
    out = Path(request["out"])
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: w.detach().float().contiguous().clone() for name, w in trained.weights.items()},
              out / "weights.safetensors")
    np.savez(out / "check.npz", x=x.numpy(), latents=latents.numpy(), x_hat=x_hat.numpy())
    meta = {"variant": run.variant, "d_in": run.d_in, "d_sae": run.d_sae, "k": trained.k,
            "apply_b_dec_to_input": trained.apply_b_dec_to_input, "settings": trained.settings,
            "notes": trained.notes, "seconds": seconds}
    (out / "meta.json").write_text(json.dumps(meta, indent=2, default=str))
    return {"seconds": seconds}


def serve(channel: TextIO, *, packages: list[str], variants: dict[str, dict[str, Any]], fit: Fit,
          export: Callable[[Run, Any], Trained]) -> None:
    """Answer requests until stdin ends.

    Args:
        packages: distributions whose versions ``hello`` tells, the peer first.
        variants: what sets the sparsity of each, see the module.
        fit: trains by the peer's own loop.
        export: from what ``fit`` returned to neutral weights.
    """
    stepper: _Stepper | None = None
    for line in sys.stdin:
        request = json.loads(line)
        threads = request.get("threads")
        if threads is not None:
            torch.set_num_threads(threads)
        try:
            with tempfile.TemporaryDirectory() as scratch:
                match request["command"]:
                    case "hello":
                        answer = {"versions": {name: version(name) for name in packages},
                                  "python": platform.python_version(), "variants": variants}
                    case "time_setup":
                        if stepper is not None:
                            stepper.close()
                        run = _run_of(request, steps=_STEPS_OF_TIMING, scratch=Path(scratch))
                        stepper = _Stepper(fit, run, threads)
                        answer = {}
                    case "time":
                        if stepper is None:
                            raise ValueError("time was asked for before time_setup")
                        steps = [1e3 * seconds for seconds in stepper.step(request["steps"])]
                        answer = {"ms": statistics.median(steps), "all_ms": steps}
                    case "train":
                        answer = _train(fit, export, request, Path(scratch))
                    case other:
                        raise ValueError(f"command {other!r} is unknown")
        except Exception as error:  # one failed run must not end the process
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        channel.write(json.dumps(answer) + "\n")
        channel.flush()
