"""Readers of gettext catalogues: .po (text) and .mo (compiled), both to (English, translation) pairs.

Formats: https://www.gnu.org/software/gettext/manual/html_node/PO-Files.html and MO-Files.html there.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

_ESCAPES = {"n": "\n", "t": "\t", "r": "\r"}
_LINE = re.compile(r'(msgctxt|msgid_plural|msgid|msgstr)(?:\[\d+\])?\s+"(.*)"')


@dataclass(slots=True)
class Entry:
    """One message: its English text, its translation, and whether the translator has marked it as a guess.

    A message with plural forms is told by its English plural and by its last form, the one that stands for
    many in every language; the pairing of the other forms depends on the language.
    """

    english: str
    translation: str
    fuzzy: bool = False


@dataclass(slots=True)
class _Draft:
    msgid: str = ""
    msgid_plural: str = ""
    msgstr: list[str] = field(default_factory=list)
    fuzzy: bool = False

    def entry(self) -> Entry:
        return Entry(
            _plain(self.msgid_plural or self.msgid), _plain(self.msgstr[-1] if self.msgstr else ""), self.fuzzy
        )


def read_po(text: str) -> Iterator[Entry]:
    """Yield the entries of a .po file that have a translation; obsolete ones (`#~`) are comments and not read."""
    draft, keyword, fuzzy = _Draft(), "", False
    for line in text.splitlines():
        line = line.strip()
        if line.startswith("#,"):
            fuzzy = "fuzzy" in line
        elif found := _LINE.fullmatch(line):
            starts = found[1] in ("msgctxt", "msgid") and keyword == "msgstr"
            if starts:
                yield from _translated(draft)
            if starts or not keyword:
                draft, fuzzy = _Draft(fuzzy=fuzzy), False
            keyword = found[1]
            _append(draft, keyword, found[2], new=True)
        elif keyword and len(line) >= 2 and line[0] == line[-1] == '"':
            _append(draft, keyword, line[1:-1], new=False)
    yield from _translated(draft)


def _append(draft: _Draft, keyword: str, text: str, *, new: bool) -> None:
    """Put one quoted string where it belongs: a new plural form, or the continuation of the text before."""
    if keyword == "msgid":
        draft.msgid += text
    elif keyword == "msgid_plural":
        draft.msgid_plural += text
    elif keyword == "msgstr" and new:
        draft.msgstr.append(text)
    elif keyword == "msgstr":
        draft.msgstr[-1] += text


def _translated(draft: _Draft) -> Iterator[Entry]:
    entry = draft.entry()
    if entry.english and entry.translation:
        yield entry


def _plain(quoted: str) -> str:
    return re.sub(r"\\(.)", lambda found: _ESCAPES.get(found[1], found[1]), quoted) if "\\" in quoted else quoted


def read_mo(content: bytes) -> Iterator[Entry]:
    """Yield the entries of a .mo file; raises ValueError when it is none or is cut.

    The standard library's reader is not used: it forgets the English plural.
    """
    order = {0x950412DE: "<", 0xDE120495: ">"}.get(int.from_bytes(content[:4], "little"))
    if order is None or len(content) < 20:
        raise ValueError("not a .mo file")
    count, originals, translations = struct.unpack_from(f"{order}3I", content, 8)
    if max(originals, translations) + 8 * count > len(content):
        raise ValueError("a cut .mo file")
    for row in range(count):
        english = _mo_text(content, order, originals + 8 * row).rpartition("\x04")[2]
        translation = _mo_text(content, order, translations + 8 * row)
        if english and translation:
            yield Entry(english.rpartition("\0")[2], translation.rpartition("\0")[2])


def _mo_text(content: bytes, order: str, row: int) -> str:
    length, start = struct.unpack_from(f"{order}2I", content, row)
    if start + length > len(content):
        raise ValueError("a cut .mo file")
    return content[start : start + length].decode("utf-8")
