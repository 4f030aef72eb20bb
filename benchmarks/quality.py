"""``python -m benchmarks quality``: who reconstructs best at the same L0, everybody at their own best rate.

For each contestant and variant: (1) the learning rate, from a grid that grows while its best is at an edge, by FVU on
validation rows at L0 40, one seed; (2) at that rate, runs around L0 15 to 110 with every seed, scored on test rows and
interpolated at the L0s of the table; (3) one run at the contestant's own defaults. Where nothing but a coefficient (or
a target that is missed) sets L0, it is searched by the secant method on log-log axes.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.contestants import (
    CONTESTANTS,
    OURS,
    VARIANTS,
    Bench,
    Job,
    PeerAbsent,
    Record,
    RunFailed,
    find_cache,
    mean_and_spread,
)
from sae_zoo.frontier.pareto import interpolate_at
from sae_zoo.records import write_json

SUMMARY = "summary.json"
# The table's last column compares with the better of these.
RIVALS = ("sae-lens", "dictionary-learning")
_METRICS = ("fvu", "delta_lm_loss")
# Where L0 is not set exactly: L0s on both sides of the one at which rates are compared, and beyond the table's ends.
_AROUND, _BEYOND = 1.4, 1.35
_MOST_RUNS_A_CURVE = 5
# How near in log L0 a run has to be to what was aimed at, how often to aim at one L0, and between which neighbours a
# value may be interpolated: curves bend downwards on log-log axes, so a chord over a wide gap flatters.
_NEAR, _MOST_AIMS, _WIDEST_GAP = 0.15, 3, 2.5
_MOST_EXTENSIONS = 3

Train = Callable[[float], Record]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    shared_arguments(parser)
    parser.add_argument("--variants", type=_names(VARIANTS), default=list(VARIANTS), metavar="NAME,NAME,...",
                        help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--seeds", type=_numbers(int), default=[0, 1, 2], metavar="N,N,...")
    parser.add_argument("--lrs", type=_numbers(float), default=[3e-4, 1e-3, 2e-3, 4e-3], metavar="LR,LR,...",
                        help="the grid of learning rates that everybody starts with")


def shared_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``quality`` and ``frontier`` take alike."""
    parser.add_argument("--cache", metavar="DIR", help="a cache of activations; by default the one in outputs/cache")
    parser.add_argument("--d-sae", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--targets", type=_numbers(float), default=[20, 40, 80], metavar="L0,L0,...")
    parser.add_argument("--contestants", type=_names(CONTESTANTS), default=list(CONTESTANTS), metavar="NAME,NAME,...",
                        help=f"of {', '.join(CONTESTANTS)}")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmark/quality"), metavar="DIR",
                        help="one file for each finished run; what is there is not trained again")


def _numbers(kind: type) -> Callable[[str], list]:
    def parse(text: str) -> list:
        return [kind(part) for part in text.split(",")]

    parse.__name__ = "comma-separated numbers"
    return parse


def _names(known: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is unknown; choose from {', '.join(known)}")
        return names

    return parse


# The search, on curves of (control, record).


def next_control(points: Sequence[tuple[float, float]], wanted: float, *, rising: bool) -> float:
    """The control at which to expect an L0 of ``wanted``: a secant through the two points nearest to it, log-log.

    Args:
        points: (control, L0) pairs, at least one.
        rising: whether L0 rises with the control. A slope of the wrong sign, or below 0.2, or above 5, is taken for
            noise and cut; a step is at most a factor of 10.
    """
    sign = 1.0 if rising else -1.0
    log_points, goal = [(math.log(c), math.log(max(l0, 0.1))) for c, l0 in points], math.log(wanted)
    (log_c, log_l0), *others = sorted(log_points, key=lambda point: abs(point[1] - goal))
    others = [point for point in others if point[0] != log_c]
    slope = (others[0][1] - log_l0) / (others[0][0] - log_c) if others else sign
    slope = sign * min(5.0, max(0.2, sign * slope))
    step = (goal - log_l0) / slope
    return math.exp(log_c + max(-math.log(10), min(math.log(10), step)))


def at_l0(records: Sequence[Record], l0_key: str, key: str, at: float) -> float | None:
    """``key`` of a curve of runs at L0 ``at``, log-log between them; None outside them, where the two next to it are
    too far apart, or where a value cannot be.
    """
    points = {run[l0_key]: run[key] for run in records
              if run[key] is not None and run[key] > 0 and run[l0_key] is not None and run[l0_key] > 0}
    below, above = [l0 for l0 in points if l0 <= at], [l0 for l0 in points if l0 >= at]
    if not below or not above or min(above) / max(below) > _WIDEST_GAP:
        return None
    return interpolate_at(list(points), list(points.values()), at)


def bracket(train: Train, wanted: Sequence[float], within: tuple[float, float], controls: list[float], *, rising: bool,
            known: Sequence[tuple[float, float]]) -> list[Record]:
    """Runs whose validation L0s reach from ``within[0]`` or less to ``within[1]`` or more.

    Args:
        train: a run at a control.
        wanted: L0s to have a run near each of, by rising L0; the first and the last are aimed at again until they are
            far enough.
        controls: those already chosen for this curve; those of new runs are appended.
        known: (control, L0) of other runs that tell roughly where to begin, at least one unless ``controls`` are given.

    Returns:
        The runs at all ``controls``; they may fall short of ``within``: it gives up after some, or when twice the
        control (or half of it) makes no difference.
    """
    runs = [train(control) for control in controls]

    def own() -> list[tuple[float, float]]:
        return [(control, run["l0_validation"]) for control, run in zip(controls, runs, strict=True)]

    def aim(l0: float) -> None:
        controls.append(next_control(own() if len(runs) > 1 else [*own(), *known], l0, rising=rising))
        runs.append(train(controls[-1]))

    def stuck() -> bool:
        *before, (control, l0) = own()
        return any(abs(math.log(control / c)) >= math.log(2) and abs(l0 - other) <= 0.01 * other
                   for c, other in before)

    for l0 in wanted:
        for _ in range(_MOST_AIMS):
            if any(abs(math.log(max(found, 0.1) / l0)) < _NEAR for _, found in own()) or (len(runs) > 1 and stuck()):
                break
            aim(l0)
    for _ in range(_MOST_RUNS_A_CURVE):
        if stuck():
            break
        l0s = [found for _, found in own()]
        if min(l0s) > within[0]:
            aim(wanted[0])
        elif max(l0s) < within[1]:
            aim(wanted[-1])
        else:
            break
    return runs


# One contestant, one variant.


class Trial:
    """All runs of one contestant and variant.

    Args:
        base: the job that all others vary, seed and rate aside.
        targets: L0s of the table; rates are compared at the middle one.
    """

    def __init__(self, bench: Bench, base: Job, control: dict[str, Any], targets: Sequence[float],
                 say: Callable[[str], None]):
        self._bench, self._base, self._say = bench, base, say
        self.targets, self.middle = sorted(targets), sorted(targets)[len(targets) // 2]
        self.exact, self.rising = control["control"] == "k", control["control"] != "coefficient"
        # Where to begin, (control, L0): a target gives itself; the peer's default coefficient is a guess like another.
        self._known = [(self.middle, self.middle) if self.rising else (control["start"], self.middle)]
        self._controls: dict[float, list[float]] = {}

    def run(self, lr: float | None, sparsity: float | None, seed: int, *, defaults: bool = False) -> Record:
        job = replace(self._base, lr=lr, sparsity=sparsity, seed=seed, defaults=defaults)
        record = self._bench.record(job)
        self._say(f"{job}: L0 {record['l0']:.2f} FVU {record['fvu']:.4f} dead {record['dead_fraction']:.1%} "
                  f"{record['seconds']:.0f} s")
        return record

    def fvu_at_middle(self, lr: float, seed: int) -> float:
        """Validation FVU at the middle L0 at a rate; infinite where its runs fail or do not get there."""
        controls = self._controls.setdefault(lr, [])
        try:
            if self.exact:
                return self.run(lr, self.middle, seed)["fvu_validation"]
            runs = bracket(lambda control: self.run(lr, control, seed), (self.middle / _AROUND, self.middle * _AROUND),
                           (self.middle, self.middle), controls, rising=self.rising, known=self._known)
        except RunFailed as failed:
            self._say(str(failed))
            return math.inf
        found = at_l0(runs, "l0_validation", "fvu_validation", self.middle)
        if found is None:
            return math.inf
        if not self.rising:  # coefficients at one rate tell where to look at the next; a target is its own best guess
            self._known = [(control, run["l0_validation"]) for control, run in zip(controls, runs, strict=True)]
        return found

    def choose_lr(self, lrs: Sequence[float], seed: int) -> dict[float, float]:
        """Validation FVU by rate: those of the grid, and beyond its edge while the best is there."""
        found = {lr: self.fvu_at_middle(lr, seed) for lr in sorted(lrs)}
        for _ in range(_MOST_EXTENSIONS):
            best = min(found, key=found.get)
            if best not in (min(found), max(found)):
                break
            beyond = best * 2 if best == max(found) else best / 2
            found[beyond] = self.fvu_at_middle(beyond, seed)
        return found

    def curves(self, lr: float, seeds: Sequence[int]) -> list[list[Record]]:
        """At a rate, the runs of each seed by rising L0, from below the first target to above the last."""
        if self.exact:
            return [[self.run(lr, target, seed) for target in self.targets] for seed in seeds]
        low, high = self.targets[0] / _BEYOND, self.targets[-1] * _BEYOND
        controls = list(self._controls[lr])
        bracket(lambda control: self.run(lr, control, seeds[0]), (low, *self.targets, high),
                (self.targets[0], self.targets[-1]), controls, rising=self.rising, known=self._known)
        return [sorted((self.run(lr, control, seed) for control in controls), key=lambda run: run["l0"])
                for seed in seeds]

    def at_target(self, curve: Sequence[Record], key: str, target: float) -> float | None:
        """A test score at a target; where k sets L0, at that k."""
        if self.exact:
            return next(run[key] for run in curve if run["sparsity"] == target)
        return at_l0(curve, "l0", key, target)


def measure(bench: Bench, base: Job, lrs: Sequence[float], targets: Sequence[float], seeds: Sequence[int],
            say: Callable[[str], None]) -> dict[str, Any]:
    """Everything about one contestant and variant.

    Raises:
        PeerAbsent: if it is a peer that is not there, or that does not have the variant.
        RunFailed: if every rate fails, or a run at the best one.
    """
    control = bench.control(base.contestant, base.variant)
    trial = Trial(bench, base, control, targets, say)
    by_lr = trial.choose_lr(lrs, seeds[0])
    lr = min(by_lr, key=by_lr.get)
    if math.isinf(by_lr[lr]):
        raise RunFailed(f"{base.contestant} {base.variant} got to L0 {trial.middle:g} at none of the rates {[*by_lr]}")
    curves = trial.curves(lr, seeds)
    runs = [run for curve in curves for run in curve]
    at: dict[str, dict[str, Any]] = {}
    for target in trial.targets:
        at[f"{target:g}"] = {}
        for key in _METRICS:
            by_seed = [trial.at_target(curve, key, target) for curve in curves]
            mean, spread = mean_and_spread(by_seed)
            at[f"{target:g}"] |= {key: mean, f"{key}_spread": spread, f"{key}_by_seed": by_seed}
    own = trial.run(None, None if control["control"] == "coefficient" else trial.middle, seeds[0], defaults=True)
    return {
        "versions": bench.versions(base.contestant), "lr": lr,
        "fvu_validation_by_lr": {f"{rate:g}": None if math.isinf(fvu) else fvu for rate, fvu in by_lr.items()},
        "lr_at_edge": lr in (min(by_lr), max(by_lr)), "at": at,
        "curve": [[run["sparsity"], run["l0_validation"]] for run in curves[0]],
        "alive_share": 1 - max(run["dead_fraction"] for run in runs),
        "relative_reconstruction_bias": mean_and_spread(run["relative_reconstruction_bias"] for run in runs)[0],
        "seconds": mean_and_spread(run["seconds"] for run in runs)[0], "settings": runs[0]["settings"],
        "notes": runs[0]["notes"],
        "defaults": {key: own[key] for key in ("l0", "fvu", "delta_lm_loss", "dead_fraction", "seconds", "settings")},
    }


def add_ratios(of_variant: dict[str, dict[str, Any]]) -> None:
    """Give every contestant its ratio to the best rival, ``{metric}_ratio``, at each target: below 1 is better."""
    rivals = [of_variant[name] for name in RIVALS if "at" in of_variant.get(name, {})]
    for result in of_variant.values():
        for target, at in result.get("at", {}).items():
            for key in _METRICS:
                best = min((rival["at"][target][key] for rival in rivals if rival["at"][target][key] is not None),
                           default=None)
                at[f"{key}_ratio"] = None if best is None or at[key] is None else at[key] / best


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The benchmark; prints its tables and returns what ``--json`` shows.

    Raises:
        ValueError: in one line, for whatever is wrong with the arguments or the cache.
    """

    def say(line: str) -> None:
        print(line, flush=True)

    with Bench(find_cache(args.cache), args.out, args.peers_dir, threads=args.threads) as bench:
        setting = {"data_id": bench.cache.data_id, "d_in": bench.cache.d_in, "d_sae": args.d_sae, "batch": args.batch,
                   "steps": args.steps, "seeds": args.seeds, "targets": args.targets, "threads": args.threads}
        variants = _measured_before(args.out / SUMMARY, setting)
        for variant in args.variants:
            variants.setdefault(variant, {})
            for contestant in args.contestants:
                base = Job(contestant=contestant, variant=variant, d_sae=args.d_sae, batch=args.batch, steps=args.steps,
                           seed=0, lr=None, sparsity=None)
                try:
                    result = measure(bench, base, args.lrs, args.targets, args.seeds, say)
                except PeerAbsent as absent:
                    result = {"absent": str(absent)}
                variants[variant][contestant] = result
            add_ratios(variants[variant])
            result = {"quality": setting, "variants": variants}
            write_json(args.out / SUMMARY, result)
    print("\n" + format_tables(variants))
    return result


def _measured_before(summary: Path, setting: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The variants of ``summary`` where it is of this ``setting``: a table may be filled in several sittings."""
    if not summary.exists():
        return {}
    before = json.loads(summary.read_text())
    return before["variants"] if before["quality"] == setting else {}


# Tables.


def _cell(mean: float | None, spread: float | None = None, form: str = ".4f") -> str:
    return "-" if mean is None else f"{mean:{form}}" + ("" if spread is None else f" ± {spread:{form}}")


def align(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as columns, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]),
                                *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
                     for row in rows)


def _settings(settings: dict[str, Any], notes: Sequence[str]) -> str:
    return ", ".join([*(f"{key}={value}" for key, value in sorted(settings.items())), *notes])


def format_tables(variants: dict[str, dict[str, Any]]) -> str:
    """A table for each variant, what is absent, and every contestant's settings."""
    parts = []
    for variant, of_variant in variants.items():
        measured = {name: result for name, result in of_variant.items() if "at" in result}
        if measured:
            targets = list(next(iter(measured.values()))["at"])
            columns = [(key, target) for key in _METRICS for target in targets]
            rows = [[variant, "version", "lr", *(f"{'FVU' if key == 'fvu' else 'dLM'} at {t}" for key, t in columns),
                     "alive", "seconds", *(f"/ best, {t}" for t in targets)]]
            for name, result in measured.items():
                at = result["at"]
                rows.append([name, next(iter(result["versions"].values())),
                             f"{result['lr']:g}" + ("!" if result["lr_at_edge"] else ""),
                             *(_cell(at[t][key], at[t][f"{key}_spread"]) for key, t in columns),
                             f"{result['alive_share']:.1%}", f"{result['seconds']:.0f}",
                             *(_cell(at[t]["fvu_ratio"], form=".3f") for t in targets)])
            parts.append(align(rows))
        for name, result in measured.items():
            own = result["defaults"]
            parts.append(f"{name} at its defaults: L0 {own['l0']:.1f}, FVU {own['fvu']:.4f}, dead "
                         f"{own['dead_fraction']:.1%}; {_settings(own['settings'], [])}")
        parts += [f"{name}: absent, {result['absent']}" for name, result in of_variant.items() if "absent" in result]
        parts += [f"{name} settings: {_settings(result['settings'], result['notes'])}"
                  for name, result in measured.items()]
        parts.append("")
    parts.append(f"/ best: FVU over that of the better of {' and '.join(RIVALS)}; alive: the least of all runs; !: the "
                 "best rate is the last that was tried")
    return "\n".join(parts)


__all__ = ["OURS", "RIVALS", "SUMMARY", "VARIANTS", "add_arguments", "run"]
