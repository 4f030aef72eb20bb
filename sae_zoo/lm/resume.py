"""Forward passes over the same rows again and again, each from the layer of a hook point on.

What a reconstruction costs is measured by passes that differ from the hook point on alone. What the layers below make
of a row is therefore kept from the first pass over it.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sae_zoo.lm.hooks import HookPoint, lm_forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

MOST_BYTES = 1 << 29  # of streams that are kept


def layers_below(model: nn.Module, hook: HookPoint) -> list[nn.Module]:
    """The layers that run before that of ``hook``; none where its module is not in a list of layers."""
    parts = hook.module.split(".")
    for i, part in enumerate(parts):
        stack = model.get_submodule(".".join(parts[:i]))
        if isinstance(stack, nn.ModuleList) and part == str(hook.layer):
            return list(stack)[: hook.layer]
    return []


def stream_of(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The stream [batch, context, d_model] in what a layer returns: itself, or the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


@dataclass
class Streams:
    """Streams that the layers below a hook point made of rows of tokens.

    Attributes:
        room: bytes that may still be kept.
        kept: of a batch of rows, by its hash, the stream [batch, context, d_model] before the layer of the hook point.
        as_tuple: whether a layer returns it in a tuple.
        trusted: whether a pass that begins there gives what a whole one gives; None before that was tried.
    """

    room: int = MOST_BYTES
    kept: dict[bytes, Tensor] = field(default_factory=dict)
    as_tuple: bool = False
    trusted: bool | None = None


class FromLayer:
    """Calls of ``lm_forward(model, tokens)`` that skip the layers below that of ``hook`` where ``tokens`` were seen
    before.

    The first batch is read both ways: where the two logits differ in a bit (a layer that takes more than the stream
    from those below it), all passes are whole ones. So are those over rows for which there is no room.

    Args:
        model: a Hugging Face causal language model in eval mode; nothing below the layer of ``hook`` may be changed
            between calls.
        streams: of the same model (or one like it) at the same hook point; None begins with none.
    """

    def __init__(self, model: PreTrainedModel, hook: HookPoint, streams: Streams | None = None):
        self.model, self._streams = model, Streams() if streams is None else streams
        self._below = layers_below(model, hook)

    def __call__(self, tokens: Tensor) -> Any:
        """The model's output for ``tokens`` [batch, context] int."""
        streams = self._streams
        if not self._below or streams.trusted is False:
            return lm_forward(self.model, tokens)
        key = hashlib.sha256(tokens.cpu().numpy().tobytes()).digest()
        if key in streams.kept:
            return self._from(streams.kept[key], tokens)
        output, stream = self._whole(tokens)
        if stream is not None and stream.nbytes <= streams.room:
            if streams.trusted is None:
                streams.trusted = torch.equal(output.logits, self._from(stream, tokens).logits)
                if not streams.trusted:
                    log.info("every pass of the language model is a whole one: its layers hand on more than the stream")
                    return output
            streams.kept[key] = stream
            streams.room -= stream.nbytes
        return output

    def _whole(self, tokens: Tensor) -> tuple[Any, Tensor | None]:
        """The output, and the stream [batch, context, d_model] before the layer of the hook point."""
        seen: list[Tensor] = []
        thread = threading.get_ident()

        def keep(module: nn.Module, args: tuple, output: Any) -> None:
            if threading.get_ident() == thread:
                self._streams.as_tuple = isinstance(output, tuple)
                if not isinstance(output, tuple) or len(output) == 1:
                    seen.append(stream_of(output).detach())

        handle = self._below[-1].register_forward_hook(keep)
        try:
            output = lm_forward(self.model, tokens)
        finally:
            handle.remove()
        return output, seen[0] if len(seen) == 1 else None

    def _from(self, stream: Tensor, tokens: Tensor) -> Any:
        with _replaced(self._below, lambda: (stream,) if self._streams.as_tuple else stream):
            return lm_forward(self.model, tokens)


@contextmanager
def _replaced(layers: list[nn.Module], output: Callable[[], Any]) -> Iterator[None]:
    """Replace each of ``layers`` within this context: it only returns ``output()``, in the thread that asks."""
    thread = threading.get_ident()

    def instead(forward: Callable) -> Callable:
        return lambda *args, **kwargs: output() if threading.get_ident() == thread else forward(*args, **kwargs)

    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = instead(layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward
