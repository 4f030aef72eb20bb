"""``python -m sae_zoo.plan <overrides of sae_zoo.train>``: bytes, memory, FLOPs and time, before any of them is spent.

No weights are loaded, and nothing is written but for a moment a file that times the disk. With ``-m`` the jobs are
summed. What cannot fit on this machine is said in one line, with what would, and exit status 2. ``--json`` prints one
object as the last line of the output.
"""

from __future__ import annotations

import json
import sys
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedModel

from sae_zoo.config import (build_corpus, build_harvest_spec, build_remote, build_sae, build_skeleton, device_of,
                            harvested, run_entry_point)
from sae_zoo.data.cache import MANIFEST, make_cache_id
from sae_zoo.data.file import open_array
from sae_zoo.data.module import START_ROWS, VALIDATION_ROWS
from sae_zoo.data.norms import describe
from sae_zoo.data.remote import RemoteFolder
from sae_zoo.lm.hooks import HookPoint, resolve_hook
from sae_zoo.lm.skeleton import n_bytes
from sae_zoo.one_stream import stream_key
from sae_zoo.planning.job import Harvest, Job, Online
from sae_zoo.planning.lm import LMCost, harvest_cost, hook_widths, lm_cost
from sae_zoo.planning.machine import (Rates, calibration_size, disk_rates, existing_folder, lm_rate, sae_rates,
                                      this_machine)
from sae_zoo.planning.report import Plan, Planned, as_json, text
from sae_zoo.planning.sae import sae_cost
from sae_zoo.processes import devices_of
from sae_zoo.records import digest

# Overrides that make a phase smaller, and the least that is advised; each is halved until the phase fits.
_REMEDIES = {"harvest": {"lm.batch_size": 1, "data.n_tokens.train": 100_000},
             "training": {"d_sae": 1024, "data.rows_per_shard": 16384, "data.buffer_rows": 16384,
                          "recipe.batch_size": 256},
             "evaluation": {"lm.batch_size": 1, "d_sae": 1024}}


class _Planner:
    """Makes jobs of configs; what several of them share is looked at once."""

    def __init__(self, cfg: DictConfig):
        self.device = device_of(cfg.trainer.accelerator)
        self.machine = this_machine(Path(cfg.output_dir), self.device)
        self.disk = disk_rates(existing_folder(Path(cfg.output_dir)))
        self._known: dict[str, Any] = {}

    def _once(self, make: Callable[[], Any], *of: Any) -> Any:
        key = digest([value if not OmegaConf.is_config(value) else OmegaConf.to_container(value, resolve=True)
                      for value in of])
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def model(self, cfg: DictConfig) -> PreTrainedModel:
        return self._once(lambda: build_skeleton(cfg, self.device), "model", cfg.lm)

    def hooks(self, cfg: DictConfig) -> list[HookPoint]:
        """The hook point of a job, and those that are harvested with it."""
        model, hook, together = self.model(cfg), cfg.hook, cfg.hook.harvest_together
        where = [(hook.layer, hook.site)]
        if together is not None:
            where += [(layer, site) for layer in together.layers for site in together.sites]
        return [resolve_hook(model, cfg.lm.sites, *place) for place in dict.fromkeys(where)]

    def lm_cost(self, cfg: DictConfig) -> LMCost:
        model, hook = self.model(cfg), self.hooks(cfg)[0]
        return self._once(lambda: lm_cost(model, hook, batch_size=cfg.lm.batch_size, context_size=cfg.lm.context_size),
                          "lm", cfg.lm, hook.name)

    def harvest(self, cfg: DictConfig) -> Harvest:
        model, hooks, spec = self.model(cfg), self.hooks(cfg), build_harvest_spec(harvested(cfg))
        rows = {"batch_size": cfg.lm.batch_size, "context_size": cfg.lm.context_size}
        cost, widths = self.lm_cost(cfg).to_hook, [self.lm_cost(cfg).d_in]
        if len(hooks) > 1:
            cost, widths = self._once(lambda: (harvest_cost(model, hooks, **rows), hook_widths(model, hooks)),
                                      "harvest", cfg.lm, sorted(hook.name for hook in hooks))
        return Harvest(widths=tuple(widths), n_tokens=spec.n_tokens_here, dtype=spec.dtype,
                       rows_per_shard=spec.rows_per_shard, cost=cost, weight_bytes=n_bytes(model), **rows)

    def job(self, cfg: DictConfig) -> Job:
        """What ``cfg`` asks for.

        Raises:
            ValueError: for whatever is wrong with it.
        """
        online = None
        if cfg.data.name == "file":
            array = open_array(cfg.data.path)
            harvest, lm, d_in = None, None, array.shape[1]
            held_out = len(array) * cfg.data.heldout_fraction if cfg.data.heldout_path is None else len(
                open_array(cfg.data.heldout_path))
            n_rows = {"validation": int(held_out / 2), "test": int(held_out / 2)}
        elif cfg.data.name in ("cache", "online"):
            harvest, lm = self.harvest(cfg), self.lm_cost(cfg)
            d_in, n_rows = lm.d_in, harvest.n_tokens
            if cfg.data.name == "online":
                online = Online(n_tokens=cfg.data.n_tokens.train, buffer_rows=cfg.data.buffer_rows)
        else:
            raise ValueError(f"data.name is {cfg.data.name!r}; choose cache, online or file")
        devices = len(devices_of(cfg.trainer.accelerator, cfg.trainer.devices))
        with torch.device("meta"):
            sae = build_sae(cfg, d_in=d_in, input_scale=1.0)  # of which only the start is asked
        batch = cfg.recipe.batch_size // (devices * cfg.trainer.num_nodes)
        cost = self._once(lambda: sae_cost(lambda: build_sae(cfg, d_in=d_in, input_scale=1.0), batch),
                          "sae", cfg.sae, cfg.recipe, cfg.d_sae, d_in, batch)
        entries = cfg.l0_target or cfg.d_sae
        return Job(
            name=f"{cfg.sae.name} at L0 {cfg.l0_target}, seed {cfg.seed}", harvest=harvest, lm=lm, sae=cost,
            entries=entries, dense=entries >= sae.sparse_below_density * cfg.d_sae,
            starts_dense=sae.start_density is None or sae.start_density >= sae.sparse_below_density,
            calibrated=sae.calibrated, n_steps=cfg.recipe.n_steps, validation_every=cfg.trainer.validation_every,
            n_validation_rows=min(VALIDATION_ROWS, n_rows["validation"]),
            n_rows=min(cfg.evaluation.n_rows, n_rows["test"]), devices=devices, online=online,
            n_start_rows=START_ROWS if sae.start_density is not None else 0,
            # Of a row that the language model reads, the first token is no activation.
            n_lm_tokens=min(cfg.evaluation.n_lm_tokens, n_rows["test"] * cfg.lm.context_size // max(1, cfg.lm.context_size - 1)))

    def rates(self, cfg: DictConfig, job: Job) -> Rates:
        """This machine's, for the SAE and the language model of ``job``."""
        d_in, mixed = job.sae.d_in, cfg.trainer.precision == "bf16-mixed"
        d_sae, batch = calibration_size(d_in, cfg.d_sae, job.sae.batch, self.device)

        def of_sae() -> dict[str, float]:
            small = OmegaConf.merge(cfg, {"d_sae": d_sae, "l0_target": max(1, min(cfg.l0_target or 1, d_sae // 4)),
                                          "recipe": {"threshold_start": "quantile"}})
            sae = build_sae(small, d_in=d_in, input_scale=d_in**0.5)
            return sae_rates(sae, batch, self.device, mixed=mixed)

        of_lm = 0.0
        if job.harvest is not None:
            rows = {"batch_size": cfg.lm.batch_size, "context_size": cfg.lm.context_size}
            of_lm = self._once(lambda: lm_rate(self.model(cfg), self.device, **rows), "lm rate", cfg.lm)
        return Rates(**self._once(of_sae, "rates", cfg.sae, cfg.recipe, d_in, d_sae, batch, mixed), lm_flop=of_lm,
                     **self.disk)

    def copy_bytes(self, cfg: DictConfig, harvest: Harvest) -> tuple[int, int] | None:
        """Of the copies of a cache that lies elsewhere, if ``cfg`` names one: what all of it is, as the config describes
        it, and how much more than now their folder may hold."""
        remote = build_remote(cfg)
        if not isinstance(remote, RemoteFolder):
            return None
        copies = remote.copies
        now = sum(file.stat().st_size for file in copies.folder.iterdir()) if copies.folder.is_dir() else 0
        one = replace(harvest, widths=harvest.widths[:1])  # of what is harvested together the first is the job's own
        return one.bytes_on_disk(at_peak=False), max(0, copies.max_bytes - now)

    def found(self, cfg: DictConfig) -> list[str] | None:
        """Of the caches of ``cfg``, if all are on the disk, as their manifests say, what there is to say of their long
        rows, a line each; weights have no fingerprint here.
        """
        if build_remote(cfg) is not None:
            return []
        caches = Path(cfg.output_dir) / "cache"
        wanted = {"corpus": build_corpus(cfg.corpus).fingerprint(), "lm_dtype": str(self.model(cfg).dtype),
                  **build_harvest_spec(harvested(cfg)).identity}
        lines = []
        for hook in self.hooks(cfg):
            names = make_cache_id(lm=cfg.lm.name, hook=hook.name, identity={}).rpartition("-")[0] + f"-*/{MANIFEST}"
            manifests = (json.loads(file.read_text()) for file in caches.glob(names))
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
        self.configs: list[DictConfig] = []
        self.planned: list[Planned] = []
        self.harvest_of: list[str | None] = []
        self.here: dict[str, list[str]] = {}  # of caches that are there, what there is to say of them
        self.copies: dict[str, tuple[int, int]] = {}  # by what the caches are known by in harvest_of
        self._streams: list[str | None] = []
        self._place: str | None = None  # of the job before
        self._planner: _Planner | None = None

    def add(self, cfg: DictConfig) -> None:
        """Plan one job."""
        if self._planner is None:
            self._planner = _Planner(cfg)
        job, key = self._planner.job(cfg), None
        if job.harvest is not None:
            hooks = sorted(hook.name for hook in self._planner.hooks(cfg))
            parts = (OmegaConf.to_container(part, resolve=True) for part in (cfg.lm, cfg.corpus, cfg.data))
            key = digest([*parts, *hooks])
            if key not in self.harvest_of and (lines := self._planner.found(cfg)) is not None:
                self.here[key] = lines
            if copied := self._planner.copy_bytes(cfg, job.harvest):
                self.copies[key] = copied
        launcher = HydraConfig.get().runtime.choices.get("hydra/launcher")
        together = launcher == "one_stream"
        place = digest([key, cfg.hook.layer, cfg.hook.site, cfg.evaluation.n_lm_tokens])
        if launcher in ("basic", "one_stream"):  # all jobs in one process
            job = replace(job, place_measured=place == self._place)
        self._place = place
        self._streams.append(stream_key(cfg) if together else None)
        self.configs.append(cfg)
        self.planned.append(Planned(job, self._planner.rates(cfg, job)))
        self.harvest_of.append(key)

    def plan(self) -> Plan:
        """All jobs so far."""
        kept = [planned.job.sae.kept_bytes for planned in self.planned]
        of_stream = Counter()
        for stream, own in zip(self._streams, kept, strict=True):
            of_stream[stream] += own
        planned = tuple(planned if stream is None else replace(planned, beside=of_stream[stream] - own)
                        for planned, stream, own in zip(self.planned, self._streams, kept, strict=True))
        copies = min(sum(whole for whole, _ in self.copies.values()), max((most for _, most in self.copies.values()),
                                                                          default=0))
        return Plan(self._planner.machine, planned, tuple(self.harvest_of), self.here, copies)

    def remedies(self, plan: Plan) -> list[str]:
        """Of each of the plan's shortages, what would fit: an override, or that none would."""
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
        shard = max((self.planned[self.harvest_of.index(key)].job.harvest.shard_bytes for key in self.copies), default=0)
        if 0 < shard < for_copies:
            return f"data.remote.copy_gb={_rounded_down(for_copies // 10**6) / 1000:g} would fit, or choose another output_dir"
        return "free some, or choose another output_dir"

    def _smaller(self, plan: Plan, phase: str) -> str:
        """What lets the phase fit, of the first job whose does not: fewer jobs together; or overrides, one alone, or all
        by as little as fits."""
        cfg, short = next((cfg, planned) for cfg, planned in zip(self.configs, plan.jobs)
                          if planned.needs_more(plan.machine, phase))
        if not replace(short, beside=0).needs_more(plan.machine, phase):
            return "fewer jobs at once, or leave hydra/launcher=one_stream out"
        least = {key: value for key, value in _REMEDIES[phase].items() if OmegaConf.select(cfg, key) is not None}
        if "d_sae" in least and cfg.l0_target is not None:
            least["d_sae"] = max(least["d_sae"], cfg.l0_target)
        for together in (*((key,) for key in least), tuple(least)):
            values = {key: OmegaConf.select(cfg, key) for key in together}
            while any(value // 2 >= least[key] for key, value in values.items()):
                values = {key: value // 2 if value // 2 >= least[key] else value for key, value in values.items()}
                changes = [f"{key}={value}" for key, value in values.items()]
                job = self._planner.job(OmegaConf.merge(cfg, OmegaConf.from_dotlist(changes)))
                if not Planned(job, self.planned[0].rates).needs_more(plan.machine, phase):
                    return f"{' '.join(changes)} would fit"
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
