"""SAEs on disk: two files that mean raw activations in, raw reconstruction out, and need neither Hydra nor Lightning's
checkpoint to be read.

``sae.safetensors`` holds float32 tensors under the field's names (``W_enc`` [d_in, d_sae], ``W_dec`` [d_sae, d_in], the
biases, ``threshold``); ``sae.json`` says the variant, the sizes and the variant's options. The input scale and the
subtraction of ``b_dec`` are folded in (:meth:`sae_zoo.saes.base.SAE.folded`).
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_zoo.files import replacing
from sae_zoo.records import write_json
from sae_zoo.saes import SAE, variant_class

WEIGHTS, CONFIG = "sae.safetensors", "sae.json"


def folded_weights(sae: SAE) -> dict[str, Tensor]:
    """The weights of :meth:`sae_zoo.saes.base.SAE.folded` as on disk: float32, in the host's memory."""
    return {name: weight.detach().float().contiguous().cpu() for name, weight in sae.folded().items()}


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
    expected = {name: list(w.shape) for name, w in sae.folded().items()}
    found = {name: list(w.shape) for name, w in weights.items()}
    if found != expected:
        raise ValueError(f"{directory / WEIGHTS} does not fit {CONFIG}: it holds {found}, expected {expected}")
    sae.load_folded(weights)
    return sae.eval().requires_grad_(False)
