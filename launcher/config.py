"""Configuration: frozen dataclasses filled from YAML files and from `key=value` words. The only door to OmegaConf.

Defaults, then each file (a later one wins), then the overrides. Every problem is found before any is reported.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.errors import ConfigError
from launcher import schema, values
from launcher.schema import Key
from launcher.sources import Sources
from launcher.values import BadValue

Config = TypeVar("Config")


class _Loaded(NamedTuple):
    config: Any
    written: dict[str, Any]  # by dotted key, interpolations as they stand
    resolved: dict[str, Any]


def load(
    config_class: type[Config],
    files: Iterable[str | Path] = (),
    overrides: Iterable[str] = (),
    *,
    fixed: Mapping[str, str] | None = None,
) -> Config:
    """An instance of a stage's Config out of files and overrides.

    Args:
        overrides: `key=value` or `--key=value`; a bare `--key` sets a true-or-false key.
        fixed: keys that the command itself sets; giving them another value is a problem.

    Raises:
        ConfigError: lists every problem: unknown keys, wrong types, values out of range, missing keys, unreadable
            files, unset environment variables, and what the Config's own `check()` says.
    """
    return _load(config_class, files, overrides, fixed or {}).config


def render(
    config_class: type,
    files: Iterable[str | Path] = (),
    overrides: Iterable[str] = (),
    *,
    fixed: Mapping[str, str] | None = None,
) -> str:
    """The merged configuration as YAML, checked, with interpolations resolved, those of the environment excepted.

    What `${oc.env:...}` stands for may be a secret, and this text ends in logs. Raises ConfigError as load does.
    """
    _, written, resolved = _load(config_class, files, overrides, fixed or {})
    shown = {name: resolved[name] if _is_public(written, str(value)) else value for name, value in written.items()}
    return OmegaConf.to_yaml(OmegaConf.create(_nested(shown)))


def describe(config_class: type) -> list[Key]:
    """The keys of a Config in the order they are declared, for `--help`."""
    return list(schema.keys(config_class))


def _load(
    config_class: type, files: Iterable[str | Path], overrides: Iterable[str], fixed: Mapping[str, str]
) -> _Loaded:
    sources = Sources({key.name: key for key in schema.keys(config_class)})
    for file in files:
        sources.read_file(Path(file))
    for word in overrides:
        sources.read_override(word)
    for name, text in fixed.items():
        sources.fix(name, text)
    written = _written_values(sources)
    unresolved = OmegaConf.to_yaml(OmegaConf.create(_nested(written)))
    resolved = _resolve(written, sources)
    sources.problems += _limit_problems(resolved, sources)
    if not sources.problems:
        config = schema.build(config_class, resolved, unresolved)
        # a key may be called check too: `quintet distill check=true`
        sources.problems += config.check() if callable(getattr(config_class, "check", None)) else []
    if sources.problems:
        raise ConfigError(sources.problems)
    return _Loaded(config, written, resolved)


# Checking


def _written_values(sources: Sources) -> dict[str, Any]:
    """The value of every key: typed, or as it stands where it holds an interpolation, or None where it is wrong."""
    written = {}
    for name, key in sources.keys.items():
        given = sources.given.get(name)
        if given is None or given.text == "???":
            if key.mandatory and name not in sources.unread:
                sources.problems.append(f"{name}: must be given ({key.help}); write {name}=VALUE")
            written[name] = None if key.mandatory else key.default
            continue
        written[name] = None
        try:
            if values.has_interpolation(given.node):
                value = values.plain(given.node)
                OmegaConf.create({name: value})  # refuses broken `${`
            else:
                value = values.convert(given.node, key.type)
            written[name] = {**key.default, **value} if _keeps_default(key, value) else value
        except BadValue as error:
            sources.problems.append(given.problem(name, error))
        except OmegaConfBaseException as error:
            sources.problems.append(given.problem(name, f"is no valid interpolation ({str(error).splitlines()[0]})"))
    return written


def _keeps_default(key: Key, value: Any) -> bool:
    return isinstance(value, dict) and isinstance(key.default, dict)


def _resolve(written: dict[str, Any], sources: Sources) -> dict[str, Any]:
    """The same values with every `${...}` replaced by what it stands for, in the type that the key wants."""
    tree = OmegaConf.create(_nested(written))
    resolved = dict(written)
    for name, given in sources.given.items():
        if written[name] is None or not values.has_interpolation(given.node):
            continue
        wanted, resolved[name] = sources.keys[name].type, None
        try:
            value = OmegaConf.select(tree, name)
            value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            resolved[name] = values.convert(values.node_of_value(value, wanted), wanted)
        except BadValue:
            # the value itself is not shown: it may be a secret
            sources.problems.append(given.problem(name, f"stands for a wrong value; wants {values.words(wanted)}"))
        except OmegaConfBaseException as error:
            sources.problems.append(given.problem(name, _interpolation_problem(str(error).splitlines()[0])))
    return resolved


def _interpolation_problem(text: str) -> str:
    variable = re.search(r"Environment variable '(.*)' not found", text)
    if variable:
        return (
            f"the environment variable {variable[1]} is not set; export it or write ${{oc.env:{variable[1]},DEFAULT}}"
        )
    missing = re.search(r"Interpolation key '(.*)' not found", text)
    return f"there is no key {missing[1]}; name one of this configuration" if missing else text


def _limit_problems(resolved: dict[str, Any], sources: Sources) -> list[str]:
    """One problem for every value outside the choices or the bounds of its key."""
    problems = []
    for name, value in resolved.items():
        what = next(filter(None, (_beyond(sources.keys[name], item) for item in _items(value))), None)
        if what:
            given = sources.given.get(name)
            problems.append(given.problem(name, what) if given else f"{name}={value}: {what}")
    return problems


def _items(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list | tuple) else (value,)


def _beyond(key: Key, value: Any) -> str | None:
    """What is wrong with a single value, or None. A value of None has been refused before where it is wrong."""
    if value is None:
        return None
    if key.choices and value not in key.choices:
        near = difflib.get_close_matches(str(value), [str(choice) for choice in key.choices], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"must be one of {', '.join(str(choice) or 'nothing' for choice in key.choices)}{hint}"
    if key.low is not None and value < key.low:
        return f"must be at least {key.low}"
    if key.above is not None and value <= key.above:
        return f"must be above {key.above}"
    if key.high is not None and value > key.high:
        return f"must be at most {key.high}"
    return None


# Writing


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of dotted names."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *sections, last = name.split(".")
        branch = tree
        for section in sections:
            branch = branch.setdefault(section, {})
        branch[last] = value
    return tree


def _is_public(written: Mapping[str, Any], text: str) -> bool:
    """Does the text stand for nothing but other keys of the configuration, which stand for no more either?"""
    references = re.findall(r"\$\{([^}]*)\}?", text)
    return all(name in written and _is_public(written, str(written[name])) for name in references)
