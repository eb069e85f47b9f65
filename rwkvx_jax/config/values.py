"""What all configs share: checked values, the JSON form, and comparison."""

from __future__ import annotations

import dataclasses
import numbers
import types
import typing
from typing import Any, Literal

# What a float of a config becomes on a device: float32, whose smallest normal number is the first
# (devices flush smaller ones to 0) and whose largest is the second.
FLOAT32_RANGE = 2.0**-126, (2 - 2.0**-23) * 2.0**127


class UserError(Exception):
    """An error that its reader can mend: the message alone says what is wrong and what to do.

    Command lines print that message; any other exception is a bug, and keeps its traceback.
    """


class ConfigError(UserError, ValueError):
    """A configuration that cannot work; the message names the value and the remedy."""


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def require_positive(owner: str, **values: int | float) -> None:
    """Raises ConfigError unless all named values of `owner` are at least 1."""
    for name, value in values.items():
        require(value >= 1, f"{owner}.{name} is {value}: it must be at least 1")


class Checked:
    """Base of the dataclasses here: refuses values that are not of a field's declared type."""

    def __post_init__(self):
        for name, hint in typing.get_type_hints(type(self)).items():
            if problem := _mismatch(hint, value := getattr(self, name)):
                raise ConfigError(f"{type(self).__name__}.{name} is {value!r}: {problem}")


def _mismatch(hint: Any, value: Any) -> str:
    """Why a value is not of a declared type, as a remedy; "" if it is."""
    if hint is int and isinstance(value, int) and not -(2**63) <= value < 2**63:
        return "it does not fit 64 bits; use a smaller number"
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "" if value in arguments else f"choose one of {list(arguments)}"
    if origin in (typing.Union, types.UnionType):
        problems = [_mismatch(argument, value) for argument in arguments]
        return "" if "" in problems else problems[0]
    if origin is tuple:
        if not isinstance(value, tuple):
            return "write a tuple"
        if arguments[-1] is Ellipsis:
            arguments = (arguments[0],) * len(value)
        if len(value) != len(arguments):
            return f"write {len(arguments)} values"
        pairs = zip(arguments, value, strict=True)
        return next(filter(None, (_mismatch(a, v) for a, v in pairs)), "")
    kinds = {int: numbers.Integral, float: numbers.Real}.get(hint, hint)
    if isinstance(value, kinds) and (hint is bool or not isinstance(value, bool)):
        return "" if hint is not float else _outside_float32(value)
    return f"expected {getattr(hint, '__name__', hint)}"


def _outside_float32(value: float) -> str:
    """Why a number can't be told to a device as it is, as a remedy; "" if it can."""
    smallest, largest = FLOAT32_RANGE
    if value == 0 or smallest <= abs(value) <= largest:
        return ""
    return "it must be finite, and 0 or within float32's range of 1.2e-38 to 3.4e38"


def to_dict(config: Any) -> dict[str, Any]:
    """JSON form of any dataclass of this module."""
    return dataclasses.asdict(config)


def from_dict(kind: type, values: Any, where: str = "config") -> Any:
    """Rebuilds a dataclass of this module from its JSON form.

    Raises:
      ConfigError: an unknown key (with the known ones), or a missing required one.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where} is {values!r}: expected an object with named fields")
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    require(not unknown, f"{where}: unknown key {unknown}; known are {sorted(hints)}")
    required = {
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    missing = sorted(required - set(values))
    require(not missing, f"{where}: missing key {missing}")
    return kind(
        **{name: _from_json(hints[name], v, f"{where}.{name}") for name, v in values.items()}
    )


def _from_json(hint: Any, value: Any, where: str) -> Any:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        inner = [a for a in arguments if a is not type(None)]
        return None if value is None else _from_json(inner[0], value, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_from_json(arguments[0], v, f"{where}.{i}") for i, v in enumerate(value))
    return value


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Lines "field: old -> new" for every leaf in which two configs of one kind differ."""
    if dataclasses.is_dataclass(old) and type(old) is type(new):
        return [
            line
            for f in dataclasses.fields(old)
            for line in differences(
                getattr(old, f.name), getattr(new, f.name), f"{where}.{f.name}".lstrip(".")
            )
        ]
    return [] if old == new else [f"{where}: {old!r} -> {new!r}"]
