"""One pass over held-out activations that says of every latent how often it fires, how strongly, and where."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.latents.streaming import Histograms, Kept
from sae_zoo.data.activations import Activations, TextActivations
from sae_zoo.evaluation.latents import LatentCounts
from sae_zoo.evaluation.suite import HeldOutRows
from sae_zoo.functional.sparse_code import SparseCode
from sae_zoo.saes import SAE

SPLIT = "test"
# Entries kept of each latent: candidates for its top contexts (several are dropped where their text overlaps), and a
# sample of all of them, from which those of middle and low activation are taken.
_TOP, _SAMPLE = 32, 64
_STRATA_A_DECADE = 4


class Entries(NamedTuple):
    """What fired in a piece of the rows, [n] each: ``latents`` int64, ``values`` float32 above zero, in raw units, and
    ``places`` int64: ``sequence * context_size + position`` in a cache, the row in a user's file."""

    latents: Tensor
    values: Tensor
    places: Tensor


def fired(sae: SAE, activations: Activations, *, progress_bar: bool = False) -> Iterator[tuple[SparseCode, Entries]]:
    """All held-out rows, encoded piece by piece; everything on the CPU."""
    context_size = activations.tokens(SPLIT).shape[1] if isinstance(activations, TextActivations) else None
    rows = HeldOutRows(activations, SPLIT, activations.n_rows(SPLIT), device=sae.W_dec.device,
                       progress_bar=progress_bar)
    for places, x in rows.pieces():
        code = sae.encode_sparse(x)
        if context_size is not None:
            start, stop = int(places[0]), int(places[-1]) + 1
            origin = activations.origin(SPLIT, start, stop)
            places = (origin.sequences.long() * context_size + origin.positions)[places - start]
        values = code.values.float().cpu()
        on = values > 0
        yield code, Entries(code.active.latent_ids.cpu()[on].long(), values[on], places[code.active.rows.cpu()[on]])


@dataclass(frozen=True)
class Survey:
    """What a pass over the test rows found.

    Attributes:
        counts: how often each latent fires, its mean and its largest value.
        histograms: of the values of each latent.
        top: the strongest entries of each latent.
        sample: a uniform sample of the entries of each latent.
    """

    counts: LatentCounts
    histograms: Histograms
    top: Kept
    sample: Kept


def survey(sae: SAE, activations: Activations, *, seed: int = 0, progress_bar: bool = False) -> Survey:
    """Look at every latent of ``sae`` on all test rows.

    Memory beside a piece of rows is about 2 kB a latent, whatever the number of rows.

    Args:
        seed: of the sample.
    """
    generator = torch.Generator().manual_seed(seed)
    found = Survey(LatentCounts(sae.d_sae), Histograms(sae.d_sae), Kept(sae.d_sae, _TOP), Kept(sae.d_sae, _SAMPLE))
    for code, entries in fired(sae, activations, progress_bar=progress_bar):
        latents, values, places = entries
        found.counts.add(code)
        found.histograms.add(latents, values)
        found.top.add(latents, values, values, places)
        found.sample.add(latents, torch.rand(len(values), generator=generator), values, places)
    return found


def stratified(frequency: Tensor, n: int, *, seed: int = 0) -> list[int]:
    """``n`` of the latents that fire (all of them, if there are fewer), as evenly as possible from each quarter of a
    decade of ``frequency`` [d_sae]; which ones is drawn by ``seed``.

    Latents drawn regardless of their frequency would nearly all be rare ones.
    """
    alive = frequency.nonzero().squeeze(1)
    alive = alive[torch.randperm(len(alive), generator=torch.Generator().manual_seed(seed))]
    stratum = (frequency[alive].log10() * _STRATA_A_DECADE).floor()
    order = stratum.argsort(stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order)) - torch.searchsorted(stratum[order], stratum[order])
    return sorted(alive[rank.argsort(stable=True)[:n]].tolist())


def nearest(directions: Tensor, others: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of each of ``directions`` [n, d_in] the ``k`` of ``others`` [m, d_in] with the largest cosine.

    Returns:
        Cosines, largest first, and indices into ``others``; [n, min(k, m)] each.
    """
    others = F.normalize(others, dim=1)
    found = [(F.normalize(part, dim=1) @ others.T).topk(min(k, len(others)), dim=1) for part in directions.split(1024)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])
