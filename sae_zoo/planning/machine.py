"""Memory, disk and speed of this machine, its speed by a few seconds of real work at small size."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from sae_zoo.lm.hooks import lm_forward
from sae_zoo.lm.skeleton import one_layer
from sae_zoo.saes import SAE

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container; cgroup v2
_STATM = Path("/proc/self/statm")
_FILE_BYTES = 1 << 26
# FLOPs of a calibrating piece of work: a fraction of a second, but large enough for a device's full speed.
_FLOPS = {"cpu": 4e9, "cuda": 2e12}
_REPEATS = 3


@dataclass(frozen=True)
class Machine:
    """Memory and disk of a machine, in bytes.

    Attributes:
        host_bytes: memory, or what a container may have of it.
        device_bytes: memory of one device; None where the CPU is the device.
        free_disk_bytes: where the outputs go.
        process_bytes: memory of a process that has loaded the libraries that a run loads.
        device: for people.
    """

    host_bytes: int
    device_bytes: int | None
    free_disk_bytes: int
    process_bytes: int
    device: str

    @property
    def device_type(self) -> str:
        return "cpu" if self.device_bytes is None else "cuda"


@dataclass(frozen=True)
class Rates:
    """Seconds that one unit of work takes on this machine; see :func:`sae_rates`, :func:`lm_rate`, :func:`disk_rates`.

    Attributes:
        encode: a token and latent of the encoder GEMM with its selection, at this d_in.
        entry: an active entry: the decoder, the backward pass, what the variant adds.
        parameter: a parameter's step of the optimiser.
        selected: entries in the active set for each that fires (a window below a threshold makes more).
        lm_flop: a FLOP of the language model; 0 where there is none.
        write, read, digest: a byte written to disk, read from the page cache or disk, hashed.
    """

    encode: float
    entry: float
    parameter: float
    selected: float
    lm_flop: float
    write: float
    read: float
    digest: float


def existing_folder(path: Path) -> Path:
    """``path``, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def this_machine(output_dir: Path, device: torch.device) -> Machine:
    """The machine, with the disk of ``output_dir``; call it before the process grows by work of its own."""
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if _CGROUP_LIMIT.exists() and (limit := _CGROUP_LIMIT.read_text().strip()).isdigit():
        host = min(host, int(limit))
    if _STATM.exists():
        process = int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    else:  # the peak so far, in bytes on macOS and in KiB elsewhere
        process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    on_gpu = device.type == "cuda"
    return Machine(
        host_bytes=host, device_bytes=torch.cuda.get_device_properties(device).total_memory if on_gpu else None,
        free_disk_bytes=shutil.disk_usage(existing_folder(output_dir)).free, process_bytes=process,
        device=torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads")


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Median of a few runs of ``work``, after one that is not counted."""
    times = []
    for _ in range(_REPEATS + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def calibration_size(d_in: int, d_sae: int, batch: int, device: torch.device) -> tuple[int, int]:
    """``(d_sae, batch)`` of real steps that take a fraction of a second: as wide as the run's, and shorter."""
    budget = _FLOPS[device.type] / (2 * d_in)  # tokens x latents
    rows = max(1, min(batch, int(budget**0.5)))
    return max(1, min(d_sae, int(budget / rows))), rows


def sae_rates(sae: SAE, batch: int, device: torch.device, *, mixed: bool) -> dict[str, float]:
    """``encode``, ``entry``, ``parameter`` and ``selected`` of :class:`Rates`, from real steps of ``sae``.

    A step is taken apart by three clocks: the encoder with its selection (proportional to tokens x latents), forward
    and backward without it (to the entries of the active set), and the optimiser (to the parameters).

    Args:
        sae: small, of the run's variant and d_in; it is started at its L0, on random rows.
        mixed: products in bfloat16.
    """
    products = torch.autocast(device.type, torch.bfloat16, enabled=mixed)
    x = torch.randn(batch, sae.d_in, generator=torch.Generator().manual_seed(0))
    sae.initialise(x)
    sae, x = sae.to(device), x.to(device)
    optimizer = sae.configure_optimizers()["optimizer"]
    with products:
        counts = sae.loss(x, sparse=True).counts
    n_selected, n_fired = int(counts.n_selected), max(1, int(counts.n_fired))

    def forward_and_backward() -> None:
        optimizer.zero_grad()
        with products:
            loss = sae.loss(x, sparse=True).total
        loss.backward()

    with products:
        encode = seconds(lambda: sae.encode_sparse(x), device)
    both = seconds(forward_and_backward, device)
    return {"encode": encode / (batch * sae.d_sae), "entry": max(0.0, both - encode) / max(1, n_selected),
            "parameter": seconds(optimizer.step, device) / sum(p.numel() for p in sae.parameters()),
            "selected": n_selected / n_fired}


def lm_rate(model: PreTrainedModel, device: torch.device, *, batch_size: int, context_size: int) -> float:
    """Seconds a FLOP of ``model``, a skeleton: from a real forward pass of its first layer alone, its weights constant.

    Args:
        batch_size, context_size: of the run's rows; fewer and shorter ones are read where these would take long.
    """
    layer = one_layer(model).to_empty(device=device)
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.fill_(0.01)
    n_tokens = max(2, int(_FLOPS[device.type] / (2 * sum(p.numel() for p in layer.parameters()))))
    context = min(context_size, n_tokens)
    tokens = torch.zeros(max(1, min(batch_size, n_tokens // context)), context, dtype=torch.int32)

    @torch.no_grad()
    def forward() -> None:
        lm_forward(layer, tokens)

    with FlopCounterMode(display=False) as counter:
        forward()
    return seconds(forward, device) / counter.get_total_flops()


def disk_rates(folder: Path) -> dict[str, float]:
    """``write`` (flushed to disk), ``read`` (most likely from the page cache) and ``digest`` (SHA-256) of
    :class:`Rates`, from a file of 64 MB in ``folder`` that is removed again.
    """
    content = os.urandom(_FILE_BYTES)
    with tempfile.TemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter()
        file.seek(0)
        file.readinto(bytearray(_FILE_BYTES))
        read = time.perf_counter()
        hashlib.sha256(content).digest()
        times = (written - start, read - written, time.perf_counter() - read)
    return dict(zip(("write", "read", "digest"), (t / _FILE_BYTES for t in times), strict=True))
