"""From a composed Hydra config to the objects of the other rooms, and the frame that every entry point runs in."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra._internal.utils import get_args_parser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from transformers import PreTrainedModel
from yaml import YAMLError

from sae_zoo.data.copies import Copies
from sae_zoo.data.corpus import CORPORA, Corpus
from sae_zoo.data.file import FileActivations
from sae_zoo.data.folders import Folder, LocalFolder
from sae_zoo.data.harvesting import HarvestSpec
from sae_zoo.data.remote import RemoteFolder, is_url
from sae_zoo.lm.load import LoadedLM, check_context_size, load_lm
from sae_zoo.lm.skeleton import load_skeleton
from sae_zoo.memory import keep_freed_memory
from sae_zoo.records import digest
from sae_zoo.saes import SAE, variant_class
from sae_zoo.training.recipe import Recipe
from sae_zoo.typed import check_complete, check_types, types_of

# In a checkout conf/ stands beside the package; in a wheel it is inside it.
_PACKAGE = Path(__file__).resolve().parent
CONFIG_DIR = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"

# What does not change a run's numbers, and so is neither hashed nor named.
_WITHOUT_EFFECT = ("output_dir", "sweep", "logger", "trainer.progress_bar", "trainer.log_every_n_steps",
                   "trainer.accelerator", "trainer.devices", "trainer.num_nodes",  # but for rounding
                   "trainer.checkpoint_every", "hook.harvest_together", "lm.device_map",
                   "data.remote", "corpus.folder",  # the same bytes, wherever they lie
                   "matched")  # of an experiment: its values stand where they are used
# Overrides whose values the names of sweep and job spell out themselves.
_SPELLED_OUT = ("experiment", "sae", "lm", "hook", "hook.layer", "hook.site", "l0_target", "seed")
# Settings of the trainer that sweeps compare; the others are not for a name.
_NAMED_OF_TRAINER = ("trainer.precision", "trainer.gradient_clip_val")
# Overrides that say where, if not at the one place of conf/train.yaml.
_PLACE = ("lm", "hook.layer", "hook.site")
# Overrides that make runs incomparable: they name the sweep, all others the job.
_OF_SWEEP = ("recipe", "recipe.n_steps", "recipe.batch_size", "d_sae")
_GROUPS_OF_SWEEP = ("corpus", "data", "lm", "evaluation")
# Types of what in a train.yaml is used as it stands, and not handed to a constructor.
_SETTINGS = {
    "trainer": {"accelerator": str, "devices": int | str | list[int], "num_nodes": int, "precision": str | int,
                "gradient_clip_val": float | None, "log_every_n_steps": int, "validation_every": int,
                "checkpoint_every": int, "progress_bar": bool},
    "evaluation": {"n_rows": int, "n_lm_tokens": int},
}


def one_line(error: BaseException) -> str:
    """The message of an error on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def compose_config(entry_point: str, overrides: Sequence[str]) -> DictConfig:
    """The config that ``python -m sae_zoo.<entry_point> *overrides`` would have, for use from Python."""
    with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return hydra.compose(entry_point, list(overrides))


def prepare_process() -> None:
    """What every process of ours does first."""
    keep_freed_memory()
    # Lightning's advice and its own use of torch's internals: of no use to somebody who trains an SAE.
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)


def run_entry_point(task: Callable[[DictConfig], object], config_name: str) -> None:
    """Run ``task`` under Hydra; a user's mistake ends in one line on stderr and exit status 2, Ctrl-C in one and 130.

    With HYDRA_FULL_ERROR=1 in the environment the whole traceback is shown instead.
    """
    prepare_process()
    as_found = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors through to here instead of printing them over many lines
    try:
        _check_command_line(sys.argv[1:])
        hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=config_name)(task)()
    except KeyboardInterrupt as stop:
        print(f"sae_zoo.{config_name}: {str(stop) or 'interrupted'}; the same command goes on from what is finished",
              file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, OSError, HydraException, OmegaConfBaseException) as error:
        if as_found:
            raise
        print(f"sae_zoo.{config_name}: error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        if as_found is None:
            del os.environ["HYDRA_FULL_ERROR"]


# What Hydra itself writes into the config of a sweep: its launcher and its sweeper.
_HYDRAS_OWN = ("hydra._internal.core_plugins.", "hydra_plugins.")


def _what_it_makes(config: Any) -> Iterator[str]:
    """Of a YAML file: names of what is to be made, and of folders with more configs."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            if key == "_target_" and not str(value).startswith(_HYDRAS_OWN) or key == "searchpath" and value:
                yield f"{key}: {value}"
            yield from _what_it_makes(value)
    elif isinstance(config, list):
        for value in config:
            yield from _what_it_makes(value)


def _check_command_line(arguments: Sequence[str]) -> None:
    """Hydra makes objects of whatever a config names (a callback, a launcher), before any task could look at it.

    Raises:
        ValueError: if an argument names something that is to be made, or a folder with configs that do, or a pickle.
    """
    if named := [argument for argument in arguments if re.search(r"\b_target_\b", argument)]:
        raise ValueError(f"{named[0]} is refused: nothing is made from a name in a config; leave _target_ out")
    if any(re.match(r"[~+]*hydra\.searchpath\b", argument) for argument in arguments):
        raise ValueError("hydra.searchpath is refused; give one folder with --config-dir")
    given = get_args_parser().parse_known_args(arguments)[0]
    if given.experimental_rerun is not None:
        raise ValueError(f"--experimental-rerun {given.experimental_rerun} is refused: a pickle can run anything when it is "
                         "read; give the run's command again")
    for folder in filter(None, (given.config_dir, given.config_path)):
        for file in sorted(file for place in {Path(folder), _PACKAGE / folder} for file in place.rglob("*.yaml")):
            try:
                if not re.search(r"_target_|searchpath|\\", file.read_text()):  # a key may be written with escapes
                    continue  # parsing the configs of a thousand runs would take seconds
                config = OmegaConf.to_container(OmegaConf.load(file))
            except (OmegaConfBaseException, YAMLError, UnicodeError, OSError):
                continue  # Hydra could not read it either
            if made := next(_what_it_makes(config), None):
                raise ValueError(f"{file} is refused: nothing is made from a name in a config; leave {made} out")


# Names of folders.


def _is_or_below(key: str, names: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(name + ".") for name in names)


def _file_name(text: str) -> str:
    """``text`` as part of a file name; long or exotic ones end in a digest so that they stay distinct."""
    safe = re.sub(r"[^A-Za-z0-9._=+-]+", "_", text).strip("._")
    if safe and safe == text and len(safe) <= 100:
        return safe
    return f"{safe[:80]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _key(override: str) -> str:
    return override.split("=")[0].lstrip("+~")


def _overrides(root: DictConfig, *, of_sweep: bool) -> list[str]:
    chosen = []
    for override in sorted(root.hydra.overrides.task):
        key = _key(override)
        of_trainer = _is_or_below(key, ("trainer",)) and key not in _NAMED_OF_TRAINER
        if key in _SPELLED_OUT or of_trainer or _is_or_below(key, _WITHOUT_EFFECT):
            continue
        if (key in _OF_SWEEP or _is_or_below(key, _GROUPS_OF_SWEEP)) == of_sweep:
            chosen.append(override)
    return chosen


def _sweep_name(_root_: DictConfig) -> str:
    experiment = _root_.hydra.runtime.choices.get("experiment")
    place = (f"{_root_.lm.name}-{_root_.hook.site}.{_root_.hook.layer}" if _root_.data.name != "file"
             else Path(_root_.data.path).stem)
    # A sweep with a name of its own, and an experiment, may go over several places, whose jobs have the same names: a
    # folder each, in one of its own.
    if experiment is None and _root_.sweep is not None:
        sweep = _file_name(str(_root_.sweep))
        of_place = any(_key(override) in _PLACE for override in _root_.hydra.overrides.task)
        return f"{sweep}/{_file_name(place)}" if of_place else sweep
    folder = _file_name("-".join([place, *_overrides(_root_, of_sweep=True)]))
    if experiment is None:
        return folder
    return f"{_file_name(str(experiment if _root_.sweep is None else _root_.sweep))}/{folder}"


def _job_name(_root_: DictConfig) -> str:
    parts = [_root_.sae.name, f"l0_{_root_.l0_target}", f"seed_{_root_.seed}"]
    return _file_name("-".join([*parts, *_overrides(_root_, of_sweep=False)]))


OmegaConf.register_new_resolver("file_name", lambda text: _file_name(str(text)), replace=True)
OmegaConf.register_new_resolver("sweep_name", _sweep_name, replace=True)
OmegaConf.register_new_resolver("job_name", _job_name, replace=True)


def config_hash(config: dict[str, Any]) -> str:
    """Digest of a resolved config without what cannot change a run's numbers."""
    config = OmegaConf.create(config)
    for key in _WITHOUT_EFFECT:
        parent, _, name = key.rpartition(".")
        node = OmegaConf.select(config, parent) if parent else config
        if node is not None:
            node.pop(name, None)
    if "data" in config and config.data.get("part") is None:  # the same runs as before there were parts
        config.data.pop("part", None)
    if "lm" in config and config.lm.get("document_separator") is None:  # likewise
        config.lm.pop("document_separator", None)
    return digest(OmegaConf.to_container(config))


# Objects.


def device_of(accelerator: str) -> torch.device:
    """The device of an accelerator as the trainer names it: ``auto`` takes the first GPU, if there is one."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda")
    if accelerator not in ("auto", "cpu"):
        raise ValueError(f"accelerator is {accelerator!r}, and there is none here; choose auto or cpu")
    return torch.device("cpu")


def build_corpus(cfg: DictConfig) -> Corpus:
    """The corpus of a ``corpus/*.yaml``.

    Raises:
        ValueError: if its name is unknown, or it is empty.
    """
    arguments = OmegaConf.to_container(cfg, resolve=True)
    name = arguments.pop("name", None)
    if str(name) not in CORPORA:
        raise ValueError(f"corpus.name: {name!r} is unknown; choose from {', '.join(sorted(CORPORA))}")
    check_types(types_of(CORPORA[name]), arguments, where="corpus.")
    check_complete(CORPORA[name], arguments, where="corpus.")
    return CORPORA[name](**arguments)


def build_lm(cfg: DictConfig, device: torch.device) -> LoadedLM:
    """The language model of a ``train.yaml`` or ``harvest.yaml``, frozen, on ``device``.

    Raises:
        ValueError: if it cannot be loaded, or was trained on rows shorter than ``lm.context_size``.
    """
    lm = cfg.lm
    loaded = load_lm(lm.path, revision=lm.revision, dtype=lm.dtype, device=device, device_map=lm.get("device_map"),
                     document_separator=lm.get("document_separator"), made=Path(cfg.output_dir) / "lm")
    check_context_size(loaded.model.config, lm.context_size)
    return loaded


def build_skeleton(cfg: DictConfig, device: torch.device) -> PreTrainedModel:
    """What :func:`build_lm` would load, without its weights; errors as there."""
    lm = cfg.lm
    model = load_skeleton(lm.path, revision=lm.revision, dtype=lm.dtype, device=device, made=Path(cfg.output_dir) / "lm")
    check_context_size(model.config, lm.context_size)
    return model


def build_harvest_spec(cfg: DictConfig) -> HarvestSpec:
    """What ``data/cache.yaml`` (or ``online.yaml``) and the language model's context size say of a cache."""
    arguments = {k: v for k, v in OmegaConf.to_container(cfg.data, resolve=True).items() if k not in ("name", "remote", "max_norm")}
    if cfg.data.name == "online":  # how its text is read is no fact of a cache
        check_types({"buffer_rows": int}, {"buffer_rows": arguments.pop("buffer_rows")}, where="data.")
    check_types(types_of(HarvestSpec), arguments, where="data.")
    check_types(types_of(HarvestSpec), {"context_size": cfg.lm.context_size}, where="lm.")
    arguments["context_size"] = cfg.lm.context_size
    check_complete(HarvestSpec, arguments, where="data.")
    if cfg.data.name == "online" and arguments.get("part") is not None:
        raise ValueError(f"data.part is {arguments['part']}, but data is online, which stores no training rows; choose "
                         "data=cache, or leave it out")
    return HarvestSpec(**arguments)


def harvested(cfg: DictConfig) -> DictConfig:
    """``cfg`` as its caches are made: where training rows are not stored, with one token of them, the least."""
    return OmegaConf.merge(cfg, {"data": {"n_tokens": {"train": 1}}}) if cfg.data.name == "online" else cfg


def build_remote(cfg: DictConfig) -> Folder | None:
    """Where a ``train.yaml`` says that its cache lies finished; None if it says nothing.

    Raises:
        ValueError: if a value is of another type, or the address cannot be used.
    """
    remote = OmegaConf.to_container(cfg.data, resolve=True).get("remote")  # runs of earlier versions have none
    if remote is None:
        return None
    check_types({"remote": Mapping}, {"remote": remote}, where="data.")
    check_types({"path": str | None, "copy_gb": float}, remote, where="data.remote.")
    path, copy_gb = remote["path"], remote["copy_gb"]
    if path is None:
        return None
    if cfg.data.name != "cache":
        raise ValueError(f"data.remote.path is {path}, but data is {cfg.data.name}; choose data=cache, or leave it out")
    if not 0 < copy_gb < math.inf:
        raise ValueError(f"data.remote.copy_gb is {copy_gb}; it must be above 0")
    if not is_url(path):
        return LocalFolder(Path(path))
    return RemoteFolder(path, Copies(Path(cfg.output_dir) / "cache" / ".copies", int(copy_gb * 1e9)))


def build_file_activations(cfg: DictConfig) -> FileActivations:
    """The activations of ``data/file.yaml``."""
    arguments = {k: v for k, v in OmegaConf.to_container(cfg, resolve=True).items() if k not in ("name", "max_norm")}
    check_types(types_of(FileActivations), arguments, where="data.")
    check_complete(FileActivations, arguments, where="data.")
    return FileActivations(**arguments)


def build_recipe(cfg: DictConfig) -> Recipe:
    """The recipe of a ``recipe/*.yaml``; what in it belongs to the SAE is left out."""
    of_the_sae = ("d_sae", "bandwidth", "auxk_coefficient", "max_norm")
    arguments = {k: v for k, v in OmegaConf.to_container(cfg, resolve=True).items() if k not in of_the_sae}
    check_types(types_of(Recipe), arguments, where="recipe.")
    check_complete(Recipe, arguments, where="recipe.")
    return Recipe(**arguments)


def build_sae(cfg: DictConfig, *, d_in: int, input_scale: float) -> SAE:
    """The SAE of a ``train.yaml``, at its random start."""
    arguments = {k: v for k, v in OmegaConf.to_container(cfg.sae, resolve=True).items() if k not in ("name", "variant")}
    shared = {"d_sae": cfg.d_sae, "l0_target": cfg.l0_target, "seed": cfg.seed}
    variant = variant_class(cfg.sae.variant)
    check_types(types_of(variant), shared)
    check_types(types_of(variant), arguments, where="sae.")
    return variant(d_in=d_in, input_scale=input_scale, recipe=build_recipe(cfg.recipe), **shared, **arguments)


def check_settings(cfg: DictConfig) -> None:
    """Look at what of a ``train.yaml`` no object is built from.

    Raises:
        ValueError: if a value is of another type, or a count is below 1.
    """
    for group, expected in _SETTINGS.items():
        values = OmegaConf.to_container(cfg[group], resolve=True)
        check_types(expected, values, where=f"{group}.")
        for name in expected.keys() - values.keys():
            raise ValueError(f"{group}.{name} is missing; leave it in the config, or give it a value")
        for name, value in values.items():
            if expected[name] is int and value < 1:
                raise ValueError(f"{group}.{name} is {value}; it must be at least 1")
    if (clip := cfg.trainer.gradient_clip_val) is not None and not clip > 0:
        raise ValueError(f"trainer.gradient_clip_val is {clip}; it must be positive, or null for none")
