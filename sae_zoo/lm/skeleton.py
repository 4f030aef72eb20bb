"""The module tree of a language model without its weights: on the meta device, from its config alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from transformers import AutoConfig, PreTrainedModel

from sae_zoo.lm import dtype as of_dtype
from sae_zoo.lm.dtype import build_skeleton, check_dtype, choose_dtype
from sae_zoo.lm.gguf import gguf_config, gguf_file
from sae_zoo.lm.load import BUILTIN, MADE

# What the hub's config.json of these gated models says of their shape, for machines that cannot read it there. Checked
# against table 1 of the Gemma 2 report (arXiv 2408.00118) and the number of parameters that the hub shows.
_GEMMA_2 = {"model_type": "gemma2", "vocab_size": 256000, "head_dim": 256, "query_pre_attn_scalar": 256,
            "sliding_window": 4096, "max_position_embeddings": 8192, "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0, "tie_word_embeddings": True}
KNOWN_CONFIGS: dict[str, dict[str, Any]] = {
    "google/gemma-2-2b": {**_GEMMA_2, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
                          "num_attention_heads": 8, "num_key_value_heads": 4},
    "google/gemma-2-9b": {**_GEMMA_2, "hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42,
                          "num_attention_heads": 16, "num_key_value_heads": 8},
}


def _config(path: str, revision: str | None) -> Any:
    if (file := gguf_file(path)) is not None:
        return gguf_config(file)
    folder = BUILTIN if path == "builtin" else Path(path).expanduser()
    try:
        own = folder / "config.json" if folder.is_dir() else hf_hub_download(path, "config.json", revision=revision)
        return AutoConfig.from_pretrained(own, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if path in KNOWN_CONFIGS:
            return AutoConfig.for_model(**KNOWN_CONFIGS[path])
        raise ValueError(
            f"lm.path: {path!r} (revision {revision or 'main'}) has no config.json within reach: it is neither a "
            "folder with one nor a hub model that can be reached; check the spelling, the network, your access if it "
            f"is gated, and whether HF_HUB_OFFLINE is set ({str(error).strip().splitlines()[0]})") from None


def load_skeleton(path: str, *, revision: str | None = None, dtype: str = "float32", device: torch.device | str = "cpu",
                  made: Path = MADE) -> PreTrainedModel:
    """The model that :func:`sae_zoo.lm.load.load_lm` would load, on the meta device: every module, no weight.

    Args:
        path, revision, dtype, device, made: as of :func:`~sae_zoo.lm.load.load_lm`. Of a hub model only ``config.json``
            is read; that of Gemma 2 2B and 9B is known where the hub cannot be reached. Nothing is written.

    Raises:
        ValueError: if the dtype is unknown, or no config is within reach or of a causal language model.
    """
    check_dtype(dtype)
    config = _config(path, revision)
    try:
        return build_skeleton(config, choose_dtype(dtype, config, device, made, remember=False))
    except ValueError as error:
        raise ValueError(f"lm.path: {path!r} is not a causal language model: {error}") from None


def one_layer(model: PreTrainedModel) -> PreTrainedModel:
    """A skeleton with the first of ``model``'s layers and next to no vocabulary: small enough to be made real."""
    return of_dtype.one_layer(model.config, model.dtype)


def n_bytes(model: PreTrainedModel) -> int:
    """Memory that the model's parameters will take; tied ones count once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())
