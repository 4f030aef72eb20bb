"""Load a causal language model to read activations from: frozen, in eval mode, with a name for exactly its bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from sae_zoo.lm.hooks import count_layers

BUILTIN = Path(__file__).parent / "builtin"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What a hub model is loaded from. Not every *.safetensors: some repositories hold the same weights twice.
_HUB_FILES = ("*.json", "*.txt", "tokenizer.model", "model*.safetensors")
_QUIET_BELOW_BYTES = 1_000_000_000  # loads in a moment; no progress bar


@dataclass(frozen=True)
class LoadedLM:
    """A language model, ready to be read.

    Attributes:
        model: a ``*ForCausalLM`` in eval mode; no parameter requires a gradient.
        fingerprint: names its weights, config and tokenizer: SHA-256 of a folder's files, or the hub model's commit.
        path: as it was asked for.
        n_layers: transformer layers.
        device: where it was put; None where transformers has spread it over several.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    path: str
    n_layers: int
    device: torch.device | None

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Meanwhile the model waits in the host's memory, so that its device has room; one that is spread stays."""
        if self.device is None:
            yield
            return
        self.model.to("cpu")
        yield  # after an error there may be no room on the device, and the error must not be lost
        self.model.to(self.device)


def _download(name: str, revision: str | None) -> Path:
    """The local snapshot of a hub model; its folder is named by the commit."""
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"lm.path: {name!r} (revision {revision or 'main'}) is neither a folder nor a hub model that can be "
            "reached; check the spelling, the network, your access if it is gated, and whether HF_HUB_OFFLINE is set "
            f"({str(error).strip().splitlines()[0]})"
        ) from None


def _files(folder: Path) -> list[Path]:
    """The files of an LM folder that decide what it computes and how it reads text.

    Raises:
        ValueError: if there is no config, no tokenizer or no weights.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ValueError(f"lm.path: {folder} is an LM folder without weights: it has no *.safetensors; "
                         "write one with model.save_pretrained")
    for name, writer in (("config.json", "model"), ("tokenizer.json", "tokenizer")):
        if not (folder / name).is_file():
            raise ValueError(f"lm.path: {folder} has no {name}; write one with {writer}.save_pretrained")
    # tokenizer_config.json says which tokens are special; a tokenizer without such a file has none to say.
    return [f for f in (*(folder / n for n in ("config.json", "tokenizer.json", "tokenizer_config.json")), *weights)
            if f.is_file()]


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as content:
            digest.update(file.name.encode() + b"\0" + hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


@contextmanager
def _progress_bar(shown: bool) -> Iterator[None]:
    was_enabled = transformers_logging.is_progress_bar_enabled()
    if not shown:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()


def load_lm(path: str, *, revision: str | None = None, dtype: str = "float32", device: torch.device | str = "cpu",
            device_map: str | None = None) -> LoadedLM:
    """Load a causal language model and its tokenizer; safetensors only, and never code from the model's repository.

    Args:
        path: ``builtin``, a folder as ``save_pretrained`` writes it, or a name on the Hugging Face hub.
        revision: a commit, tag or branch of the hub; None is main.
        dtype: float32, bfloat16 or float16; not part of the fingerprint.
        device_map: how transformers is to spread the layers over all devices, ``auto`` say; needs ``accelerate``. None
            puts the model on ``device`` whole.

    Raises:
        ValueError: if the dtype is unknown, a device map cannot be had, ``path`` is neither a folder nor a hub model
            within reach, there is no complete model in it, or a folder is given a revision.
    """
    if dtype not in DTYPES:
        raise ValueError(f"lm.dtype: {dtype!r} is unknown; choose from {', '.join(DTYPES)}")
    if device_map is not None and find_spec("accelerate") is None:
        raise ValueError(f"lm.device_map is {device_map!r}, which needs the accelerate package: pip install accelerate, or "
                         "leave it null")
    folder = BUILTIN if path == "builtin" else Path(path).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"lm.revision is {revision!r}, but lm.path {path!r} is a folder; only hub models have one")
        files = _files(folder)
        fingerprint = _digest(files)
    else:
        folder = _download(path, revision)
        files = _files(folder)
        fingerprint = folder.name
    try:
        with _progress_bar(shown=sum(f.stat().st_size for f in files) > _QUIET_BELOW_BYTES):
            model, report = AutoModelForCausalLM.from_pretrained(
                folder, dtype=DTYPES[dtype], device_map=device_map, use_safetensors=True, trust_remote_code=False,
                output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"lm.path: {folder} cannot be loaded as a causal language model: {error}") from error
    if report["missing_keys"]:  # transformers would leave them random and only warn
        missing = sorted(report["missing_keys"])
        raise ValueError(f"lm.path: {folder} lacks {len(missing)} of the model's weights, {missing[0]} among them; "
                         "its config.json and its *.safetensors do not belong together")
    model.requires_grad_(False).eval()
    if device_map is None:
        model.to(device)
    return LoadedLM(model, tokenizer, fingerprint, path, count_layers(model),
                    torch.device(device) if device_map is None else None)
