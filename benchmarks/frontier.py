"""``python -m benchmarks frontier``: seconds to a frontier of two variants at three targets.

Everybody trains anew, one run after the other, at the learning rate that ``quality`` found best for them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.contestants import OURS, Bench, Job, PeerAbsent, Record, find_cache
from benchmarks.quality import SUMMARY, align, at_l0, next_control, shared_arguments

VARIANTS = ("topk", "jumprelu")
# Two L0s that differ by less are taken for the same.
_SAME_L0 = 0.01


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line takes; ``--out`` is where ``quality`` left its results."""
    shared_arguments(parser)
    parser.add_argument("--seed", type=int, default=0)


def measured(summary: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """What ``quality`` has found out by (contestant, variant); empty if it was not run."""
    if not summary.exists():
        return {}
    variants = json.loads(summary.read_text())["variants"]
    return {(name, variant): result for variant, of_variant in variants.items()
            for name, result in of_variant.items() if "lr" in result}


def at_least_as_good(point: Record, ours: Sequence[Record], theirs: Sequence[Record]) -> bool | None:
    """Whether ``point`` of ours has an FVU at most theirs at its L0.

    At the L0 of a run of theirs, against that run; between two, against the line between them on log-log axes; beyond
    all of them only where one side is worse in both, else None.

    Args:
        point: one of ``ours``.
        theirs: the peer's runs of the same variant.
    """
    near = min(theirs, key=lambda run: abs(run["l0"] / point["l0"] - 1))
    if abs(near["l0"] / point["l0"] - 1) <= _SAME_L0:
        return point["fvu"] <= near["fvu"]
    line = at_l0(theirs, "l0", "fvu", point["l0"])
    if line is not None:
        return point["fvu"] <= line
    if any(run["l0"] > point["l0"] and run["fvu"] >= point["fvu"] for run in theirs):
        return True
    if any(run["l0"] < point["l0"] and run["fvu"] < point["fvu"] for run in theirs):
        return False
    return None


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The benchmark; prints its table and returns what ``--json`` shows.

    Raises:
        ValueError: in one line, for whatever is wrong with the arguments or the cache, or if a run fails.
    """
    found = measured(args.out / SUMMARY)
    contestants: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch, \
            Bench(find_cache(args.cache), Path(scratch), args.peers_dir, threads=args.threads) as bench:
        for name in args.contestants:
            try:
                contestants[name] = _frontier(bench, name, found, args)
            except PeerAbsent as absent:
                contestants[name] = {"absent": str(absent)}
        setting = {"data_id": bench.cache.data_id, "d_sae": args.d_sae, "batch": args.batch, "steps": args.steps,
                   "seed": args.seed, "targets": args.targets, "threads": args.threads}
    ours = contestants.get(OURS, {}).get("points")
    for name, result in contestants.items():
        if ours and name != OURS and "points" in result:
            result["ours_at_least_as_good"] = {
                variant: [at_least_as_good(point, ours[variant], result["points"][variant]) for point in ours[variant]]
                for variant in result["points"]}
            result["seconds_over_ours"] = result["seconds"] / sum(point["seconds"] for variant in result["points"]
                                                                  for point in ours[variant])
    print(format_table(contestants, args.targets))
    return {"frontier": setting, "contestants": contestants}


def _frontier(bench: Bench, name: str, found: dict[tuple[str, str], dict[str, Any]],
              args: argparse.Namespace) -> dict[str, Any]:
    """The points of one contestant, for the variants that it has.

    Raises:
        PeerAbsent: if it is a peer that is not there, or one whose coefficients ``quality`` has not searched for.
    """
    result: dict[str, Any] = {"versions": bench.versions(name), "lr": {}, "points": {}}
    for variant in VARIANTS:
        if not bench.has(name, variant):
            continue
        control = bench.control(name, variant)["control"]
        known = found.get((name, variant))
        if control == "coefficient" and known is None:
            raise PeerAbsent(f"its {variant} has a coefficient and no target; let quality find the coefficients first")
        lr = result["lr"][variant] = known and known["lr"]
        result["points"][variant] = []
        for target in args.targets:
            sparsity = next_control(known["curve"], target, rising=False) if control == "coefficient" else target
            record = bench.record(Job(contestant=name, variant=variant, d_sae=args.d_sae, batch=args.batch,
                                      steps=args.steps, seed=args.seed, lr=lr, sparsity=sparsity))
            print(f"{name} {variant} {target:g}: L0 {record['l0']:.2f} FVU {record['fvu']:.4f} "
                  f"{record['seconds']:.0f} s", flush=True)
            result["points"][variant].append({key: record[key] for key in ("l0", "fvu", "delta_lm_loss", "seconds")})
    result["seconds"] = sum(point["seconds"] for points in result["points"].values() for point in points)
    return result


def format_table(contestants: dict[str, dict[str, Any]], targets: Sequence[float]) -> str:
    """One row a contestant: seconds, then L0 and FVU of every point, and whether ours is at least as good there."""
    header = [f"{variant} {target:g}" for variant in VARIANTS for target in targets]
    rows = [["", "version", "points", "seconds", "/ ours", *header]]
    notes = []
    for name, result in contestants.items():
        if "absent" in result:
            notes.append(f"{name}: absent, {result['absent']}")
            continue
        cells = []
        for variant in VARIANTS:
            points = result["points"].get(variant)
            good = result.get("ours_at_least_as_good", {}).get(variant, [None] * len(targets))
            cells += ["-"] * len(targets) if points is None else [
                f"{p['fvu']:.4f} at {p['l0']:.1f}" + {True: " yes", False: " no", None: ""}[g]
                for p, g in zip(points, good, strict=True)]
        ratio = result.get("seconds_over_ours")
        n_points = sum(map(len, result["points"].values()))
        rows.append([name, next(iter(result["versions"].values())), str(n_points), f"{result['seconds']:.0f}",
                     "" if ratio is None else f"{ratio:.2f}", *cells])
        notes += [f"{name} {variant}: quality has not found its best rate; its default was used"
                  for variant, lr in result["lr"].items() if lr is None]
    return "\n".join([align(rows), *notes, "FVU at the measured L0; yes: ours is at least as good at its L0; / ours: "
                                           "seconds over ours for the same points"])
