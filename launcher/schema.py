"""The keys of a configuration, read off its dataclass: one flat list of dotted names."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Key:
    """One key that may be set; `default` is `dataclasses.MISSING` when it must be given."""

    name: str
    type: Any
    default: Any
    help: str = ""
    choices: tuple[Any, ...] = ()
    low: float | None = None
    above: float | None = None
    high: float | None = None

    @property
    def mandatory(self) -> bool:
        return self.default is dataclasses.MISSING


def keys(config_class: type, default: Any = None, prefix: str = "") -> Iterator[Key]:
    """Every key of a dataclass and of the dataclasses nested in it, in the order they are declared.

    Args:
        default: the instance whose values are the defaults of a nested section, where the parent gives one.
        prefix: what stands before the names, with its dot.
    """
    types_of = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        if field.metadata.get("hidden"):
            continue
        value = _default(field) if default is None else getattr(default, field.name)
        name, wanted = prefix + field.name, types_of[field.name]
        if dataclasses.is_dataclass(wanted) and isinstance(wanted, type):
            yield from keys(wanted, None if value is dataclasses.MISSING else value, f"{name}.")
        else:
            yield Key(name, wanted, value, **field.metadata)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def members(wanted: Any) -> tuple[Any, ...]:
    """The types a union is made of; any other type alone."""
    if typing.get_origin(wanted) in (typing.Union, types.UnionType):
        return typing.get_args(wanted)
    return (wanted,)


def type_name(wanted: Any) -> str:
    """A type as `--help` shows it: int, str | list[str], ..."""
    if isinstance(wanted, type) and not typing.get_args(wanted):
        return "null" if wanted is type(None) else wanted.__name__
    return " | ".join(map(type_name, members(wanted))) if len(members(wanted)) > 1 else str(wanted)


def build(config_class: type, values: Mapping[str, Any], unresolved: str, prefix: str = "") -> Any:
    """An instance of the dataclass from the values of all its dotted keys.

    `unresolved` goes to the field made by data.settings.unresolved(), if there is one.
    """
    types_of = typing.get_type_hints(config_class)
    arguments = {}
    for field in dataclasses.fields(config_class):
        wanted = types_of[field.name]
        if field.metadata.get("hidden"):
            arguments[field.name] = unresolved
        elif dataclasses.is_dataclass(wanted) and isinstance(wanted, type):
            arguments[field.name] = build(wanted, values, unresolved, f"{prefix}{field.name}.")
        else:
            arguments[field.name] = values[prefix + field.name]
    return config_class(**arguments)
