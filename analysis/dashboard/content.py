"""What the page shows of each run, as plain values: compact, since a browser has to carry all of it.

Bounds: a latent that is shown in detail takes about 1 kB of the file, nearly all of it the text of its contexts, and
one that is only listed about 30 bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from analysis.dashboard.frontier import frontier
from analysis.latents import (
    KINDS,
    Context,
    Run,
    Survey,
    UnknownEffects,
    contexts,
    logit_effects,
    nearest,
    stratified,
    survey,
    token_texts,
)
from analysis.latents.logits import Effects
from sae_zoo.frontier.pareto import label_of
from sae_zoo.frontier.runs import run_name

# Tokens that a latent promotes or suppresses: in the list, and in its details. Nearest latents of each other run.
_LISTED_TOKENS, _TOKENS, _NEAREST = 4, 10, 3
_METRICS = ("l0", "l0_target", "fvu", "delta_lm_loss", "loss_recovered", "dead_fraction", "seed")


class TokenTable:
    """Token ids as they are used, numbered from 0, so that each text is stored once."""

    def __init__(self) -> None:
        self._index: dict[int, int] = {}

    def __call__(self, ids: Iterable[int]) -> list[int]:
        return [self._index.setdefault(i, len(self._index)) for i in ids]

    @property
    def ids(self) -> list[int]:
        """The token ids, in the order of their numbers."""
        return list(self._index)


def _short(values: Iterable[float], digits: int = 3) -> list[float]:
    """Numbers with as many digits as anybody reads."""
    return [float(f"{value:.{digits}g}") for value in values]


def _context(context: Context, table: TokenTable) -> list[Any]:
    """[kind, which token it is about, tokens, which of them fire, how strongly]."""
    on = [i for i, value in enumerate(context.values) if value > 0]
    return [list(KINDS).index(context.kind), context.at, table(context.token_ids), on,
            _short(context.values[i] for i in on)]


def _details(found: Survey, latent: int, effects: Effects | None, shown: list[Context],
             table: TokenTable) -> dict[str, Any]:
    width, counts = found.histograms.of(latent)
    of_tokens = None
    if effects is not None:
        of_tokens = [[table(ids[latent].tolist()), _short(values[latent].tolist(), 2)] for ids, values in (
            (effects.promoted_ids, effects.promoted), (effects.suppressed_ids, effects.suppressed))]
    return {"bin": width, "counts": counts, "effects": of_tokens, "contexts": [_context(c, table) for c in shown]}


def _choose(frequency: Tensor, n: int, wanted: Sequence[int]) -> list[int]:
    """``n`` latents that fire: those of ``wanted`` (best first), then others of all frequencies."""
    first = [latent for latent in dict.fromkeys(wanted) if frequency[latent] > 0][:n]
    others = frequency.clone()
    others[first] = 0
    return sorted([*first, *stratified(others, n - len(first))])


def _run(run: Run, n_latents: int, wanted: Sequence[int], table: TokenTable, *,
         progress_bar: bool) -> tuple[dict[str, Any], list[int]]:
    """A run's part of the content, and which of its latents are shown in detail."""
    sae, source, notes = run.sae, run.source, []
    found = survey(sae, source.activations, progress_bar=progress_bar)
    frequency, fired = found.counts.frequency, found.counts.fired
    chosen = _choose(frequency, n_latents, wanted)
    effects = None
    shown: dict[int, list[Context]] = {}
    if source.lm is None:
        notes.append("These activations came from a file, without their text: there are no contexts and no tokens.")
    else:
        shown = contexts(sae, source.activations, found, chosen, progress_bar=progress_bar)
        try:
            effects = logit_effects(source.lm.model, source.hook, sae.W_dec, _TOKENS)
        except UnknownEffects as why:
            notes.append(str(why))
    alive = int((fired > 0).sum())
    if len(chosen) < alive:
        notes.append(f"{len(chosen):,} of the {alive:,} latents that fire are shown in detail, the others listed "
                     "(--latents N for more). They are drawn as evenly as possible from each range of frequencies"
                     + (", after those that are nearest to the first run's." if wanted else "."))
    content = {
        "name": run_name(run.record), "label": label_of(run.record), "notes": notes, "d_sae": sae.d_sae,
        "n_tokens": found.counts.n_tokens, "metrics": {key: run.record.get(key) for key in _METRICS},
        "frequency": _short(frequency.tolist()), "max": _short(found.counts.value_max.tolist()),
        "mean": _short((found.counts.value_sum / fired.clamp_min(1)).tolist()),
        "promoted": None if effects is None else [table(ids[:_LISTED_TOKENS]) for ids in effects.promoted_ids.tolist()],
        "details": {latent: _details(found, latent, effects, shown.get(latent, []), table) for latent in chosen},
    }
    return content, chosen


def gather(runs: Sequence[Run], *, n_latents: int, progress_bar: bool = False) -> dict[str, Any]:
    """Everything that the page shows of ``runs``, which are of the same activations.

    Two passes over the test rows for each run; memory does not grow with their number.

    Args:
        n_latents: how many latents of all runs together are shown in detail.

    Raises:
        ValueError: if that is less than one for each run.
    """
    if n_latents < len(runs):
        raise ValueError(f"--latents is {n_latents}; it must be at least 1 for each of the {len(runs)} runs")
    table = TokenTable()
    parts: list[dict[str, Any]] = []
    chosen: list[list[int]] = []
    for run in runs:
        wanted = []
        if chosen:  # what the first run's latents are to be compared with
            W_dec = runs[0].sae.W_dec[torch.tensor(chosen[0], dtype=torch.int64)]
            wanted = nearest(W_dec, run.sae.W_dec, 1)[1].squeeze(1).tolist()
        part, own = _run(run, n_latents // len(runs), wanted, table, progress_bar=progress_bar)
        parts.append(part)
        chosen.append(own)
    for part, own, run in zip(parts, chosen, runs, strict=True):
        for i, other in enumerate(runs):
            if other is run or not own:
                continue
            near = nearest(run.sae.W_dec[torch.tensor(own)], other.sae.W_dec, _NEAREST)
            for latent, cosines, ids in zip(own, *(column.tolist() for column in near), strict=True):
                part["details"][latent].setdefault("nearest", {})[i] = [ids, _short(cosines)]
    source, record = runs[0].source, runs[0].record
    texts = [] if source.lm is None else token_texts(source.lm.tokenizer, table.ids)
    where = record["data_id"] if source.lm is None else f"{record['lm']}, {record['hook']}"
    return {"where": where, "tokens": texts, "kinds": list(KINDS), "frontier": frontier([run.record for run in runs]),
            "runs": list(parts)}
