"""Docstrings of the packages installed in the running environment, read with `ast`; nothing is imported."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data.records import normalise
from data.texts import without_links, without_marks
from data.wheels import stated_licence

_FILE_BYTES = 2 << 20  # generated tables, not documentation, are larger


class Docstring(NamedTuple):
    """One docstring: the line of what it documents, its first paragraph and the prose after it."""

    line: int
    summary: str
    body: str


class Installed:
    """The running environment as a place to read from, with the interface of data.wheels.Wheel."""

    name = "docstrings"
    licence = "that of each package"

    def __init__(self) -> None:
        self.version = ".".join(map(str, sys.version_info[:3]))
        self.problems: list[str] = []
        self._read: dict[str, tuple[str, str]] = {}  # package -> (version, licence) of those that were read

    def members(self, pattern: str, parse: Callable[[bytes], Any] = bytes) -> Iterator[tuple[re.Match[str], Any]]:
        """Yield (match, parse(content)) of installed files named `package/path`, by package, then by path."""
        whole = re.compile(pattern)
        for package, version, licence, files in _packages():
            for name, path in files:
                found = whole.fullmatch(f"{package}/{name}")
                if found is None:
                    continue
                try:
                    content = parse(path.read_bytes())
                except (OSError, ValueError) as error:
                    self.problems.append(f"{found[0]}: {error}")
                    continue
                self._read[package] = (version, licence)
                yield found, content

    def describe(self) -> dict[str, Any]:
        """What was read, for the list of sources."""
        packages = [{"name": name, "version": at, "licence": terms} for name, (at, terms) in self._read.items()]
        return {"name": self.name, "version": self.version, "licence": self.licence, "packages": packages}

    def licence_texts(self) -> Iterator[tuple[str, str]]:
        """Yield (package, the licence it states); the texts themselves are installed beside the packages."""
        for name, (version, licence) in self._read.items():
            yield f"{name} {version}", licence


def _packages() -> Iterator[tuple[str, str, str, list[tuple[str, Path]]]]:
    """Yield (name, version, licence, its Python files by name) of the standard library and every installed package."""
    library = Path(sysconfig.get_path("stdlib"))
    own = sorted(path for path in library.rglob("*.py") if "site-packages" not in path.parts)
    files = [(path.relative_to(library).as_posix(), path) for path in own]
    yield "python", ".".join(map(str, sys.version_info[:3])), "PSF-2.0", files
    installed = {
        found.metadata["Name"].lower(): found for found in importlib.metadata.distributions() if found.metadata["Name"]
    }
    for name, package in sorted(installed.items()):
        inside = sorted(str(path) for path in package.files or () if path.suffix == ".py")
        licence = stated_licence(package.read_text("METADATA") or "")
        yield name, package.version, licence, [(path, Path(str(package.locate_file(path)))) for path in inside]


def read_docstrings(content: bytes) -> list[Docstring]:
    """The docstrings of a module that have a summary and prose after it; raises ValueError when it is no Python."""
    if len(content) > _FILE_BYTES or (b'"""' not in content and b"'''" not in content):
        return []
    try:
        with warnings.catch_warnings():  # other people's invalid escapes
            warnings.simplefilter("ignore")
            tree = ast.parse(content)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"not readable as Python ({type(error).__name__})") from error
    texts = [(getattr(node, "lineno", 1), ast.get_docstring(node)) for node in _documented(tree)]
    found = [Docstring(line, *summary_and_prose(text)) for line, text in texts if text]
    return [docstring for docstring in found if docstring.summary and docstring.body]


_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_Documented = ast.Module | _Definition


def _documented(module: ast.Module) -> Iterator[_Documented]:
    """The module and every class and function in it, in the order of their lines."""
    todo: list[_Documented] = [module]
    while todo:
        node = todo.pop()
        yield node
        todo += [child for child in reversed(node.body) if isinstance(child, _Definition)]


_HEADING = re.compile(
    r"(args?|arguments|parameters|keyword arguments|returns?|yields?|raises|attributes|examples?|notes?|see also|"
    r"references|inputs?|outputs?|methods|properties|warnings?|shape|usage|todo)\s*:{0,2}",
    re.IGNORECASE,
)
_ROLE = re.compile(r":[A-Za-z][\w:+.-]*:`~?([^`<>]*?)(?:\s*<[^`]*>)?`")
_REFERENCE = re.compile(r"`([^`<>]+?)\s*<[^`<>]*>`_{0,2}")
_FENCED = re.compile(r"^[ \t]*(```+|~~~+).*?(?:^[ \t]*\1|\Z)", re.DOTALL | re.MULTILINE)
_CITATION = re.compile(r"\s*\[[\w*#]+\]_")
_UNDERLINE = re.compile(r"([-=~^\"*+#])\1{2,}")
_NOT_PROSE = re.compile(r"(?:\.\.\s|:\w+|@\w+|[-*+|=\d#%<>])")
_FORMULA = re.compile(r"\\[A-Za-z]+|\$")


def summary_and_prose(docstring: str) -> tuple[str, str]:
    """The first paragraph of a docstring and the prose after it, up to the first section such as Parameters.

    Code, doctests, directives, lists, field lists and formulas are left out; reStructuredText roles become their
    text. Both are "" where the docstring does not begin with prose.
    """
    summary, *paragraphs = re.split(r"\n\s*\n", _FENCED.sub("", docstring.strip()))
    if not _is_prose(summary.splitlines()) or _HEADING.fullmatch(summary.strip()):
        return "", ""
    prose = []
    for paragraph in paragraphs:
        lines = paragraph.strip("\n").splitlines()
        if not lines or _starts_section(lines):
            break
        if _is_prose(lines):
            prose.append(paragraph)
    return _plain(summary), _plain(" ".join(prose))


def _is_prose(lines: list[str]) -> bool:
    if not lines or lines[0][:1].isspace() or _NOT_PROSE.match(lines[0]):
        return False
    return not any(_FORMULA.search(line) or _UNDERLINE.fullmatch(line.strip()) for line in lines)


def _starts_section(lines: list[str]) -> bool:
    underlined = len(lines) > 1 and _UNDERLINE.fullmatch(lines[1].strip()) is not None
    return underlined or _HEADING.fullmatch(lines[0].strip()) is not None


def _plain(text: str) -> str:
    text = _CITATION.sub("", _REFERENCE.sub(r"\1", _ROLE.sub(r"\1", text)))
    text = without_marks(without_links(text)).replace("::", ":")
    return normalise(text.encode(errors="replace").decode())  # a literal "\ud800" is no text that can be written
