"""The SAE hierarchy. A variant is one module here, named as its ``variant``, with one class; nothing else lists it."""

from __future__ import annotations

import importlib
import pkgutil

from sae_zoo.saes.base import SAE, SAELoss, SAEOutput

_NOT_VARIANTS = frozenset({"attributes", "base", "lightning", "io"})


def variants() -> list[str]:
    """Names of all variants."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _NOT_VARIANTS)


def variant_class(variant: str) -> type[SAE]:
    """The class of a variant.

    Raises:
        ValueError: if there is none of that name.
    """
    if variant not in variants():
        raise ValueError(f"variant {variant!r} is unknown; choose from {', '.join(variants())}")
    module = importlib.import_module(f"{__name__}.{variant}")
    return next(c for c in vars(module).values()
                if isinstance(c, type) and issubclass(c, SAE) and vars(c).get("variant") == variant)


__all__ = ["SAE", "SAELoss", "SAEOutput", "variant_class", "variants"]
