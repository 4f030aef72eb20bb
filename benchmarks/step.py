"""``python -m benchmarks step``: milliseconds of a whole training step, beside the encoder GEMM alone.

A step is forward, backward, optimiser and decoder constraint, on one batch of synthetic activations, at the L0 that a
trained SAE has. In each round the GEMM, every variant and every peer take their turns, so that what slows the machine
slows all; medians over rounds are shown, and of ratios the median of each round's.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers import PEERS, PeerAbsent, Worker
from sae_zoo.config import compose_config
from sae_zoo.process import give_back_freed_memory, keep_freed_memory
from sae_zoo.running.settings import TrainSettings
from sae_zoo.saes import variants

_MB = 2**20
_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    shape_argument(parser)
    variants_argument(parser)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--beta1", type=float, default=0.0, help="of Adam; 0 is the paper's, recipe=short has 0.9")
    parser.add_argument("--no-peers", action="store_true", help="leave the peers out")


def shape_argument(parser: argparse.ArgumentParser) -> None:
    """``--shape``, for every benchmark on synthetic activations."""
    parser.add_argument("--shape", type=_shape, default=(384, 8192, 4096, 40), metavar="D_IN,D_SAE,BATCH,L0")


def variants_argument(parser: argparse.ArgumentParser) -> None:
    """``--variants``, for every benchmark of ours."""
    parser.add_argument("--variants", type=_variants, default=variants(), metavar="NAME,NAME,...",
                        help="all, if left out")


def _variants(text: str) -> list[str]:
    if unknown := set(names := text.split(",")) - set(variants()):
        raise argparse.ArgumentTypeError(f"{sorted(unknown)[0]!r} is no variant; choose from {', '.join(variants())}")
    return names


def _shape(text: str) -> tuple[int, int, int, int]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*){3}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; give four whole numbers, D_IN,D_SAE,BATCH,L0")
    d_in, d_sae, batch, l0 = map(int, text.split(","))
    if l0 > d_sae:
        raise argparse.ArgumentTypeError(f"L0 is {l0}; it must be at most D_SAE = {d_sae}")
    return d_in, d_sae, batch, l0


def synthetic(n: int, d_in: int) -> Tensor:
    """[n, d_in] sums of few of 4 * d_in directions, and noise."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(4 * d_in, d_in, generator=generator) / d_in**0.5
    rows = []
    for start in range(0, n, 256):
        size = min(256, n - start)
        on = torch.rand(size, 4 * d_in, generator=generator) < 16 / (4 * d_in)
        rows.append((on * torch.rand(size, 4 * d_in, generator=generator)) @ directions
                    + 0.05 * torch.randn(size, d_in, generator=generator))
    return torch.cat(rows)


class Trainee:
    """An SAE of a variant that starts at its L0 and stays there: rates so small that nothing moves."""

    def __init__(self, variant: str, d_sae: int, l0: int, x: Tensor, *, beta1: float):
        settings = TrainSettings.of(compose_config("train", [
            f"sae={variant}", f"d_sae={d_sae}", f"l0_target={l0}", f"recipe.beta1={beta1}",
            "recipe.threshold_start=quantile", "recipe.lr=1e-9", "recipe.decoder_lr=1e-9",
            "recipe.free_decoder_lr=1e-9", "recipe.threshold_lr=1e-9", "recipe.bias_lr=1e-9"]))
        self.x, self.sae = x, settings.sae(d_in=x.shape[1], input_scale=float(x.square().sum(1).mean().sqrt()))
        self.sae.to(x.device)
        self.sae.initialise(x)
        self.optimizer = self.sae.configure_optimizers()["optimizer"]

    def step(self, *, sparse: bool = True) -> float:
        """One training step; returns its L0."""
        return self.phases(lambda name: None, sparse=sparse)

    def phases(self, done: Callable[[str], None], *, sparse: bool = True) -> float:
        """One training step that calls ``done`` with the name of each phase when it ends."""
        loss = self.sae.loss(self.x, sparse=sparse)
        done("forward")
        loss.total.backward()
        done("backward")
        self.optimizer.step()
        self.optimizer.zero_grad()
        done("optimiser")
        l0, _ = self.sae._count(loss.counts)
        done("counters")
        return l0

    def encode(self) -> None:
        """The part of the forward pass up to the active set and its latents."""
        self.sae.encode_sparse(self.x)


def milliseconds(work: Callable[[], object], device: torch.device) -> float:
    """Of ``work`` on ``device``."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def gemm_timer(x: Tensor, d_sae: int) -> Callable[[], float]:
    """Milliseconds of the encoder GEMM alone, into a buffer that is there already."""
    W_enc, buffer = torch.randn(d_sae, x.shape[1], device=x.device).T, x.new_empty(len(x), d_sae)

    def gemm() -> float:
        return milliseconds(lambda: torch.mm(x, W_enc, out=buffer), x.device)

    gemm()
    return gemm


def _phase_milliseconds(trainee: Trainee) -> dict[str, float]:
    times, last = {}, time.perf_counter()

    def done(name: str) -> None:
        nonlocal last
        if trainee.x.is_cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        times[name], last = 1e3 * (now - last), now

    trainee.phases(done)
    return times


# Memory: of a process of its own, because what a process has once had shows in all later peaks.


def _status(key: str) -> int:
    return int(re.search(rf"{key}:\s+(\d+) kB", _STATUS.read_text()).group(1)) * 1024


def measure_memory(variant: str, d_in: int, d_sae: int, batch: int, l0: int, beta1: float, threads: int) -> None:
    """Print the bytes that :func:`peak_bytes` gives; for a process of its own."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    Trainee(variant, 64, 4, synthetic(256, 16), beta1=beta1).step()  # load and compile everything
    x = synthetic(batch, d_in)
    gemm_timer(x, d_sae)  # the work area that the BLAS library keeps for itself: the encoder GEMM alone has it too
    del x
    give_back_freed_memory()
    before = _status("VmRSS")
    x = synthetic(batch, d_in)
    trainee = Trainee(variant, d_sae, l0, x, beta1=beta1)
    give_back_freed_memory()  # as training does after the start of the SAE
    _CLEAR_REFS.write_text("5")  # the peak starts anew
    for _ in range(3):
        trainee.step()
    print(_status("VmHWM") - before)


def peak_bytes(variant: str, shape: tuple[int, int, int, int], *, beta1: float) -> int | None:
    """Resident memory of training steps above that of a process that has run the encoder GEMM; None where the system
    does not say.
    """
    if not _CLEAR_REFS.exists():
        return None
    arguments = (variant, *shape, beta1, torch.get_num_threads())
    done = subprocess.run([sys.executable, "-c", f"from benchmarks.step import *; measure_memory(*{arguments!r})"],
                          stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout)


def least_bytes(trainee: Trainee) -> int:
    """Parameters, their gradients, the optimiser's state and one batch."""
    parameters = list(trainee.sae.parameters())
    state = [value for p in parameters for value in trainee.optimizer.state[p].values() if torch.is_tensor(value)]
    return sum(t.numel() * t.element_size() for t in (*parameters, *parameters, *state, trainee.x))


def _peer_timers(shape: tuple[int, int, int, int], args: argparse.Namespace, rows: Path) -> tuple[dict, dict, list]:
    """Timers by (peer, variant), what is absent by peer, and the workers to close.

    A worker holds one trainer at a time, so it is set up anew for each of its variants, by the first call of a timer.
    """
    _, d_sae, batch, l0 = shape
    timers, absent, workers = {}, {}, []
    for name in PEERS:
        try:
            worker = Worker(name, args.peers_dir, threads=args.threads)
        except PeerAbsent as error:
            absent[name] = {"absent": str(error)}
            continue
        workers.append(worker)
        for variant in worker.variants:
            def start(worker: Worker = worker, variant: str = variant) -> None:
                worker.time_setup(variant, rows, d_sae=d_sae, batch=batch, l0=l0)

            timers[name, variant] = (start, lambda worker=worker: statistics.median(worker.time(1)))
    return timers, absent, workers


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The benchmark; prints its table and returns what ``--json`` shows."""
    d_in, d_sae, batch, l0 = args.shape
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x = synthetic(batch, d_in).to(device)
    gemm = gemm_timer(x, d_sae)
    gemms, results = [], {}
    trainees = {name: Trainee(name, d_sae, l0, x, beta1=args.beta1) for name in args.variants}
    times = {name: {"step": [], "dense": [], "encode": [], "phases": [], "ratio": [], "dense_ratio": []}
             for name in trainees}
    measured_l0 = {name: trainee.step() for name, trainee in trainees.items()}
    for _ in range(args.rounds):
        for name, trainee in trainees.items():
            base, t = gemm(), times[name]
            gemms.append(base)
            t["step"].append(milliseconds(trainee.step, device))
            t["ratio"].append(t["step"][-1] / base)
            t["encode"].append(milliseconds(trainee.encode, device))
            t["phases"].append(_phase_milliseconds(trainee))
            if len(t["dense"]) < max(1, args.rounds // 3):  # it is slow
                t["dense"].append(milliseconds(lambda trainee=trainee: trainee.step(sparse=False), device))
                t["dense_ratio"].append(t["dense"][-1] / base)
    median = statistics.median
    for name, t in times.items():
        least = least_bytes(trainees[name])
        results[name] = {
            "ms": median(t["step"]), "ratio": median(t["ratio"]), "l0": measured_l0[name],
            "density": float(trainees[name].sae.density), "dense_ms": median(t["dense"]),
            "dense_ratio": median(t["dense_ratio"]), "encode_ms": median(t["encode"]),
            "phases_ms": {key: median(p[key] for p in t["phases"]) for key in t["phases"][0]},
            "peak_mb": None, "peak_ratio": None, "least_mb": least / _MB}
        peak = peak_bytes(name, args.shape, beta1=args.beta1) if device.type == "cpu" else _cuda_peak(trainees[name])
        if peak is not None:
            results[name] |= {"peak_mb": peak / _MB, "peak_ratio": peak / least}
    del trainees
    peers = {} if args.no_peers else _peers(args, gemm)
    result = {"shape": list(args.shape), "threads": torch.get_num_threads(), "device": str(device),
              "torch": torch.__version__, "beta1": args.beta1, "rounds": args.rounds,
              "encoder_gemm_ms": median(gemms), "variants": results, "peers": peers}
    print(_table(result))
    return result


def _cuda_peak(trainee: Trainee) -> int:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    trainee.step()
    return torch.cuda.max_memory_allocated() - before


def _peers(args: argparse.Namespace, gemm: Callable[[], float]) -> dict[str, Any]:
    d_in, _, batch, _ = args.shape
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.npy"
        np.save(rows, synthetic(4 * batch, d_in).numpy())
        timers, peers, workers = _peer_timers(args.shape, args, rows)
        try:
            for (name, variant), (start, timer) in timers.items():
                start()
                pairs = [(gemm(), timer()) for _ in range(max(3, args.rounds // 3))]  # they are slow
                peers.setdefault(name, {})[variant] = {
                    "ms": statistics.median(ms for _, ms in pairs),
                    "ratio": statistics.median(ms / base for base, ms in pairs)}
            for worker in workers:
                peers[worker.name]["versions"] = worker.versions
        finally:
            for worker in workers:
                worker.close()
    return peers


def _table(result: dict[str, Any]) -> str:
    d_in, d_sae, batch, l0 = result["shape"]
    lines = [f"d_in {d_in}, d_sae {d_sae}, batch {batch}, L0 {l0}; {result['threads']} threads on {result['device']}, "
             f"torch {result['torch']}, beta1 {result['beta1']:g}; encoder GEMM alone "
             f"{result['encoder_gemm_ms']:.1f} ms", "",
             f"{'variant':10}{'step ms':>9}{'/ GEMM':>8}{'L0':>7}{'encode':>11}{'forward':>9}{'backward':>10}"
             f"{'optimiser':>11}{'dense / GEMM':>14}{'peak MB':>9}{'/ least':>9}"]
    for name, r in result["variants"].items():
        peak = ("-", "-") if r["peak_mb"] is None else (f"{r['peak_mb']:.0f}", f"{r['peak_ratio']:.2f}")
        p = r["phases_ms"]
        lines.append(f"{name:10}{r['ms']:9.1f}{r['ratio']:8.2f}{r['l0']:7.1f}{r['encode_ms']:11.1f}{p['forward']:9.1f}"
                     f"{p['backward']:10.1f}{p['optimiser']:11.1f}{r['dense_ratio']:14.2f}{peak[0]:>9}{peak[1]:>9}")
    for peer, r in result["peers"].items():
        if "absent" in r:
            lines.append(f"{peer}: absent, {r['absent']}")
            continue
        version = next(iter(r["versions"].values()))
        lines += [f"{peer} {version}, {variant}: {t['ms']:.0f} ms, {t['ratio']:.1f} times the GEMM"
                  for variant, t in r.items() if variant != "versions"]
    lines += ["", "encode: encoder GEMM and selection, a part of forward; least: parameters, gradients, optimiser "
                  "state and one batch"]
    return "\n".join(lines)
