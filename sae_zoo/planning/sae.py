"""Costs of training an SAE: FLOPs of a step, and memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sae_zoo.functional.encoder import chunk_rows
from sae_zoo.functional.selection import Above, Selection
from sae_zoo.planning.meter import Cost, Meter
from sae_zoo.saes import SAE

# Measured on a CPU (resident peaks of training steps; tests/planning holds them against a real process): bytes that an
# entry of the active set takes with its gradients and its place in the order by latent; ...
_BYTES_AN_ENTRY = 80
# ... bytes, and chunks of pre-activations, that the heap holds beyond what lives in a dense step, as it breaks into
# pieces (fitted to six shapes and all variants, 95 to 321 MB, each met to a factor of 1.3); ...
_HEAP_BYTES, _CHUNKS_IN_HEAP = 64 << 20, 3
# ... (on a CUDA device, whose chunks are larger: chunks that live at the peak of a dense step; not measured there) ...
_CHUNKS_ALIVE = 5
# ... weight matrices that AuxK's gradients take: each is made at full width from that of the dead latents alone.
_AUXK_MATRICES = 5
# Rows with which the products of a step are counted: few enough for one chunk, so that nothing is computed twice.
_ROWS = 64


@dataclass(frozen=True)
class SAECost:
    """Costs of training an SAE on batches of ``batch`` rows on one device.

    Attributes:
        n_parameters: trained numbers.
        parameter_bytes, state_bytes: of the parameters and buffers, and of the optimiser's state.
        whole_products: matrix products of batch x d_in x d_sae that every step runs whole: the encoder's and, where the
            selection is one of the whole batch, its look at all pre-activations.
        products: those of a dense step: the whole ones and, of the decoders and the gradients, those that a sparse step
            runs on the active set.
        dense: a whole dense step on a CPU without the optimiser, parameters and batch included; it computes a chunk's
            forward pass twice.
    """

    batch: int
    d_in: int
    d_sae: int
    auxk: bool
    n_parameters: int
    parameter_bytes: int
    state_bytes: int
    whole_products: int
    products: int
    dense: Cost

    @property
    def kept_bytes(self) -> int:
        """Memory between two steps, while others take turns: parameters, their gradients, the optimiser's state."""
        return 2 * self.parameter_bytes + self.state_bytes

    def sparse_flops(self, entries: float, dead_share: float) -> float:
        """FLOPs of a step on the active set: 2 B d n for each whole product, 2 d for each other product and entry; for
        AuxK, with m dead latents, 14 B d m: two products forward, done twice, and three backward. Without products of a
        matrix and a vector, as torch counts.

        Args:
            entries: active ones a token.
            dead_share: of the latents.
        """
        size = 2 * self.batch * self.d_in
        auxk = 7 * size * dead_share * self.d_sae if self.auxk else 0.0
        on_entries = self.products - self.whole_products
        return size * (self.whole_products * self.d_sae + on_entries * entries) + auxk

    def sparse_bytes(self, entries: float) -> int:
        """Memory of steps on the active set: parameters, as much again for their gradients, the optimiser's state, the
        batch, what the decoder has to make and its error (each as large as the batch), and the entries.

        Args:
            entries: active ones a token.
        """
        batch = self.batch * self.d_in * 4
        return round(self.kept_bytes + 3 * batch + _BYTES_AN_ENTRY * entries * self.batch)

    def peak_bytes(self, entries: float, *, dense: bool, device: str) -> int:
        """Memory of training: of a sparse step, with AuxK's gradients where it is on, or if that is larger of a dense
        one: what lives at its peak, the optimiser's state, and on a CPU the holes of the heap.

        Args:
            entries: active ones a token.
            dense: whether the run has dense steps.
            device: ``cpu`` or ``cuda``; need not be there.
        """
        auxk = _AUXK_MATRICES * self.d_in * self.d_sae * 4 if self.auxk else 0
        sparse = self.sparse_bytes(entries) + auxk
        if not dense:
            return sparse
        chunk = self._chunk_bytes("cpu")
        if device == "cpu":
            more = _HEAP_BYTES + _CHUNKS_IN_HEAP * chunk
        else:
            more = _CHUNKS_ALIVE * (self._chunk_bytes(device) - chunk)
        return max(sparse, self.dense.peak_bytes + more + self.state_bytes)

    def _chunk_bytes(self, device: str) -> int:
        """Pre-activations that exist at once."""
        with FakeTensorMode():
            return chunk_rows(torch.empty(self.batch, self.d_in, device=device), self.d_sae) * self.d_sae * 4


def sae_cost(build: Callable[[], SAE], batch: int) -> SAECost:
    """The cost of the SAE that ``build`` makes, without its memory: the real one, on the meta device or of fakes.

    Args:
        batch: rows a step, on one device.
    """
    with torch.device("meta"):
        sae = build()
    optimizer = sae.configure_optimizers()["optimizer"]
    for parameter in sae.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = [x for entry in optimizer.state.values() for x in entry.values() if isinstance(x, torch.Tensor)]
    few = _dense_step(build, min(batch, _ROWS))
    size = 2 * min(batch, _ROWS) * sae.d_in * sae.d_sae
    return SAECost(
        batch=batch, d_in=sae.d_in, d_sae=sae.d_sae, auxk=sae.auxk_coefficient > 0,
        n_parameters=sum(p.numel() for p in sae.parameters()),
        parameter_bytes=_n_bytes([*sae.parameters(), *sae.buffers()]), state_bytes=_n_bytes(state),
        whole_products=1 if _is_of_rows(sae) else 2, products=math.floor(few.flops / size),
        dense=_dense_step(build, batch))


def _n_bytes(tensors: list[torch.Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _is_of_rows(sae: SAE) -> bool:
    """Whether the selection looks at each row by itself, not at the values of a whole batch."""
    return isinstance(sae.selection(training=True), Selection)


class _OneLook:
    """A stand-in for a selection of the whole batch, whose choice would depend on values: its one look, and any rule.
    """

    def of_batch(self, products: Callable[[], Iterable[torch.Tensor]], bias: torch.Tensor, n_rows: int) -> Selection:
        for _ in products():
            pass
        return Above(0.0)


def _dense_step(build: Callable[[], SAE], batch: int) -> Cost:
    """Forward and backward of a dense step on a CPU."""
    with Meter() as meter:
        sae = build()
        sae.auxk_coefficient = 0.0  # when a run begins no latent is dead
        if not _is_of_rows(sae):
            one_look: Any = _OneLook()  # which has all that a step asks of it
            sae.selection = lambda *, training: one_look  # type: ignore[method-assign]  # of this one alone
        sae.loss(torch.empty(batch, sae.d_in), sparse=False).total.backward()
        return meter.so_far()
