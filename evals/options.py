"""Options as dataclasses: one declaration serves the command line, YAML and the recorded rows."""

from __future__ import annotations

import argparse
import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from .errors import InputError

T = TypeVar("T")


def option(
    default: Any,
    text: str,
    min: float | None = None,
    max: float | None = None,
    choices: Iterable[str] = (),
) -> Any:
    """A field of an options class.

    Args:
        default: its value where none is given; a list is written as a tuple.
        text: what it means, for `--help`.
        min, max: bounds of the value, or of each value of a tuple.
        choices: the strings that are allowed.
    """
    return dataclasses.field(
        default=default,
        metadata={"help": text, "min": min, "max": max, "choices": tuple(choices)},
    )


def inherited(cls: type, name: str, default: Any) -> Any:
    """The field `name` of the options class that a class extends, with another default."""
    (found,) = (field for field in dataclasses.fields(cls) if field.name == name)
    return dataclasses.field(default=default, metadata=found.metadata)


def build(
    cls: type[T],
    values: Mapping[str, Any],
    where: str,
    called: Callable[[str], str] | None = None,
) -> T:
    """An instance of an options class from plain values.

    Args:
        cls: the class.
        values: by field name; a tuple may be given as a list or as one value.
        where: what the values belong to, for messages.
        called: what messages call a field, by its name (default: `where`, and the name).

    Raises:
        InputError: naming an unknown key, or a value of a wrong type or out of range.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    called = called or (lambda name: f"{where}: {name}")
    chosen = {}
    for name, value in values.items():
        if name not in fields:
            known = f"choose from {', '.join(fields)}" if fields else "it takes none"
            raise InputError(f"{where}: unknown key {name!r}; {known}")
        chosen[name] = _checked(fields[name], hints[name], value, called(name))
    try:
        return cls(**chosen)
    except TypeError as error:
        missing = [
            name for name, field in fields.items() if _required(field) and name not in chosen
        ]
        if not missing:
            raise
        raise InputError(f"{called(missing[0])} is missing") from error


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _checked(field: dataclasses.Field, hint: Any, value: Any, where: str) -> Any:
    kind, many, optional = _kind(hint)
    if value is None and optional:
        return None
    if many:
        values = value if isinstance(value, list | tuple) else [value]
        if not values:
            raise InputError(f"{where} is empty; give one or more")
        return tuple(_one(field, kind, x, where, of_many=True) for x in values)
    return _one(field, kind, value, where)


def _one(
    field: dataclasses.Field, kind: type, value: Any, where: str, of_many: bool = False
) -> Any:
    if kind is float and type(value) is int:
        value = float(value)
    if kind is float and type(value) is float and not math.isfinite(value):
        raise InputError(f"{where} is {value}; it takes a finite number")
    if kind is not Any and type(value) is not kind:
        raise InputError(f"{where} is {value!r}; it takes {_NAMES.get(kind, kind.__name__)}")
    low, high = field.metadata.get("min"), field.metadata.get("max")
    choices = field.metadata.get("choices")
    if low is not None and value < low:
        raise InputError(f"{where} is {value}; choose {low} or more")
    if high is not None and value > high:
        raise InputError(f"{where} is {value}; choose {high} or less")
    if choices and value not in choices:
        problem = (
            f": {value!r} is unknown; choose from" if of_many else f" is {value!r}; choose one of"
        )
        raise InputError(f"{where}{problem} {', '.join(choices)}")
    return value


_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
}


def _kind(hint: Any) -> tuple[Any, bool, bool]:
    """Of an annotation: the type of one value, whether there are several, whether None is one."""
    optional = False
    if isinstance(hint, types.UnionType):
        (hint,) = (x for x in typing.get_args(hint) if x is not type(None))
        optional = True
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True, optional
    return hint, False, optional


def add_arguments(parser: argparse.ArgumentParser, cls: type, title: str) -> None:
    """Give a command line an argument for every field of an options class."""
    group = parser.add_argument_group(title)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind, many, _ = _kind(hints[field.name])
        default = field.default
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        suffix = "" if default is None or _required(field) else f" (default {shown})"
        arguments: dict[str, Any] = {
            "default": argparse.SUPPRESS,
            "dest": field.name,
            "help": (field.metadata.get("help", "") + suffix).replace("%", "%%"),
        }
        if kind is bool:
            arguments["action"] = argparse.BooleanOptionalAction
        else:
            arguments["type"] = kind
            arguments["metavar"] = {int: "N", float: "X"}.get(kind, "NAME")
            if many:
                arguments["nargs"] = "+"
        group.add_argument(flag(field.name), **arguments)


def from_arguments(cls: type[T], args: argparse.Namespace, **extra: Any) -> T:
    """The options that `add_arguments` let a command line name; messages name them as typed."""
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    given = {name: value for name, value in vars(args).items() if name in names}
    return build(cls, given | extra, "command line", flag)


def flag(name: str) -> str:
    """The argument of a field."""
    return "--" + name.replace("_", "-")
