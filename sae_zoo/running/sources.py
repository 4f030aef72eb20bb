"""The source of a run's activations: a cache (harvested if it is missing), the language model, or a user's file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from sae_zoo.data.activations import Activations, TextActivations
from sae_zoo.data.array_file import FileActivations
from sae_zoo.data.cache import Cache
from sae_zoo.data.existing import open_finished
from sae_zoo.data.harvesting import harvest
from sae_zoo.data.online import OnlineActivations
from sae_zoo.lm.hooks import HookPoint
from sae_zoo.lm.load import LoadedLM
from sae_zoo.running.devices import place_of_process, use_own_device
from sae_zoo.running.settings import CacheSettings, HarvestSettings, SourceSettings, device_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Activations and, where they were harvested from one, the language model and the hook point in it."""

    activations: Activations
    lm: LoadedLM | None
    hook: HookPoint | None

    def aside(self) -> AbstractContextManager[None]:
        """Meanwhile the language model makes room on its device, unless the activations come from it."""
        if self.lm is None or isinstance(self.activations, OnlineActivations):
            return nullcontext()
        return self.lm.aside()

    @property
    def cache_id(self) -> str | None:
        return self.activations.cache_id if isinstance(self.activations, TextActivations) else None


def _harvest_caches(settings: CacheSettings, lm: LoadedLM, hooks: list[HookPoint], *, along: Sequence[HookPoint] = (),
                    process: tuple[int, int] = (0, 1), progress_bar: bool) -> dict[str, Cache]:
    """Caches of ``hooks``, made where they are missing, in one pass with those of ``along``; by several processes,
    ``process`` is the number of this one and how many there are.
    """
    if settings.remote is not None:
        raise ValueError(f"data.remote.path is {settings.remote}; training opens what lies there, nothing is "
                         "harvested: leave it out")
    return harvest(lm, settings.lm.name, hooks, settings.corpus(), settings.stored, root=settings.folder,
                   batch_size=settings.lm.batch_size, along=along, process=process, progress_bar=progress_bar)


def harvest_all(settings: HarvestSettings) -> None:
    """Harvest every site at every layer in one pass and say where the caches are."""
    use_own_device(settings.local_devices)
    of_lm = settings.caches.lm
    lm = of_lm.load(device_of(settings.accelerator))
    hooks = [of_lm.hook(lm.model, layer, site) for layer in settings.layers for site in settings.sites]
    caches = _harvest_caches(settings.caches, lm, hooks, process=place_of_process(), progress_bar=settings.progress_bar)
    for name, cache in caches.items():
        log.info("%-14s d_in %5d  %s rows  %.2f GB  %s", name, cache.d_in, f"{cache.n_rows('train'):,}",
                 cache.n_bytes / 1e9, cache.path)


def open_source(settings: SourceSettings, device: torch.device, *, process: tuple[int, int] = (0, 1),
                progress_bar: bool) -> Source:
    """The activations that ``settings`` ask for.

    Args:
        process: of several that harvest what is missing together, the number of this one and how many there are.

    Raises:
        ValueError: in one line, for whatever is wrong with them.
    """
    if isinstance(settings.data, CacheSettings):
        source = _of_lm(settings, settings.data, device, process=process, progress_bar=progress_bar)
    else:
        source = Source(FileActivations(**settings.data), None, None)
    source.activations.leave_out(settings.max_norm)
    return source


def _of_lm(settings: SourceSettings, caches: CacheSettings, device: torch.device, *, process: tuple[int, int],
           progress_bar: bool) -> Source:
    assert settings.hook is not None  # of a language model
    lm = caches.lm.load(device)
    hook, *along = (caches.lm.hook(lm.model, layer, site)
                    for layer, site in ((settings.hook.layer, settings.hook.site), *settings.hook.along))
    if caches.remote is not None:
        return Source(open_finished(caches.remote, lm, hook, caches.corpus(), caches.spec), lm, hook)
    cache = _harvest_caches(caches, lm, [hook], along=along, process=process, progress_bar=progress_bar)[hook.name]
    if caches.buffer_rows is None:
        return Source(cache, lm, hook)
    return Source(OnlineActivations(cache, lm, caches.lm.name, hook, caches.corpus(), caches.spec,
                                    buffer_rows=caches.buffer_rows, batch_size=caches.lm.batch_size), lm, hook)
