"""What the claims rest on: finished, complete runs as curves of arms, measured files, and what was left out and why."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae_zoo.frontier.labels import NAMES
from sae_zoo.frontier.pareto import label_of
from sae_zoo.frontier.runs import COMPARABLE, run_name
from sae_zoo.records import FINISHED, RECORD, read_records

Record = Mapping[str, Any]
Group = tuple  # the values of COMPARABLE: runs are compared within one only
Pair = tuple[Group, int]  # group and seed

# What the paper's arms are, of the options that ablations change; a run that says otherwise is in no arm of a frontier.
PUBLISHED = {
    "relu": {"sae.penalty": "l1"},
    "topk": {"sae.recall": 1.0},
    "jumprelu": {"sae.penalty": "l0", "sae.sparsity_loss": "l0", "sae.kernel": "rectangle", "sae.threshold_as": "log",
                 "sae.ste_into_pre_acts": False},
}
# Fields of a recipe that an option of the SAE, or the group, has the last word on.
_OVERRIDDEN = {"recipe.bandwidth", "recipe.auxk_coefficient", "recipe.d_sae"}
# What two machines may differ by in L0 and FVU after the same training; 0.6 % of FVU was seen (analysis/results).
_ROUNDING = 0.01
# Measurements that are no runs.
STE, STEP = "ste.json", "step.json"


@dataclass(frozen=True)
class Curve:
    """Runs that differ in nothing but what sets their L0."""

    runs: tuple[Record, ...]

    def points(self, metric: str, *, log: bool) -> tuple[list[float], list[float]]:
        """L0s and values of ``metric`` of the runs that have it.

        Raises:
            ValueError: if fewer than two have it, or with ``log`` a value is not above zero: leaving it out would make
                the curve look worse there than it is.
        """
        measured = [run for run in self.runs if number(run.get(metric)) is not None]
        if len(measured) < 2:
            raise ValueError(f"{metric} is measured at {len(measured)} L0s; a curve needs two")
        l0s, values = [run["l0"] for run in measured], [run[metric] for run in measured]
        if log and min(values) <= 0:
            worst = measured[values.index(min(values))]
            raise ValueError(f"{metric} is {min(values):g} in {run_name(worst)}, which has no logarithm")
        return l0s, values


@dataclass
class Arm:
    """One side of a comparison.

    Attributes:
        name: for people.
        curves: by (group, seed).
        left_out: what did not become a curve, and why; lines.
    """

    name: str
    curves: dict[Pair, Curve] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def number(value: Any) -> float | None:
    """``value`` if it is a finite number, else None."""
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def group_of(run: Record) -> Group:
    return tuple(run[key] for key in COMPARABLE)


def options_of(run: Record, *, without: Iterable[str] = ()) -> frozenset[tuple[str, str]]:
    """How a run was trained, apart from its L0 and its seed: all of its sae.* and recipe.* as (key, JSON); 4 is 4.0."""
    skipped = _OVERRIDDEN | set(without)
    return frozenset((key, json.dumps(float(value) if type(value) is int else value)) for key, value in run.items()
                     if key.startswith(("sae.", "recipe.")) and key not in skipped)


def is_published(run: Record, *, varied: Iterable[str] = ()) -> bool:
    """Whether a run's variant has the form that PUBLISHED gives it, ``varied`` keys aside."""
    form = PUBLISHED.get(run.get("variant"), {})
    return all(run.get(key, value) == value for key, value in form.items() if key not in varied)


class Evidence:
    """All that was read.

    Attributes:
        runs: finished runs that say what they are comparable with.
        left_out: the other records, and copies, with the reason; lines.
        ste, step: the different contents of files of these names, with their paths.
        names: what a group is called.
    """

    def __init__(self, directories: Sequence[Path | str]):
        """Read everything in and below ``directories``.

        Raises:
            ValueError: if one is no folder, or holds neither a record nor a measured file, or a file is damaged.
        """
        files = {name: _read_all(directories, name) for name in (STE, STEP)}
        self.ste, self.step = files[STE], files[STEP]
        # A folder may hold nothing but such a file.
        records = read_records([directory for directory in map(Path, directories) if any(directory.rglob(RECORD))
                                or not any(any(directory.rglob(name)) for name in files)])
        self.runs, self.left_out = [], []
        seen: dict[str, Record] = {}
        for record in {Path(record["run_dir"]).resolve(): record for record in records}.values():
            content = json.dumps({key: value for key, value in record.items() if key != "run_dir"}, sort_keys=True)
            reason = _why_not(record)
            if reason is None and content in seen:
                reason = f"a copy of {run_name(seen[content])}"
            seen.setdefault(content, record)
            if reason is None:
                self.runs.append({**record, "label": label_of(record)})
            else:
                self.left_out.append(f"{run_name(record)}: {reason}")
        self.names = _group_names({group_of(run) for run in self.runs})
        self._popularity = Counter(options_of(run) for run in self.runs)

    @property
    def lms(self) -> list[str]:
        """The language models of the runs, by name."""
        return sorted({run["lm"] for run in self.runs if run["lm"] is not None})

    def of_lm(self, lm: str) -> Evidence:
        """The same with the runs on one language model alone."""
        part = copy(self)
        part.runs = [run for run in self.runs if run["lm"] == lm]
        return part

    def where(self, pair: Pair) -> str:
        """A pair's name for people."""
        return f"{self.names[pair[0]]}, seed {pair[1]}"

    def arm(self, label: str, keep: Callable[[Record], bool] = lambda run: True) -> Arm:
        """The runs of a label that ``keep`` keeps, in the label's published form."""
        arm = self.arm_of(NAMES[label], lambda run: run["label"] == label and keep(run) and is_published(run))
        others = sum(run["label"] == label and keep(run) and not is_published(run) for run in self.runs)
        if others:
            arm.left_out.append(f"{arm.name}: {others} runs of another form than the published one, which belong to "
                                "the ablations")
        return arm

    def arm_of(self, name: str, keep: Callable[[Record], bool]) -> Arm:
        """The runs that ``keep`` keeps; where a group has several configurations, those of its main one, which is that
        of most runs of all groups.
        """
        arm = Arm(name)
        for group, runs in _by(filter(keep, self.runs), group_of).items():
            self._add_curves(arm, self._main(arm, group, _by(runs, options_of)))
        return arm

    def ablation(self, value_of: Callable[[Record], Hashable | None], varied: Sequence[str]) -> dict[Hashable, Arm]:
        """Arms of JumpReLU runs that differ in nothing but ``varied`` (and L0 and seed), by what ``value_of`` says of a
        run (None: nothing). Only groups with two values or more are in them; of several families of such runs a group
        has the one with most runs.
        """
        runs = [run for run in self.runs if run.get("variant") == "jumprelu" and is_published(run, varied=varied)
                and value_of(run) is not None]
        arms: dict[Hashable, Arm] = {}
        for group, own in _by(runs, group_of).items():
            families = _by(own, lambda run: options_of(run, without=varied))
            families = {key: family for key, family in families.items() if len({*map(value_of, family)}) > 1}
            chosen = Arm("JumpReLU")
            for value, part in _by(self._main(chosen, group, families), value_of).items():
                arm = arms.setdefault(value, Arm(f"JumpReLU with {varied[0].removeprefix('sae.')} {value}"))
                self._add_curves(arm, part)
                arm.left_out += [line for line in chosen.left_out if line not in arm.left_out]
        return arms

    def _main(self, arm: Arm, group: Group, configurations: Mapping[frozenset, list[Record]]) -> list[Record]:
        """The runs of the configuration that most runs of all groups have; none, and a line, where two have as many."""
        if not configurations:
            return []
        counts = {key: (sum(self._popularity[o] for o in {*map(options_of, runs)}), len(runs))
                  for key, runs in configurations.items()}
        best = max(counts.values())
        main = [key for key, count in counts.items() if count == best]
        differing = {key for key, _ in frozenset.union(*configurations) - frozenset.intersection(*configurations)}
        what = (f"{self.names[group]}: {arm.name} has {len(configurations)} configurations, which differ in "
                f"{', '.join(sorted(differing))}")
        if len(main) > 1:
            arm.left_out.append(f"{what}; none has most runs, so none is taken for the main one")
            return []
        if len(configurations) > 1:
            others = sum(map(len, configurations.values())) - len(configurations[main[0]])
            arm.left_out.append(f"{what}; that with most runs is taken, the other {others} runs are not")
        return configurations[main[0]]

    def _add_curves(self, arm: Arm, runs: Iterable[Record]) -> None:
        for pair, own in _by(runs, lambda run: (group_of(run), run["seed"])).items():
            repeats = list(_by(own, _setting).values())
            kept = [max(same, key=lambda run: number(run.get("n_lm_targets")) or 0) for same in repeats]
            if not all(map(_agree, repeats)) or len({run["l0"] for run in kept}) < len(kept):
                arm.left_out.append(f"{self.where(pair)}: two runs of {arm.name} have the same target or the same L0; "
                                    "they differ in something that records do not tell")
            else:
                arm.curves[pair] = Curve(tuple(kept))


def _agree(runs: Sequence[Record]) -> bool:
    """Whether runs of one configuration, seed and target are one training that was done more than once, as two sweeps
    do that share an arm: to the same numbers, or on another machine to numbers that rounding explains. It counts once,
    by the one that was scored on most tokens.
    """
    for key in ("l0", "fvu"):
        values = [run.get(key) for run in runs]
        if len({*values}) > 1 and (None in map(number, values) or max(values) > (1 + _ROUNDING) * min(values)):
            return False
    return True


def _setting(run: Record) -> tuple:
    """What decides a run's sparsity: (L0 target, explicit coefficient)."""
    return run.get("l0_target"), run.get("sparsity_coefficient")


def _by(runs: Iterable[Record], key: Callable[[Record], Hashable]) -> dict[Hashable, list[Record]]:
    parts = defaultdict(list)
    for run in runs:
        parts[key(run)].append(run)
    return dict(parts)


def _why_not(record: Record) -> str | None:
    """Why a record is no evidence; None if it is."""
    if record.get("status") != FINISHED:
        return f"not finished: {' '.join(str(record.get('error')).split())}"
    missing = [key for key in (*COMPARABLE, "seed", "l0") if key not in record]
    missing += [key for key in ("data_id", "d_in", "d_sae", "n_tokens", "seed") if record.get(key, 0) is None]
    if not (record.get("label") or record.get("variant")):
        missing.append("label")
    if missing:
        return f"its record does not tell {', '.join(missing)}"
    l0 = number(record["l0"])
    return None if l0 is not None and l0 > 0 else f"its L0 is {record['l0']}"


def _group_names(groups: Iterable[Group]) -> dict[Group, str]:
    """The hook of each group, and whatever else differs between groups."""
    groups = [dict(zip(COMPARABLE, group, strict=True)) for group in groups]
    differ = {key for key in COMPARABLE if len({group[key] for group in groups}) > 1}
    shown = sorted(differ - {"hook", "data_id"})
    names = {tuple(group.values()): ", ".join([str(group["hook"] or group["data_id"]),
                                               *(f"{key} {group[key]}" for key in shown)]) for group in groups}
    counts = Counter(names.values())
    return {group: name if counts[name] == 1
            else f"{name}, data_id {dict(zip(COMPARABLE, group, strict=True))['data_id']}"
            for group, name in names.items()}


def _read_all(directories: Iterable[Path | str], name: str) -> list[tuple[Path, Any]]:
    """Every file of that name with a content of its own, as (path, JSON).

    Raises:
        ValueError: if one is not JSON.
    """
    found: dict[str, tuple[Path, Any]] = {}
    for path in sorted({path for directory in directories for path in Path(directory).rglob(name)}):
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}; write it again") from None
        found.setdefault(json.dumps(content, sort_keys=True), (path, content))
    return list(found.values())
