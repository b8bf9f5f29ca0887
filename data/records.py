"""What a record is: a text pair with its labels, checked once, where it enters.

A record that breaks a rule is a `BadRecord` with a short stable reason, so that callers can count by reason and
tell where it was. Nothing here reads files.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

MAX_CHARS = 100_000

REASONS = frozenset(
    {
        "not an object",
        "missing query",
        "missing passage",
        "null list",
        "wrong type",
        "empty text",
        "text too long",
        "invalid UTF-8",
        "invalid JSON",
    }
)


@dataclass(frozen=True, slots=True)
class Record:
    """One text pair.

    `lang` is a BCP-47 tag, `negatives` are in rank order, and both sides of a `symmetric` pair are queries.
    """

    query: str
    passage: str
    source: str = ""
    lang: str = ""
    id: str = ""
    negatives: tuple[str, ...] = ()
    instruction: str = ""
    symmetric: bool = False


NAMES = ("query", "passage", "source", "lang", "id", "negatives", "instruction", "symmetric")

# The values of a record in the order of NAMES.
Row = tuple[str, str, str, str, str, tuple[str, ...], str, bool]


class BadRecord(ValueError):
    """A record that cannot be used; `reason` is one of REASONS, `detail` names the field."""

    def __init__(self, reason: str, detail: str = "") -> None:
        assert reason in REASONS, reason
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}" if detail else reason)


def parse(obj: object, columns: Mapping[str, str] = {}, *, max_chars: int = MAX_CHARS) -> Record:
    """Check one decoded object and return it as a record; texts are kept as they are, not normalised.

    Args:
        obj: a dict, as decoded from JSON or taken from a table's row. Unknown keys are ignored; an optional
            text that is null counts as absent, and an integer `id` is written out.
        columns: our name -> the name in `obj`, for those that differ. `negatives` may be a list or one text.
        max_chars: the longest text taken, in characters.

    Raises:
        BadRecord: with the first rule that is broken.
    """
    names = NAMES if not columns else tuple(columns.get(name, name) for name in NAMES)
    row = values(obj, names, max_chars)
    _refuse_surrogates(row)
    return Record(*row)


def values(obj: object, names: Sequence[str] = NAMES, max_chars: int = MAX_CHARS) -> Row:
    """The checked values of `parse` without the record around them: shards are read through this, row by row.

    `names` are the keys to look up, in the order of NAMES. Raises BadRecord.
    """
    if not isinstance(obj, dict):
        raise BadRecord("not an object", f"got {type(obj).__name__}")
    query, passage, source, lang, id, negatives, instruction, symmetric = map(obj.get, names)
    if query is None:
        raise BadRecord("missing query", f"no {names[0]!r}")
    if passage is None:
        raise BadRecord("missing passage", f"no {names[1]!r}")
    _check_text(query, "query", max_chars)
    _check_text(passage, "passage", max_chars)
    if negatives is not None or names[5] in obj:
        negatives = _negatives(negatives, max_chars)
    if type(id) is int:
        id = str(id)
    # Unrolled, as most records have few of these: a loop over names and values takes a tenth of the reading time.
    if source is not None:
        _check_label(source, "source", max_chars)
    if lang is not None:
        _check_label(lang, "lang", max_chars)
    if id is not None:
        _check_label(id, "id", max_chars)
    if instruction is not None:
        _check_label(instruction, "instruction", max_chars)
    if symmetric is not None and type(symmetric) is not bool:
        raise BadRecord("wrong type", f"symmetric is {type(symmetric).__name__}, not a boolean")
    return (
        query,
        passage,
        source or "",
        lang or "",
        id or "",
        negatives or (),
        instruction or "",
        symmetric or False,
    )


def _check_text(value: object, name: str, max_chars: int) -> None:
    if not isinstance(value, str):
        raise BadRecord("wrong type", f"{name} is {type(value).__name__}, not a text")
    if not value or value.isspace():
        raise BadRecord("empty text", name)
    if len(value) > max_chars:
        raise BadRecord("text too long", f"{name} has {len(value)} characters, the limit is {max_chars}")


def _check_label(value: object, name: str, max_chars: int) -> None:
    if not isinstance(value, str):
        raise BadRecord("wrong type", f"{name} is {type(value).__name__}, not a text")
    if len(value) > max_chars:
        raise BadRecord("text too long", f"{name} has {len(value)} characters, the limit is {max_chars}")


def _negatives(value: object, max_chars: int) -> tuple[str, ...]:
    if value is None:
        raise BadRecord("null list", "negatives")
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, list | tuple):
        raise BadRecord("wrong type", f"negatives is {type(value).__name__}, not a list")
    for number, text in enumerate(value):
        _check_text(text, f"negatives[{number}]", max_chars)
    return tuple(value)


def _refuse_surrogates(row: Row) -> None:
    """Half of a surrogate pair fits into a Python string but into no UTF-8 file."""
    try:
        for value in (*row[:5], *row[5], row[6]):
            value.encode()
    except UnicodeEncodeError as error:
        raise BadRecord("invalid UTF-8", f"unpaired surrogate at character {error.start}") from None


def normalise(text: str) -> str:
    """NFC, every run of white space to one blank, no white space at the ends."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    # A printable text has no white space but blanks: most texts need no new string, which is 3 times as fast.
    if text.isprintable() and "  " not in text and text[:1] != " " and text[-1:] != " ":
        return text
    return " ".join(text.split())


def text_hash(text: str) -> int:
    """The identity of a text: signed 64-bit XXH3 of its normalised UTF-8 bytes."""
    unsigned = xxhash.xxh3_64_intdigest(normalise(text).encode())
    return unsigned - (1 << 64) if unsigned >> 63 else unsigned


def text_hashes(texts: Sequence[str]) -> npt.NDArray[np.int64]:
    """`text_hash` of each text."""
    return np.fromiter(map(text_hash, texts), np.int64, len(texts))
