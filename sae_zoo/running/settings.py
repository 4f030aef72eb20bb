"""Settings of a ``train.yaml`` or ``harvest.yaml``: its values, checked once, and what is made of them.

A config is a mapping of plain values, every reference in it resolved. What is wrong with it is said in one line by the
name that it has there. Nothing is read or downloaded before it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from transformers import PreTrainedModel

from sae_zoo.data.array_file import FileActivations
from sae_zoo.data.copies import Copies
from sae_zoo.data.corpus import CORPORA, Corpus
from sae_zoo.data.folders import Folder, LocalFolder
from sae_zoo.data.harvesting import HarvestSpec
from sae_zoo.data.remote import RemoteFolder, is_url
from sae_zoo.lm.hooks import HookPoint, resolve_hook
from sae_zoo.lm.load import LoadedLM, check_context_size, load_lm
from sae_zoo.lm.skeleton import load_skeleton
from sae_zoo.records import digest
from sae_zoo.running.checks import Config, check_counts, check_types, checked, group_at, types_of, value_at, without
from sae_zoo.running.devices import devices_of
from sae_zoo.saes import SAE, variant_class
from sae_zoo.training.recipe import Recipe

# What does not change a run's numbers, and so is neither hashed nor named.
WITHOUT_EFFECT = ("output_dir", "sweep", "logger", "trainer.progress_bar", "trainer.log_every_n_steps",
                  "trainer.accelerator", "trainer.devices", "trainer.num_nodes",  # but for rounding
                  "trainer.checkpoint_every", "hook.harvest_together", "lm.device_map", "sae.display",
                  "data.remote", "corpus.folder",  # the same bytes, wherever they lie
                  "matched")  # of an experiment: its values stand where they are used
# What earlier versions did not have, and is no change where it is null.
_NEW_AND_NULL = ("data.part", "lm.document_separator")


def config_hash(config: Config) -> str:
    """Digest of a config without what cannot change a run's numbers."""
    return digest(_hashed(config))


def _hashed(config: Config, prefix: str = "") -> dict[str, Any]:
    kept = {}
    for key, value in config.items():
        name = prefix + str(key)
        if name not in WITHOUT_EFFECT and not (name in _NEW_AND_NULL and value is None):
            kept[key] = _hashed(value, f"{name}.") if isinstance(value, Mapping) else value
    return kept


def device_of(accelerator: str) -> torch.device:
    """The device of an accelerator as the trainer names it: ``auto`` takes the first GPU, if there is one."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda")
    if accelerator not in ("auto", "cpu"):
        raise ValueError(f"accelerator is {accelerator!r}, and there is none here; choose auto or cpu")
    return torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """A ``trainer/*.yaml``; Lightning's arguments have its names."""

    accelerator: str
    devices: int | str | list[int]
    num_nodes: int
    precision: str | int
    gradient_clip_val: float | None
    log_every_n_steps: int
    validation_every: int
    checkpoint_every: int
    progress_bar: bool

    def __post_init__(self) -> None:
        check_counts("trainer.", num_nodes=self.num_nodes, log_every_n_steps=self.log_every_n_steps,
                      validation_every=self.validation_every, checkpoint_every=self.checkpoint_every)
        if (clip := self.gradient_clip_val) is not None and not clip > 0:
            raise ValueError(f"trainer.gradient_clip_val is {clip}; it must be positive, or null for none")

    @property
    def device(self) -> torch.device:
        return device_of(self.accelerator)

    @property
    def local_devices(self) -> list[int]:
        """Devices of this machine, by number; see :func:`~sae_zoo.running.devices.devices_of`."""
        return devices_of(self.accelerator, self.devices)

    @property
    def n_processes(self) -> int:
        """Number of processes on all machines."""
        return len(self.local_devices) * self.num_nodes


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """A run's ``evaluation``.

    Attributes:
        n_rows: held-out activations, at most.
        n_lm_tokens: held-out tokens that the language model reads with the reconstruction spliced in.
    """

    n_rows: int
    n_lm_tokens: int

    def __post_init__(self) -> None:
        check_counts("evaluation.", n_rows=self.n_rows, n_lm_tokens=self.n_lm_tokens)


@dataclass(frozen=True, kw_only=True)
class LMSettings:
    """A ``lm/*.yaml``; see :func:`~sae_zoo.lm.load.load_lm`.

    Attributes:
        made: folder of converted language models.
        batch_size: rows a forward pass.
        sites: names of hook points, or ``auto``; see :mod:`sae_zoo.lm.hooks`.
    """

    name: str
    path: str
    revision: str | None
    dtype: str
    context_size: int
    batch_size: int
    sites: str | Mapping
    made: Path
    device_map: str | None = None
    document_separator: str | None = None

    def __post_init__(self) -> None:
        check_counts("lm.", context_size=self.context_size, batch_size=self.batch_size)

    def load(self, device: torch.device) -> LoadedLM:
        """The language model, frozen, on ``device``.

        Raises:
            ValueError: if it cannot be loaded, or was trained on rows shorter than ``lm.context_size``.
        """
        loaded = load_lm(self.path, revision=self.revision, dtype=self.dtype, device=device, device_map=self.device_map,
                         document_separator=self.document_separator, made=self.made)
        check_context_size(loaded.model.config, self.context_size)
        return loaded

    def skeleton(self, device: torch.device) -> PreTrainedModel:
        """The model that :meth:`load` would load, without its weights; errors as there."""
        model = load_skeleton(self.path, revision=self.revision, dtype=self.dtype, device=device, made=self.made)
        check_context_size(model.config, self.context_size)
        return model

    def hook(self, model: PreTrainedModel, layer: int, site: str) -> HookPoint:
        """See :func:`~sae_zoo.lm.hooks.resolve_hook`."""
        return resolve_hook(model, self.sites, layer, site)


def corpus_of(config: Config) -> Corpus:
    """The corpus of a ``corpus/*.yaml``.

    Raises:
        ValueError: if its name is unknown, or it is empty.
    """
    name: Any = config.get("name")
    if str(name) not in CORPORA:
        raise ValueError(f"corpus.name: {name!r} is unknown; choose from {', '.join(sorted(CORPORA))}")
    return CORPORA[name](**checked(CORPORA[name], without(config, "name"), where="corpus."))


def _remote_of(data: Config, output_dir: Path) -> Folder | None:
    remote = data.get("remote")  # runs of earlier versions have none
    if remote is None:
        return None
    check_types({"remote": Mapping}, {"remote": remote}, where="data.")
    check_types({"path": str | None, "copy_gb": float}, remote, where="data.remote.")
    path, copy_gb = remote["path"], remote["copy_gb"]
    if path is None:
        return None
    if data["name"] != "cache":
        raise ValueError(f"data.remote.path is {path}, but data is {data['name']}; choose data=cache, or leave it out")
    if not 0 < copy_gb < math.inf:
        raise ValueError(f"data.remote.copy_gb is {copy_gb}; it must be above 0")
    if not is_url(path):
        return LocalFolder(Path(path))
    return RemoteFolder(path, Copies(output_dir / "cache" / ".copies", int(copy_gb * 1e9)))


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """Ingredients and place of caches: ``lm``, ``corpus`` and ``data=cache`` or ``data=online`` of a config.

    Attributes:
        spec: of what a run trains on.
        buffer_rows: of the shuffle buffer of ``data=online``, which stores no training rows; None is ``data=cache``.
        remote: where a finished cache lies that is opened, not made.
        corpus_config: see :meth:`corpus`.
    """

    lm: LMSettings
    spec: HarvestSpec
    corpus_config: Config
    buffer_rows: int | None
    remote: Folder | None
    output_dir: Path

    @classmethod
    def of(cls, config: Config) -> Self:
        """Settings from a ``train.yaml`` or ``harvest.yaml``.

        Raises:
            ValueError: for whatever is wrong with them.
        """
        data, output_dir, buffer_rows = group_at(config, "data"), Path(value_at(config, "output_dir")), None
        of_spec = without(data, "name", "remote", "max_norm", "buffer_rows")
        if value_at(config, "data.name") == "online":  # how its text is read is no fact of a cache
            check_types({"buffer_rows": int}, {"buffer_rows": data.get("buffer_rows")}, where="data.")
            buffer_rows = data["buffer_rows"]
        lm = LMSettings(**checked(LMSettings, group_at(config, "lm"), where="lm.", made=output_dir / "lm"))
        spec = HarvestSpec(**checked(HarvestSpec, of_spec, where="data.", context_size=lm.context_size))
        if buffer_rows is not None and spec.part is not None:
            raise ValueError(f"data.part is {spec.part}, but data is online, which stores no training rows; choose "
                             "data=cache, or leave it out")
        return cls(lm=lm, spec=spec, corpus_config=group_at(config, "corpus"), buffer_rows=buffer_rows,
                   remote=_remote_of(data, output_dir), output_dir=output_dir)

    @property
    def folder(self) -> Path:
        """The folder where caches are made."""
        return self.output_dir / "cache"

    @property
    def stored(self) -> HarvestSpec:
        """The spec of the caches: where training rows are not stored, with one token of them, the least."""
        if self.buffer_rows is None:
            return self.spec
        return replace(self.spec, n_tokens={**self.spec.n_tokens, "train": 1})

    def corpus(self) -> Corpus:
        """See :func:`corpus_of`."""
        return corpus_of(self.corpus_config)


@dataclass(frozen=True, kw_only=True)
class HarvestSettings:
    """A ``harvest.yaml``: every site at every layer."""

    caches: CacheSettings
    layers: list[int]
    sites: list[str]
    accelerator: str
    devices: int | str | list[int]
    progress_bar: bool

    @classmethod
    def of(cls, config: Config) -> Self:
        """Settings from a ``harvest.yaml``.

        Raises:
            ValueError: for whatever is wrong with them.
        """
        own = without(config, "lm", "corpus", "data", "output_dir")
        return cls(**checked(cls, own, where="", caches=CacheSettings.of(config)))

    @property
    def local_devices(self) -> list[int]:
        """Devices of this machine, by number; see :func:`~sae_zoo.running.devices.devices_of`."""
        return devices_of(self.accelerator, self.devices)


@dataclass(frozen=True, kw_only=True)
class HookSettings:
    """A run's ``hook``; a cache that it misses is harvested in one pass with those of ``harvest_together``.

    Attributes:
        layer: counted from 0.
        harvest_together: ``layers`` and ``sites``, each with each; None for this hook point alone.
    """

    layer: int
    site: str
    harvest_together: Mapping | None = None

    def __post_init__(self) -> None:
        if self.harvest_together is not None:
            check_types({"layers": list[int], "sites": list[str]}, self.harvest_together,
                        where="hook.harvest_together.")

    @property
    def along(self) -> Sequence[tuple[int, str]]:
        """Layer and site of each that is harvested with it."""
        together = self.harvest_together
        return [] if together is None else [(layer, site) for layer in together["layers"] for site in together["sites"]]


@dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """The source of a run's activations.

    Attributes:
        data: a language model's, by way of caches; or of :class:`FileActivations` the arguments.
        hook: None where there is no language model.
        max_norm: see :meth:`sae_zoo.data.activations.Activations.leave_out`.
    """

    data: CacheSettings | Mapping[str, Any]
    hook: HookSettings | None
    max_norm: float | None

    @classmethod
    def of(cls, config: Config) -> Self:
        """The source in a ``train.yaml``.

        Raises:
            ValueError: for whatever is wrong with it.
        """
        name = value_at(config, "data.name")
        max_norm = config["data"].get("max_norm")  # runs of earlier versions have none
        check_types({"max_norm": float | None}, {"max_norm": max_norm}, where="data.")
        if name == "file":
            arguments = checked(FileActivations, without(config["data"], "name", "max_norm"), where="data.")
            return cls(data=arguments, hook=None, max_norm=max_norm)
        if name not in ("cache", "online"):
            raise ValueError(f"data.name is {name!r}; choose cache, online or file")
        hook = HookSettings(**checked(HookSettings, group_at(config, "hook"), where="hook."))
        return cls(data=CacheSettings.of(config), hook=hook, max_norm=max_norm)


def recipe_of(config: Config) -> Recipe:
    """The recipe of a ``recipe/*.yaml``; what in it belongs to the SAE and the data is left out.

    Raises:
        ValueError: for whatever is wrong with it.
    """
    of_others = ("d_sae", "bandwidth", "auxk_coefficient", "max_norm")
    return Recipe(**checked(Recipe, without(config, *of_others), where="recipe."))


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """A ``train.yaml``.

    Attributes:
        config: all of it.
        sae_arguments: of the variant, but for what the activations say.
        wandb_project: None without wandb.
    """

    config: Config
    variant: type[SAE]
    sae_arguments: Mapping[str, Any]
    recipe: Recipe
    source: SourceSettings
    trainer: TrainerSettings
    evaluation: EvaluationSettings
    wandb_project: str | None

    @classmethod
    def of(cls, config: Config) -> Self:
        """Settings from a ``train.yaml``.

        Raises:
            ValueError: for whatever is wrong with them, but for what only activations and language model can say.
        """
        of_sae, logger = group_at(config, "sae"), group_at(config, "logger")
        variant = variant_class(value_at(config, "sae.variant"))
        shared = {name: value_at(config, name) for name in ("d_sae", "l0_target", "seed")}
        own = without(of_sae, "name", "variant", "display")
        check_types(types_of(variant), shared)
        check_types(types_of(variant), own, where="sae.")
        if (name := value_at(config, "logger.name")) not in ("csv", "wandb"):
            raise ValueError(f"logger.name is {name!r}; choose csv or wandb")
        settings = cls(
            config=config, variant=variant, sae_arguments={**shared, **own},
            recipe=recipe_of(group_at(config, "recipe")), source=SourceSettings.of(config),
            trainer=TrainerSettings(**checked(TrainerSettings, group_at(config, "trainer"), where="trainer.")),
            evaluation=EvaluationSettings(**checked(EvaluationSettings, group_at(config, "evaluation"),
                                                    where="evaluation.")),
            wandb_project=value_at(config, "logger.project") if logger["name"] == "wandb" else None)
        with torch.device("meta"):
            settings.sae(d_in=1, input_scale=1.0)  # which looks at its values
        return settings

    @property
    def seed(self) -> int:
        """Seed of the initial weights and the order of the data."""
        return self.sae_arguments["seed"]

    @property
    def l0_target(self) -> float | None:
        return self.sae_arguments["l0_target"]

    def sae(self, *, d_in: int, input_scale: float) -> SAE:
        """The SAE at its random start."""
        return self.variant(d_in=d_in, input_scale=input_scale, recipe=self.recipe, **self.sae_arguments)
