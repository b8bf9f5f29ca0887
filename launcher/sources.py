"""What configuration files and `key=value` words say: every value with its place, every problem kept for the end."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from launcher import schema, values
from launcher.schema import Key
from launcher.values import BadValue, compose

_OPTIONS = ("--config", "--print-config", "--debug", "--help")  # of every stage, in launcher/cli.py


@dataclass(frozen=True)
class Given:
    """A value somebody wrote: its node, its text for messages, and `file:line`, or "" for the command line."""

    node: yaml.Node
    text: str
    place: str = ""

    def problem(self, name: str, what: object) -> str:
        return f"{name}={self.text}: {what}{_at(self.place)}"


@dataclass
class Sources:
    """What has been read so far: the values by dotted key, the last one winning, and what is wrong."""

    keys: dict[str, Key]
    given: dict[str, Given] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    unread: set[str] = field(default_factory=set)  # keys whose value was no value: told once, not missed again

    def read_file(self, path: Path, parents: tuple[Path, ...] = (), place: str = "") -> None:
        """Add the keys of one file, after those of the files that its `include` names (relative to itself)."""
        if path.resolve() in parents:
            self.problems.append(f"{path}: includes itself; take the include out{_at(place)}")
            return
        try:
            root = _compose_file(path)
        except BadValue as error:
            self.problems.append(f"{error}{_at(place)}")
            return
        for key_node, value_node in root.value:
            if key_node.value == "include":
                include = Given(value_node, _text(value_node), f"{path}:{key_node.start_mark.line + 1}")
                for name in self._included(include):
                    self.read_file(path.parent / name, (*parents, path.resolve()), include.place)
        self._read_mapping(path, root, "", {})

    def read_override(self, word: str) -> None:
        """Add one `key=value` or `--key=value`; a bare `--key` sets a true-or-false key."""
        name, equals, text = word.partition("=")
        if name.startswith("--"):
            name = name[2:].replace("-", "_")
        key = self.keys.get(name)
        if not equals and word.startswith("--") and key and key.type is bool:
            text = "true"
        elif not equals:
            self.problems.append(self._valueless(word, name))
            self.unread.add(name)
            return
        parent, entry = self._entry_of(name)
        try:
            node = _entry_node(entry, text, self.keys[parent]) if parent else _node(text, key)
        except BadValue as error:
            self.problems.append(f"{name}={text}: {error}")
            self.unread.add(name)
            return
        self._put(parent or name, Given(node, text))

    def fix(self, name: str, text: str) -> None:
        """Set a key that belongs to the command; it is a problem if a file or an override wants something else."""
        given = self.given.get(name)
        if given and given.text.strip("'\"") != text:
            what = f"this command always sets {name}={text}; leave it out or use the command made for {given.text}"
            self.problems.append(given.problem(name, what))
        self.given[name] = Given(_node(text, self.keys[name]), text)

    def _included(self, include: Given) -> list[str]:
        try:
            names = values.convert(include.node, str | list[str])
        except BadValue:
            self.problems.append(include.problem("include", "wants a file name or a list of file names"))
            return []
        return [names] if isinstance(names, str) else names

    def _read_mapping(self, path: Path, node: yaml.MappingNode, prefix: str, seen: dict[str, int]) -> None:
        """Add the keys of one mapping of a file; `seen` holds the line of every key met in this file."""
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            name = prefix + (key_node.value if isinstance(key_node, yaml.ScalarNode) else _text(key_node))
            place = f"{path}:{line}"
            if name in seen:
                self.problems.append(f"{name}: is given twice, first on line {seen[name]}; keep one{_at(place)}")
            seen[name] = line
            if self._section(name) and isinstance(value_node, yaml.MappingNode):
                self._read_mapping(path, value_node, f"{name}.", seen)
            elif name != "include":
                self._put(name, Given(value_node, _text(value_node), place))

    def _valueless(self, word: str, name: str) -> str:
        """What is wrong with a word that holds no equals sign."""
        if word.endswith((".yaml", ".yml")):
            return f"{word}: is no key=value; write --config {word}"
        if word.startswith("--") and name not in self.keys:
            option = difflib.get_close_matches(word, _OPTIONS, n=1)
            if option and not _similar(name, list(self.keys)):
                return f"{word}: no such option; did you mean {option[0]}?"
            return self._unknown(name, "")
        return f"{word}: has no value; write {name}=VALUE"

    def _put(self, name: str, given: Given) -> None:
        """Keep a value under its key, or note that there is no such key. Mappings add to earlier ones."""
        section = self._section(name)
        if section and given.text in ("", "null", "~"):
            return  # a heading with every line below it commented out
        if name not in self.keys:
            problem = given.problem(name, f"is a section; its keys are {', '.join(section)}")
            self.problems.append(problem if section else self._unknown(name, given.place))
            return
        old = self.given.get(name)
        if old and isinstance(old.node, yaml.MappingNode) and isinstance(given.node, yaml.MappingNode):
            node = yaml.MappingNode(given.node.tag, old.node.value + given.node.value)
            given = Given(node, given.text, given.place)
        self.given[name] = given

    def _unknown(self, name: str, place: str) -> str:
        similar = _similar(name, list(self.keys))
        mend = f"did you mean {' or '.join(similar)}?" if similar else "--help lists the keys"
        return f"{name}: no such key; {mend}{_at(place)}"

    def _section(self, name: str) -> list[str]:
        """The keys of a section; none when the name is no section."""
        return [key for key in self.keys if key.startswith(f"{name}.")]

    def _entry_of(self, name: str) -> tuple[str, str]:
        """The mapping key and the entry that a dotted name such as columns.query means, or two empty texts."""
        parent, _, entry = name.rpartition(".")
        return (parent, entry) if parent in self.keys and _mapping_type(self.keys[parent]) else ("", "")


def _compose_file(path: Path) -> yaml.MappingNode:
    """The mapping a file holds; an empty file is an empty mapping. Raises BadValue, with the file and the line."""
    try:
        root = compose(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise BadValue(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise BadValue(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise BadValue(f"{path}: is no UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except BadValue as error:
        raise BadValue(f"{path}: {error}") from None
    except yaml.YAMLError as error:
        mark, what = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise BadValue(f"{where}: invalid YAML: {what or str(error).splitlines()[0]}") from None
    if root is None:
        return yaml.MappingNode("tag:yaml.org,2002:map", [])
    if not isinstance(root, yaml.MappingNode):
        raise BadValue(f"{path}: holds no mapping; write lines of `key: value`")
    return root


def _node(text: str, key: Key | None) -> yaml.Node:
    return values.node_of_text(text, key.type if key else str)


def _entry_node(entry: str, text: str, key: Key) -> yaml.MappingNode:
    """The mapping of one entry that columns.query=title means."""
    node = values.node_of_text(text, _mapping_type(key).__args__[1])
    return yaml.MappingNode("tag:yaml.org,2002:map", [(yaml.ScalarNode("tag:yaml.org,2002:str", entry), node)])


def _mapping_type(key: Key) -> Any:
    """The dict type among the types a key takes, or None."""
    return next((member for member in schema.members(key.type) if getattr(member, "__origin__", None) is dict), None)


def _similar(name: str, known: Sequence[str]) -> list[str]:
    """Up to three known names like this one, in full or in their last part."""
    tails = {key: key.rpartition(".")[2] for key in known}
    close_tails = difflib.get_close_matches(name.rpartition(".")[2], set(tails.values()), n=2, cutoff=0.75)
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.7)
    return list(dict.fromkeys(near + [key for close in close_tails for key in known if tails[key] == close]))[:3]


def _text(node: yaml.Node) -> str:
    """A node as it was written, on one line, cut when long."""
    start, end = node.start_mark, node.end_mark
    text = " ".join(start.buffer[start.pointer : end.pointer].split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _at(place: str) -> str:
    return f" ({place})" if place else ""
