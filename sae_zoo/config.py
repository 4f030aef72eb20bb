"""From a composed Hydra config to the objects of the other rooms, and the frame that every entry point runs in."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from sae_zoo.data.corpus import CORPORA, Corpus
from sae_zoo.memory import keep_freed_memory

# In a checkout conf/ stands beside the package; in a wheel it is inside it.
_PACKAGE = Path(__file__).resolve().parent
CONFIG_DIR = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"


def one_line(error: BaseException) -> str:
    """The message of an error on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def run_entry_point(task: Callable[[DictConfig], object], config_name: str) -> None:
    """Run ``task`` under Hydra; a user's mistake ends in one line on stderr and exit status 2.

    With HYDRA_FULL_ERROR=1 in the environment the whole traceback is shown instead.
    """
    keep_freed_memory()
    wants_traceback = bool(os.environ.get("HYDRA_FULL_ERROR"))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors through to here instead of printing them over many lines
    try:
        hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=config_name)(task)()
    except (ValueError, OSError, HydraException, OmegaConfBaseException) as error:
        if wants_traceback:
            raise
        print(f"sae_zoo.{config_name}: error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None


def build_corpus(cfg: DictConfig) -> Corpus:
    """The corpus of a ``corpus/*.yaml``.

    Raises:
        ValueError: if its name is unknown, or it is empty.
    """
    arguments = dict(cfg)
    name = arguments.pop("name")
    if name not in CORPORA:
        raise ValueError(f"corpus.name: {name!r} is unknown; choose from {', '.join(sorted(CORPORA))}")
    return CORPORA[name](**arguments)
