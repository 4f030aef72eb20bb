"""Everything that is measured of a finished SAE, on held-out activations and in the language model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from sae_zoo.evaluation.attribution import gradients, uniformity
from sae_zoo.evaluation.latents import LatentCounts
from sae_zoo.evaluation.lm_loss import ablated_cross_entropy, lm_metrics
from sae_zoo.evaluation.reconstruction import Reconstruction, ReconstructionSums
from sae_zoo.functional.sparse_code import SparseCode
from sae_zoo.lm.hooks import HookPoint
from sae_zoo.lm.load import LoadedLM
from sae_zoo.lm.rows import data_points

_ROWS_AT_ONCE = 4096
# Of each row of tokens, positions whose attributions are looked at, and the seed that draws them: the same for all runs.
_ATTRIBUTED_POSITIONS, _ATTRIBUTION_SEED = 2, 0

T = TypeVar("T")
# What the language model alone decides, of the place that was scored last, by what it is: (place, value). The runs of a
# sweep share it; measuring it takes more than half of the forward passes of an evaluation.
_of_lm: dict[str, tuple[Any, Any]] = {}


class EncodesAndDecodes(Protocol):
    """An SAE, as far as scoring needs it: raw activations in, raw reconstruction out."""

    d_sae: int
    W_dec: Tensor

    def encode_sparse(self, x: Tensor) -> SparseCode: ...

    def decode(self, latents: SparseCode) -> Tensor: ...


def held_out_rows(activations: Any, split: str, n_rows: int, *, device: torch.device,
                  progress_bar: bool) -> Iterable[Tensor]:
    """The first ``n_rows`` of a split (all of it, if it has fewer), in pieces, on ``device``."""
    n_rows = min(n_rows, activations.n_rows(split))
    for start in tqdm(range(0, n_rows, _ROWS_AT_ONCE), desc="held-out rows", disable=not progress_bar, leave=False):
        yield activations.rows(split, start, min(n_rows, start + _ROWS_AT_ONCE)).to(device)


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
    """What ``measure`` gave when it was last asked for ``what`` at the same place."""
    place = (lm.fingerprint, lm.model.dtype, lm.model.device, hook, tuple(special_ids), batch_size, tokens.shape,
             hashlib.sha256(tokens.cpu().numpy().tobytes()).digest())
    if what not in _of_lm or _of_lm[what][0] != place:
        _of_lm[what] = place, measure()
    return _of_lm[what][1]


def score_in_lm(reconstruct: Callable[[Tensor], Tensor], lm: LoadedLM, hook: HookPoint, tokens: Tensor,
                special_ids: Iterable[int], *, n_tokens: int, batch_size: int, progress_bar: bool) -> dict[str, Any]:
    """LM metrics with reconstructions spliced in, over the first ``n_tokens`` (about: whole rows) of packed ``tokens``.

    Args:
        tokens: [n_rows, context] int.
        special_ids: token ids that are neither data points nor targets.
    """
    tokens = tokens[: max(1, n_tokens // tokens.shape[1])]
    where = (lm.model, hook, tokens, data_points(tokens, special_ids))
    how = {"batch_size": batch_size, "progress_bar": progress_bar}
    ce_ablated = _once("ce_ablated", lm, hook, tokens, special_ids, batch_size,
                       lambda: ablated_cross_entropy(*where, **how))
    result = asdict(lm_metrics(*where, reconstruct, ce_ablated=ce_ablated, **how))
    return {**result, "n_lm_targets": result.pop("n_targets")}


def score_attribution(sae: EncodesAndDecodes, lm: LoadedLM, hook: HookPoint, tokens: Tensor, special_ids: Iterable[int],
                      *, n_tokens: int, batch_size: int, progress_bar: bool) -> float:
    """``r_l0``: the mean of :func:`sae_zoo.evaluation.attribution.uniformity` over a few positions of each row of the
    first ``n_tokens`` of ``tokens``; arguments as for :func:`score_in_lm`.
    """
    tokens = tokens[: max(1, n_tokens // tokens.shape[1])]
    pairs = _once("gradients", lm, hook, tokens, special_ids, batch_size, lambda: list(gradients(
        lm.model, hook, tokens, data_points(tokens, special_ids), n_positions=_ATTRIBUTED_POSITIONS,
        batch_size=batch_size, seed=_ATTRIBUTION_SEED, progress_bar=progress_bar)))
    device = sae.W_dec.device
    found = [uniformity(sae.encode_sparse(x.to(device)), sae.W_dec, gradient.to(device)) for x, gradient in pairs]
    return float(torch.cat(found).nanmean())
