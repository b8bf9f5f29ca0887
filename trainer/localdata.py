"""Local files for benchmarks: graded pairs, translations, labelled texts, groups to put in order. Plain data, no model.

A table is a .tsv file or JSONL (.jsonl, .gz, .zst). A TSV has a header with the columns' names, or the columns in the
order given here and nothing else. A row that cannot be read is an error: figures over part of a file compare with none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import xxhash

from data.errors import UserError
from data.records import normalise
from trainer.sets import SUFFIXES, lines

TABLES = (".tsv", *SUFFIXES)
_LEFT, _RIGHT = ("sentence1", "query"), ("sentence2", "passage")

Row = dict[str, Any]
Columns = Mapping[str, Sequence[str]]  # what a column is called here, and the names that files may have for it


@dataclass(frozen=True)
class Table:
    """n rows as columns of n values, and the fingerprint of the files they are from."""

    columns: dict[str, list[Any]]
    fingerprint: str

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))


@dataclass(frozen=True)
class Group:
    """A query and the passages to put in order: those that answer it, and others."""

    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]


def graded_pairs(path: Path, key: str = "sts") -> Table:
    """sentence1, sentence2, score. Raises UserError, also where all scores are the same."""
    names: Columns = {"sentence1": _LEFT, "sentence2": _RIGHT, "score": ("score", "label")}
    table = _table(path, key, names, numbers=("score",))
    if len(set(table.columns["score"])) < 2:
        raise UserError(f"{key}={path}: all scores are the same, so nothing can agree with them")
    return table


def translations(path: Path, key: str = "bitext") -> Table:
    """sentence1 and its translation sentence2. Raises UserError."""
    return _table(path, key, {"sentence1": _LEFT, "sentence2": _RIGHT})


def labelled(folder: Path, key: str = "classification") -> tuple[Table, Table]:
    """text and label of a folder's train and test files.

    Raises:
        UserError: a file is missing, there is only one label, or a label is in the test file alone.
    """
    names: Columns = {"text": ("text", "sentence", "query"), "label": ("label",)}
    train, test = (_table(_member(folder, split, key), key, names) for split in ("train", "test"))
    known = {str(label) for label in train.columns["label"]}
    unseen = sorted({str(label) for label in test.columns["label"]} - known)
    if unseen:
        raise UserError(f"{key}={folder}: the label {unseen[0]!r} is in test and not in train; a probe cannot learn it")
    if len(known) < 2:
        raise UserError(f"{key}={folder}: train has the one label {min(known)!r}; there is nothing to tell apart")
    return train, test


def groups(path: Path, key: str = "reranking") -> tuple[list[Group], str]:
    """The groups of a JSONL file, and its fingerprint.

    A row has a query, its answers under `positive`, `positives` or `passage`, and others under `negative(s)`.

    Raises:
        UserError: the file cannot be read, or a row lacks one of the three.
    """
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"{key}={path}: groups are read from {', '.join(SUFFIXES)}")
    found = [_group(row, f"{key}={path}, line {number}") for number, row in _rows(path, key)]
    if not found:
        raise UserError(f"{key}={path}: the file is empty")
    return found, fingerprint(path)


def fingerprint(*paths: Path) -> str:
    """XXH3 of the files' bytes, in hex."""
    digest = xxhash.xxh3_128()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


# --- reading ---------------------------------------------------------------------------------------------------


def _table(path: Path, key: str, names: Columns, numbers: Sequence[str] = ()) -> Table:
    columns: dict[str, list[Any]] = {name: [] for name in names}
    rows = _tsv(path, key, names) if path.name.endswith(".tsv") else _rows(path, key)
    for number, row in rows:
        for name, accepted in names.items():
            where = f"{key}={path}, line {number}"
            columns[name].append(_value(row, name, accepted, where, name in numbers))
    if not any(columns.values()):
        raise UserError(f"{key}={path}: the file is empty")
    return Table(columns, fingerprint(path))


def _value(row: Row, name: str, accepted: Sequence[str], where: str, number: bool) -> Any:
    found = next((row[other] for other in accepted if other in row), None)
    if number:
        try:
            value = float(found)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise UserError(f"{where}: {name}={found!r} is no number")
        return value
    text = normalise(str(found)) if isinstance(found, str | int) else ""
    if not text:
        raise UserError(f"{where}: no {name}; a row has {' or '.join(accepted)}")
    return text


def _tsv(path: Path, key: str, names: Columns) -> Iterator[tuple[int, Row]]:
    header: list[str] | None = None
    for number, line in _lines(path, key):
        try:
            cells = line.decode("utf-8").rstrip("\r\n").split("\t")
        except UnicodeDecodeError as error:
            raise UserError(f"{key}={path}, line {number}: no UTF-8 text ({error.reason})") from None
        if header is None:
            named = [cell.strip().lower() for cell in cells]
            if all(set(accepted) & set(named) for accepted in names.values()):
                header = named
                continue
            header = list(names)
        if len(cells) != len(header):
            raise UserError(
                f"{key}={path}, line {number}: {len(cells)} columns, not {len(header)} ({', '.join(header)}); write a "
                "header with the columns' names, or no more than these"
            )
        yield number, dict(zip(header, cells, strict=True))


def _rows(path: Path, key: str) -> Iterator[tuple[int, Row]]:
    for number, line in _lines(path, key):
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise UserError(f"{key}={path}, line {number}: no JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{key}={path}, line {number}: a row is an object")
        yield number, row


def _lines(path: Path, key: str) -> Iterator[tuple[int, bytes]]:
    if not path.is_file():
        raise UserError(f"{key}={path}: no such file")
    if not path.name.endswith(TABLES):
        raise UserError(f"{key}={path}: none of {', '.join(TABLES)}")
    return lines(path)


def _group(row: Row, where: str) -> Group:
    query = row.get("query")
    positives = _texts(row, "positive", "positives", "passage")
    negatives = _texts(row, "negative", "negatives")
    if not isinstance(query, str) or not normalise(query) or not positives or not negatives:
        raise UserError(f"{where}: a row has a query, a list of positives and a list of negatives, none of them empty")
    return Group(normalise(query), positives, negatives)


def _texts(row: Row, *names: str) -> tuple[str, ...]:
    found: Any = next((row[name] for name in names if name in row), [])
    texts = [found] if isinstance(found, str) else found
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return ()
    return tuple(dict.fromkeys(text for text in map(normalise, texts) if text))


def _member(folder: Path, stem: str, key: str) -> Path:
    for suffix in TABLES:
        if (folder / f"{stem}{suffix}").is_file():
            return folder / f"{stem}{suffix}"
    raise UserError(f"{key}={folder}: no {stem}.jsonl or {stem}.tsv in it; give a folder with train and test")
