"""The runs of a paper: finished ones, by site and layer, refused where they must not stand side by side."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sae_zoo.frontier.pareto import SeedGroup, group_seeds, label_of
from sae_zoo.frontier.runs import Record, check_comparable, read_runs, run_name, some
from sae_zoo.frontier.style import Style, styles

# Where in the language model: (site, layer); ("", 0) where the activations came without one.
Place = tuple[str, int]

# The paper's order of rows; other sites follow by name.
_SITES = ("residual", "mlp", "attention")
# What all runs of one paper share; those of one place agree on sae_zoo.frontier.runs.COMPARABLE besides.
_SHARED = ("lm", "d_sae", "n_tokens")


class NotMeasured(ValueError):
    """The runs lack what a figure shows."""


@dataclass(frozen=True)
class Runs:
    """Finished runs that may share figures.

    Attributes:
        directories: where they were read from.
        places: the groups of seeds at each (site, layer), sites in the paper's order, layers ascending.
        notes: a line for each label some of whose runs are in no figure.
        failed: a line for each run that has not finished.
    """

    directories: tuple[Path, ...]
    places: dict[Place, list[SeedGroup]]
    notes: list[str]
    failed: list[str]

    @property
    def finished(self) -> list[Record]:
        """All finished runs, by place."""
        return [run for groups in self.places.values() for group in groups for run in group.runs]

    @property
    def look(self) -> dict[str, Style]:
        """label -> style, of all places."""
        return styles(group.label for groups in self.places.values() for group in groups)

    @property
    def setting(self) -> str:
        """What all runs share, for a figure's head."""
        run = self.finished[0]
        source = f"data {str(run['data_id'])[:12]}" if run["lm"] is None else run["lm"]
        return f"{source}  ·  d_sae {run['d_sae']:,}  ·  {run['n_tokens']:,} training tokens"


def _place(record: Record) -> Place:
    hook = record.get("hook")
    if hook is None:
        return "", 0
    site, _, layer = hook.rpartition(".")
    if not site or not layer.isdecimal():
        raise ValueError(f"the hook of {run_name(record)} is {hook!r}; <site>.<layer> is expected, "
                         "e.g. residual.3")
    return site, int(layer)


def _position(place: Place) -> tuple:
    site, layer = place
    return _SITES.index(site) if site in _SITES else len(_SITES), site, layer


def _config(run: Record) -> frozenset[tuple[str, str]]:
    """How a run's SAE and recipe were configured, as far as its record tells; an older one tells nothing."""
    return frozenset((key, json.dumps(value)) for key, value in run.items() if key.startswith(("sae.", "recipe.")))


def _main_config(label: str, runs: list[Record]) -> tuple[list[Record], list[str]]:
    """Those of ``runs`` (of one label) that have the config of most, and a line about the others (ablations, say).

    Raises:
        ValueError: if two configs have as many runs.
    """
    counts = Counter(map(_config, runs)).most_common()
    if len(counts) == 1:
        return runs, []
    configs = [config for config, _ in counts]
    differ = sorted({key for key, _ in frozenset.union(*configs) - frozenset.intersection(*configs)})
    what = f"the runs of {label} have {len(counts)} configs, which differ in {some(differ)}"
    if counts[0][1] == counts[1][1]:
        raise ValueError(f"{what}; none is that of most runs: give their sweeps one by one, or a label of its own to "
                         "each (sae.name=...)")
    others = [run_name(run) for run in runs if _config(run) != configs[0]]
    return [run for run in runs if _config(run) == configs[0]], [
        f"note: {what}; that of {counts[0][1]} runs is drawn, {len(others)} are not: {some(others)}"]


def load_runs(directories: Iterable[Path | str]) -> Runs:
    """The finished runs in and below ``directories``, sorted for the figures.

    A curve is of one config but for target and seed. Where a label has runs of several, as ablations have, those of
    the config that most of them have are taken, and a note says which are not.

    Raises:
        ValueError: if a folder does not exist or holds no record, no run has finished, the finished runs differ in what
            must be equal (language model, d_sae and training tokens everywhere, data and d_in at one site and layer),
            or no config of a label has most runs.
    """
    directories = [Path(directory) for directory in directories]
    _, finished, failed = read_runs(directories)
    check_comparable(finished, _SHARED)
    of_label: dict[str, list[Record]] = {}
    for record in finished:
        of_label.setdefault(label_of(record), []).append(record)
    at: dict[Place, list[Record]] = {}
    notes: list[str] = []
    for label, runs in sorted(of_label.items()):
        main, lines = _main_config(label, runs)
        notes += lines
        for record in main:
            at.setdefault(_place(record), []).append(record)
    for runs in at.values():
        check_comparable(runs)
    places = {place: group_seeds(at[place]) for place in sorted(at, key=_position)}
    return Runs(tuple(directories), places, notes, failed)
