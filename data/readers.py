"""Input files as rows, split into parts that workers read side by side.

Read are JSON lines (.jsonl or .ndjson, also .gz and .zst), .json (a list, or lines), .csv and .tsv (with a header),
.parquet, .arrow, folders written by `datasets.save_to_disk`, BEIR folders (corpus, queries, qrels), and folders
of such files. Nothing is unpickled and no script of a data set is run.
"""

from __future__ import annotations

import csv
import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from data.errors import UserError
from data.inputs import PACKED, format_of, sibling

PART_BYTES = 32 << 20
PART_ROWS = 1 << 17
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Fault:
    """A row that cannot even be decoded: why (one of records.REASONS), more exactly, and how it begins."""

    reason: str
    detail: str
    text: str


@dataclass(frozen=True)
class Part:
    """What one worker reads of a file: bytes start..stop of JSON lines, row groups start..stop of Parquet, or all."""

    file: str
    format: str
    start: int = 0
    stop: int = 0


def split(file: str) -> list[Part]:
    """The parts of a file, in order; they do not depend on the number of workers."""
    format = format_of(file)
    with _readable(file):
        if format == "lines" and not file.endswith(PACKED):
            size = os.path.getsize(file)
            starts = range(0, max(size, 1), PART_BYTES)
            return [Part(file, format, start, min(start + PART_BYTES, size)) for start in starts]
        if format == "parquet":
            return _row_groups(file)
    return [Part(file, format)]


def rows(part: Part, wanted: Callable[[str], bool] = lambda _: True) -> Iterator[tuple[int, Any]]:
    """(number, row) of every row of a part, numbers from 1 on within the part (lines, or rows of a table).

    A row is a decoded value, None for a blank line, or a Fault. Empty cells of tables are left out of their rows.

    Args:
        wanted: tells whether a column is needed; the others are not read from column files.

    Raises:
        UserError: the file cannot be read to its end.
    """
    with _readable(part.file):
        yield from _ROWS[part.format](part, wanted)


def columns(file: str, sample: int = 100) -> list[tuple[str, ...]]:
    """The different sets of column names in the first rows of a file, in order of appearance."""
    format = format_of(file)
    with _readable(file):
        if format == "parquet":
            return [tuple(pq.read_schema(file).names)]
        if format == "csv":
            with _text(file) as text:
                return [tuple(next(_csv_reader(file, text), []))]
        if format == "beir":
            return [("query", "passage", "id")]
        values = (row for _, row in islice(rows(Part(file, format)), sample))
        return list(dict.fromkeys(tuple(row) for row in values if isinstance(row, dict)))


@contextmanager
def _readable(file: str) -> Iterator[None]:
    """Turn whatever a damaged or unreadable file raises into one message."""
    try:
        yield
    except (OSError, EOFError, zlib.error, pa.ArrowException, csv.Error, orjson.JSONDecodeError) as error:
        reason = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), "")
        reason = reason or type(error).__name__
        raise UserError(f"input={file}: cannot be read ({reason}); fetch it again or leave it out") from error


def _open(file: str) -> BinaryIO:
    if file.endswith(".gz"):
        return gzip.open(file, "rb")  # type: ignore[return-value]
    if file.endswith(".zst"):
        return io.BufferedReader(pa.input_stream(file, compression="zstd"), 1 << 20)
    return open(file, "rb")


def _text(file: str) -> io.TextIOWrapper:
    # A stray byte becomes half a surrogate pair, which the record's check refuses and counts.
    return io.TextIOWrapper(_open(file), "utf-8-sig", errors="surrogateescape", newline="")


def _lines(part: Part, _: Callable[[str], bool]) -> Iterator[tuple[int, Any]]:
    """JSON lines. A range of bytes has the lines that begin in it."""
    with _open(part.file) as file:
        position = part.start
        if part.start:
            file.seek(part.start - 1)
            position += len(file.readline()) - 1
        for number, line in enumerate(file, 1):
            if part.stop and position >= part.stop:
                return
            position += len(line)
            yield number, _value(line.removeprefix(_BOM) if number == 1 else line)


def _value(line: bytes) -> Any:
    if not line or line.isspace():
        return None
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return _json_fault(line, str(error))


def _json_fault(line: bytes, message: str) -> Fault:
    text = line[:200].decode(errors="replace").strip()
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return Fault("invalid UTF-8", f"at byte {error.start} of the line", text)
    return Fault("invalid JSON", message, text)


def _json(part: Part, wanted: Callable[[str], bool]) -> Iterator[tuple[int, Any]]:
    """A JSON list, or JSON lines under the name of .json, which is just as common."""
    with _open(part.file) as file:
        content = file.read().removeprefix(_BOM)
    if content.lstrip()[:1] != b"[":
        yield from _lines(replace(part, stop=0), wanted)
        return
    yield from enumerate(orjson.loads(content), 1)


def _csv_reader(file: str, text: io.TextIOWrapper) -> Any:
    csv.field_size_limit(1 << 30)
    tabs = Path(file.removesuffix(".gz").removesuffix(".zst")).suffix == ".tsv"
    return csv.reader(text, delimiter="\t" if tabs else ",")


def _csv(part: Part, _: Callable[[str], bool]) -> Iterator[tuple[int, Any]]:
    """Rows by the line they end on, the header being line 1. A missing or empty cell is no cell."""
    with _text(part.file) as text:
        reader = _csv_reader(part.file, text)
        names: list[str] = next(reader, [])
        for cells in reader:
            if len(cells) > len(names):
                detail = f"{len(cells)} cells under {len(names)} column names"
                yield reader.line_num, Fault("not an object", detail, " | ".join(cells)[:200])
            elif cells:
                yield reader.line_num, {name: cell for name, cell in zip(names, cells, strict=False) if cell}


def _row_groups(file: str) -> list[Part]:
    """Runs of row groups of some PART_ROWS rows."""
    metadata = pq.read_metadata(file)
    parts: list[Part] = []
    start = rows = 0
    for group in range(metadata.num_row_groups):
        rows += metadata.row_group(group).num_rows
        if rows >= PART_ROWS or group == metadata.num_row_groups - 1:
            parts.append(Part(file, "parquet", start, group + 1))
            start, rows = group + 1, 0
    return parts


def _parquet(part: Part, wanted: Callable[[str], bool]) -> Iterator[tuple[int, Any]]:
    with pq.ParquetFile(part.file) as file:
        names = [name for name in file.schema_arrow.names if wanted(name)]
        groups = list(range(part.start, part.stop)) if part.stop else None
        yield from _batches(file.iter_batches(4096, row_groups=groups, columns=names))


def _arrow(part: Part, wanted: Callable[[str], bool]) -> Iterator[tuple[int, Any]]:
    """An Arrow stream, as `datasets` writes it, or an Arrow file."""
    with pa.memory_map(part.file) as source:
        is_file = source.read_at(min(6, source.size()), 0) == b"ARROW1"
        if is_file:
            file = pa.ipc.open_file(source)
            batches = (file.get_batch(number) for number in range(file.num_record_batches))
            yield from _batches(_selected(batches, wanted))
        else:
            yield from _batches(_selected(iter(pa.ipc.open_stream(source)), wanted))


def _selected(batches: Iterator[pa.RecordBatch], wanted: Callable[[str], bool]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        yield batch.select([name for name in batch.schema.names if wanted(name)])


def _batches(batches: Iterator[pa.RecordBatch]) -> Iterator[tuple[int, Any]]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield number, {name: value for name, value in row.items() if value is not None}


def _beir_rows(part: Part, _: Callable[[str], bool]) -> Iterator[tuple[int, Any]]:
    """Query and passage of every judgement above 0, by the lines of the qrels file.

    Only the texts that are judged are held in memory. A judgement on a text that is not there gives a row without it.
    """
    folder = Path(part.file).parent.parent
    judged = list(_judged(part))
    queries = _texts(sibling(folder, "queries"), {query for _, query, _ in judged})
    passages = _texts(sibling(folder, "corpus"), {passage for _, _, passage in judged})
    for line, query, passage in judged:
        texts = {"id": query, "query": queries.get(query), "passage": passages.get(passage)}
        yield line, {name: text for name, text in texts.items() if text is not None}


def _judged(part: Part) -> Iterator[tuple[int, str, str]]:
    """(line, query id, corpus id) of the judgements above 0."""
    for line, row in _csv(part, lambda _: True):
        try:
            if float(row["score"]) > 0:
                yield line, row["query-id"], row["corpus-id"]
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"input={part.file}, line {line}: no judgement; wants the columns query-id, corpus-id and score"
            ) from None


def _texts(file: str, ids: set[str]) -> dict[str, str]:
    """The texts of a BEIR file by id, titles put before them."""
    if not file:
        raise UserError("input: a qrels file needs corpus.jsonl and queries.jsonl in the folder above it")
    found = {}
    for _, row in rows(Part(file, "lines")):
        if isinstance(row, dict) and str(row.get("_id")) in ids:
            found[str(row["_id"])] = " ".join(filter(None, (row.get("title"), row.get("text"))))
    return found


_ROWS: dict[str, Callable[[Part, Callable[[str], bool]], Iterator[tuple[int, Any]]]] = {
    "lines": _lines,
    "json": _json,
    "csv": _csv,
    "parquet": _parquet,
    "arrow": _arrow,
    "beir": _beir_rows,
}
