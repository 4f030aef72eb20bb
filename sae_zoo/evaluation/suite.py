"""Everything that is measured of a finished SAE, on held-out activations and in the language model."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from sae_zoo.evaluation.attribution import gradients, uniformity
from sae_zoo.evaluation.latents import LatentCounts
from sae_zoo.evaluation.lm_loss import ablated_cross_entropy, lm_metrics
from sae_zoo.evaluation.reconstruction import Reconstruction, ReconstructionSums
from sae_zoo.functional.norms import is_within
from sae_zoo.functional.sparse_code import SparseCode
from sae_zoo.lm.hooks import HookPoint
from sae_zoo.lm.load import LoadedLM
from sae_zoo.lm.resume import FromLayer, Streams
from sae_zoo.lm.rows import data_points

_ROWS_AT_ONCE = 4096
# Of each row of tokens, positions whose attributions are looked at, and the seed that draws them: the same for all
# runs.
_ATTRIBUTED_POSITIONS, _ATTRIBUTION_SEED = 2, 0

T = TypeVar("T")
# What the language model alone decides, of the place that was scored last, by what it is: (place, value). The runs of a
# sweep share it; measuring it takes more than half of the forward passes of an evaluation.
_of_lm: dict[str, tuple[Any, Any]] = {}


class EncodesAndDecodes(Protocol):
    """An SAE, as far as scoring needs it: raw activations in, raw reconstruction out."""

    d_sae: int

    @property
    def W_dec(self) -> Tensor: ...

    def encode_sparse(self, x: Tensor) -> SparseCode: ...

    def decode(self, latents: SparseCode) -> Tensor: ...


class HeldOutRows:
    """The first ``n_rows`` of a split (all of it, if it has fewer), in pieces, on ``device``, less those of at least
    ``activations.norm_bound``: no SAE is trained on such rows, so none is scored on them.

    Raises:
        ValueError: on iteration, if no row is left.
    """

    def __init__(self, activations: Any, split: str, n_rows: int, *, device: torch.device, progress_bar: bool):
        self.activations, self.split, self.device, self._progress_bar = activations, split, device, progress_bar
        self.n_rows = min(n_rows, activations.n_rows(split))
        self._all, self._kept = ReconstructionSums(), ReconstructionSums()

    def __iter__(self) -> Iterator[Tensor]:
        for _, rows in self.pieces():
            yield rows

    def pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Numbers of rows in the split [n], on the CPU, and these rows [n, d_in]; n is not 0."""
        self._all, self._kept = ReconstructionSums(), ReconstructionSums()
        bound = self.activations.norm_bound
        for start in tqdm(range(0, self.n_rows, _ROWS_AT_ONCE), desc="held-out rows", disable=not self._progress_bar,
                          leave=False):
            rows = self.activations.rows(self.split, start, min(self.n_rows, start + _ROWS_AT_ONCE))
            inside = is_within(rows, bound)
            if not math.isinf(bound):
                self._all.add(rows, torch.zeros_like(rows))
                self._kept.add(rows[inside], torch.zeros_like(rows[inside]))
            if bool(inside.any()):
                yield start + inside.nonzero().squeeze(1), rows[inside].to(self.device)
        if not math.isinf(bound) and not self._kept.n_rows:
            raise ValueError(f"all {self.n_rows} rows of {self.split} have a norm of {bound:.4g} or more; raise "
                             "data.max_norm, or leave it null")

    def left_out(self) -> dict[str, float]:
        """Share of the rows of the last iteration that was left out, and the share of their variance that goes with it.
        """
        if not self._all.n_rows:
            return {"left_out_of_test": 0.0, "left_out_variance": 0.0}
        whole, kept = self._all.variance, self._kept.variance
        return {"left_out_of_test": 1 - self._kept.n_rows / self._all.n_rows,
                "left_out_variance": max(0.0, 1 - kept / whole) if whole else 0.0}


def within(reconstruct: Callable[[Tensor], Tensor], bound: float) -> Callable[[Tensor], Tensor]:
    """``reconstruct`` on rows whose norm is below ``bound``, the identity on others: what was left out of training
    stays as the language model has it.
    """

    def apply(x: Tensor) -> Tensor:
        inside = is_within(x, bound)
        if bool(inside.all()):
            return reconstruct(x)
        x_hat = x.clone()
        if bool(inside.any()):
            x_hat[inside] = reconstruct(x[inside]).to(x)
        return x_hat

    return apply


def score_sae(sae: EncodesAndDecodes, rows: Iterable[Tensor]) -> tuple[dict[str, Any], LatentCounts]:
    """L0, use of latents and reconstruction over ``rows`` (pieces of [n, d_in])."""
    sums, counts = ReconstructionSums(), LatentCounts(sae.d_sae)
    for x in rows:
        code = sae.encode_sparse(x)
        counts.add(code)
        sums.add(x, sae.decode(code))
    result = asdict(sums.result())
    return {**counts.summary(), **result, "n_eval_tokens": result.pop("n_rows")}, counts


def score_reconstruction(reconstruct: Callable[[Tensor], Tensor], rows: Iterable[Tensor]) -> Reconstruction:
    """Reconstruction metrics of any function of activations."""
    sums = ReconstructionSums()
    for x in rows:
        sums.add(x, reconstruct(x))
    return sums.result()


def _once(what: str, lm: LoadedLM, hook: HookPoint, tokens: Tensor, special_ids: Iterable[int], batch_size: int,
          measure: Callable[[], T]) -> T:
    """The result of ``measure``, kept from when it was last asked for ``what`` at the same place."""
    place = (lm.fingerprint, lm.model.dtype, lm.model.device, hook, tuple(special_ids), batch_size, tokens.shape,
             hashlib.sha256(tokens.cpu().numpy().tobytes()).digest())
    if what not in _of_lm or _of_lm[what][0] != place:
        _of_lm[what] = place, measure()
    return _of_lm[what][1]


def _passes(lm: LoadedLM, hook: HookPoint, tokens: Tensor, special_ids: Iterable[int], batch_size: int) -> FromLayer:
    """Forward passes of ``lm``; what its layers below ``hook`` make of ``tokens`` is shared by all runs at a place."""
    return FromLayer(lm.model, hook, _once("streams", lm, hook, tokens, special_ids, batch_size, Streams))


def score_in_lm(reconstruct: Callable[[Tensor], Tensor], lm: LoadedLM, hook: HookPoint, tokens: Tensor,
                special_ids: Iterable[int], *, n_tokens: int, batch_size: int, progress_bar: bool) -> dict[str, Any]:
    """LM metrics with reconstructions spliced in, over the first ``n_tokens`` (about: whole rows) of packed ``tokens``.

    Args:
        tokens: [n_rows, context] int.
        special_ids: token ids that are neither data points nor targets.
    """
    tokens = tokens[: max(1, n_tokens // tokens.shape[1])]
    where = (_passes(lm, hook, tokens, special_ids, batch_size), hook, tokens, data_points(tokens, special_ids))
    how: dict[str, Any] = {"batch_size": batch_size, "progress_bar": progress_bar}
    ce_ablated = _once("ce_ablated", lm, hook, tokens, special_ids, batch_size,
                       lambda: ablated_cross_entropy(*where, **how))
    result = asdict(lm_metrics(*where, reconstruct, ce_ablated=ce_ablated, **how))
    return {**result, "n_lm_targets": result.pop("n_targets")}


def score_attribution(sae: EncodesAndDecodes, lm: LoadedLM, hook: HookPoint, tokens: Tensor, special_ids: Iterable[int],
                      *, norm_bound: float, n_tokens: int, batch_size: int, progress_bar: bool) -> float:
    """``r_l0``: the mean of :func:`sae_zoo.evaluation.attribution.uniformity` over a few positions of each row of the
    first ``n_tokens`` of ``tokens``, of activations of a norm below ``norm_bound``; other arguments as for
    :func:`score_in_lm`.
    """
    tokens = tokens[: max(1, n_tokens // tokens.shape[1])]
    pairs = _once("gradients", lm, hook, tokens, special_ids, batch_size, lambda: list(gradients(
        _passes(lm, hook, tokens, special_ids, batch_size), hook, tokens, data_points(tokens, special_ids),
        n_positions=_ATTRIBUTED_POSITIONS, batch_size=batch_size, seed=_ATTRIBUTION_SEED, progress_bar=progress_bar)))
    device = sae.W_dec.device
    inside = [(x[kept], gradient[kept]) for x, gradient in pairs if (kept := is_within(x, norm_bound)).any()]
    found = [uniformity(sae.encode_sparse(x.to(device)), sae.W_dec, gradient.to(device)) for x, gradient in inside]
    return float(torch.cat(found).nanmean()) if found else math.nan
