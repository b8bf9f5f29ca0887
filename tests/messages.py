"""Every message that the code can address to a user, out of its syntax: what is raised, and what a check finds."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import NamedTuple

from pages import ROOT

GAP = "…"
# the errors that the command line shows, and the problems that are gathered into one of them
ERRORS = {
    *("QuintetError", "UserError", "ConfigError", "DataError", "NumericError", "Stopped", "WatchdogError"),
    *("BadValue", "Problem", "_BadHeader"),
}


class Site(NamedTuple):
    """Where a message is made, and its text, with … for what is filled in; empty where it is all filled in."""

    file: str
    function: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}, {self.function}: {self.text or 'its text is made elsewhere'}"


def sites() -> list[Site]:
    """The messages of the three packages."""
    found = []
    for package in ("data", "launcher", "trainer"):
        for path in sorted((ROOT / package).rglob("*.py")):
            file = _File(path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8")))
            found += file.sites(file.tree, "")
    return found


class _File:
    """One module: the functions and the texts that its messages are made of."""

    def __init__(self, name: str, tree: ast.Module) -> None:
        self.name, self.tree = name, tree
        nodes = list(ast.walk(tree))
        self._functions = {node.name: node for node in nodes if isinstance(node, ast.FunctionDef)}
        self._assigned: dict[str, list[ast.expr]] = {}
        for node in nodes:
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    self._assigned.setdefault(ast.unparse(target), []).append(node.value)

    def sites(self, tree: ast.AST, function: str) -> Iterator[Site]:
        for node in ast.iter_child_nodes(tree):
            inside = node.name if isinstance(node, ast.FunctionDef | ast.ClassDef) else function
            for text in self._messages(node, inside):
                yield Site(self.name, inside, getattr(node, "lineno", 0), text)
            yield from self.sites(node, inside)

    def _messages(self, node: ast.AST, function: str) -> Iterator[str]:
        """The texts of a call that makes an error, and of a statement that adds to a list of problems."""
        if isinstance(node, ast.Call) and node.args:
            name = ast.unparse(node.func)
            if name.rsplit(".", 1)[-1] in ERRORS or name.endswith("problems.append"):
                yield from self._texts(node.args[0])
        finds = function.endswith(("problems", "check"))
        if isinstance(node, ast.Return) and node.value and finds:
            yield from self._items(node.value)
        if isinstance(node, ast.AugAssign) and ast.unparse(node.target).endswith("problems"):
            yield from self._items(node.value)

    def _items(self, node: ast.expr) -> Iterator[str]:
        """The texts of a list that is written out."""
        if isinstance(node, ast.List):
            for item in node.elts:
                yield from self._texts(item)
        elif isinstance(node, ast.ListComp):
            yield from self._texts(node.elt)
        elif isinstance(node, ast.BinOp):
            yield from self._items(node.left)
            yield from self._items(node.right)
        elif isinstance(node, ast.Name):
            for value in self._assigned.get(node.id, []):
                yield from self._items(value) if isinstance(value, ast.List | ast.ListComp) else ()

    def _texts(self, node: ast.expr, depth: int = 0) -> Iterator[str]:
        """What an expression may say; looks up the functions, names and formats of this file."""
        if isinstance(node, ast.IfExp):
            yield from self._texts(node.body, depth)
            yield from self._texts(node.orelse, depth)
        elif isinstance(node, ast.List | ast.ListComp):
            yield from self._items(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value.replace("{!r}", GAP).replace("{}", GAP)
        elif isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else GAP for part in node.values)
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            yield from (left + right for left in self._texts(node.left) for right in self._texts(node.right))
        elif depth < 3 and (makers := self._makers(node)):
            for maker in makers:
                yield from self._texts(maker, depth + 1)
        else:
            yield ""

    def _makers(self, node: ast.expr) -> list[ast.expr]:
        """Where the text of a name or a call is written: what is assigned, or what the function returns."""
        if isinstance(node, ast.Name):
            return self._assigned.get(node.id, [])
        if not isinstance(node, ast.Call):
            return []
        if isinstance(node.func, ast.Attribute) and node.func.attr == "format":
            return [node.func.value]
        if isinstance(node.func, ast.Attribute) and node.func.attr == "problem":
            return node.args[1:]
        function = self._functions.get(ast.unparse(node.func).rsplit(".", 1)[-1])
        returns = ast.walk(function) if function else ()
        return [found.value for found in returns if isinstance(found, ast.Return) and found.value]
