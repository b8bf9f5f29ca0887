"""Which columns of an input file hold the query, the passage and the rest, and its rows as records' objects.

Known without a map, first match first:

    query       query, anchor
    passage     passage, positive, positive_passages, pos
    negatives   negatives; negative, negative_1, negative_2, ...; negative_passages; neg
    id          id, _id, query_id

So our own records, sentence-transformers' (anchor, positive, negative_1, ...), Tevatron's (query, positive_passages,
negative_passages: lists of {docid, title, text}) and FlagEmbedding's (query, pos, neg) are read as they are. A
passage that is a list gives one record for each of its texts; a text that is {title, text} is both, joined by a blank.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from data.errors import UserError
from data.records import NAMES

_KNOWN = {
    "query": ("query", "anchor"),
    "passage": ("passage", "positive", "positive_passages", "pos"),
    "negatives": ("negatives", "negative_passages", "neg"),
    "id": ("id", "_id", "query_id"),
}
_NUMBERED = re.compile(r"negative(?:_(\d+))?")
_WORDS = {"true": True, "1": True, "false": False, "0": False}

Columns = Mapping[str, str | list[str]]
# (our field, the columns it comes from) for every field that has one.
Layout = tuple[tuple[str, tuple[str, ...]], ...]


class Layouts:
    """Turns rows into what records.parse checks; `columns` (our field -> theirs) is what the user says about them.

    Rows may have different columns, as JSON lines do: each is read by its own. A row with none of the mapped columns
    is read by the known names, so that files of different layouts go into one pack.
    """

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self._layouts: dict[tuple[str, ...], Layout] = {}

    def objects(self, row: Any) -> Iterator[Any]:
        """One object for each passage of the row; the row itself if it is none."""
        if not isinstance(row, dict):
            yield row
            return
        found = {field: _value(field, [row[column] for column in columns]) for field, columns in self._layout(row)}
        passages = found.get("passage")
        if isinstance(passages, list):
            for passage in passages or [None]:
                yield found | {"passage": _text(passage)}
        else:
            yield found

    def wants(self, column: str) -> bool:
        """Whether a column is of any use."""
        return bool(_layout((column,), self._columns))

    def check(self, seen: Mapping[str, Sequence[tuple[str, ...]]]) -> None:
        """Look at the column names in the first rows of all files (file -> the different sets of them).

        Raises:
            UserError: a mapped column is in no file, or a file has no query and passage; lists the columns found.
        """
        found = {file: list(dict.fromkeys(chain(*sets))) for file, sets in seen.items()}
        everywhere = list(dict.fromkeys(chain(*found.values())))
        for field, value in self._columns.items():
            for name in _listed(value):
                if name not in everywhere:
                    raise UserError(f"columns.{field}={name}: no such column; found are {', '.join(everywhere)}")
        for file, sets in seen.items():
            if not any({"query", "passage"} <= dict(_layout(names, self._columns)).keys() for names in sets):
                raise UserError(_unknown(found[file], file))

    def _layout(self, row: Mapping[str, Any]) -> Layout:
        names = tuple(row)
        layout = self._layouts.get(names)
        if layout is None:
            layout = self._layouts[names] = _layout(names, self._columns)
        return layout


def problems(columns: Columns) -> list[str]:
    """What is wrong with a map of columns by itself."""
    unknown = [
        f"columns.{field}: no such field; the fields are {', '.join(NAMES)}" for field in columns if field not in NAMES
    ]
    return unknown + [
        f"columns.{field}={value}: only negatives may come from several columns; name one"
        for field, value in columns.items()
        if not isinstance(value, str) and field != "negatives"
    ]


def _layout(names: Sequence[str], columns: Columns) -> Layout:
    fields = []
    if not any(name in names for value in columns.values() for name in _listed(value)):
        columns = {}
    for field in NAMES:
        if field in columns:
            chosen = tuple(name for name in _listed(columns[field]) if name in names)
        else:
            chosen = _known(field, names)
        if chosen:
            fields.append((field, chosen))
    return tuple(fields)


def _known(field: str, names: Sequence[str]) -> tuple[str, ...]:
    first = next((name for name in _KNOWN.get(field, (field,)) if name in names), None)
    if first is not None or field != "negatives":
        return () if first is None else (first,)
    numbered = [name for name in names if _NUMBERED.fullmatch(name)]
    return tuple(sorted(numbered, key=lambda name: int(name.partition("_")[2] or -1)))


def _unknown(found: Sequence[str], file: str) -> str:
    if not found:
        return f"input={file}: has no rows with named columns; a record is a JSON object or a row under a header"
    texts = [name for name in found if name not in NAMES] or list(found)
    example = f"columns='{{query: {texts[0]}, passage: {texts[1 % len(texts)]}}}'"
    return (
        f"input={file}: cannot tell query and passage among the columns {', '.join(found)}; "
        f"say which they are, for example {example}"
    )


def _value(field: str, values: list[Any]) -> Any:
    """One field from the values of its columns."""
    if field == "negatives":
        return None if values == [None] else [_text(text) for value in values for text in _listed(value)]
    if field == "symmetric":
        return _WORDS.get(values[0].lower(), values[0]) if isinstance(values[0], str) else values[0]
    return _text(values[0])


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _text(value: Any) -> Any:
    """A text, or what stands for one in Tevatron's lists; anything else as it is, for the record's check."""
    if isinstance(value, dict):
        parts = [part for name in ("title", "text") if isinstance(part := value.get(name), str) and part.strip()]
        return " ".join(parts)
    return value
