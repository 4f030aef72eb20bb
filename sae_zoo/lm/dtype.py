"""The number type of a language model: as it was asked for, or the faster one of this machine."""

from __future__ import annotations

import copy
import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from sae_zoo.files import locked, write_text

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOKENS = 256  # of a timed forward pass
_SECONDS = 0.4  # that each type is timed for
_GAIN = 1.3  # bfloat16 rounds; it is taken where it is faster by more than noise


def check_dtype(dtype: str) -> None:
    """Raises ValueError unless ``dtype`` is one of :data:`DTYPES` or ``auto``."""
    if dtype not in (*DTYPES, "auto"):
        raise ValueError(f"lm.dtype: {dtype!r} is unknown; choose from {', '.join(DTYPES)}, auto")


def build_skeleton(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model of ``config`` on the meta device: every module, no weight."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    return model.eval().requires_grad_(False)


def one_layer(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """A skeleton with the first layer of ``config`` and next to no vocabulary: small enough to be made real."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = 1, 256, None
    return build_skeleton(config, dtype)


@torch.no_grad()
def tokens_per_second(config: Any, dtype: torch.dtype) -> float:
    """Speed of a whole model of ``config`` on this machine's CPU, but for its vocabulary: from one layer, its weights
    constant.
    """
    layer = one_layer(config, dtype).to_empty(device="cpu")
    for tensor in (*layer.parameters(), *layer.buffers()):
        tensor.fill_(0.01)
    tokens = torch.zeros(1, _TOKENS, dtype=torch.long)
    layer(input_ids=tokens, use_cache=False)
    best, until = float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < until or best == float("inf"):
        start = time.perf_counter()
        layer(input_ids=tokens, use_cache=False)
        best = min(best, time.perf_counter() - start)
    return _TOKENS / (best * config.get_text_config().num_hidden_layers)


def choose_dtype(dtype: str, config: Any, device: torch.device | str, root: Path, *,
                 remember: bool = True) -> torch.dtype:
    """The type that ``lm.dtype`` means.

    ``auto`` is bfloat16 on a GPU. On a CPU both are timed, for a second, and bfloat16 is taken where it is 1.3 times as
    fast. The answer is written below ``root`` and is then the answer for all models of these shapes, so that all runs
    with this ``output_dir`` read the same activations, whatever else the machine does and whichever machine it is.

    Args:
        dtype: float32, bfloat16, float16 or auto.
        config: of the language model.
        remember: whether an answer is written; one that is there counts in any case.

    Raises:
        ValueError: if ``dtype`` is unknown, or what is written below ``root`` is no answer.
    """
    check_dtype(dtype)
    if dtype != "auto":
        return DTYPES[dtype]
    text = config.get_text_config()
    file = root / f"dtype-{config.model_type}-{text.num_hidden_layers}x{text.hidden_size}.json"
    if file.is_file():
        return _remembered(file)
    if not remember:
        return DTYPES[_measure(config, device)["dtype"]]
    with locked(root / f".{file.name}.lock", "timing the language model"):
        if not file.is_file():
            measured = _measure(config, device)
            write_text(file, json.dumps(measured) + "\n")
            speeds = ", ".join(f"{name} {speed:,.0f}" for name, speed in measured["tokens_per_second"].items())
            log.info("lm.dtype auto: %s (%s; kept in %s)", measured["dtype"],
                     f"tokens a second here: {speeds}" if speeds else "as on any GPU", file)
        return _remembered(file)


def _measure(config: Any, device: torch.device | str) -> dict[str, Any]:
    if torch.device(device).type != "cpu":
        return {"dtype": "bfloat16", "tokens_per_second": {}}
    speeds = {name: round(tokens_per_second(config, DTYPES[name]), 1) for name in ("float32", "bfloat16")}
    return {"dtype": "bfloat16" if speeds["bfloat16"] > _GAIN * speeds["float32"] else "float32",
            "tokens_per_second": speeds}


def _remembered(file: Path) -> torch.dtype:
    try:
        return DTYPES[json.loads(file.read_text(encoding="utf-8"))["dtype"]]
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"{file} does not say what lm.dtype auto was; delete it, or give lm.dtype") from None
