"""Claims that no run decides: the straight-through estimator (C3), the cost of a step (C8); from files of their own."""

from __future__ import annotations

import math
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

from scipy import stats

from analysis.claims.evidence import STE, STEP, Evidence, number
from analysis.claims.finding import Check, Finding, decide, not_measured, show
from analysis.claims.intervals import CONFIDENCE, FEWEST, Estimate, estimate
from sae_zoo.frontier.labels import NAMES


def unbiased_gradient(evidence: Evidence) -> Finding:
    """C3, from a file ste.json (written by python -m analysis.theory), holds if the distance of the mean
    straight-through gradient from the analytic one falls with the bandwidth (it is less at the smallest than at the
    largest, and nowhere between neighbours rises by more than two standard errors), and at the smallest is within two
    standard errors of 0. It does not hold if the distance does not fall.
    """
    metric = "STE estimate / analytic gradient at the smallest bandwidth"
    if not evidence.ste:
        return not_measured(metric, why=f"No {STE} in the folders; python -m analysis.theory DIR writes it.")
    if len(evidence.ste) > 1:
        paths = ", ".join(str(path) for path, _ in evidence.ste)
        return not_measured(metric, why=f"Several {STE} that differ, so that none is taken: {paths}.")
    analytic, rows = _read_ste(*evidence.ste[0])
    distances = [(abs(mean - analytic), error) for _, mean, error in rows]
    falls = distances[0][0] < distances[-1][0] and all(
        near <= far + 2 * math.hypot(near_error, far_error)
        for (near, near_error), (far, far_error) in pairwise(distances))
    (bandwidth, mean, error), (distance, _) = rows[0], distances[0]
    low, high = sorted(bound / analytic for bound in stats.norm.interval(CONFIDENCE, mean, error))
    finest = Estimate(mean / analytic, (low, high), 0, 0, "normal", {})
    caveats = ["One toy with a known answer, not a trained SAE."]
    if falls and distance > 2 * error:
        caveats.append("At the smallest bandwidth the estimate still differs from the analytic one; try a smaller one.")
    coarser = ", ".join(f"{mean / analytic:.3f} at {eps:g}" for eps, mean, _ in reversed(rows[1:]))
    verdict = decide(holds=falls and distance <= 2 * error, fails=not falls)
    return Finding(verdict, metric, finest.effect, finest.interval, caveats=caveats,
                   words=f"STE estimate / analytic gradient {coarser}, {show(finest)} at bandwidth {bandwidth:g}",
                   details={"analytic": analytic, "estimates": [list(row) for row in rows]})


def _read_ste(path: Path, content: Any) -> tuple[float, list[tuple[float, float, float]]]:
    """The analytic gradient, and (bandwidth, mean, standard error of the mean) by rising bandwidth.

    Raises:
        ValueError: if the content is something else.
    """
    try:
        analytic = float(content["analytic"])
        rows = sorted((float(eps), float(mean), float(error)) for eps, mean, error, _ in content["estimates"])
        if len(rows) < 2 or not analytic or not all(map(math.isfinite, (analytic, *sum(rows, ())))):
            raise ValueError("finite numbers, a gradient that is not 0 and two bandwidths are expected")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not what analysis.theory writes: {error!r}; write it again with python -m "
                         f"analysis.theory {path.parent}") from None
    return analytic, rows


def cost_of_a_step(evidence: Evidence) -> Finding:
    """C8, from files step.json (the last line of python -m benchmarks step --json, a folder each), holds if the
    intervals of both ratios of a training step's time, JumpReLU / Gated (of Gated's two forms the cheaper) and JumpReLU
    / TopK, lie below 1. It does not hold if one lies above 1. A benchmark is one number, so an interval takes three.
    """
    metric, remarks = "time of a training step, JumpReLU / Gated", _seconds(evidence)
    ratios: dict[str, dict[tuple[str, int], float]] = {"gated": {}, "topk": {}}
    shapes = set()
    for i, (path, content) in enumerate(evidence.step):
        times, shape = _read_step(path, content)
        shapes.add(shape)
        forms = [times[name] for name in ("gated", "gated_ri_l1") if name in times]
        if "jumprelu" in times and forms:
            ratios["gated"]["", i] = math.log(times["jumprelu"] / min(forms))
        if {"jumprelu", "topk"} <= times.keys():
            ratios["topk"]["", i] = math.log(times["jumprelu"] / times["topk"])
    found = {name: estimate(own).transformed(math.exp) for name, own in ratios.items() if own}
    if not found:
        nothing = not_measured(metric, why=f"No {STEP} with JumpReLU and Gated or TopK; python -m benchmarks "
                                           f"step --json | tail -n 1 > {STEP} writes it.")
        nothing.caveats += remarks
        return nothing
    verdict = decide(holds=len(found) == len(ratios) and all(own.is_below(1) for own in found.values()),
                     fails=any(own.is_above(1) for own in found.values()))
    caveats = [f"Not the paper's scale or hardware: [d_in, d_sae, batch, L0] = {'; '.join(sorted(shapes))}."]
    caveats += [f"{NAMES[name]} is not in {STEP}, and the claim speaks of it." for name in ratios if name not in found]
    if len(evidence.step) < FEWEST:
        caveats.append(f"Fewer than {FEWEST} benchmarks: no interval can be given.")
    first = next(iter(found))
    words = ", ".join(f"JumpReLU / {NAMES[name]} {show(own)}" for name, own in found.items())
    return Finding(verdict, f"time of a training step, JumpReLU / {NAMES[first]}", found[first].effect,
                   found[first].interval, f"time of a training step {words}, benchmarks: {len(evidence.step)}",
                   caveats=[*caveats, *remarks],
                   details={"n_benchmarks": len(evidence.step),
                            "ratios": {name: own.as_json({"": "all"}) for name, own in found.items()}})


def _read_step(path: Path, content: Any) -> tuple[dict[str, float], str]:
    """Each variant's time in units of its encoder GEMM, and what was measured where.

    Raises:
        ValueError: if the content is something else.
    """
    try:
        times = {name: float(own["ratio"]) for name, own in content["variants"].items()}
        if not all(0 < time < math.inf for time in times.values()):
            raise ValueError("times above 0 are expected")
        return times, f"{content['shape']} on {content['device']}"
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not the JSON line of benchmarks step: {error!r}; write it again with "
                         f"python -m benchmarks step --json | tail -n 1 > {STEP}") from None


def _seconds(evidence: Evidence) -> list[str]:
    """Remarks on how long runs took; no evidence."""
    jumprelu, remarks = evidence.arm("jumprelu").curves, []
    for other in ("gated", "topk"):
        ratios = [own["seconds_training"] / its["seconds_training"]
                  for pair, curve in evidence.arm(other).curves.items() if pair in jumprelu
                  for its in curve.runs for own in jumprelu[pair].runs if its.get("l0_target") == own.get("l0_target")
                  and all((number(run.get("seconds_training")) or 0) > 0 for run in (own, its))]
        if ratios:
            remarks.append(f"Whole runs of JumpReLU took {statistics.median(ratios):.2f} times as long as "
                           f"{NAMES[other]}'s (median, {len(ratios)} compared); no evidence: compilation, L0 control "
                           "and whatever else the machine did are in it.")
    return remarks


CHECKS = {
    "C3": Check("the STE's gradient is that of the loss", unbiased_gradient),
    "C8": Check("cheaper step than Gated and TopK", cost_of_a_step),
}
