"""SAEs on disk: two files that mean raw activations in, raw reconstruction out, and need neither Hydra nor Lightning's
checkpoint to be read.

``sae.safetensors`` holds float32 tensors under the field's names (``W_enc`` [d_in, d_sae], ``W_dec`` [d_sae, d_in], the
biases, ``threshold``); ``sae.json`` says the variant, the sizes and the variant's options. The input scale C and the
subtraction of ``b_dec`` are folded in: b_enc' = C b_enc - C W_enc b_dec, b_dec' = C b_dec, theta' = C theta.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_zoo.files import replacing
from sae_zoo.records import write_json
from sae_zoo.saes import SAE, variant_class

WEIGHTS, CONFIG = "sae.safetensors", "sae.json"
_THRESHOLD = "threshold_parameter"


@torch.no_grad()
def folded_weights(sae: SAE) -> dict[str, Tensor]:
    """The parameters of ``sae``, folded so that they act on raw activations; names as on disk."""
    scale = sae.input_scale
    weights = {name: p.detach().float().clone() for name, p in sae.named_parameters()}
    shift = sae.b_dec @ sae.W_enc if sae.subtract_b_dec else torch.zeros_like(weights[sae.encoder_bias])
    for name in weights.keys() - {"W_enc", "W_dec", _THRESHOLD, "r_mag"}:
        # A bias on the encoder's output loses what the encoder made of b_dec; Gated's magnitude path sees the encoder
        # through exp(r_mag).
        lost = {sae.encoder_bias: shift, "b_mag": shift * sae.r_mag.exp() if name == "b_mag" else None}.get(name)
        weights[name] = scale * (weights[name] if lost is None else weights[name] - lost)
    if _THRESHOLD in weights:
        weights["threshold"] = scale * sae.threshold.detach().float()
        del weights[_THRESHOLD]
    return {name: w.contiguous().cpu() for name, w in weights.items()}


def save_sae(sae: SAE, directory: Path, *, about: dict) -> None:
    """Write ``sae`` folded into ``directory``; ``about`` (plain values: lm, hook, ...) goes into ``sae.json``."""
    with replacing(directory / WEIGHTS) as temporary:
        save_file(folded_weights(sae), temporary)
    write_json(directory / CONFIG, {"variant": sae.variant, "d_in": sae.d_in, "d_sae": sae.d_sae,
                                    "options": sae.options, **about})


def load_sae(directory: str | Path) -> SAE:
    """An SAE that a run has written, ready to use on raw activations, in eval mode.

    Args:
        directory: a run's folder (``outputs/runs/<sweep>/<job>``).

    Raises:
        ValueError: if a file is missing or does not fit the other.
    """
    directory = Path(directory)
    for name in (WEIGHTS, CONFIG):
        if not (directory / name).is_file():
            raise ValueError(f"{directory} holds no {name}; give the folder of a finished run")
    config = json.loads((directory / CONFIG).read_text())
    sae = variant_class(config["variant"])(d_in=config["d_in"], d_sae=config["d_sae"], subtract_b_dec=False,
                                           **config["options"])
    weights = load_file(directory / WEIGHTS)
    if "threshold" in weights:
        weights[_THRESHOLD] = weights.pop("threshold")
    expected = {name: list(p.shape) for name, p in sae.named_parameters()}
    found = {name: list(w.shape) for name, w in weights.items()}
    if found != expected:
        raise ValueError(f"{directory / WEIGHTS} does not fit {CONFIG}: it holds {found}, expected {expected}")
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(weights[name])
    return sae.eval().requires_grad_(False)
