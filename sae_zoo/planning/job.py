"""One job of a sweep: what each of its phases takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from sae_zoo.data.cache import DTYPES
from sae_zoo.data.cache_writer import estimated_bytes
from sae_zoo.data.online import PASSES_AHEAD, SAMPLE_ROWS
from sae_zoo.lm.resume import MOST_BYTES
from sae_zoo.planning.lm import LMCost
from sae_zoo.planning.machine import Machine, Rates
from sae_zoo.planning.meter import Cost
from sae_zoo.planning.sae import SAECost

# What a process takes on a CUDA device before it computes: the context and the libraries' work areas.
_CUDA_BYTES = 1_000_000_000
# What a run's process takes beyond one that has loaded it all: Lightning's trainer, threads, compiled kernels.
_LATER_BYTES = 100_000_000
# On a CPU, what a pass of the language model leaves of the heap beyond what lives at its peak, the holes: 1.5 bytes for
# each of these, but no more than so many (measured from 0.5 to 4 GB, analysis/LOG.md).
_HOLES, _MOST_HOLES = 1.5, 600_000_000
# Share of latents that is taken to be dead where AuxK trains them (0.1 to 3 % at the end of runs, analysis/LOG.md).
DEAD_SHARE = 0.03
# A token while text is packed: the pieces, the stream and the rows, int32 each.
_BYTES_A_PACKED_TOKEN = 12
_ROWS_WAITING = 1 << 27  # bytes of rows that a cache's writer collects
_BATCHES_READ_AHEAD = 4  # one in use, two waiting, one being read
_FORWARD_PASSES = 2  # of the language model for each SAE: clean, spliced
_ATTRIBUTED_POSITIONS = 2  # gradients a row
_CALIBRATION_PASSES = 5  # over the validation rows, when L0 control ends: about four looks, which decode too
_START_PASSES = 3  # over the rows of a start: encode, find quantiles, decode, each about as long as to encode
# Of a training step, around it: Lightning's loop, counters, L0 control.
_STEP_SECONDS = 2e-3
# Before the first one and after the last: the trainer, kernels that are loaded, checkpoints (analysis/LOG.md).
_FIT_SECONDS = 1.0
_CHECKPOINTS = 3  # two are kept, and a new one is written beside them


@dataclass(frozen=True)
class Harvest:
    """A pass of the language model that makes activation caches.

    Attributes:
        widths: of the activations at each hook point.
        n_tokens: rows of each split of each cache.
        dtype, rows_per_shard: of the caches.
        context_size, batch_size: tokens a row that the model reads, rows a forward pass.
        cost: of a forward pass to the last hook point.
        weight_bytes: of the model.
    """

    widths: tuple[int, ...]
    n_tokens: Mapping[str, int]
    dtype: str
    rows_per_shard: int
    context_size: int
    batch_size: int
    cost: Cost
    weight_bytes: int

    @property
    def n_forward(self) -> float:
        """Forward passes; a row's first token, BOS, is no activation."""
        return sum(self.n_tokens.values()) / ((self.context_size - 1) * self.batch_size)

    def bytes_on_disk(self, *, at_peak: bool) -> int:
        """Bytes of all caches, finished, or with the one shard that is there twice while they are made."""
        shard = self.rows_per_shard if at_peak else 0
        return sum(estimated_bytes(self.n_tokens, d_in=d_in, dtype=self.dtype, rows_per_shard=shard)
                   for d_in in self.widths)

    @property
    def activation_bytes(self) -> int:
        """Bytes of the activations alone: tokens x width x bytes a number."""
        return sum(self.n_tokens.values()) * sum(self.widths) * DTYPES[self.dtype].itemsize

    def of_at_most(self, n_train: int) -> Harvest:
        """The same of no more than ``n_train`` tokens of train."""
        return replace(self, n_tokens={**self.n_tokens, "train": min(n_train, self.n_tokens["train"])})

    @property
    def shard_bytes(self) -> int:
        """Bytes of the activations in a shard of the widest cache."""
        return min(self.rows_per_shard, max(self.n_tokens.values())) * max(self.widths) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Online:
    """Training rows straight from the language model: tokens of the text that is read, rows in the shuffle buffer."""

    n_tokens: int
    buffer_rows: int


@dataclass(frozen=True)
class Phase:
    """Attributes: name, seconds, FLOPs; peak memory of the host and of each device (0 where the CPU is it), bytes."""

    name: str
    seconds: float
    flops: float
    host_bytes: float
    device_bytes: float


@dataclass(frozen=True)
class Job:
    """The work of a job, as its config says.

    Attributes:
        name: for people.
        harvest: None where the activations are a file's; of the held-out rows alone where train is on the fly.
        lm: of a batch of rows at the hook point; None where there is no language model.
        sae: of a step on one device.
        entries: latents above 0 on a token, on average over the run.
        dense: whether all steps are.
        starts_dense: whether the first ones are.
        calibrated: whether L0 control ends with a calibration.
        n_steps, validation_every, n_validation_rows: of training.
        n_rows, n_lm_tokens: of the evaluation.
        devices: that train together, each on its share of a batch.
        n_start_rows: that a data-dependent start looks at; 0 where there is none.
        online: None where training rows are read from a disk.
        place_measured: whether the job before it in the same process is evaluated at the same place.
    """

    name: str
    harvest: Harvest | None
    lm: LMCost | None
    sae: SAECost
    entries: float
    dense: bool
    starts_dense: bool
    calibrated: bool
    n_steps: int
    validation_every: int
    n_validation_rows: int
    n_rows: int
    n_lm_tokens: int
    devices: int
    n_start_rows: int = 0
    online: Online | None = None
    place_measured: bool = False

    def run_bytes(self) -> int:
        """Disk that the run's folder takes while it trains: checkpoints of parameters and optimiser, and the SAE."""
        return _CHECKPOINTS * (self.sae.parameter_bytes + self.sae.state_bytes) + self.sae.parameter_bytes

    def phases(self, machine: Machine, rates: Rates) -> list[Phase]:
        """Harvest (where there is one), training and evaluation; a harvest that another job has made is in it too."""
        made = [self._harvest(machine, rates)] if self.harvest is not None else []
        return [*made, self._training(machine, rates), self._evaluation(machine, rates)]

    def _memory(self, machine: Machine, *, host: float, device: float) -> tuple[float, float]:
        """Peaks from what a phase holds in either place; on a CPU it is one place, with a process for each device."""
        host += machine.process_bytes + _LATER_BYTES
        if machine.device_bytes is None:
            return self.devices * (host + device), 0.0
        return self.devices * host, device + _CUDA_BYTES

    def _harvest(self, machine: Machine, rates: Rates) -> Phase:
        """FLOPs: the forward passes'. Time: they at the rate of a real layer; every byte of a cache is written twice
        (as rows in the order of reading, then in shards), read once and hashed. Memory: the model, a forward pass, the
        packed tokens; for each cache the rows that wait, and at the end a shard.
        """
        work = self.harvest
        assert work is not None  # asked of jobs that harvest
        n_bytes = work.bytes_on_disk(at_peak=False)
        flops = work.n_forward * work.cost.flops
        waiting = sum(min(_ROWS_WAITING, n_bytes) for _ in work.widths)
        host = sum(work.n_tokens.values()) * _BYTES_A_PACKED_TOKEN + waiting + work.shard_bytes
        if machine.device_bytes is not None:
            host += work.weight_bytes  # it is loaded on the way to the device
        memory = self._memory(machine, host=host, device=work.weight_bytes + _on_heap(machine, work.cost.peak_bytes))
        return Phase("harvest", flops * rates.lm_flop + n_bytes * (2 * rates.write + rates.read + rates.digest), flops,
                     *memory)

    def step_seconds(self, rates: Rates) -> float:
        """A training step: B n encode + B entries entry + parameters parameter + AuxK's and a dense step's FLOPs at the
        encoder's rate, B of one device; or, if that is longer, the reading of the batch.
        """
        sae = self.sae
        flop = rates.encode / (2 * sae.d_in)
        if self.dense:
            computing = sae.dense.flops * flop
        else:
            entries = self.entries * rates.selected
            auxk = sae.sparse_flops(entries, DEAD_SHARE) - sae.sparse_flops(entries, 0.0)
            computing = sae.batch * (sae.d_sae * rates.encode + entries * rates.entry) + auxk * flop
        computing += sae.n_parameters * rates.parameter + _STEP_SECONDS
        return max(computing, sae.batch * self.devices * sae.d_in * 4 * rates.read)

    def _encoding(self, rates: Rates, rows: float) -> tuple[float, float]:
        """Seconds and FLOPs of encoding rows with a finished SAE."""
        return (rows * self.sae.d_sae * rates.encode, 2 * rows * self.sae.d_in * self.sae.d_sae)

    def _training(self, machine: Machine, rates: Rates) -> Phase:
        """The start, ``n_steps`` steps, and looks at the validation rows between them and at the end. Memory: two
        shards, the batches that are read ahead, and :meth:`SAECost.peak_bytes`; on the host, in one process, the
        language model, which waits for the evaluation. On the fly it is on every device instead; and for shards, the
        buffer, the packed tokens and what the language model has read ahead. Its passes are added to the steps: they
        run beside them, but on the same processors.
        """
        sae, looks = self.sae, self.n_steps // self.validation_every + _CALIBRATION_PASSES * self.calibrated
        encoded = looks * self.n_validation_rows + _START_PASSES * self.n_start_rows
        seconds, flops = self._encoding(rates, encoded)
        entries = self.entries * rates.selected
        a_step = sae.dense.flops if self.dense else sae.sparse_flops(entries, DEAD_SHARE)
        batches = _BATCHES_READ_AHEAD * sae.batch * sae.d_in * 4
        waiting: float = 2 * self.harvest.shard_bytes if self.harvest is not None else 0
        of_lm, pass_bytes = 0.0, 0.0
        if self.online is not None:
            assert self.harvest is not None  # of the held-out rows
            waiting, of_lm = self._on_the_fly()
            pass_bytes = _on_heap(machine, self.harvest.cost.peak_bytes)
        peak = sae.peak_bytes(sae.d_sae if self.dense else entries, dense=self.dense or self.starts_dense,
                              device=machine.device_type)
        lm_waits, lm_works = (self._lm_bytes(), 0) if self.online is None else (0, self._lm_bytes())
        host, device = self._memory(machine, host=batches + waiting, device=lm_works + peak + pass_bytes)
        memory = host + lm_waits, device
        seconds += _FIT_SECONDS + self.n_steps * self.step_seconds(rates) + of_lm / self.devices * rates.lm_flop
        return Phase("training", seconds, flops + self.n_steps * a_step * self.devices + of_lm, *memory)

    def _on_the_fly(self) -> tuple[float, float]:
        """Host bytes of each process, and the language model's FLOPs: for all rows of the run and a buffer that is only
        begun, and twice for the rows that the input's scale and the start are taken from.
        """
        work, text, sae = self.harvest, self.online, self.sae
        assert work is not None and text is not None  # asked of jobs on the fly
        buffer_rows = min(text.buffer_rows, text.n_tokens)
        rows = self.n_steps * sae.batch * self.devices + buffer_rows + 2 * min(SAMPLE_ROWS, text.n_tokens)
        of_a_pass = (work.context_size - 1) * work.batch_size
        n_bytes = (buffer_rows / self.devices + (PASSES_AHEAD + 1) * of_a_pass) * sae.d_in * DTYPES[work.dtype].itemsize
        return n_bytes + text.n_tokens * _BYTES_A_PACKED_TOKEN, rows / of_a_pass * work.cost.flops

    def _lm_bytes(self) -> int:
        return self.lm.weight_bytes if self.lm is not None else 0

    def _evaluation(self, machine: Machine, rates: Rates) -> Phase:
        """Encoding ``n_rows`` rows and the rows of the language model's tokens, two forward passes of it; and what it
        alone decides, unless a job before has measured that: one without the activation, and r_L0's with its gradients.
        Of rows that were read before, the layers below the hook point are kept. Memory: the model and the parameters,
        what is kept, and the passes' peak with gradients.
        """
        seconds, flops = self._encoding(rates, self.n_rows + (self.n_lm_tokens if self.lm is not None else 0))
        peak: float = 0
        kept: float = 0
        if self.lm is not None and self.harvest is not None:
            lm, batches = self.lm, max(1, self.n_lm_tokens // self.harvest.context_size) / self.harvest.batch_size
            kept = min(batches * lm.stream_bytes, MOST_BYTES)
            below = lm.below * (kept / (batches * lm.stream_bytes) if kept else 0.0)  # of a pass, on average
            gradient = lm.attribution.flops - lm.forward.flops
            of_lm = batches * (_FORWARD_PASSES * (lm.forward.flops - below) + (
                0 if self.place_measured else 2 * lm.forward.flops - below + _ATTRIBUTED_POSITIONS * gradient))
            seconds, flops = seconds + of_lm * rates.lm_flop, flops + of_lm
            peak = _on_heap(machine, lm.attribution.peak_bytes * min(1.0, batches))
        memory = self._memory(machine, host=0, device=self._lm_bytes() + self.sae.parameter_bytes + kept + peak)
        return Phase("evaluation", seconds, flops, *memory)


def _on_heap(machine: Machine, peak_bytes: float) -> float:
    """Memory that a pass takes whose tensors take ``peak_bytes``."""
    return peak_bytes + (min(_HOLES * peak_bytes, _MOST_HOLES) if machine.device_bytes is None else 0.0)
