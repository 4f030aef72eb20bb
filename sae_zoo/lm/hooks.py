"""Hook points: name one, capture activations there, splice others in.

A site is a module path with a ``{layer}`` in it and the side of that module, its input or its output. A hook point is a
site at a layer. Modules that return tuples count by their first element.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Sites = Mapping[str, Mapping[str, str]]


def _sites(layer: str, mlp: str, attention: str) -> Sites:
    return {
        "residual": {"module": layer, "io": "output"},
        "mlp": {"module": f"{layer}.{mlp}", "io": "output"},
        "attention": {"module": f"{layer}.{attention}", "io": "input"},
    }


# By ``config.model_type``. residual: the stream after the layer; mlp: what the MLP adds to the stream (in Gemma 2 that
# is after its RMSNorm, as in the paper); attention: the concatenated heads before W_O, n_heads * head_dim wide.
SITES: Mapping[str, Sites] = {
    "gemma2": _sites("model.layers.{layer}", "post_feedforward_layernorm", "self_attn.o_proj"),
    "llama": _sites("model.layers.{layer}", "mlp", "self_attn.o_proj"),
    "gpt_neox": _sites("gpt_neox.layers.{layer}", "mlp", "attention.dense"),
    "gpt2": _sites("transformer.h.{layer}", "mlp", "attn.c_proj"),
}


@dataclass(frozen=True)
class HookPoint:
    """One place in a language model.

    Attributes:
        layer: counted from 0.
        site: e.g. ``residual``.
        module: path of the module in the model, e.g. ``model.layers.3``.
        io: ``input`` or ``output`` of that module.
    """

    layer: int
    site: str
    module: str
    io: str

    @property
    def name(self) -> str:
        """E.g. ``residual.3``."""
        return f"{self.site}.{self.layer}"


def count_layers(model: PreTrainedModel) -> int:
    """Transformer layers of a Hugging Face model."""
    return model.config.get_text_config().num_hidden_layers


def resolve_hook(model: PreTrainedModel, sites: Sites | str, layer: int, site: str) -> HookPoint:
    """The hook point of ``site`` at ``layer``, known to exist in ``model``.

    Args:
        model: a Hugging Face causal language model.
        sites: ``"auto"`` takes the table of the model's type from :data:`SITES`; or a table of one's own,
            ``{site: {"module": path with {layer}, "io": "input" | "output"}}``.
        layer: 0 to n_layers - 1.

    Raises:
        ValueError: if there is no table for the model's type, or the site, the layer or the module does not exist.
    """
    if sites == "auto":
        model_type = model.config.model_type
        if model_type not in SITES:
            raise ValueError(f"lm.sites: auto does not know the model type {model_type!r}, only {', '.join(SITES)}; "
                             "write the sites yourself, e.g. {residual: {module: 'model.layers.{layer}', io: output}}")
        sites = SITES[model_type]
    if not isinstance(sites, Mapping):
        raise ValueError(f"lm.sites is {sites!r}; give auto or {{site: {{module: ..., io: ...}}}}")
    if site not in sites:
        raise ValueError(f"hook.site: {site!r} is unknown; choose from {', '.join(sites)}")
    n_layers = count_layers(model)
    if not isinstance(layer, int) or not 0 <= layer < n_layers:
        raise ValueError(f"hook.layer is {layer!r}; the model has {n_layers} layers, 0 to {n_layers - 1}")
    where = sites[site]
    if not isinstance(where, Mapping) or set(where) != {"module", "io"} or where["io"] not in ("input", "output"):
        raise ValueError(f"lm.sites.{site} is {where}; it needs a module (a path with {{layer}} in it) and an io "
                         "(input or output), nothing else")
    path = where["module"].replace("{layer}", str(layer))
    modules = dict(model.named_modules())
    if path not in modules:
        prefix = path
        while prefix and prefix not in modules:
            prefix = prefix.rpartition(".")[0]
        children = ", ".join(name for name, _ in modules[prefix].named_children())
        raise ValueError(f"lm.sites.{site}.module: the model has no {path!r}; "
                         f"{repr(prefix) if prefix else 'the model'} has {children or 'no modules inside'}")
    return HookPoint(layer, site, path, where["io"])


def lm_forward(model: PreTrainedModel, tokens: Tensor):
    """The model's output for ``tokens`` [batch, context] int, each row on its own, without a key-value cache."""
    embedding: Any = model.get_input_embeddings()  # a module with a weight
    return model(input_ids=tokens.to(embedding.weight.device).long(), use_cache=False)


def _attach(model: nn.Module, hook: HookPoint, see: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Show ``see`` every activation [batch, context, d] at ``hook``; what it returns, if anything, takes its place.

    Only of forward passes in the thread that asks: another one may read the same model ahead meanwhile.
    """
    thread = threading.get_ident()

    def substitute(values: tuple) -> tuple | None:
        if threading.get_ident() != thread:
            return None
        x = values[0] if values else None
        if not isinstance(x, Tensor) or x.ndim != 3:
            found = f"shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"lm.sites.{hook.site}: the {hook.io} of {hook.module!r} is {found}, not an activation "
                             "[batch, context, d]; choose another module or the other io")
        replacement = see(x)
        return None if replacement is None else (replacement, *values[1:])

    def on_input(module: nn.Module, args: tuple):
        return substitute(args)

    def on_output(module: nn.Module, args: tuple, output):
        if isinstance(output, tuple):
            return substitute(output)
        replaced = substitute((output,))
        return None if replaced is None else replaced[0]

    module = model.get_submodule(hook.module)
    return module.register_forward_pre_hook(on_input) if hook.io == "input" else module.register_forward_hook(on_output)


def _never_reached(hook: HookPoint) -> ValueError:
    return ValueError(f"hook {hook.name}: the forward pass never called {hook.module!r}; choose another module")


class _LastHookReached(Exception):
    """Ends a forward pass from inside it."""


@torch.no_grad()
def capture(model: PreTrainedModel, hooks: Sequence[HookPoint], tokens: Tensor) -> dict[str, Tensor]:
    """Activations at several hook points from one forward pass, which stops at the last of them.

    Args:
        tokens: [batch, context] int.

    Returns:
        ``{hook.name: [batch, context, d]}`` in the model's dtype, each where its layer is.

    Raises:
        ValueError: if a hook point is never reached, or what passes there is no activation.
    """
    captured: dict[str, Tensor] = {}
    wanted = {hook.name: hook for hook in hooks}

    def keep(name: str, x: Tensor) -> None:
        captured[name] = x
        if len(captured) == len(wanted):
            raise _LastHookReached

    handles = []
    try:
        for name, hook in wanted.items():
            handles.append(_attach(model, hook, partial(keep, name)))
        lm_forward(model, tokens)
    except _LastHookReached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    for name, hook in wanted.items():
        if name not in captured:
            raise _never_reached(hook)
    return {name: captured[name] for name in wanted}


def hook_width(model: PreTrainedModel, hook: HookPoint) -> int:
    """Width d of the activations at ``hook``, seen by running two tokens to there."""
    return capture(model, [hook], torch.zeros(1, 2, dtype=torch.long))[hook.name].shape[-1]


@contextmanager
def splice(model: PreTrainedModel, hook: HookPoint, replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within this context every forward pass goes on with ``replace(x)`` instead of the activation x at ``hook``.

    Args:
        replace: [batch, context, d] in the model's dtype -> the same shape; dtype and device are put back.

    Raises:
        ValueError: if ``replace`` changes the shape, or nothing passed through ``hook`` in the whole context: a splice
            without effect would look like a perfect reconstruction.
    """
    reached = False

    def see(x: Tensor) -> Tensor:
        nonlocal reached
        reached = True
        replacement = replace(x)
        if replacement.shape != x.shape:
            raise ValueError(f"hook {hook.name}: the replacement has shape {list(replacement.shape)}; "
                             f"the activation has {list(x.shape)}")
        return replacement.to(device=x.device, dtype=x.dtype)

    handle = _attach(model, hook, see)
    try:
        yield
    finally:
        handle.remove()
    if not reached:
        raise _never_reached(hook)
