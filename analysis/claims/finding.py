"""What a claim's check ends in, and what every reader of it must be told."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from analysis.claims.compare import Units
from analysis.claims.evidence import Evidence, Record, group_of, number, options_of
from analysis.claims.intervals import FEWEST, Estimate
from sae_zoo.frontier.labels import NAMES

HOLDS, FAILS, UNDECIDED, NOT_MEASURED = "holds", "does not hold", "undecided", "not measured"
# The paper's setting (PAPER.md, sections 2 and 3).
PAPER_LM, PAPER_D_SAE, PAPER_TOKENS, PAPER_SITES = "gemma2_9b", 131_072, 8e9, 9


@dataclass
class Finding:
    """A verdict and what it rests on.

    Attributes:
        verdict: one of the four above.
        metric: what ``effect`` is.
        effect, interval: the headline number and its 95 % interval; None where there is none.
        words: all effects for people, or why there is none; a line.
        n_runs: runs behind it.
        caveats: plain sentences.
        left_out: what was not used, and why; lines.
        details: finer results, plain values.
    """

    verdict: str
    metric: str
    effect: float | None = None
    interval: tuple[float, float] | None = None
    words: str = ""
    n_runs: int = 0
    caveats: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {"verdict": self.verdict, "effect": self.effect,
                "interval": None if self.interval is None else list(self.interval), "n_runs": self.n_runs,
                "metric": self.metric, "words": self.words, "caveats": self.caveats, "left_out": self.left_out,
                **self.details}


@dataclass(frozen=True)
class Check:
    """A claim, in few words, and the function that judges it; its docstring is the rule."""

    statement: str
    judge: Callable[[Evidence], Finding]

    @property
    def rule(self) -> str:
        return " ".join(inspect.getdoc(self.judge).split())


def decide(*, holds: bool, fails: bool) -> str:
    """The verdict of a claim for which there is some evidence."""
    return FAILS if fails else HOLDS if holds else UNDECIDED


def not_measured(metric: str, *units: Units, why: str) -> Finding:
    """Nothing to judge by, and ``why``."""
    left_out = unique(line for own in units for line in own.left_out)
    return Finding(NOT_MEASURED, metric, words=why, caveats=[why], left_out=left_out)


def finding(evidence: Evidence, verdict: str, metric: str, headline: Estimate, units: Iterable[Units], *, words: str,
            caveats: Iterable[str] = (), **details: Any) -> Finding:
    """A finding on curves: ``headline`` is its effect, ``units`` all that it rests on."""
    units = list(units)
    runs = {folder: run for own in units for folder, run in own.runs.items()}
    l0 = [own.l0 for own in units if own.l0 is not None]
    l0_range = [min(low for low, _ in l0), max(high for _, high in l0)] if l0 else None
    return Finding(verdict, metric, headline.effect, headline.interval, words, len(runs),
                   [*caveats, *caveats_of(evidence, units, runs.values())],
                   unique(line for own in units for line in own.left_out),
                   {"n_pairs": headline.n_pairs, "method": headline.method, "l0_range": l0_range, **details})


def caveats_of(evidence: Evidence, units: Iterable[Units], runs: Iterable[Record]) -> list[str]:
    """What limits any finding on ``runs``: scale, sites, seeds, and how the arms were trained."""
    runs = list(runs)
    pairs = {pair for own in units for pair in own.values}
    groups, seeds = {group for group, _ in pairs}, {seed for _, seed in pairs}
    caveats = []
    scales = {(str(run["lm"]), run["d_sae"], run["n_tokens"]) for run in runs}
    if small := sorted(s for s in scales if s[0] != PAPER_LM or s[1] < PAPER_D_SAE or s[2] < 0.5 * PAPER_TOKENS):
        found = "; ".join(f"{lm}, {d_sae:,} latents, {n_tokens:,} tokens" for lm, d_sae, n_tokens in small)
        caveats.append(f"Not the paper's scale: {found}; there Gemma 2 9B, 131,072 latents, about 8 billion tokens.")
    if len(groups) < FEWEST:
        names = " and ".join(sorted(evidence.names[group] for group in groups))
        caveats.append(f"Only {names}: nothing is said of other sites and layers.")
    elif len(groups) < PAPER_SITES:
        caveats.append(f"{len(groups)} site/layer pairs; the paper has {PAPER_SITES}.")
    if len(seeds) == 1:
        caveats.append("One seed: the spread over seeds is not measured.")
    if len(pairs) < FEWEST:
        caveats.append(f"Fewer than {FEWEST} pairs of site/layer and seed: no interval can be given.")
    auxk = {(name_of(run), run.get("variant") == "topk", has_auxk(run)) for run in runs}
    if helped := sorted(name for name, is_topk, has in auxk if has and not is_topk):
        caveats.append(f"{', '.join(helped)}: trained with AuxK (sae.auxk_coefficient above 0), published without.")
    if any(is_topk and has is False for _, is_topk, has in auxk):
        caveats.append("TopK: trained without AuxK, which is part of the published one.")
    if untold := [run for run in runs if not options_of(run)]:
        caveats.append(f"{len(untold)} of {len(runs)} records do not tell the SAE's options; their label is taken for "
                       "the published form.")
    if differing := _differing_recipes(runs):
        caveats.append(f"The arms' recipes differ in {', '.join(differing)}.")
    return caveats


def plain(evidence: Evidence, estimates: Mapping[str, Estimate | None]) -> dict[str, Any]:
    """Estimates as plain values."""
    return {key: own and own.as_json(evidence.names) for key, own in estimates.items()}


def has_auxk(run: Record) -> bool | None:
    """Whether a run was trained with AuxK; None where its record does not tell."""
    coefficient = number(run.get("sae.auxk_coefficient"))
    return None if coefficient is None else coefficient > 0


def name_of(run: Record) -> str:
    """A run's label for people."""
    return NAMES.get(run["label"], run["label"])


def _differing_recipes(runs: Iterable[Record]) -> list[str]:
    """Fields in which the recipes of labels differ within a group."""
    recipes = defaultdict(lambda: defaultdict(set))
    for run in runs:
        recipes[group_of(run)][run["label"]] |= {(k, v) for k, v in options_of(run) if k.startswith("recipe.")}
    return sorted({key for by_label in recipes.values() for one in by_label.values() for other in by_label.values()
                   for key, _ in one - other})


def unique(lines: Iterable[str]) -> list[str]:
    """``lines`` without repetitions, in order."""
    return list(dict.fromkeys(lines))


def show(estimate: Estimate | None, form: str = ".3f", unit: str = "") -> str:
    """``0.931 [0.912, 0.950]``, for people."""
    if estimate is None:
        return "not measured"
    if estimate.interval is None:
        return f"{estimate.effect:{form}}{unit} (no interval)"
    low, high = estimate.interval
    return f"{estimate.effect:{form}}{unit} [{low:{form}}, {high:{form}}]"


def over(estimate: Estimate) -> str:
    """``over 27 pairs``, for people."""
    return f"over {estimate.n_pairs} pair{'' if estimate.n_pairs == 1 else 's'}"
