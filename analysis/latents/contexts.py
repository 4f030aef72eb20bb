"""The text in which latents fire: which places are shown, and how strongly it fires on each token around."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from analysis.latents.survey import SPLIT, Survey, fired
from sae_zoo.data.activations import TextActivations
from sae_zoo.saes import SAE

# How many contexts of each kind, and how many tokens of text stand before and after the one that each is about.
KINDS = {"top": 8, "middle": 4, "bottom": 4}
_BEFORE, _AFTER = 20, 9


@dataclass(frozen=True)
class Context:
    """A piece of held-out text around a token on which a latent fires.

    Attributes:
        kind: ``top``: its strongest activations; ``middle``: nearest to the median of a sample of them; ``bottom``: the
            lowest of that sample, about the lowest tenth of all.
        token_ids: the text.
        values: the latent on each token, in raw units; 0 where it does not fire, and on special tokens.
        at: which of the tokens the context was chosen for.
    """

    kind: str
    token_ids: list[int]
    values: list[float]
    at: int


def choose_places(found: Survey, latent: int, context_size: int) -> dict[str, list[int]]:
    """Places (``sequence * context_size + position``) to show of a latent, by kind. No two of them share text, so that
    a latent which fires on every token of a passage does not show that passage again and again.
    """
    taken: list[int] = []

    def take(places: Iterable[int], n: int) -> list[int]:
        chosen: list[int] = []
        for place in places:
            if len(chosen) < n and all(place // context_size != other // context_size
                                       or abs(place - other) > _BEFORE + _AFTER for other in taken):
                chosen.append(place)
                taken.append(place)
        return chosen

    sample = sorted(zip(*found.sample.of(latent), strict=True))
    centre = (len(sample) - 1) / 2
    around = [sample[i] for i in sorted(range(len(sample)), key=lambda i: abs(i - centre))]
    # Where a latent has fired a few times only, top comes first, then bottom.
    top = take(found.top.of(latent)[1], KINDS["top"])
    bottom = take((place for _, place in sample), KINDS["bottom"])
    return {"top": top, "middle": take((place for _, place in around), KINDS["middle"]), "bottom": bottom}


def contexts(sae: SAE, cache: TextActivations, found: Survey, latents: Sequence[int], *,
             progress_bar: bool = False) -> dict[int, list[Context]]:
    """Contexts of each of ``latents``: top, middle, bottom, each in order of falling activation.

    A second pass over the test rows: which text is shown is known only after the first, and the rows around a token
    stand anywhere in a shuffled cache. Memory beside a piece of rows is about 30 kB for each of ``latents``.

    Args:
        found: :func:`survey` of this SAE on this cache.
    """
    tokens = cache.tokens(SPLIT)
    context_size = tokens.shape[1]
    windows: list[tuple[int, str, int, range]] = []  # (latent, kind, place, places shown)
    for latent in latents:
        for kind, places in choose_places(found, latent, context_size).items():
            for place in places:
                first = place - place % context_size
                windows.append((latent, kind, place, range(max(first, place - _BEFORE),
                                                           min(first + context_size, place + _AFTER + 1))))
    wanted = torch.tensor([place * sae.d_sae + latent for latent, _, _, shown in windows for place in shown],
                          dtype=torch.int64)
    # Windows of one latent are apart, so no key is there twice.
    keys, order = wanted.sort()
    values = torch.zeros(len(keys))
    of_interest = torch.zeros(sae.d_sae, dtype=torch.bool)
    of_interest[list(latents)] = True
    for _, entries in fired(sae, cache, progress_bar=progress_bar) if len(keys) else ():
        on = of_interest[entries.latents]
        own = entries.places[on] * sae.d_sae + entries.latents[on]
        slot = torch.searchsorted(keys, own).clamp(max=len(keys) - 1)
        hit = keys[slot] == own
        values[slot[hit]] = entries.values[on][hit]
    in_order = torch.empty_like(values)
    in_order[order] = values
    shown_values = iter(in_order.tolist())
    flat = tokens.view(-1)
    result: dict[int, list[Context]] = {latent: [] for latent in latents}
    for latent, kind, place, shown in windows:
        result[latent].append(Context(kind, flat[shown.start : shown.stop].tolist(),
                                      [next(shown_values) for _ in shown], place - shown.start))
    rank = list(KINDS)
    for own in result.values():
        own.sort(key=lambda context: (rank.index(context.kind), -context.values[context.at]))
    return result


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token by itself, spaces included; a piece of a character becomes U+FFFD."""
    # Decoders of SentencePiece vocabularies drop a space at the beginning of a text, and each token is one here.
    pieces = tokenizer.convert_ids_to_tokens(list(ids))
    return [piece.replace("▁", " ") if piece.startswith("▁") else tokenizer.decode([i])
            for i, piece in zip(ids, pieces, strict=True)]


def highlighted(context: Context, texts: Sequence[str], largest: float) -> str:
    """A context as HTML for a notebook: tokens coloured by their activation, which their titles say in numbers.

    Args:
        texts: of the context's tokens; any text, it is escaped.
        largest: activation of the full colour.
    """
    spans = []
    for i, (text, value) in enumerate(zip(texts, context.values, strict=True)):
        shown = html.escape(text.replace("\n", "↵"))
        mark = "border-bottom:2px solid #0072B2;" if i == context.at else ""
        strength = f"background:rgba(230,120,0,{0.15 + 0.7 * min(1.0, value / largest):.2f});" if value > 0 else ""
        styled = f'<span style="{strength}{mark}" title="{value:.4g}">{shown}</span>'
        spans.append(styled if strength or mark else shown)
    return (f'<div style="font-family:monospace;white-space:pre-wrap;margin:4px 0"><b>{context.values[context.at]:.3g}'
            f'</b>  {"".join(spans)}</div>')
