"""Readers of gettext catalogues: .po (text) and .mo (compiled), both to (English, translation) pairs.

Formats: https://www.gnu.org/software/gettext/manual/html_node/PO-Files.html and MO-Files.html there.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

_ESCAPES = {"n": "\n", "t": "\t", "r": "\r"}
_LINE = re.compile(r'(msgctxt|msgid_plural|msgid|msgstr)(?:\[\d+\])?\s+"(.*)"')


@dataclass(slots=True)
class Entry:
    """One message: its English text, the English plural when it has one, its translation, and whether that is a guess.

    Of several plural forms `translation` is the last, the one that stands for many in every language; which of the
    others stands for one depends on the language.
    """

    msgid: str
    plural: str
    translation: str
    fuzzy: bool = False

    @property
    def english(self) -> str:
        """The English text that `translation` translates."""
        return self.plural or self.msgid


def read_po(text: str) -> Iterator[Entry]:
    """Yield the entries of a .po file that have a translation; obsolete ones (`#~`) are comments and not read."""
    entry, keyword, fuzzy = Entry("", "", ""), "", False
    for line in text.splitlines():
        line = line.strip()
        if line.startswith("#,"):
            fuzzy = "fuzzy" in line
        elif found := _LINE.fullmatch(line):
            if found[1] in ("msgctxt", "msgid") and keyword in ("", "msgstr"):
                yield from _translated(entry)
                entry, fuzzy = Entry("", "", "", fuzzy), False
            keyword = found[1]
            if keyword == "msgstr":
                entry.translation = ""  # a further plural form replaces the one before
            _append(entry, keyword, found[2])
        elif keyword and len(line) >= 2 and line[0] == line[-1] == '"':
            _append(entry, keyword, line[1:-1])
    yield from _translated(entry)


def _append(entry: Entry, keyword: str, quoted: str) -> None:
    if keyword == "msgid":
        entry.msgid += _plain(quoted)
    elif keyword == "msgid_plural":
        entry.plural += _plain(quoted)
    elif keyword == "msgstr":
        entry.translation += _plain(quoted)


def _translated(entry: Entry) -> Iterator[Entry]:
    if entry.msgid and entry.translation:
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
        msgid, _, plural = _mo_text(content, order, originals + 8 * row).rpartition("\x04")[2].partition("\0")
        forms = _mo_text(content, order, translations + 8 * row)
        yield from _translated(Entry(msgid, plural, forms.rpartition("\0")[2]))


def _mo_text(content: bytes, order: str, row: int) -> str:
    length, start = struct.unpack_from(f"{order}2I", content, row)
    if start + length > len(content):
        raise ValueError("a cut .mo file")
    return content[start : start + length].decode("utf-8")
