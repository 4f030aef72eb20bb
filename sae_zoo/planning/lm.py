"""Cost of the language model to a run: forward passes for the harvest, and for the metrics of the evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sae_zoo.lm.hooks import HookPoint, capture, lm_forward, splice
from sae_zoo.lm.resume import layers_below, stream_of
from sae_zoo.lm.skeleton import n_bytes
from sae_zoo.planning.meter import Cost, Meter


@dataclass(frozen=True)
class LMCost:
    """Costs of one batch of rows of tokens, at one hook point.

    Attributes:
        weight_bytes: memory of the model.
        d_in: width at the hook point.
        to_hook: a forward pass that stops at the hook point, as the harvest runs it.
        below: FLOPs of it in the layers below that of the hook point, which a row that is read again does not take.
        stream_bytes: of what is kept of a batch for that.
        forward: a whole one; its peak is with gradients from the hook point on.
        attribution: a whole one and the gradient of one position's logits at the hook point.
    """

    weight_bytes: int
    d_in: int
    to_hook: Cost
    below: int
    stream_bytes: int
    forward: Cost
    attribution: Cost


def lm_cost(model: PreTrainedModel, hook: HookPoint, *, batch_size: int, context_size: int) -> LMCost:
    """Costs of ``model`` (on the meta device) for ``batch_size`` rows of ``context_size`` tokens.

    One pass is metered: until the hook point nothing is kept for a gradient, so what was seen when it is reached is
    what a harvest costs.
    """
    tokens, leaves = torch.zeros(batch_size, context_size, dtype=torch.int32), []
    seen: dict[str, Any] = {"below": 0, "stream_bytes": 0}
    below = layers_below(model, hook)
    with Meter() as meter, ExitStack() as stack:

        def layer_begins(module: nn.Module, args: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
            seen.update(below=meter.so_far().flops, stream_bytes=stream_of(output).nbytes)

        if below:
            stack.callback(below[-1].register_forward_hook(layer_begins).remove)

        def leaf(x: Tensor) -> Tensor:
            seen["to_hook"] = meter.so_far()
            leaves.append(x.detach().requires_grad_())
            return leaves[0]

        with torch.enable_grad(), splice(model, hook, leaf):
            logits = lm_forward(model, tokens).logits
            seen["forward"] = meter.so_far()
            logits[:, 0].float().sum().backward()
        seen["attribution"] = meter.so_far()
    return LMCost(n_bytes(model), leaves[0].shape[-1], **seen)


def hook_widths(model: PreTrainedModel, hooks: Sequence[HookPoint]) -> list[int]:
    """Width at each of ``hooks`` of a model on the meta device, seen by running two tokens to there.

    Raises:
        ValueError: if one is never reached, or what passes there is no activation.
    """
    with Meter():
        return [x.shape[-1] for x in capture(model, hooks, torch.zeros(1, 2, dtype=torch.int32)).values()]


def harvest_cost(model: PreTrainedModel, hooks: Sequence[HookPoint], *, batch_size: int, context_size: int) -> Cost:
    """Cost of the pass that captures all ``hooks``, which stops at the last."""
    with Meter() as meter:
        capture(model, hooks, torch.zeros(batch_size, context_size, dtype=torch.int32))
        return meter.so_far()
