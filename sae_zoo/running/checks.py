"""Values of a config: found by name, and held against the annotations of what they are for, so that what is missing or
of a wrong type is said by the name that it has there."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Config = Mapping[str, Any]


def value_at(config: Config, name: str) -> Any:
    """The value that has a dotted name.

    Raises:
        ValueError: if there is none.
    """
    value: Any = config
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise ValueError(f"{name} is missing; leave it in the config, or give it a value")
        value = value[part]
    return value


def group_at(config: Config, name: str) -> Config:
    """The mapping that has a dotted name.

    Raises:
        ValueError: if there is none.
    """
    group = value_at(config, name)
    check_types({name: Mapping}, {name: group})
    return group


def types_of(maker: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of the arguments of a function, or of all constructors of a class of ours."""
    if not isinstance(maker, type):
        return typing.get_type_hints(maker)
    hints: dict[str, Any] = {}
    for base in reversed(maker.__mro__):
        if base.__module__.startswith("sae_zoo") and "__init__" in vars(base):
            hints |= typing.get_type_hints(vars(base)["__init__"])
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


def checked(maker: Any, values: Config, *, where: str, **ours: Any) -> dict[str, Any]:
    """``values`` with ``ours``, which no config has, if they are arguments with which ``maker`` can be called.

    Args:
        where: what stands before a name in the config, for the error.

    Raises:
        ValueError: if a name is unknown or missing, or its value is of another type.
    """
    check_types(without(types_of(maker), *ours), values, where=where)
    check_complete(maker, {**values, **ours}, where=where)
    return {**values, **ours}


def without(values: Config, *names: str) -> dict[str, Any]:
    """``values`` but for those of ``names``."""
    return {key: value for key, value in values.items() if key not in names}


def check_counts(where: str, **counts: int) -> None:
    """Look for counts below 1.

    Raises:
        ValueError: if there is one.
    """
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{where}{name} is {value}; it must be at least 1")


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
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", Mapping: "a mapping",
             type(None): "null"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))
