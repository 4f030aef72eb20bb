"""Where a run's activations come from: a cache (harvested if it is missing), the language model, or a user's file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig

from sae_zoo.config import build_corpus, build_file_activations, build_harvest_spec, build_lm, build_remote, harvested
from sae_zoo.data.activations import Activations
from sae_zoo.data.cache import Cache
from sae_zoo.data.finished import open_finished
from sae_zoo.data.harvesting import harvest
from sae_zoo.data.online import OnlineActivations
from sae_zoo.lm.hooks import HookPoint, resolve_hook
from sae_zoo.lm.load import LoadedLM


@dataclass(frozen=True)
class Source:
    """Activations and, where they were harvested from one, the language model and the hook point in it."""

    activations: Activations
    lm: LoadedLM | None
    hook: HookPoint | None

    def aside(self) -> AbstractContextManager[None]:
        """Meanwhile the language model makes room on its device, unless the activations come from it."""
        stays = self.lm is None or isinstance(self.activations, OnlineActivations)
        return nullcontext() if stays else self.lm.aside()

    @property
    def cache_id(self) -> str | None:
        return self.activations.cache_id if isinstance(self.activations, Cache) else None


def hooks_of(cfg: DictConfig, lm: LoadedLM, *, layers: Iterable[int], sites: Iterable[str]) -> list[HookPoint]:
    """Every site at every layer."""
    return [resolve_hook(lm.model, cfg.lm.sites, layer, site) for layer in layers for site in sites]


def harvest_caches(cfg: DictConfig, lm: LoadedLM, hooks: list[HookPoint], *, along: Sequence[HookPoint] = (),
                   process: tuple[int, int] = (0, 1), progress_bar: bool) -> dict[str, Cache]:
    """Caches of ``hooks`` below ``output_dir``, made where they are missing, in one pass with those of ``along``; by
    several processes, ``process`` is the number of this one and how many there are.
    """
    if (remote := build_remote(cfg)) is not None:
        raise ValueError(f"data.remote.path is {remote}; training opens what lies there, nothing is harvested: leave it "
                         "out")
    return harvest(lm, cfg.lm.name, hooks, build_corpus(cfg.corpus), build_harvest_spec(cfg),
                   root=Path(cfg.output_dir) / "cache", batch_size=cfg.lm.batch_size, along=along,
                   process=process, progress_bar=progress_bar)


def open_source(cfg: DictConfig, device: torch.device, *, process: tuple[int, int] = (0, 1), progress_bar: bool) -> Source:
    """The activations that a ``train.yaml`` asks for; ``process`` as in :func:`harvest_caches`.

    Raises:
        ValueError: in one line, for whatever is wrong with them.
    """
    source = _open_source(cfg, device, process=process, progress_bar=progress_bar)
    source.activations.leave_out(cfg.data.get("max_norm"))
    return source


def _open_source(cfg: DictConfig, device: torch.device, *, process: tuple[int, int], progress_bar: bool) -> Source:
    if cfg.data.name == "file":
        return Source(build_file_activations(cfg.data), None, None)
    if cfg.data.name not in ("cache", "online"):
        raise ValueError(f"data.name is {cfg.data.name!r}; choose cache, online or file")
    lm = build_lm(cfg, device)
    hook = resolve_hook(lm.model, cfg.lm.sites, cfg.hook.layer, cfg.hook.site)
    if (remote := build_remote(cfg)) is not None:
        return Source(open_finished(remote, lm, hook, build_corpus(cfg.corpus), build_harvest_spec(cfg)), lm, hook)
    together = cfg.hook.harvest_together
    along = [] if together is None else hooks_of(cfg, lm, layers=together.layers, sites=together.sites)
    cache = harvest_caches(harvested(cfg), lm, [hook], along=along, process=process,
                           progress_bar=progress_bar)[hook.name]
    if cfg.data.name == "cache":
        return Source(cache, lm, hook)
    train = {"buffer_rows": cfg.data.buffer_rows, "batch_size": cfg.lm.batch_size}
    return Source(OnlineActivations(cache, lm, cfg.lm.name, hook, build_corpus(cfg.corpus), build_harvest_spec(cfg),
                                    **train), lm, hook)
