"""Values from a config against the annotations of what they are for, so that a wrong type is said by its name."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def types_of(maker: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of the arguments of a function, or of all constructors of a class of ours."""
    if not isinstance(maker, type):
        return typing.get_type_hints(maker)
    hints: dict[str, Any] = {}
    for base in reversed(maker.__mro__):
        if base.__module__.startswith("sae_zoo") and "__init__" in vars(base):
            hints |= typing.get_type_hints(base.__init__)
    return hints


def check_types(expected: Mapping[str, Any], arguments: Mapping[str, Any], *, where: str = "") -> None:
    """Compare values with annotations (see :func:`types_of`).

    Args:
        where: what stands before a name in the config, for the error.

    Raises:
        ValueError: if a name is not expected, or its value is of another type.
    """
    for name, value in arguments.items():
        if name not in expected:
            raise ValueError(f"{where}{name} is unknown here; leave it out, or choose from {', '.join(expected)}")
        if not _fits(value, expected[name]):
            raise ValueError(f"{where}{name} is {value!r}; it must be {_spoken(expected[name])}")


def check_complete(maker: Callable[..., Any], arguments: Mapping[str, Any], *, where: str = "") -> None:
    """Look for the arguments without which ``maker`` cannot be called.

    Raises:
        ValueError: if one is not among ``arguments``.
    """
    for name, parameter in inspect.signature(maker).parameters.items():
        needed = parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
        if needed and name not in arguments:
            raise ValueError(f"{where}{name} is missing; leave it in the config, or give it a value")


def _fits(value: Any, hint: Any) -> bool:
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if kind is Mapping:
        return isinstance(value, Mapping) and all(_fits(item, parts[1]) for item in value.values())
    if kind in (Sequence, list):
        return isinstance(value, list) and all(_fits(item, parts[0]) for item in value)
    if hint in (int, float):  # true and false are numbers to Python, but nobody means them so
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return not isinstance(hint, type) or isinstance(value, hint)


def _spoken(hint: Any) -> str:
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return " or ".join(map(_spoken, parts))
    if kind is Mapping:
        return f"a mapping of names to {_spoken(parts[1])}"
    if kind in (Sequence, list):
        return f"a list of {_spoken(parts[0])}"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))
