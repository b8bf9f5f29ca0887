"""Typed values out of YAML nodes and out of bare text.

The type that a key wants decides how its text is read, not the guesses of YAML 1.1 (on is true, 0123 is 83,
1e-4 is text). Where the guess and the wish disagree the value is refused, because another YAML reader would
see something else in the same file.
"""

from __future__ import annotations

import math
import re
import typing
from typing import Any

import yaml

from launcher.schema import members

_TAG = "tag:yaml.org,2002:"
_MOST_NODES = 1_000_000  # of a file, with what its aliases stand for: a list of shards may be long
_BOOL, _INT, _NULL, _STR = (_TAG + name for name in ("bool", "int", "null", "str"))
_PLAIN = (_BOOL, _INT, _NULL, _STR, *(_TAG + name for name in ("float", "timestamp", "value", "seq", "map")))
_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9_]*)")
_NUMBER = re.compile(r"[-+]?((0|[1-9][0-9_]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


class BadValue(ValueError):
    """A value that does not fit its key; the text says what is wrong and the mend."""


def words(wanted: Any) -> str:
    """A type in the words of a message: "text or a list of text"."""
    if len(members(wanted)) > 1:
        return " or ".join(words(member) for member in members(wanted))
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (list, tuple):
        return f"a list of {'' if _length(wanted) is None else f'{_length(wanted)} x '}{words(arguments[0])}"
    if origin is dict:
        return f"a mapping of names to {words(arguments[1])}"
    return _WORDS[wanted]


def _length(wanted: Any) -> int | None:
    """How many items a tuple of one type has; None for tuple[X, ...] and list[X]."""
    arguments = typing.get_args(wanted)
    return None if typing.get_origin(wanted) is list or arguments[-1] is Ellipsis else len(arguments)


def has_interpolation(node: yaml.Node) -> bool:
    """Does any text in the node hold a `${...}`?"""
    if isinstance(node, yaml.ScalarNode):
        return "${" in node.value
    parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
    return any(has_interpolation(part) for part in parts)


def plain(node: yaml.Node) -> Any:
    """What safe YAML makes of a node, whatever type is wanted. Raises BadValue on tags that are not plain YAML."""
    try:
        return yaml.SafeLoader("").construct_document(node)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise BadValue(f"is no plain YAML value ({str(error).splitlines()[0]})") from None


def node_of_text(text: str, wanted: Any) -> yaml.Node:
    """The node of a value written outside a YAML file: on the command line or in an environment variable.

    Text for a text key is taken literally, blanks and all; `[...]` and `{...}` are YAML where a list or a mapping
    is wanted. Raises BadValue.
    """
    types = members(wanted)
    origins = {typing.get_origin(member) for member in types}
    if text in ("null", "~") and type(None) in types:
        return yaml.ScalarNode(_NULL, text)
    if text[:1] in ("[", "{") and origins & {list, tuple, dict}:
        return _compose(text)
    if "${" in text:
        return yaml.ScalarNode(_STR, text, style='"')
    if str in types or typing.Literal in origins:
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
        return _compose(text) if quoted else yaml.ScalarNode(_STR, text, style='"')
    return _compose(text)


def node_of_value(value: Any, wanted: Any) -> yaml.Node:
    """The node of a value that an interpolation gave."""
    return node_of_text(value, wanted) if isinstance(value, str) else _compose(yaml.safe_dump(value))


def compose(text: str) -> yaml.Node | None:
    """The nodes of a YAML text; None for an empty one.

    Raises:
        yaml.YAMLError: it is none.
        BadValue: it is nested too deeply, or aliases (`&a`, `*a`) stand for themselves or for more than one writes.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except RecursionError:
        raise BadValue("is nested too deeply; write it flatter") from None
    waiting, count = [] if root is None else [root], 0
    while waiting:
        node, count = waiting.pop(), count + 1
        if count > _MOST_NODES:
            raise BadValue("has aliases that stand for themselves, or for too many values; write the values out")
        if isinstance(node, yaml.MappingNode):
            waiting += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value
    return root


def _compose(text: str) -> yaml.Node:
    try:
        node = compose(text)
    except yaml.YAMLError as error:
        what = getattr(error, "problem", None) or "unreadable"
        raise BadValue(f"is no valid YAML ({what}); put text with special characters in quotes") from None
    return yaml.ScalarNode(_NULL, "") if node is None else node


def convert(node: yaml.Node, wanted: Any) -> Any:
    """The value of a node as the wanted type. Raises BadValue."""
    if node.tag not in _PLAIN:
        raise BadValue(f"has the tag {node.tag.replace(_TAG, '!!')}; plain YAML only, leave it out")
    fitting = [member for member in members(wanted) if _fits(node, member)]
    if not fitting:
        raise BadValue(f"wants {words(wanted)}")
    problem: BadValue | None = None
    for member in fitting:
        try:
            return _convert_one(node, member)
        except BadValue as error:
            problem = problem or error
    raise problem or AssertionError("unreachable")


def _fits(node: yaml.Node, member: Any) -> bool:
    """Is the node of the shape of this type: a list, a mapping, null or a single value?"""
    origin = typing.get_origin(member)
    if isinstance(node, yaml.SequenceNode):
        return origin in (list, tuple)
    if isinstance(node, yaml.MappingNode):
        return origin is dict
    if node.tag == _NULL:
        return member is type(None)
    return origin in (None, typing.Literal) and member is not type(None)


def _convert_one(node: yaml.Node, wanted: Any) -> Any:
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (list, tuple):
        if _length(wanted) not in (None, len(node.value)):
            raise BadValue(f"wants {words(wanted)}")
        return origin(convert(item, arguments[0]) for item in node.value)
    if origin is dict:
        return {plain_key(key): convert(value, arguments[1]) for key, value in node.value}
    if origin is typing.Literal:
        return _to_literal(node, arguments)
    return None if wanted is type(None) else _READERS[wanted](node)


def plain_key(node: yaml.Node) -> str:
    """The text of a mapping's key. Raises BadValue when the key is a list or a mapping."""
    if not isinstance(node, yaml.ScalarNode):
        raise BadValue("has a key that is no plain text")
    return node.value


def _to_str(node: yaml.ScalarNode) -> str:
    if node.tag == _BOOL:
        meaning = "true" if plain(node) else "false"
        raise BadValue(f"wants text, and YAML reads this bare word as {meaning}; put it in quotes: '{node.value}'")
    return node.value


def _to_int(node: yaml.ScalarNode) -> int:
    if _WHOLE.fullmatch(node.value):
        return int(node.value.replace("_", ""))
    _refuse_misread(node)
    if _NUMBER.fullmatch(node.value) and float(node.value).is_integer():
        raise BadValue(f"wants a whole number; write {int(float(node.value))}")
    raise BadValue("wants a whole number")


def _to_float(node: yaml.ScalarNode) -> float:
    if _NUMBER.fullmatch(node.value) and math.isfinite(number := float(node.value)):
        return number
    _refuse_misread(node)
    raise BadValue("wants a finite number")


def _refuse_misread(node: yaml.ScalarNode) -> None:
    """Refuse 0123 (octal), 0x1F, 1:30 (base 60) and the like. Raises BadValue."""
    if node.tag == _INT:
        raise BadValue(f"YAML reads this as {plain(node)}; write the number you mean in plain digits, no leading 0")


def _to_bool(node: yaml.ScalarNode) -> bool:
    if node.tag != _BOOL:
        raise BadValue("wants true or false")
    return bool(plain(node))


def _to_literal(node: yaml.ScalarNode, allowed: tuple[Any, ...]) -> Any:
    for choice in allowed:
        if node.tag != _BOOL and node.value == str(choice):
            return choice
    raise BadValue(f"must be one of {', '.join(map(str, allowed))}")


_READERS = {str: _to_str, int: _to_int, float: _to_float, bool: _to_bool}
