"""Claims on the main comparison: variants at matched L0 (C1, C2, C4, C5, C9, C14)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from analysis.claims.compare import Units, mean_difference, mean_level, ratios_by_l0, slopes
from analysis.claims.evidence import Arm, Evidence, is_published
from analysis.claims.finding import (
    PAPER_D_SAE,
    Check,
    Finding,
    decide,
    finding,
    has_auxk,
    not_measured,
    over,
    plain,
    show,
)
from analysis.claims.intervals import Estimate
from sae_zoo.frontier.labels import NAMES

LOSSES = {"fvu": "FVU", "delta_lm_loss": "delta LM loss"}


def _losses(evidence: Evidence, references: Sequence[Arm]) -> tuple[dict[str, Units], dict[str, Estimate | None], dict]:
    """Both losses of JumpReLU over the best of ``references``; and the same at single L0s, as plain values."""
    jumprelu = evidence.arm("jumprelu")
    units = {metric: mean_difference(evidence, jumprelu, references, metric) for metric in LOSSES}
    by_l0 = {metric: plain(evidence, ratios_by_l0(evidence, jumprelu, references, metric)) for metric in LOSSES}
    return units, {metric: own.ratio() for metric, own in units.items()}, by_l0


def _loss_finding(evidence: Evidence, verdict: str, against: str, units: dict[str, Units],
                  ratios: dict[str, Estimate | None], caveats: Sequence[str] = (), **details: Any) -> Finding:
    shown = {metric: own for metric, own in ratios.items() if own is not None}
    first = next(iter(shown))
    words = f"ratio JumpReLU / {against}: " + ", ".join(
        f"{LOSSES[metric]} {show(own)} {over(own)}" for metric, own in shown.items())
    missing = [f"{LOSSES[metric]} is not measured, and the claim speaks of both losses."
               for metric in ratios if metric not in shown]
    return finding(evidence, verdict, f"{LOSSES[first]} ratio JumpReLU / {against} at matched L0", shown[first],
                   units.values(), words=words, caveats=[*caveats, *missing], by_metric=plain(evidence, ratios),
                   **details)


def against_gated(evidence: Evidence) -> Finding:
    """C1 holds if the intervals of both ratios JumpReLU / Gated at matched L0, FVU and delta LM loss (of Gated and
    Gated RI-L1 the better at each L0), lie below 1, and at no site/layer that of its seeds lies above 1. It does not
    hold if one of the two lies above 1.
    """
    gated = [evidence.arm("gated"), evidence.arm("gated_ri_l1")]
    units, ratios, by_l0 = _losses(evidence, gated)
    if not any(ratios.values()):
        return not_measured("FVU ratio JumpReLU / Gated at matched L0", *units.values(),
                            why="No curves of JumpReLU and Gated that can be compared.")
    by_site = [ratio.by_group for ratio in ratios.values() if ratio]
    sites = set.intersection(*map(set, by_site))
    lower = [site for site in sites if all(own[site].effect < 1 for own in by_site)]
    surely = [site for site in sites if all(own[site].is_below(1) for own in by_site)]
    against = sorted(evidence.names[site] for site in sites if any(own[site].is_above(1) for own in by_site))
    caveats = [f"Contradicted at {', '.join(against)}."] if against else []
    pairs = {pair for own in units.values() for pair in own.values}
    for arm in gated:
        if absent := pairs - arm.curves.keys():
            caveats.append(f"{arm.name} has no curve at {len(absent)} of {len(pairs)} pairs; there the other form "
                           "alone is compared with.")
    verdict = decide(holds=all(own is not None and own.is_below(1) for own in ratios.values()) and not against,
                     fails=any(own is not None and own.is_above(1) for own in ratios.values()))
    result = _loss_finding(
        evidence, verdict, "Gated", units, ratios, caveats, by_l0=by_l0, n_sites=len(sites), n_sites_lower=len(lower),
        n_sites_interval_below_1=len(surely), sites_interval_above_1=against)
    result.words += (f"; below 1 at {len(lower)} of {len(sites)} sites/layers, with the interval of their seeds at "
                     f"{len(surely)}")
    return result


def against_topk(evidence: Evidence) -> Finding:
    """C2 holds if the intervals of both ratios JumpReLU / TopK at matched L0, FVU and delta LM loss, end below 1.01 (a
    margin of 1 %). It does not hold if one of the two begins above 1.01.
    """
    units, ratios, by_l0 = _losses(evidence, [evidence.arm("topk")])
    if not any(ratios.values()):
        return not_measured("FVU ratio JumpReLU / TopK at matched L0", *units.values(),
                            why="No curves of JumpReLU and TopK that can be compared.")
    verdict = decide(holds=all(own is not None and own.is_below(1.01) for own in ratios.values()),
                     fails=any(own is not None and own.is_above(1.01) for own in ratios.values()))
    return _loss_finding(evidence, verdict, "TopK", units, ratios, by_l0=by_l0)


def shrinkage(evidence: Evidence) -> Finding:
    """C4 holds if the interval of JumpReLU's relative reconstruction bias gamma lies within 1 +- 0.01 and that of
    ReLU's, at the same L0s, below 0.99. It does not hold if JumpReLU's lies outside 1 +- 0.01, or ReLU's above 0.99.
    Means over log L0.
    """
    key, metric = "relative_reconstruction_bias", "relative reconstruction bias of JumpReLU"
    arms = [evidence.arm("jumprelu"), evidence.arm("relu")]
    units = {"jumprelu": mean_level(evidence, arms, key), "relu": mean_level(evidence, arms[::-1], key)}
    if not units["jumprelu"].values:  # without ReLU, JumpReLU's own range
        units["jumprelu"] = mean_level(evidence, arms[:1], key)
    gamma = {label: own.estimate() for label, own in units.items()}
    own, other = gamma.values()
    if own is None:
        return not_measured(metric, units["jumprelu"], why="No curve of JumpReLU.")
    verdict = decide(
        holds=own.is_above(0.99) and own.is_below(1.01) and other is not None and other.is_below(0.99),
        fails=own.is_below(0.99) or own.is_above(1.01) or (other is not None and other.is_above(0.99)))
    return finding(evidence, verdict, metric, own, units.values(),
                   words=f"gamma of JumpReLU {show(own, '.4f')}, of ReLU {show(other, '.4f')}, {over(own)}",
                   caveats=[] if other else ["ReLU is not measured at the same L0s, and the claim speaks of it."],
                   by_variant=plain(evidence, gamma))


def frequent_latents(evidence: Evidence) -> Finding:
    """C5 holds if, at matched L0, the intervals of both differences in the share of latents that fire on more than 10 %
    of tokens, JumpReLU - Gated and TopK - Gated (of Gated's two forms the larger share at each L0), lie above 0, and,
    where all SAEs have the paper's 131,072 latents, those of both shares below 0.06 %. It does not hold if one of these
    lies on the other side. Shares are interpolated linearly in log L0.
    """
    key = "fraction_above_10pct"
    arms = {label: evidence.arm(label) for label in ("jumprelu", "topk")}
    gated = [evidence.arm("gated"), evidence.arm("gated_ri_l1")]
    units = {label: mean_difference(evidence, arm, gated, key, log=False, best=np.maximum)
             for label, arm in arms.items()}
    found = {label: own.estimate() for label, own in units.items() if own.values}
    if not found:
        return not_measured("share of latents firing on > 10 % of tokens, JumpReLU - Gated", *units.values(),
                            why="No curves of Gated that JumpReLU or TopK can be compared with.")
    shares = {label: mean_level(evidence, [arms[label]], key).estimate() for label in found}
    at_width = {run["d_sae"] for own in units.values() for run in own.runs.values()} == {PAPER_D_SAE}
    verdict = decide(
        holds=len(found) == len(arms) and all(own.is_above(0) for own in found.values())
        and (not at_width or all(share.is_below(6e-4) for share in shares.values())),
        fails=any(own.is_below(0) for own in found.values())
        or (at_width and any(share.is_above(6e-4) for share in shares.values())))
    caveats = [f"{arms[label].name} is not measured beside Gated, and the claim speaks of it."
               for label in arms if label not in found]
    if not at_width:
        caveats.append("The bound of 0.06 % is for 131,072 latents (at one L0, fewer latents must fire more often): "
                       "not tested.")
    first = next(iter(found))
    words = ", ".join(f"{arms[label].name} - Gated {show(own.transformed(_percent), '+.3f')} points (own share "
                      f"{100 * shares[label].effect:.3f} %)" for label, own in found.items())
    return finding(evidence, verdict, f"share of latents firing on > 10 % of tokens, {arms[first].name} - Gated",
                   found[first], units.values(), caveats=caveats,
                   words=f"latents firing on > 10 % of tokens: {words}, {over(found[first])}",
                   differences=plain(evidence, found), shares=plain(evidence, shares))


def _percent(share: float) -> float:
    return 100 * share


def dead_latents(evidence: Evidence) -> Finding:
    """C9, on runs of JumpReLU without AuxK only (sae.auxk_coefficient is 0), holds if at matched L0 the intervals of
    both differences in the share of dead latents, JumpReLU - Gated and JumpReLU - (TopK with AuxK), end below one
    percentage point, and that of JumpReLU's own share below 5 % ("few"). It does not hold if one of the differences
    begins above one point or the share above 5 %. Of Gated's two forms the one with fewer dead counts at each L0.
    Shares are interpolated linearly in log L0.
    """
    key = "dead_fraction"
    # By variant: where the recipe has AuxK for all, those without are an ablation with a label of its own.
    jumprelu, topk = (evidence.arm_of(NAMES[variant], lambda run, variant=variant, with_it=with_it: (
                          run.get("variant") == variant and is_published(run) and has_auxk(run) is with_it))
                      for variant, with_it in (("jumprelu", False), ("topk", True)))
    others = {"TopK with AuxK": [topk],
              "Gated": [evidence.arm("gated"), evidence.arm("gated_ri_l1")]}
    units = {name: mean_difference(evidence, jumprelu, arms, key, log=False) for name, arms in others.items()}
    level = mean_level(evidence, [jumprelu], key)
    found, share = {name: own.estimate() for name, own in units.items() if own.values}, level.estimate()
    if share is None:
        return not_measured("dead share of JumpReLU without AuxK", level,
                            why="No curve of JumpReLU without AuxK (experiment=auxk has them); with it is no test.")
    verdict = decide(
        holds=len(found) == len(others) and share.is_below(0.05) and all(own.is_below(0.01) for own in found.values()),
        fails=share.is_above(0.05) or any(own.is_above(0.01) for own in found.values()))
    caveats = [f"{name} is not measured beside JumpReLU without AuxK, and the claim speaks of it."
               for name in others if name not in found]
    caveats += ["Dead means: fired on none of the evaluation tokens.", "Gated was not resampled."]
    first = next(iter(found), None)
    words = "".join(f"; minus that of {name} {show(own.transformed(_percent), '+.2f')} points"
                    for name, own in found.items())
    return finding(evidence, verdict, "dead share of JumpReLU without AuxK" + (f" - {first}" if first else ""),
                   found[first] if first else share, [*units.values(), level], caveats=caveats,
                   words=f"dead latents of JumpReLU {show(share.transformed(_percent), '.2f', ' %')}{words}, "
                         f"{over(share)}",
                   differences=plain(evidence, found), **plain(evidence, {"share": share}))


def uniformity(evidence: Evidence) -> Finding:
    """C14 holds if the interval of the slope of log r_L0 against log L0 lies below 0 for JumpReLU and every other
    variant that is measured (TopK, Gated, Gated RI-L1; one at least), and the curves are alike: the intervals of all
    ratios of r_L0, JumpReLU / other at matched L0, within 10 % (1/1.1 to 1.1). It does not hold if a slope's interval
    lies above 0 or a ratio's outside.
    """
    metric = "slope of log r_L0 against log L0, JumpReLU"
    arms = {label: evidence.arm(label) for label in ("jumprelu", "topk", "gated", "gated_ri_l1")}
    slope_units = {label: slopes(evidence, arm, "r_l0") for label, arm in arms.items()}
    steep = {label: own.estimate() for label, own in slope_units.items() if own.values}
    if "jumprelu" not in steep:
        return not_measured(metric, slope_units["jumprelu"], why="No curve of JumpReLU with r_L0.")
    ratio_units = {label: mean_difference(evidence, arms["jumprelu"], [arm], "r_l0")
                   for label, arm in arms.items() if label != "jumprelu"}
    ratios = {label: own.ratio() for label, own in ratio_units.items() if own.values}
    verdict = decide(
        holds=bool(ratios) and all(own.is_below(0) for own in steep.values())
        and all(own.is_above(1 / 1.1) and own.is_below(1.1) for own in ratios.values()),
        fails=any(own.is_above(0) for own in steep.values())
        or any(own.is_below(1 / 1.1) or own.is_above(1.1) for own in ratios.values()))
    words = ", ".join(f"{arms[label].name} {show(own)}" for label, own in steep.items())
    alike = ", ".join(f"{arms[label].name} {show(own)}" for label, own in ratios.items()) or "others not measured"
    return finding(evidence, verdict, metric, steep["jumprelu"], [*slope_units.values(), *ratio_units.values()],
                   words=f"slope of log r_L0 in log L0: {words}; r_L0 ratio of JumpReLU to {alike}",
                   caveats=[] if ratios else ["Nothing is measured beside JumpReLU, and the claim says all are alike."],
                   slopes=plain(evidence, steep), ratios=plain(evidence, ratios))


CHECKS = {
    "C1": Check("JumpReLU beats Gated at matched L0", against_gated),
    "C2": Check("JumpReLU at least equals TopK there", against_topk),
    "C4": Check("training L0 avoids shrinkage", shrinkage),
    "C5": Check("more frequent latents than Gated's", frequent_latents),
    "C9": Check("few dead latents without AuxK", dead_latents),
    "C14": Check("effect more diffuse as L0 rises", uniformity),
}
