"""Which tokens a latent speaks for: the direct effect of its decoder direction on the logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sae_zoo.lm.hooks import HookPoint

_LOGITS_AT_ONCE = 2**24  # latents x vocabulary: 64 MB in float32


class UnknownEffects(ValueError):
    """A hook point from which no direct way leads to the logits that this module knows."""


@dataclass(frozen=True)
class Effects:
    """The tokens on which latents have the largest effects, [n_latents, k] each.

    Attributes:
        promoted_ids, promoted: the most promoted first, and their effects.
        suppressed_ids, suppressed: the most suppressed first.
    """

    promoted_ids: Tensor
    promoted: Tensor
    suppressed_ids: Tensor
    suppressed: Tensor


def _scale(norm: nn.Module, width: int) -> Tensor:
    """What a norm multiplies by, [width]."""
    if isinstance(norm, nn.LayerNorm):
        return norm.weight
    # An RMS norm leaves a vector of ones (RMS 1) as its scale, whether it stores that as w or, like Gemma, as 1 + w.
    weight = next(norm.parameters())
    return norm(torch.ones(width, dtype=weight.dtype, device=weight.device))


def _into_stream(model: nn.Module, hook: HookPoint, directions: Tensor) -> Tensor:
    """``directions`` [n, d_in] at a hook point as the residual stream receives them, [n, d_model]."""
    module = model.get_submodule(hook.module)
    # transformers' Conv1D (GPT-2) is a linear map as well, with its weight the other way round.
    if hook.io == "input" and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"):
        received = module(directions) - module(torch.zeros_like(directions[:1]))  # less its bias
        if model.config.model_type == "gemma2" and hook.module.endswith(".self_attn.o_proj"):
            layer = model.get_submodule(hook.module.removesuffix(".self_attn.o_proj"))
            received = received * _scale(layer.post_attention_layernorm, received.shape[1])
        return received
    return directions


@torch.no_grad()
def logit_effects(model: nn.Module, hook: HookPoint, W_dec: Tensor, k: int) -> Effects:
    """The ``k`` most promoted and the ``k`` most suppressed tokens of each row of ``W_dec`` [n, d_in].

    Computed for a row d: ``e = W_U (g * d)`` less its mean over the vocabulary, where W_U [vocabulary, d_model] is the
    unembedding and g the scale of the final norm. A LayerNorm's centring is applied to d as well. A row at the
    attention site (the heads before W_O) is first taken through W_O and, in Gemma 2, through the scale of the norm
    behind it. Logits are less their mean because a shift of all of them changes no probability.

    So an effect is in logits for each unit of the latent, where the stream ahead of the final norm has RMS 1; at
    another RMS all effects are divided by it, which changes no order. Ignored is everything else that follows: the
    layers after the hook point, that a norm divides by what the latent itself changes, and soft-capping of logits.
    For a latent in an early layer this may say little about what the model makes of it.

    Args:
        model: a Hugging Face causal language model.

    Raises:
        UnknownEffects: if the model has no single final norm, or what is at ``hook`` is no part of the residual stream.
    """
    norms = [module for module in model.base_model.children() if "norm" in type(module).__name__.lower()]
    if len(norms) != 1:
        raise UnknownEffects(f"no logit effects: {type(model.base_model).__name__} has {len(norms)} final norms; one "
                             "is expected")
    unembedding = model.get_output_embeddings().weight
    vocabulary, d_model = unembedding.shape
    found = []
    for part in W_dec.split(max(1, _LOGITS_AT_ONCE // vocabulary)):
        received = _into_stream(model, hook, part.to(unembedding))
        if received.shape[1] != d_model:
            raise UnknownEffects(f"no logit effects: {hook.name} is {received.shape[1]} wide and the residual stream "
                                 f"{d_model}; what is there is no part of it")
        if isinstance(norms[0], nn.LayerNorm):
            received = received - received.mean(1, keepdim=True)
        effects = (received * _scale(norms[0], d_model) @ unembedding.T).float()
        effects -= effects.mean(1, keepdim=True)
        top, low = effects.topk(min(k, vocabulary)), effects.topk(min(k, vocabulary), largest=False)
        found.append([part.cpu() for part in (top.indices, top.values, low.indices, low.values)])
    return Effects(*(torch.cat(parts) for parts in zip(*found, strict=True)))
