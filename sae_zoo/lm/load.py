"""Load a causal language model to read activations from: frozen, in eval mode, with a name for exactly its bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from sae_zoo.lm.dtype import check_dtype, choose_dtype
from sae_zoo.lm.gguf import converted, gguf_file, gguf_fingerprint
from sae_zoo.lm.hooks import count_layers

BUILTIN = Path(__file__).parent / "builtin"
# Where language models are made: converted GGUF files, and what lm.dtype auto was.
MADE = Path("outputs/lm")
# What a hub model is loaded from. Not every *.safetensors: some repositories hold the same weights twice.
_HUB_FILES = ("*.json", "*.txt", "tokenizer.model", "model*.safetensors")
_QUIET_BELOW_BYTES = 1_000_000_000  # loads in a moment; no progress bar


@dataclass(frozen=True)
class LoadedLM:
    """A language model, ready to be read.

    Attributes:
        model: a ``*ForCausalLM`` in eval mode; no parameter requires a gradient.
        fingerprint: names its weights, config and tokenizer: SHA-256 of a folder's or a GGUF file's content, or the hub
            model's commit; with a separator of documents of its own, a digest of the two.
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
        self.model.to("cpu")  # type: ignore[arg-type]  # transformers wraps it without its self
        yield  # after an error there may be no room on the device, and the error must not be lost
        self.model.to(self.device)  # type: ignore[arg-type]  # as above


def _download(name: str, revision: str | None) -> Path:
    """The local snapshot of a hub model; its folder is named by the commit."""
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_HUB_FILES)))
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


def check_context_size(config: Any, context_size: int) -> None:
    """Raises ValueError if rows of ``context_size`` tokens are longer than the positions that the model was trained on.
    """
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(most, int) and isinstance(context_size, int) and context_size > most:
        raise ValueError(f"lm.context_size is {context_size}; the model was trained on {most}")


def _set_special_tokens(tokenizer: PreTrainedTokenizerBase, n_embeddings: int, separator: str | None,
                        path: str) -> None:
    """Make ``separator``, if any, BOS and EOS; pad with EOS, or BOS, where the embedding has no row for padding.

    Raises:
        ValueError: if the tokenizer does not know the separator, or the model BOS or EOS.
    """
    if separator is not None:
        if separator not in tokenizer.get_vocab():
            raise ValueError(f"lm.document_separator: {separator!r} is no token of {path!r}; choose from "
                             f"{', '.join(tokenizer.all_special_tokens)}, or leave it null")
        tokenizer.bos_token = tokenizer.eos_token = separator
    for name, number in (("BOS", tokenizer.bos_token_id), ("EOS", tokenizer.eos_token_id)):
        if number is not None and number >= n_embeddings:
            raise ValueError(f"lm.path: the tokenizer of {path!r} has {name} at {number}, but the model knows "
                             f"{n_embeddings} tokens; the two do not belong together")
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= n_embeddings:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token


def load_lm(path: str, *, revision: str | None = None, dtype: str = "float32", device: torch.device | str = "cpu",
            device_map: str | None = None, document_separator: str | None = None, made: Path = MADE) -> LoadedLM:
    """Load a causal language model and its tokenizer; safetensors or GGUF, and never code from the model's repository.

    Args:
        path: ``builtin``, ``smollm2``, a GGUF file, a folder as ``save_pretrained`` writes it, or a name on the Hugging
            Face hub.
        revision: a commit, tag or branch of the hub; None is main.
        dtype: float32, bfloat16, float16, or auto, see :func:`sae_zoo.lm.dtype.choose_dtype`; not part of the
            fingerprint.
        device_map: how transformers is to spread the layers over all devices, ``auto`` say; needs ``accelerate``. None
            puts the model on ``device`` whole.
        document_separator: the token that rows begin with and documents end with; None is the tokenizer's own BOS and
            EOS. A chat model's are those of a turn, and it has read running text between others.
        made: folder of converted GGUF files, and of the answers to dtype auto.

    Raises:
        ValueError: if the dtype is unknown, a device map cannot be had, ``path`` is neither a folder nor a hub model
            within reach, there is no complete model in it, a folder is given a revision, or the separator is no token.
        OSError: if a converted model cannot be written.
    """
    check_dtype(dtype)
    if device_map is not None and find_spec("accelerate") is None:
        raise ValueError(f"lm.device_map is {device_map!r}, which needs the accelerate package: pip install "
                         "accelerate, or leave it null")
    file = gguf_file(path)
    if file is not None:
        with _progress_bar(shown=file.stat().st_size > _QUIET_BELOW_BYTES):
            folder = converted(file, made)
    else:
        folder = BUILTIN if path == "builtin" else Path(path).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"lm.revision is {revision!r}, but lm.path {path!r} is "
                             f"{'a folder' if file is None else 'a file'}; only hub models have one")
        files = _files(folder)
        fingerprint = _digest(files) if file is None else gguf_fingerprint(file)
    else:
        folder = _download(path, revision)
        files = _files(folder)
        fingerprint = folder.name
    try:
        with _progress_bar(shown=sum(f.stat().st_size for f in files) > _QUIET_BELOW_BYTES):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            pair: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=choose_dtype(dtype, config, "cuda" if device_map else device, made),
                device_map=device_map, use_safetensors=True, trust_remote_code=False, output_loading_info=True)
            model, report = pair
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"lm.path: {folder} cannot be loaded as a causal language model: {error}") from error
    if report["missing_keys"]:  # transformers would leave them random and only warn
        missing = sorted(report["missing_keys"])
        raise ValueError(f"lm.path: {folder} lacks {len(missing)} of the model's weights, {missing[0]} among them; "
                         "its config.json and its *.safetensors do not belong together")
    _set_special_tokens(tokenizer, model.get_input_embeddings().weight.shape[0], document_separator, path)
    if document_separator is not None:
        fingerprint = hashlib.sha256(f"{fingerprint} {document_separator}".encode()).hexdigest()
    model.requires_grad_(False).eval()
    if device_map is None:
        model.to(device)
    return LoadedLM(model, tokenizer, fingerprint, path, count_layers(model),
                    torch.device(device) if device_map is None else None)
