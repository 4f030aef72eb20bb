"""Claims on one choice in JumpReLU's training: bandwidth, kernel, target-L0 loss, what the STE reaches (C10 to C13)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from analysis.claims.compare import Units, mean_difference, on_grid
from analysis.claims.evidence import Arm, Curve, Evidence, Group, Pair, Record, is_published, number
from analysis.claims.finding import Check, Finding, decide, finding, not_measured, over, plain, show
from analysis.claims.intervals import estimate
from sae_zoo.frontier.labels import NAMES
from sae_zoo.frontier.pareto import interpolate_at
from sae_zoo.functional.kernel_widths import KERNEL_STD


def one_bandwidth(evidence: Evidence) -> Finding:
    """C10 holds if for one bandwidth, the same at every site/layer (two or more), the geometric mean ratio of its FVU
    to that of the site/layer's best bandwidth, at matched L0, is at most 1.02 (a margin of 2 %) at the worst
    site/layer, and its interval over all of them ends below 1.02. It does not hold if every bandwidth has a site/layer
    at which the interval of this ratio over seeds lies above 1.02. The bandwidth shown is that with the least such
    worst ratio.
    """
    metric = "FVU ratio of one bandwidth to each site/layer's best, at matched L0"
    arms = evidence.ablation(lambda run: number(run.get("sae.bandwidth")), ("sae.bandwidth",))
    units, levels = _levels(evidence, arms)
    if not levels:
        return not_measured(metric, units, why="No JumpReLU runs that differ in nothing but sae.bandwidth.")
    groups = {group for group, _ in levels}
    to_best: dict[float, dict[Pair, float]] = defaultdict(dict)
    for group in groups:
        own = {pair: level for pair, level in levels.items() if pair[0] == group}
        means = {b: np.mean([level[b] for level in own.values()]) for b in next(iter(own.values()))}
        best = min(means, key=means.get)
        for pair, level in own.items():
            for bandwidth in level:
                to_best[bandwidth][pair] = level[bandwidth] - level[best]
    everywhere = {bandwidth: estimate(own).transformed(math.exp) for bandwidth, own in to_best.items()
                  if own.keys() == levels.keys()}
    if not everywhere:
        return not_measured(metric, units, why="No bandwidth was measured at every site/layer.")
    at_worst = {b: max(own.by_group, key=lambda group: own.by_group[group].effect) for b, own in everywhere.items()}
    worst = {b: everywhere[b].by_group[group].effect for b, group in at_worst.items()}
    chosen = min(worst, key=worst.get)
    found, tested = everywhere[chosen], sorted(to_best)
    verdict = decide(
        holds=len(groups) > 1 and worst[chosen] <= 1.02 and found.is_below(1.02),
        fails=len(groups) > 1 and all(any(at.is_above(1.02) for at in own.by_group.values())
                                      for own in everywhere.values()))
    caveats = [] if len(groups) > 1 else ["One site/layer, and the claim speaks of several."]
    if tested[-1] < 10 * tested[0]:
        caveats.append(f"The bandwidths span a factor of {tested[-1] / tested[0]:.3g} only.")
    units.values = to_best[chosen]
    return finding(evidence, verdict, metric, found, [units], caveats=caveats,
                   words=f"bandwidth {chosen:g} of {', '.join(f'{b:g}' for b in tested)}: FVU ratio to each "
                         f"site/layer's best {show(found)}, at worst {worst[chosen]:.3f} "
                         f"({evidence.names[at_worst[chosen]]}), {over(found)}",
                   bandwidth=chosen, worst_effect=worst[chosen],
                   by_bandwidth=plain(evidence, {f"{b:g}": own for b, own in sorted(everywhere.items())}))


def _levels(evidence: Evidence, arms: Mapping[float, Arm]) -> tuple[Units, dict[Pair, dict[float, float]]]:
    """For each pair the mean log FVU of each arm over the L0s that all arms of its group were measured at."""
    units, levels = Units(left_out=[line for arm in arms.values() for line in arm.left_out]), {}
    of_group: dict[Group, list[float]] = defaultdict(list)
    for value in sorted(arms):
        for group in {group for group, _ in arms[value].curves}:
            of_group[group].append(value)
    for pair in sorted({pair for arm in arms.values() for pair in arm.curves}, key=str):
        values = of_group[pair[0]]
        if absent := [value for value in values if pair not in arms[value].curves]:
            units.left_out.append(f"{evidence.where(pair)}: no curve of JumpReLU with bandwidth "
                                  f"{', '.join(f'{value:g}' for value in absent)}")
            continue
        curves = [arms[value].curves[pair] for value in values]
        try:
            grid, logs = on_grid(curves, "fvu", log=True)
        except ValueError as error:
            units.left_out.append(f"{evidence.where(pair)}: bandwidths: {error}")
        else:
            levels[pair] = dict(zip(values, logs.mean(1).tolist(), strict=True))
            units.add(pair, logs.mean(), curves, grid)
    return units, levels


def kernel_shape(evidence: Evidence) -> Finding:
    """C11, on runs whose kernels have the same standard deviation (kernel's times bandwidth, to 1 %), holds if the
    intervals of the FVU ratios of triangle, Epanechnikov and Gaussian to the rectangle, at matched L0, all lie within
    2 % (1/1.02 to 1.02). It does not hold if one lies outside. The ratio furthest from 1 is shown.
    """
    metric = "FVU ratio of the kernel furthest from the rectangle, at matched L0 and variance"
    arms: dict[str, Arm] = {}
    for width in sorted({_window_std(run) for run in evidence.runs} - {None}):
        near = evidence.ablation(
            lambda run, width=width: run["sae.kernel"] if width <= (_window_std(run) or 0) <= 1.01 * width else None,
            ("sae.kernel", "sae.bandwidth"))
        if "rectangle" in near and _size(near) > _size(arms):
            arms = near
    rectangle = arms.pop("rectangle", None)
    units = {kernel: mean_difference(evidence, arm, [rectangle], "fvu") for kernel, arm in arms.items()}
    ratios = {kernel: own.ratio() for kernel, own in units.items() if own.values}
    if not ratios:
        return not_measured(metric, *units.values(),
                            why="No JumpReLU runs that differ in their kernel alone, at one standard deviation.")
    caveats = [f"The {kernel} kernel is not measured, and the claim speaks of four." for kernel in KERNEL_STD
               if kernel != "rectangle" and kernel not in ratios]
    verdict = decide(
        holds=not caveats and all(own.is_above(1 / 1.02) and own.is_below(1.02) for own in ratios.values()),
        fails=any(own.is_above(1.02) or own.is_below(1 / 1.02) for own in ratios.values()))
    furthest = max(ratios, key=lambda kernel: abs(math.log(ratios[kernel].effect)))
    shown = ", ".join(f"{kernel} {show(own)}" for kernel, own in sorted(ratios.items()))
    return finding(evidence, verdict, metric, ratios[furthest], units.values(), caveats=caveats,
                   words=f"FVU ratio to the rectangle: {shown}, {over(ratios[furthest])}", kernel=furthest,
                   by_kernel=plain(evidence, ratios))


def _window_std(run: Record) -> float | None:
    """The standard deviation of a run's window; None where its record does not tell."""
    std, bandwidth = KERNEL_STD.get(run.get("sae.kernel")), number(run.get("sae.bandwidth"))
    return None if std is None or bandwidth is None else std * bandwidth


def _size(arms: Mapping[str, Arm]) -> tuple[int, int]:
    return len(arms), sum(len(arm.curves) for arm in arms.values())


def target_l0_loss(evidence: Evidence) -> Finding:
    """C12 holds if runs with sae.sparsity_loss=l0_target reach their target, the interval of the mean of
    |L0 / target - 1| ending below 0.05, on the frontier of the runs with the l0 loss, the interval of the FVU ratio to
    that curve at their L0 ending below 1.02. It does not hold if the miss begins above 0.05 or the ratio above 1.02.
    """
    metric = "mean |L0 / target - 1| of the target-L0 loss"
    arms = evidence.ablation(lambda run: run.get("sae.sparsity_loss"), ("sae.sparsity_loss",))
    if not {"l0", "l0_target"} <= arms.keys():
        return not_measured(metric, why="No JumpReLU runs with sae.sparsity_loss=l0_target beside l0, all else equal.")
    misses, ratios = Units(left_out=arms["l0_target"].left_out), Units(left_out=arms["l0"].left_out)
    for pair, curve in arms["l0_target"].curves.items():
        l0s = np.array([run["l0"] for run in curve.runs])
        targets = np.array([run["l0_target"] for run in curve.runs])
        misses.add(pair, np.abs(l0s / targets - 1).mean(), [curve], np.sort(l0s))
        if pair in arms["l0"].curves:
            _add_to_frontier(evidence, ratios, pair, curve, arms["l0"].curves[pair])
    miss, ratio = misses.estimate(), ratios.ratio()
    in_percent = miss.transformed(lambda share: 100 * share)
    verdict = decide(holds=miss.is_below(0.05) and ratio is not None and ratio.is_below(1.02),
                     fails=miss.is_above(0.05) or (ratio is not None and ratio.is_above(1.02)))
    return finding(evidence, verdict, metric, miss, [misses, ratios],
                   words=f"target missed by {show(in_percent, '.2f', ' %')}, FVU ratio to the curve of the l0 loss "
                         f"{show(ratio)}, {over(miss)}",
                   caveats=[] if ratio else ["No L0 within the l0 loss's range: whether it is the same frontier is not "
                                             "measured."],
                   fvu_ratio=ratio and ratio.as_json(evidence.names))


def _add_to_frontier(evidence: Evidence, ratios: Units, pair: Pair, curve: Curve, frontier: Curve) -> None:
    """Add the mean log ratio of the FVU of a curve's runs to a frontier at their L0s, of those within its range."""
    try:
        l0s, values = frontier.points("fvu", log=True)
    except ValueError as error:
        ratios.left_out.append(f"{evidence.where(pair)}: l0 loss: {error}")
        return
    inside = [run for run in curve.runs if min(l0s) <= run["l0"] <= max(l0s) and (number(run.get("fvu")) or 0) > 0]
    if outside := len(curve.runs) - len(inside):
        ratios.left_out.append(f"{evidence.where(pair)}: {outside} runs of the target-L0 loss without an FVU, or at an "
                               f"L0 outside {min(l0s):.4g} to {max(l0s):.4g}, where the l0 loss was measured")
    if inside:
        logs = [math.log(run["fvu"] / interpolate_at(l0s, values, run["l0"])) for run in inside]
        ratios.add(pair, np.mean(logs), [curve, frontier], np.sort([run["l0"] for run in inside]))


# What C13 compares, of which the last is shown only.
_NEEDED = {"ste_into_pre_acts": "STE into pre-activations / without", "jumprelu_l1": "JumpReLU + L1 / JumpReLU + L0",
           "relu_l0": "ReLU + L0 / JumpReLU + L0", "relu_l1": "ReLU + L1 / JumpReLU + L0"}


def what_is_needed(evidence: Evidence) -> Finding:
    """C13 holds if the intervals of three FVU ratios at matched L0 all lie above 1: JumpReLU with the STE into
    pre-activations too, over without (sae.ste_into_pre_acts); JumpReLU with the L1 penalty, and ReLU with the L0
    penalty, each over JumpReLU with the L0 penalty (sae.penalty). It does not hold if one of the three lies below 1.
    """
    units = {}
    flag = evidence.ablation(lambda run: run.get("sae.ste_into_pre_acts"), ("sae.ste_into_pre_acts",))
    if {True, False} <= flag.keys():
        units["ste_into_pre_acts"] = mean_difference(evidence, flag[True], [flag[False]], "fvu")
    square = {f"{variant}_{penalty}": _arm_of_square(evidence, variant, penalty)
              for variant in ("jumprelu", "relu") for penalty in ("l0", "l1")}
    published = square.pop("jumprelu_l0")
    units |= {name: mean_difference(evidence, arm, [published], "fvu") for name, arm in square.items()}
    ratios = {name: units[name].ratio() for name in _NEEDED if name in units and units[name].values}
    if not ratios:
        return not_measured(f"FVU ratio {_NEEDED['ste_into_pre_acts']}, at matched L0", *units.values(),
                            why="No JumpReLU runs that differ in sae.ste_into_pre_acts alone or in sae.penalty.")
    judged = [name for name in _NEEDED if name != "relu_l1"]
    caveats = [f"{_NEEDED[name]} is not measured, and the claim speaks of it." for name in judged if name not in ratios]
    verdict = decide(holds=not caveats and all(ratios[name].is_above(1) for name in judged),
                     fails=any(name in ratios and ratios[name].is_below(1) for name in judged))
    first = next(iter(ratios))
    words = ", ".join(f"{_NEEDED[name]} {show(own)}" for name, own in ratios.items())
    return finding(evidence, verdict, f"FVU ratio {_NEEDED[first]}, at matched L0", ratios[first], units.values(),
                   words=f"FVU ratio {words}, {over(ratios[first])}", caveats=caveats, ratios=plain(evidence, ratios))


def _arm_of_square(evidence: Evidence, variant: str, penalty: str) -> Arm:
    """The runs of an activation with a penalty, of the published form but for that."""
    return evidence.arm_of(f"{NAMES[variant]} + {penalty.upper()}", lambda run: (
        run.get("variant") == variant and run.get("sae.penalty") == penalty
        and is_published(run, varied=("sae.penalty",))))


CHECKS = {
    "C10": Check("one bandwidth works at every site", one_bandwidth),
    "C11": Check("kernel shape hardly matters", kernel_shape),
    "C12": Check("the target-L0 loss reaches its target", target_l0_loss),
    "C13": Check("activation and penalty both needed", what_is_needed),
}
