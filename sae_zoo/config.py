"""The frame that every entry point runs in under Hydra: the config as plain values, names of folders, mistakes in one
line.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sae_zoo.command_line import one_line
from sae_zoo.paths import CONFIG_DIR, PACKAGE
from sae_zoo.process import prepare_process
from sae_zoo.running.settings import WITHOUT_EFFECT

# Overrides whose values the names of sweep and job spell out themselves.
_SPELLED_OUT = ("experiment", "sae", "lm", "hook", "hook.layer", "hook.site", "l0_target", "seed")
# Settings of the trainer that sweeps compare; the others are not for a name.
_NAMED_OF_TRAINER = ("trainer.precision", "trainer.gradient_clip_val")
# Overrides that say where, if not at the one place of conf/train.yaml.
_PLACE = ("lm", "hook.layer", "hook.site")
# Overrides that make runs incomparable: they name the sweep, all others the job.
_OF_SWEEP = ("recipe", "recipe.n_steps", "recipe.batch_size", "d_sae")
_GROUPS_OF_SWEEP = ("corpus", "data", "lm", "evaluation")


def plain(cfg: DictConfig) -> dict[str, Any]:
    """A config of Hydra's as plain values.

    Raises:
        OmegaConfBaseException: if a value that has to be given is not, or one refers to what is not there.
    """
    values: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    return values


def compose_config(entry_point: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The config that ``python -m sae_zoo.<entry_point> *overrides`` would have, for use from Python."""
    with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return plain(hydra.compose(entry_point, list(overrides)))


def run_entry_point(task: Callable[[dict[str, Any]], object], config_name: str) -> None:
    """Run ``task`` on the config, as plain values, under Hydra; a user's mistake ends in one line on stderr and exit
    status 2, Ctrl-C in one and 130.

    With HYDRA_FULL_ERROR=1 in the environment the whole traceback is shown instead.
    """
    @wraps(task)
    def on_plain_values(cfg: DictConfig) -> object:
        return task(plain(cfg))

    prepare_process()
    as_found = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors through to here instead of printing them over many lines
    try:
        _check_command_line(sys.argv[1:])
        hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=config_name)(on_plain_values)()
    except KeyboardInterrupt as stop:
        print(f"sae_zoo.{config_name}: {str(stop) or 'interrupted'}; the same command goes on from what is finished",
              file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, OSError, HydraException, OmegaConfBaseException) as error:
        if as_found:
            raise
        print(f"sae_zoo.{config_name}: error: {_said_of(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        if as_found is None:
            del os.environ["HYDRA_FULL_ERROR"]


def _said_of(error: Exception) -> str:
    """The message of a user's mistake, on one line; where a value is missing, which one."""
    said = one_line(error)
    if missing := re.search(r"Missing mandatory value: (\S+) full_key: (\S+)", said):
        name, place = missing.groups()
        key = place if place.rpartition(".")[2] == name else name
        return f"{key} has no value; give {key}=..."
    return said


# What Hydra itself writes into the config of a sweep: its launcher and its sweeper.
_HYDRAS_OWN = ("hydra._internal.core_plugins.", "hydra_plugins.")


def _what_it_makes(config: Any) -> Iterator[str]:
    """Entries of a YAML file that make an object or name a folder with more configs, as ``key: value``."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            if (key == "_target_" and not str(value).startswith(_HYDRAS_OWN)) or (key == "searchpath" and value):
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
        raise ValueError(f"--experimental-rerun {given.experimental_rerun} is refused: a pickle can run anything when "
                         "it is read; give the run's command again")
    for folder in filter(None, (given.config_dir, given.config_path)):
        for file in sorted(file for place in {Path(folder), PACKAGE / folder} for file in place.rglob("*.yaml")):
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
        if key in _SPELLED_OUT or of_trainer or _is_or_below(key, WITHOUT_EFFECT):
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
