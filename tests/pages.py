"""The pages that users read, and what stands in their code blocks."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# a line that begins with one of these, after VARIABLE=value, is a command to type
PROGRAMS = {
    *("quintet", ".venv/bin/quintet", "make", "bash", "sudo", "sbatch", "srun", "deepspeed", "torchrun"),
    *("python", "pytest", "wandb", "sky", "pip", "git", "export", "tests/soak.sh", ".ci/run"),
}
_ITEM = re.compile(r"(?:[-*]|\d+\.)\s+")
_ASSIGNED = re.compile(r"\w+=\S*$")


class Block(NamedTuple):
    """A code block: where its first line stands, and its lines without their common indent."""

    page: str
    line: int
    lines: list[str]


class Command(NamedTuple):
    """A command line of a page, with its words; continued lines are joined and comments are gone."""

    page: str
    line: int
    words: list[str]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {shlex.join(self.words)}"


def blocks(page: Path) -> Iterator[Block]:
    """The code blocks of a page: fenced, or four columns deeper than the text or the list item around them."""
    name = page.relative_to(ROOT).as_posix()
    lines = page.read_text(encoding="utf-8").splitlines()
    item = number = 0
    while number < len(lines):
        line = lines[number]
        indent = len(line) - len(line.lstrip())
        if line.strip().startswith("```"):
            end = next(n for n in range(number + 1, len(lines)) if lines[n].strip() == "```")
            yield Block(name, number + 2, [text[indent:] for text in lines[number + 1 : end]])
            number = end + 1
        elif line.strip() and indent >= item + 4 and not lines[number - 1].strip():
            end = number
            while end < len(lines) and (not lines[end].strip() or lines[end].startswith(" " * (item + 4))):
                end += 1
            yield Block(name, number + 1, [text[item + 4 :] for text in lines[number:end]])
            number = end
        else:
            if line.strip() and indent <= item:
                found = _ITEM.match(line)
                item = found.end() if found else (item if indent == item else 0)
            number += 1


def commands(page: Path) -> Iterator[Command]:
    """The command lines in the code blocks of a page. Raises AssertionError where a quote is never closed."""
    for block in blocks(page):
        number = 0
        while number < len(block.lines):
            start, text = number, block.lines[number]
            while _is_command(text) and not _whole(text):
                number += 1
                assert number < len(block.lines), f"{block.page}:{block.line + start}: no end: {text}"
                text = f"{text.removesuffix(chr(92))} {block.lines[number].lstrip()}"
            number += 1
            for part in re.split(r"&&|[|;] ", text) if _is_command(text) else []:
                if words := _words(part):
                    yield Command(block.page, block.line + start, words)


def typed(beginning: str) -> list[list[str]]:
    """The words of the pages' command lines that begin so, each once, without ellipses."""
    pages = [page for page in PAGES if page.name != "troubleshooting.md"]  # which has messages instead
    lines = {shlex.join(found.words): found.words for page in pages for found in commands(page)}
    fitting = [words for line, words in lines.items() if line.removeprefix(".venv/bin/").startswith(beginning)]
    return [[word for word in words if word not in ("...", "…")] for words in fitting]


def spans(page: Path) -> Iterator[Command]:
    """The commands within sentences: between backticks, with a word behind the program."""
    text = page.read_text(encoding="utf-8")
    fenced = {number for block in blocks(page) for number in range(block.line, block.line + len(block.lines))}
    for found in re.finditer(r"`([^`\n]+(?:\n[^`\n]+)?)`", text):
        line = text.count("\n", 0, found.start()) + 1
        if line not in fenced and " " in found[1] and _is_command(found[1]) and _whole(found[1]):
            yield Command(page.relative_to(ROOT).as_posix(), line, _words(found[1].replace("\n", " ")))


def _is_command(text: str) -> bool:
    words = [word for word in text.split() if not _ASSIGNED.match(word)]
    return bool(words) and words[0] in PROGRAMS


def _whole(text: str) -> bool:
    """Does a command end with this line?"""
    try:
        shlex.split(text, comments=True)
    except ValueError:
        return False
    return not text.endswith("\\")


def _words(text: str) -> list[str]:
    """The words of a command, without the variables before it and the redirections behind it."""
    words = shlex.split(text, comments=True)
    while words and _ASSIGNED.match(words[0]):
        words = words[1:]
    ends = [place for place, word in enumerate(words) if word in ("<", ">", ">>")]
    return words[: ends[0]] if ends else words
