"""Make activation caches from a language model and a corpus: one forward pass for all hook points, stopped at the last.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sae_zoo.data.cache import FORMAT_VERSION, MANIFEST, Cache, cache_lock, make_cache_id, open_cache
from sae_zoo.data.cache_writer import CacheWriter, check_disk_space, estimated_bytes
from sae_zoo.data.corpus import HELD_OUT, SPLITS, Corpus, EmptyCorpus, PackedTokens, deal, dealt_to, pack
from sae_zoo.data.norms import describe
from sae_zoo.data.writer_parts import Part, part_of, partial_folder, wait_for_first
from sae_zoo.lm.hooks import HookPoint, capture, hook_width
from sae_zoo.lm.load import LoadedLM

log = logging.getLogger(__name__)

HASHED_UP_TO_BYTES = 4_000_000_000  # a few seconds of reading


@dataclass(frozen=True, kw_only=True)
class HarvestSpec:
    """Settings of a cache, beside the language model and the corpus.

    Attributes:
        context_size: tokens a row that the language model reads, BOS included.
        n_tokens: non-special tokens of each split, about; a split with less text gives what it has.
        dtype: of the stored activations.
        rows_per_shard: activations a shard.
        seed: of the shuffle.
        part: [number, of]: only the train documents that a hash deals to part ``number``, from 0, of ``of``, and that
            share of the tokens; held-out splits are whole in every part. None for all of them.
    """

    context_size: int
    n_tokens: Mapping[str, int]
    dtype: str
    rows_per_shard: int
    seed: int
    part: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if set(self.n_tokens) != set(SPLITS):
            raise ValueError(f"data.n_tokens has {', '.join(self.n_tokens)}; it needs exactly {', '.join(SPLITS)}")
        for split, n in self.n_tokens.items():
            if n < 1:
                raise ValueError(f"data.n_tokens.{split} is {n}; it must be at least 1")
        if self.part is not None and not (len(self.part) == 2 and 0 <= self.part[0] < self.part[1]):
            raise ValueError(f"data.part is {list(self.part)}; it must be [number, of], with a number from 0 to of - 1")

    @property
    def identity(self) -> dict[str, Any]:
        """All of it as plain JSON values; without ``part`` where there is none, as in caches that knew of no parts."""
        facts = {**asdict(self), "n_tokens": dict(self.n_tokens)}
        part = facts.pop("part")
        return facts if part is None else {**facts, "part": list(part)}

    @property
    def n_tokens_here(self) -> dict[str, int]:
        """Tokens of each split, about, that are harvested: of train the share of the part, rounded up."""
        of = 1 if self.part is None else self.part[1]
        return {**self.n_tokens, "train": math.ceil(self.n_tokens["train"] / of)}


def identity_of(lm: LoadedLM, hook: HookPoint, corpus_fingerprint: str, spec: HarvestSpec) -> dict:
    # The rows of a forward pass are left out on purpose: they change the activations by rounding only.
    return {"format_version": FORMAT_VERSION, "lm": lm.fingerprint, "lm_dtype": str(lm.model.dtype),
            "hook": asdict(hook), "corpus": corpus_fingerprint, **spec.identity}


def harvest(lm: LoadedLM, lm_name: str, hooks: Sequence[HookPoint], corpus: Corpus, spec: HarvestSpec, *,
            root: Path | str, batch_size: int, along: Sequence[HookPoint] = (), process: tuple[int, int] = (0, 1),
            progress_bar: bool = True) -> dict[str, Cache]:
    """The caches of ``hooks`` below ``root``; those that are not there yet are made in one pass over the text.

    Args:
        batch_size: rows a forward pass.
        along: hook points whose missing caches are made too where one of ``hooks`` is missing, in the same pass.
        process: number of this process and how many there are; each reads its own part of the text, and the bytes that
            come out are the same. All must see ``root``.

    Returns:
        A cache for each hook point, by its name. Their rows are aligned: row i is the same token in all of them.

    Raises:
        ValueError: if the corpus is empty, the disk too small, a cache damaged or of another width than the hook
            point, or an activation not finite.
    """
    root = Path(root)
    fingerprint = corpus.fingerprint()
    points = {hook.name: hook for hook in (*hooks, *along)}
    identities = {name: identity_of(lm, hook, fingerprint, spec) for name, hook in points.items()}
    ids = {name: make_cache_id(lm=lm_name, hook=name, identity=identity) for name, identity in identities.items()}
    if all((root / ids[hook.name] / MANIFEST).exists() for hook in hooks):
        points = {hook.name: hook for hook in hooks}  # no pass, so nothing along with it
    with ExitStack() as stack:
        # Always in one order, so that two harvests cannot wait for each other.
        for cache_id in sorted(ids[name] for name in points):
            stack.enter_context(cache_lock(root, cache_id, part=process[0]))
        if process[0] > 0:
            for name in points:
                wait_for_first(root, ids[name], process[1])
        missing = [hook for name, hook in points.items() if not (root / ids[name] / MANIFEST).exists()]
        made = {}
        if missing:
            packed = _pack(corpus, lm, spec)
            if (left_out := corpus.left_out()) is not None and process[0] == 0:
                log.warning("%s and were left out", left_out)
            rows = {split: part.n_tokens for split, part in packed.items()}
            widths = {hook.name: hook_width(lm.model, hook) for hook in missing}
            n_bytes = sum(estimated_bytes(rows, d_in=d_in, dtype=spec.dtype, rows_per_shard=spec.rows_per_shard)
                          for d_in in widths.values())
            log.info("harvesting %s of %s: %s tokens, %.2f GB", ", ".join(widths), lm_name,
                     " + ".join(f"{n:,} {split}" for split, n in rows.items()), n_bytes / 1e9)
            if process[0] == 0:
                there = sum(file.stat().st_size for hook in missing
                            for file in partial_folder(root, ids[hook.name]).rglob("*") if file.is_file())
                check_disk_space(root, n_bytes - there)
            part = part_of(packed, batch_size, *process)
            writers = {
                hook.name: stack.enter_context(CacheWriter(
                    root, ids[hook.name], identity=identities[hook.name], d_in=widths[hook.name], dtype=spec.dtype,
                    splits=rows, rows_per_shard=spec.rows_per_shard, seed=spec.seed, part=part))
                for hook in missing
            }
            unfinished = [hook for hook in missing if not writers[hook.name].complete]
            _run(lm, unfinished, packed, part, writers, batch_size, progress_bar)
            made = {name: writer.finish(packed, progress_bar=progress_bar and process[0] == 0)
                    for name, writer in writers.items()}
            for name, cache in made.items():
                if process[0] == 0 and (line := describe(cache.manifest["norms"], cache.n_rows("train"), lm.tokenizer)):
                    log.warning("%s: %s", name, line)
        return {hook.name: made.get(hook.name) or _open(root / ids[hook.name], hook_width(lm.model, hook))
                for hook in hooks}


def _open(path: Path, width: int) -> Cache:
    """A cache that was there already, its hashes checked where that takes seconds and not hours."""
    cache = open_cache(path)
    if cache.d_in != width:
        raise ValueError(f"cache {path} has rows of {cache.d_in} numbers, but the hook point gives {width}; it belongs "
                         "to another language model: delete the folder to harvest it again")
    if cache.n_bytes <= HASHED_UP_TO_BYTES:
        cache.verify_hashes()
    return cache


def _pack(corpus: Corpus, lm: LoadedLM, spec: HarvestSpec) -> dict[str, PackedTokens]:
    """Token rows of each split.

    Validation and test are dealt, row by row, from the same held-out documents: validation steers a single number, the
    sparsity coefficient, towards an L0 that is then scored on test. Documents differ so much in their L0 that with some
    dozens of them on each side a split by document would miss the target by several percent whatever the control does.
    """
    n = spec.n_tokens_here
    number, of = (0, 1) if spec.part is None else spec.part
    documents = (document for document in corpus.documents("train") if dealt_to(document.name, of) == number)
    try:
        train = pack(documents, lm.tokenizer, spec.context_size, n["train"])
        held_out = pack(corpus.documents(*HELD_OUT), lm.tokenizer, spec.context_size, n["validation"] + n["test"])
    except EmptyCorpus as error:
        raise _too_few_documents(corpus, spec) or error from None
    validation, test = deal(held_out, n["validation"], n["test"])
    if not (validation.n_tokens and test.n_tokens):
        n_rows, wanted = len(held_out.tokens), n["validation"] + n["test"]
        asked = (f"data.n_tokens.validation + test = {wanted}" if held_out.n_tokens >= 0.9 * wanted
                 else f"the held-out text, {held_out.n_tokens} tokens,")
        raise ValueError(f"{asked} is {n_rows} row{'s' * (n_rows != 1)} of lm.context_size {spec.context_size}, and "
                         "validation and test need one each; give more tokens, or a smaller lm.context_size")
    return {"train": train, "validation": validation, "test": test}


def _too_few_documents(corpus: Corpus, spec: HarvestSpec) -> ValueError | None:
    """The error for a corpus of which a split is empty; None where it is not the number of documents."""
    n = {split: sum(1 for _ in corpus.documents(split)) for split in SPLITS}
    found, left_out = sum(n.values()), corpus.left_out()
    if not found:
        return ValueError(f"corpus holds no document{f': {left_out}' if left_out else ' that is not empty'}")
    without = "held-out" if n["train"] else "train"
    if n["train"] and n["validation"] + n["test"]:
        return None if spec.part is None else ValueError(
            f"data.part {list(spec.part)} has no train document: there are {n['train']}, dealt to {spec.part[1]} "
            "parts; choose fewer parts, or give more documents")
    return ValueError(f"corpus has no {without} document: it has {found} document{'s' * (found != 1)} and is split by "
                      "document, one in ten being held out; give 50 or more, a long text in chapters, say"
                      + (f" ({left_out})" if left_out else ""))


def _run(lm: LoadedLM, hooks: Sequence[HookPoint], packed: Mapping[str, PackedTokens], part: Part,
         writers: Mapping[str, CacheWriter], batch_size: int, progress_bar: bool) -> None:
    total = sum(n_rows for _, n_rows in part.rows.values()) if hooks else 0
    with tqdm(total=total, desc="harvest", unit="token", unit_scale=True,
              disable=not progress_bar or part.number > 0) as bar:
        for split, text in packed.items():
            keep, own = text.keep, part.sequences[split]
            for start in range(own.start, own.stop, batch_size):
                tokens, kept = text.tokens[start : start + batch_size], keep[start : start + batch_size]
                behind = [hook for hook in hooks if writers[hook.name].sequences_done[split] < start + len(tokens)]
                if behind:
                    sequences, positions = kept.nonzero(as_tuple=True)
                    for name, activations in capture(lm.model, behind, tokens).items():
                        new = sequences + start >= writers[name].sequences_done[split]
                        writers[name].append(
                            split, activations[kept.to(activations.device)][new.to(activations.device)],
                            tokens[kept][new], sequences[new] + start, positions[new])
                        writers[name].sequences_appended(split, start + len(tokens))
                bar.update(int(kept.sum()))
