"""One run of one contestant, sae_zoo or a peer: trained on the same rows in the same order, scored by one function.

A finished run is one JSON file, named by what it was; a run whose file is there is not trained again. A change of the
code of sae_zoo does not change the name: delete its files (``sae_zoo-*.json``) to have it measured again.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.peers import PEERS, PeerAbsent, PeerFailed, Worker
from sae_zoo.config import compose_config
from sae_zoo.data.cache import MANIFEST, Cache, open_cache
from sae_zoo.evaluation.suite import HeldOutRows, score_in_lm, score_sae
from sae_zoo.lm.hooks import resolve_hook
from sae_zoo.lm.load import load_lm
from sae_zoo.process import prepare_process
from sae_zoo.records import digest, versions, write_json
from sae_zoo.running.checks import without
from sae_zoo.running.fitting import fit
from sae_zoo.running.settings import TrainSettings, config_hash
from sae_zoo.running.sources import Source
from sae_zoo.saes import SAE

OURS = "sae_zoo"
CONTESTANTS = (OURS, *PEERS)
VARIANTS = ("topk", "jumprelu", "relu", "gated")

# Held-out rows on which a peer's output is compared with ours, and on which rates and coefficients are chosen.
_CHECK_ROWS, _VALIDATION_ROWS = 64, 20_000
_LM_TOKENS, _LM_BATCH = 16_384, 16
_SCORES = ("l0", "fvu", "relative_reconstruction_bias", "dead_fraction")
_LM_SCORES = ("delta_lm_loss", "loss_recovered")

Record = dict[str, Any]


class RunFailed(ValueError):
    """A run broke off or diverged."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run.

    Attributes:
        sparsity: what sets L0: ``k``, a target or a coefficient, as :meth:`Bench.control` says; None for the
            contestant's default.
        lr: peak learning rate; None for the contestant's default.
        defaults: everything else at the contestant's defaults too, instead of at what suits a run of this length.
    """

    contestant: str
    variant: str
    d_sae: int
    batch: int
    steps: int
    seed: int
    lr: float | None
    sparsity: float | None
    defaults: bool = False

    def __str__(self) -> str:
        settings = "defaults" if self.defaults else "lr default" if self.lr is None else f"lr {self.lr:g}"
        sparsity = "default" if self.sparsity is None else f"{self.sparsity:.4g}"
        return f"{self.contestant} {self.variant} {settings} sparsity {sparsity} seed {self.seed}"


def find_cache(given: str | None, root: Path = Path("outputs/cache")) -> Cache:
    """The cache in the folder ``given``, or the only one below ``root``.

    Raises:
        ValueError: if there is none, or more than one to choose from.
    """
    if given is not None:
        return open_cache(given)
    found = sorted(path.parent for path in root.glob(f"*/{MANIFEST}"))
    if not found:
        raise ValueError(f"there is no cache in {root}; make the README's by python -m sae_zoo.harvest layers=[3] "
                         "sites=[residual], or give another with --cache")
    if len(found) > 1:
        raise ValueError(f"{root} holds {len(found)} caches ({', '.join(path.name for path in found)}); choose one "
                         "with --cache")
    return open_cache(found[0])


def our_settings(job: Job) -> TrainSettings:
    """Those of a job of ours; the recipe's other rates (thresholds, ...) keep their ratios to ``lr``."""
    overrides = [f"sae={job.variant}", f"d_sae={job.d_sae}", f"seed={job.seed}", f"l0_target={job.sparsity:g}",
                 f"recipe.n_steps={job.steps}", f"recipe.batch_size={job.batch}", "trainer.accelerator=cpu",
                 "trainer.progress_bar=false"]
    config = compose_config("train", overrides)
    if job.lr is not None:
        recipe = config["recipe"]
        factor = job.lr / recipe["lr"]
        for key in recipe:
            if key == "lr" or key.endswith("_lr"):
                recipe[key] *= factor
    return TrainSettings.of(config)


class Bench:
    """What all runs share: activations, the language model they came from, the peers' workers, the folder of results.

    Use it in a ``with`` block; it ends the workers and deletes the copies of training rows that they read.

    Args:
        cache: its train rows are learned from, validation rows choose rates and coefficients, test rows are reported.
        out: folder of results.
        peers_dir: where the peers are installed.
        threads: of torch, for every contestant; None leaves torch's own choice.

    Raises:
        ValueError: if the cache is not of the built-in language model.
    """

    def __init__(self, cache: Cache, out: Path, peers_dir: Path, *, threads: int | None):
        if threads is not None:
            torch.set_num_threads(threads)
        prepare_process()  # as every entry point of sae_zoo does
        self.cache, self.out, self.threads = cache, Path(out), threads
        self._peers_dir = peers_dir
        self._workers: dict[str, Worker] = {}
        lm, where = load_lm("builtin"), cache.manifest["identity"]
        if where["lm"] != lm.fingerprint:
            raise ValueError(f"cache {cache.path} is not of the built-in language model, in which reconstructions are "
                             "scored; choose another with --cache")
        hook = resolve_hook(lm.model, "auto", where["hook"]["layer"], where["hook"]["site"])
        self._source = Source(cache, lm, hook)
        self.out.mkdir(parents=True, exist_ok=True)
        self._rows = tempfile.TemporaryDirectory(dir=self.out, prefix="rows-")

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers.values():
            worker.close()
        self._rows.cleanup()

    def versions(self, contestant: str) -> dict[str, str]:
        """Versions of a contestant, first, and of what it runs on.

        Raises:
            PeerAbsent: if it is a peer that is not there.
        """
        if contestant != OURS:
            return self._worker(contestant).versions
        found = versions()
        return {OURS: found.pop(OURS), **found}

    def control(self, contestant: str, variant: str) -> dict[str, Any]:
        """What sets the L0 of a variant: ``{"control": "k" | "target" | "coefficient", ...}``.

        Raises:
            PeerAbsent: if it is a peer that is not there, or that does not have the variant.
        """
        if contestant == OURS:
            return {"control": "k" if variant == "topk" else "target"}
        if not self.has(contestant, variant):
            raise PeerAbsent(f"it has no {variant}")
        return self._worker(contestant).variants[variant]

    def has(self, contestant: str, variant: str) -> bool:
        """Whether a contestant can train a variant.

        Raises:
            PeerAbsent: if it is a peer that is not there.
        """
        return contestant == OURS or variant in self._worker(contestant).variants

    def record(self, job: Job) -> Record:
        """The record of a run, from its file or by training it now.

        Raises:
            PeerAbsent: if it is one of a peer that is not there.
            RunFailed: if it breaks off, or what it makes is not finite.
        """
        file = self.out / self._file_name(job)
        if file.exists():
            return json.loads(file.read_text())
        with tempfile.TemporaryDirectory(dir=self.out, prefix="running-") as scratch:
            train = self._train_ours if job.contestant == OURS else self._train_peer
            try:
                sae, told = train(job, Path(scratch))
            except (PeerFailed, ValueError) as error:
                raise RunFailed(f"{job} failed: {error}") from error
            record = {**asdict(job), "versions": self.versions(job.contestant), "data_id": self.cache.data_id,
                      "threads": torch.get_num_threads(), **told, **self._score(sae)}
        record = {key: None if isinstance(value, float) and not math.isfinite(value) else value
                  for key, value in record.items()}
        if record["fvu"] is None:
            raise RunFailed(f"{job} failed: its reconstructions are not finite")
        write_json(file, record)
        return record

    def _file_name(self, job: Job) -> str:
        identity = {**asdict(job), "data_id": self.cache.data_id}
        if job.contestant == OURS:
            identity["config"] = config_hash(our_settings(job).config)
        else:
            identity["versions"] = self.versions(job.contestant)
        return f"{str(job).replace(' ', '-')}-{digest(identity)[:8]}.json"

    def _worker(self, name: str) -> Worker:
        if name not in self._workers:
            self._workers[name] = Worker(name, self._peers_dir, threads=self.threads)
        return self._workers[name]

    def _train_ours(self, job: Job, scratch: Path) -> tuple[SAE, dict[str, Any]]:
        settings = our_settings(job)
        start = time.perf_counter()
        sae, _ = fit(settings, self._source, scratch)
        seconds = time.perf_counter() - start
        of_sae = {**settings.config["recipe"], **without(settings.config["sae"], "display"),
                  "d_sae": job.d_sae}  # the recipe's own is a default
        return sae, {"seconds": seconds, "settings": of_sae, "notes": []}

    def _train_peer(self, job: Job, scratch: Path) -> tuple[SAE, dict[str, Any]]:
        sae, meta = self._worker(job.contestant).train(
            job.variant, self._rows_file(job), self._check_file(), scratch, d_sae=job.d_sae, batch=job.batch,
            steps=job.steps, seed=job.seed, lr=job.lr, sparsity=job.sparsity, defaults=job.defaults)
        return sae, {key: meta[key] for key in ("seconds", "settings", "notes")}

    def _rows_file(self, job: Job) -> Path:
        """Our own training batches of a seed, one after the other, in a ``.npy``."""
        file = Path(self._rows.name) / f"seed{job.seed}-{job.steps}x{job.batch}.npy"
        if not file.exists():
            partial, shape = file.with_suffix(".tmp"), (job.steps * job.batch, self.cache.d_in)
            rows = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
            for i, x in enumerate(self.cache.batches("train", job.batch, n_batches=job.steps, seed=job.seed)):
                rows[i * job.batch : (i + 1) * job.batch] = x.numpy()
            rows.flush()
            partial.replace(file)
        return file

    def _check_file(self) -> Path:
        file = Path(self._rows.name) / "check.npy"
        if not file.exists():
            np.save(file, self.cache.rows("validation", 0, _CHECK_ROWS).numpy())
        return file

    def _score(self, sae: SAE) -> dict[str, Any]:
        """Scores on validation rows, keys ending in ``_validation``, and on test rows and text."""
        device = torch.device("cpu")
        validation, _ = score_sae(sae, HeldOutRows(self.cache, "validation", _VALIDATION_ROWS, device=device,
                                                     progress_bar=False))
        test, _ = score_sae(sae, HeldOutRows(self.cache, "test", self.cache.n_rows("test"), device=device,
                                               progress_bar=False))
        in_lm = score_in_lm(sae.reconstruct, self._source.lm, self._source.hook, self.cache.tokens("test"),
                            self.cache.special_ids, n_tokens=_LM_TOKENS, batch_size=_LM_BATCH,
                            progress_bar=False)
        return {**{f"{key}_validation": validation[key] for key in ("l0", "fvu")},
                **{key: test[key] for key in _SCORES}, **{key: in_lm[key] for key in _LM_SCORES}}


def mean_and_spread(values: Iterable[float | None]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation over seeds; None where a seed has no value (or there is one seed only)."""
    values = list(values)
    if not values or None in values:
        return None, None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


__all__ = ["CONTESTANTS", "OURS", "VARIANTS", "Bench", "Job", "PeerAbsent", "Record", "RunFailed", "find_cache",
           "mean_and_spread"]
