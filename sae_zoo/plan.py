"""``python -m sae_zoo.plan <overrides of sae_zoo.train>``: bytes, memory, FLOPs and time, before any of them is spent.

No weights are loaded, and nothing is written but for a moment a file that times the disk. With ``-m`` the jobs are
summed. What cannot fit on this machine is said in one line, with what would, and exit status 2. ``--json`` prints one
object as the last line of the output.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from transformers import PreTrainedModel

from sae_zoo.config import run_entry_point
from sae_zoo.data.array_file import open_array
from sae_zoo.data.cache import MANIFEST, make_cache_id
from sae_zoo.data.module import START_ROWS, VALIDATION_ROWS
from sae_zoo.data.norms import describe
from sae_zoo.data.remote import RemoteFolder
from sae_zoo.lm.hooks import HookPoint
from sae_zoo.lm.skeleton import n_bytes
from sae_zoo.planning.job import Harvest, Job, Online
from sae_zoo.planning.lm import LMCost, harvest_cost, hook_widths, lm_cost
from sae_zoo.planning.machine import (
    Rates,
    calibration_size,
    disk_rates,
    existing_folder,
    lm_rate,
    sae_rates,
    this_machine,
)
from sae_zoo.planning.report import Plan, Planned, as_json, text
from sae_zoo.planning.sae import sae_cost
from sae_zoo.records import digest
from sae_zoo.running.checks import Config, value_at
from sae_zoo.running.settings import CacheSettings, TrainSettings
from sae_zoo.running.turns import stream_key

# Overrides that make a phase smaller, and the least that is advised; each is halved until the phase fits.
_REMEDIES = {"harvest": {"lm.batch_size": 1, "data.n_tokens.train": 100_000},
             "training": {"d_sae": 1024, "data.rows_per_shard": 16384, "data.buffer_rows": 16384,
                          "recipe.batch_size": 256},
             "evaluation": {"lm.batch_size": 1, "d_sae": 1024}}


def _changed(config: Config, values: Mapping[str, Any]) -> Config:
    """A copy of ``config`` with other values at dotted keys."""
    changed = copy.deepcopy(dict(config))
    for key, value in values.items():
        group, _, name = key.rpartition(".")
        (value_at(changed, group) if group else changed)[name] = value
    return changed


def _caches(settings: TrainSettings) -> CacheSettings:
    """The caches of a job that has a language model."""
    assert isinstance(settings.source.data, CacheSettings)
    return settings.source.data


class _Planner:
    """Makes jobs of settings; what several of them share is looked at once."""

    def __init__(self, settings: TrainSettings):
        self.device = settings.trainer.device
        folder = Path(settings.config["output_dir"])
        self.machine = this_machine(folder, self.device)
        self.disk = disk_rates(existing_folder(folder))
        self._known: dict[str, Any] = {}

    def _once(self, make: Callable[[], Any], *of: Any) -> Any:
        key = digest(of)
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def _model(self, settings: TrainSettings) -> PreTrainedModel:
        return self._once(lambda: _caches(settings).lm.skeleton(self.device), "model", settings.config["lm"])

    def hooks(self, settings: TrainSettings) -> list[HookPoint]:
        """The hook point of a job, and those that are harvested with it."""
        model, hook = self._model(settings), settings.source.hook
        assert hook is not None  # of a language model
        where = dict.fromkeys([(hook.layer, hook.site), *hook.along])
        return [_caches(settings).lm.hook(model, *place) for place in where]

    def _lm_cost(self, settings: TrainSettings) -> LMCost:
        model, hook, lm = self._model(settings), self.hooks(settings)[0], _caches(settings).lm
        return self._once(lambda: lm_cost(model, hook, batch_size=lm.batch_size, context_size=lm.context_size),
                          "lm", settings.config["lm"], hook.name)

    def _harvest(self, settings: TrainSettings) -> Harvest:
        model, hooks, spec = self._model(settings), self.hooks(settings), _caches(settings).stored
        lm = _caches(settings).lm
        rows = {"batch_size": lm.batch_size, "context_size": lm.context_size}
        of_hook = self._lm_cost(settings)
        cost, widths = of_hook.to_hook, [of_hook.d_in]
        if len(hooks) > 1:
            cost, widths = self._once(lambda: (harvest_cost(model, hooks, **rows), hook_widths(model, hooks)),
                                      "harvest", settings.config["lm"], sorted(hook.name for hook in hooks))
        return Harvest(widths=tuple(widths), n_tokens=spec.n_tokens_here, dtype=spec.dtype,
                       rows_per_shard=spec.rows_per_shard, cost=cost, weight_bytes=n_bytes(model), **rows)

    def job(self, settings: TrainSettings) -> Job:
        """The job that ``settings`` ask for.

        Raises:
            ValueError: for whatever is wrong with it.
        """
        config, data, evaluation = settings.config, settings.source.data, settings.evaluation
        online, n_lm_tokens = None, evaluation.n_lm_tokens
        if isinstance(data, CacheSettings):
            harvest, lm = self._harvest(settings), self._lm_cost(settings)
            d_in, n_rows = lm.d_in, harvest.n_tokens
            if data.buffer_rows is not None:
                online = Online(n_tokens=data.spec.n_tokens["train"], buffer_rows=data.buffer_rows)
            # Of a row that the language model reads, the first token is no activation.
            context_size = data.lm.context_size
            n_lm_tokens = min(n_lm_tokens, n_rows["test"] * context_size // max(1, context_size - 1))
        else:
            array = open_array(data["path"])
            harvest, lm, d_in = None, None, array.shape[1]
            held_out = len(array) * data["heldout_fraction"] if data["heldout_path"] is None else len(
                open_array(data["heldout_path"]))
            n_rows = {"validation": int(held_out / 2), "test": int(held_out / 2)}
        devices, recipe = len(settings.trainer.local_devices), settings.recipe
        with torch.device("meta"):
            sae = settings.sae(d_in=d_in, input_scale=1.0)  # of which only the start is asked
        batch = recipe.batch_size // (devices * settings.trainer.num_nodes)
        cost = self._once(lambda: sae_cost(lambda: settings.sae(d_in=d_in, input_scale=1.0), batch),
                          "sae", config["sae"], config["recipe"], sae.d_sae, d_in, batch)
        entries = settings.l0_target or sae.d_sae
        return Job(
            name=f"{config['sae']['name']} at L0 {settings.l0_target}, seed {settings.seed}", harvest=harvest, lm=lm,
            sae=cost, entries=entries, dense=entries >= sae.sparse_below_density * sae.d_sae,
            starts_dense=sae.start_density is None or sae.start_density >= sae.sparse_below_density,
            calibrated=sae.calibrated, n_steps=recipe.n_steps, validation_every=settings.trainer.validation_every,
            n_validation_rows=min(VALIDATION_ROWS, n_rows["validation"]),
            n_rows=min(evaluation.n_rows, n_rows["test"]), devices=devices, online=online,
            n_start_rows=START_ROWS if sae.start_density is not None else 0, n_lm_tokens=n_lm_tokens)

    def rates(self, settings: TrainSettings, job: Job) -> Rates:
        """This machine's, for the SAE and the language model of ``job``."""
        config, d_in, mixed = settings.config, job.sae.d_in, settings.trainer.precision == "bf16-mixed"
        d_sae, batch = calibration_size(d_in, job.sae.d_sae, job.sae.batch, self.device)

        def of_sae() -> dict[str, float]:
            l0_target = max(1, min(settings.l0_target or 1, d_sae // 4))
            small = TrainSettings.of(_changed(config, {"d_sae": d_sae, "l0_target": l0_target,
                                                       "recipe.threshold_start": "quantile"}))
            return sae_rates(small.sae(d_in=d_in, input_scale=d_in**0.5), batch, self.device, mixed=mixed)

        of_lm = 0.0
        if job.harvest is not None:
            lm = _caches(settings).lm
            rows = {"batch_size": lm.batch_size, "context_size": lm.context_size}
            of_lm = self._once(lambda: lm_rate(self._model(settings), self.device, **rows), "lm rate", config["lm"])
        return Rates(**self._once(of_sae, "rates", config["sae"], config["recipe"], d_in, d_sae, batch, mixed),
                     lm_flop=of_lm, **self.disk)

    def copy_bytes(self, settings: TrainSettings, harvest: Harvest) -> tuple[int, int] | None:
        """Bytes of the copies of a cache that lies elsewhere, if ``settings`` name one: what all of it is, as they
        describe it, and how much more than now their folder may hold.
        """
        remote = _caches(settings).remote
        if not isinstance(remote, RemoteFolder):
            return None
        copies = remote.copies
        now = sum(file.stat().st_size for file in copies.folder.iterdir()) if copies.folder.is_dir() else 0
        one = replace(harvest, widths=harvest.widths[:1])  # of what is harvested together the first is the job's own
        return one.bytes_on_disk(at_peak=False), max(0, copies.max_bytes - now)

    def found(self, settings: TrainSettings) -> list[str] | None:
        """Lines about long rows of the caches of ``settings``, as their manifests say; None unless all are on the disk.
        Weights have no fingerprint here.
        """
        data = _caches(settings)
        if data.remote is not None:
            return []
        wanted = {"corpus": data.corpus().fingerprint(), "lm_dtype": str(self._model(settings).dtype),
                  **data.stored.identity}
        lines = []
        for hook in self.hooks(settings):
            names = make_cache_id(lm=data.lm.name, hook=hook.name, identity={}).rpartition("-")[0] + f"-*/{MANIFEST}"
            manifests = (json.loads(file.read_text()) for file in data.folder.glob(names))
            its_own = next((manifest for manifest in manifests
                            if manifest["identity"].items() >= {"hook": asdict(hook), **wanted}.items()), None)
            if its_own is None:
                return None
            # Format 1 says nothing of norms.
            if "norms" in its_own and (line := describe(its_own["norms"], its_own["splits"]["train"]["n_rows"])):
                lines.append(f"{hook.name}: {line}")
        return lines


class _Command:
    """The jobs of one command line, as Hydra hands them over one by one."""

    def __init__(self):
        self.settings: list[TrainSettings] = []
        self.planned: list[Planned] = []
        self.harvest_of: list[str | None] = []
        self.here: dict[str, list[str]] = {}  # of caches that are there, what there is to say of them
        self.copies: dict[str, tuple[int, int]] = {}  # by what the caches are known by in harvest_of
        self._streams: list[str | None] = []
        self._place: str | None = None  # of the job before
        self._planner: _Planner | None = None

    def add(self, config: Config) -> None:
        """Plan one job."""
        settings = TrainSettings.of(config)
        if self._planner is None:
            self._planner = _Planner(settings)
        job, key = self._planner.job(settings), None
        if job.harvest is not None:
            hooks = sorted(hook.name for hook in self._planner.hooks(settings))
            key = digest([config["lm"], config["corpus"], config["data"], *hooks])
            if key not in self.harvest_of and (lines := self._planner.found(settings)) is not None:
                self.here[key] = lines
            if copied := self._planner.copy_bytes(settings, job.harvest):
                self.copies[key] = copied
        launcher = HydraConfig.get().runtime.choices.get("hydra/launcher")
        place = digest([key, config["hook"]["layer"], config["hook"]["site"], settings.evaluation.n_lm_tokens])
        if launcher in ("basic", "one_stream"):  # all jobs in one process
            job = replace(job, place_measured=place == self._place)
        self._place = place
        self._streams.append(stream_key(config) if launcher == "one_stream" else None)
        self.settings.append(settings)
        self.planned.append(Planned(job, self._planner.rates(settings, job)))
        self.harvest_of.append(key)

    def plan(self) -> Plan:
        """All jobs so far."""
        assert self._planner is not None  # since the first job
        kept = [planned.job.sae.kept_bytes for planned in self.planned]
        of_stream: Counter[str | None] = Counter()
        for stream, own in zip(self._streams, kept, strict=True):
            of_stream[stream] += own
        planned = tuple(planned if stream is None else replace(planned, beside=of_stream[stream] - own)
                        for planned, stream, own in zip(self.planned, self._streams, kept, strict=True))
        copies = min(sum(whole for whole, _ in self.copies.values()), max((most for _, most in self.copies.values()),
                                                                          default=0))
        return Plan(self._planner.machine, planned, tuple(self.harvest_of), self.here, copies)

    def remedies(self, plan: Plan) -> list[str]:
        """A line for each of the plan's shortages, with what would fit: an override, or that none would."""
        found = []
        for shortage in plan.shortages():
            remedy = self._less_disk(plan) if shortage.phase is None else self._smaller(plan, shortage.phase)
            found.append(f"{shortage.text}; {remedy}")
        return found

    def _less_disk(self, plan: Plan) -> str:
        most = max((harvest.n_tokens["train"] for harvest in plan.missing), default=0)
        n_tokens = bisect_right(range(1, most), plan.machine.free_disk_bytes, key=plan.disk_bytes_of)
        if n_tokens:
            return f"data.n_tokens.train={_rounded_down(n_tokens)} would fit, or choose another output_dir"
        for_copies = plan.machine.free_disk_bytes - (plan.disk_bytes - plan.copy_bytes)
        copied = (self.planned[self.harvest_of.index(key)].job.harvest for key in self.copies)
        shard = max((harvest.shard_bytes for harvest in copied if harvest is not None), default=0)
        if 0 < shard < for_copies:
            return (f"data.remote.copy_gb={_rounded_down(for_copies // 10**6) / 1000:g} would fit, or choose another "
                    "output_dir")
        return "free some, or choose another output_dir"

    def _smaller(self, plan: Plan, phase: str) -> str:
        """A remedy for the first job whose phase does not fit: fewer jobs together; or overrides, one alone, or all by
        as little as fits.
        """
        assert self._planner is not None  # since the first job
        settings, short = next((settings, planned) for settings, planned in zip(self.settings, plan.jobs, strict=True)
                               if planned.needs_more(plan.machine, phase))
        if not replace(short, beside=0).needs_more(plan.machine, phase):
            return "fewer jobs at once, or leave hydra/launcher=one_stream out"
        config = settings.config
        has_buffer = "buffer_rows" in config["data"]
        least: dict[str, float] = {
            key: value for key, value in _REMEDIES[phase].items() if key != "data.buffer_rows" or has_buffer}
        if "d_sae" in least and settings.l0_target is not None:
            least["d_sae"] = max(least["d_sae"], settings.l0_target)
        for together in (*((key,) for key in least), tuple(least)):
            values = {key: value_at(config, key) for key in together}
            while any(value // 2 >= least[key] for key, value in values.items()):
                values = {key: value // 2 if value // 2 >= least[key] else value for key, value in values.items()}
                job = self._planner.job(TrainSettings.of(_changed(config, values)))
                if not Planned(job, self.planned[0].rates).needs_more(plan.machine, phase):
                    return f"{' '.join(f'{key}={value}' for key, value in values.items())} would fit"
        return f"no smaller {' or '.join(least)} would; it takes a machine with more"


def _rounded_down(n: int) -> int:
    """``n`` to two digits."""
    unit = 10 ** max(0, len(str(n)) - 2)
    return n // unit * unit


def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if argument != "--json"]
    command, as_found = _Command(), sys.argv
    with tempfile.TemporaryDirectory() as nowhere:  # Hydra makes the folder of a run, and of a sweep with a file in it
        sys.argv = [as_found[0], *arguments, *(f"hydra.{mode}.dir='{nowhere}'" for mode in ("run", "sweep")),
                    "hydra.sweep.subdir=."]
        try:
            run_entry_point(command.add, "plan")
        finally:
            sys.argv = as_found
    plan = command.plan()
    remedies = command.remedies(plan)
    print(text(plan))
    if remedies:
        print(f"sae_zoo.plan: error: {'; '.join(remedies)}", file=sys.stderr)
    if "--json" in as_found:
        print(json.dumps({**as_json(plan), "refused": remedies}))
    if remedies:
        raise SystemExit(2)


if __name__ == "__main__":
    main()
