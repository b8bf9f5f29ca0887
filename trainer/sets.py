"""Retrieval sets: queries, the passages they are looked for in, and which of them are right.

Two kinds of data are read: JSONL files of pairs, where every row is a query and the distinct passages are the
corpus, and BEIR folders (corpus.jsonl, queries.jsonl, qrels/<split>.tsv).
"""

from __future__ import annotations

import codecs
import gzip
import io
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import zstandard

from data.errors import UserError
from data.records import BadRecord, Record, normalise, parse
from trainer.metrics import Relevance, relevance

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")


@dataclass(frozen=True)
class RetrievalSet:
    """q distinct queries asked by n rows, m passages.

    Attributes:
        name: the file's stem or the folder's name.
        queries, instructions: q texts each; an instruction is "" where there is none.
        passages: m texts; kinds: m times the instruction and the symmetry of the first row that has this passage,
            which decide its prompt.
        relevance: over the q queries. Passage numbers from m on were judged, but are not in the corpus.
        own: int64 [q], the passage that is the query itself and so is no result, or -1.
        rows: int64 [n], which query each row asks; sources, langs: n labels, "" where not known.
        notes: what was found wrong in the data, for the user.
    """

    name: str
    queries: tuple[str, ...]
    instructions: tuple[str, ...]
    passages: tuple[str, ...]
    kinds: tuple[tuple[str, bool], ...]
    relevance: Relevance
    own: np.ndarray
    rows: np.ndarray
    sources: tuple[str, ...]
    langs: tuple[str, ...]
    notes: tuple[str, ...] = ()


def load(data: str | Sequence[str], *, split: str = "test", limit: int = 0, seed: int = 0) -> list[RetrievalSet]:
    """Read every file or folder of `data`.

    Args:
        data: JSONL files and BEIR folders.
        split: which qrels/<split>.tsv of a BEIR folder.
        limit: at most so many rows (queries) of each, chosen with `seed`; 0 for all. The corpus stays whole.

    Raises:
        UserError: missing or unreadable data, or data without a single query or passage.
    """
    paths = [Path(entry) for entry in ([data] if isinstance(data, str) else data)]
    if not paths:
        raise UserError("data=[]: nothing to evaluate on; give JSONL files of pairs or BEIR folders")
    sets = [_load_one(path, name, split) for path, name in zip(paths, names(paths), strict=True)]
    return [_limited(data_set, limit, seed) for data_set in sets]


def names(paths: Sequence[Path]) -> list[str]:
    """Stem or folder name; where two are alike, with the folder around it."""
    places = [Path(os.path.abspath(path)) for path in paths]  # a link keeps its own name
    stems = [place.name.split(".jsonl")[0].removesuffix(".tsv") for place in places]
    alike = Counter(stems)
    found = [
        f"{place.parent.name}/{stem}" if alike[stem] > 1 else stem for place, stem in zip(places, stems, strict=True)
    ]
    twice = [name for name, count in Counter(found).items() if count > 1]
    if twice:
        raise UserError(f"data: {twice[0]!r} would name two of the results; rename one of the files or folders")
    return found


def _load_one(path: Path, name: str, split: str) -> RetrievalSet:
    if path.is_dir():
        return _beir(path, name, split)
    if not path.exists():
        raise UserError(f"data={path}: no such file or folder; give a JSONL file of pairs or a BEIR folder")
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"data={path}: neither a folder nor one of {', '.join(SUFFIXES)}")
    return _pairs(path, name)


def _limited(data: RetrievalSet, limit: int, seed: int) -> RetrievalSet:
    if not limit or limit >= len(data.rows):
        return data
    kept = np.sort(np.random.default_rng(seed).choice(len(data.rows), limit, replace=False))
    queries, rows = np.unique(data.rows[kept], return_inverse=True)
    return replace(
        data,
        queries=tuple(data.queries[number] for number in queries),
        instructions=tuple(data.instructions[number] for number in queries),
        relevance=data.relevance.take(queries),
        own=data.own[queries],
        rows=rows,
        sources=tuple(data.sources[number] for number in kept),
        langs=tuple(data.langs[number] for number in kept),
    )


class Document(NamedTuple):
    """A text of a file or folder, with what its row says of it; "" where that is not known."""

    id: str
    text: str
    source: str = ""
    lang: str = ""
    query: str = ""


def corpus(path: str) -> list[Document]:
    """The distinct texts of `documents`, normalised, in order: something to search in. Of equal ones the first stays.

    Raises:
        UserError: there is no such file, or no text in it.
    """
    found: dict[str, Document] = {}
    for document in _documents(path, "passage"):
        if text := normalise(document.text):
            found.setdefault(text, document._replace(text=text))
    if not found:
        raise UserError(f"input={path}: there is no text in it")
    return list(found.values())


def documents(path: str, side: str = "passage") -> Iterator[tuple[str, str]]:
    """(id, text) of everything in a file or folder, one by one, in order.

    A text file has one text on each line, a JSONL file one in each row's `text` (after its `title`, if any), or in its
    `passage` or `query`, whichever is the side; a BEIR folder has one for each document or query. The id is the
    row's `_id` or `id`, else the number of the line. Empty lines are passed over.

    Raises:
        UserError: there is no such file, or a row is no text.
    """
    return ((document.id, document.text) for document in _documents(path, side))


def _documents(path: str, side: str) -> Iterator[Document]:
    place = documents_file(path, side)
    where = f"{place}, line"
    if Path(path).is_dir():
        for key, row in _objects(place):
            yield _labelled(key, _document(row), row)
    elif place.name.endswith(SUFFIXES):
        for number, line in lines(place):
            yield _identified(line, number, side, f"{where} {number}")
    else:
        for number, line in lines(place):
            yield Document(str(number), _utf8(line, f"{where} {number}"))


def documents_file(path: str, side: str = "passage") -> Path:
    """The file that `documents` reads. Raises UserError when there is none."""
    place = Path(path)
    if not place.exists():
        raise UserError(f"input={path}: no such file or folder; give a text file, a JSONL file or a BEIR folder")
    return _member(place, "queries" if side == "query" else "corpus") if place.is_dir() else place


def _identified(line: bytes, number: int, side: str, where: str) -> Document:
    """The id, the text and the labels of a JSONL row."""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise UserError(f"{where}: no JSON: {error}") from None
    if isinstance(row, dict):
        key = row.get("_id") or row.get("id") or number
        if isinstance(row.get("text"), str):
            return _labelled(str(key), _document(row), row)
        if isinstance(row.get(side), str):
            return _labelled(str(key), row[side], row)
    raise UserError(f"{where}: a row is an object with a `text` or a `{side}`")


def _labelled(key: str, text: str, row: dict[str, Any]) -> Document:
    source, lang, query = (row.get(name) for name in ("source", "lang", "query"))
    return Document(key, text, *(label if isinstance(label, str) else "" for label in (source, lang, query)))


def _utf8(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: no UTF-8 text ({error.reason}); save the file as UTF-8") from None


def _document(row: dict[str, Any]) -> str:
    """A document as E5 takes it: its title, a blank and its text."""
    return f"{row.get('title') or ''} {row['text']}".strip()


# --- JSONL of pairs --------------------------------------------------------------------------------------------


def _pairs(path: Path, name: str) -> RetrievalSet:
    """Rows with equal query text (and instruction) share their answers; equal passage texts are one passage."""
    records, notes = _records(path)
    queries: dict[tuple[str, str], int] = {}
    passages: dict[str, int] = {}
    answers: list[dict[int, int]] = []
    kinds: list[tuple[str, bool]] = []
    rows = np.empty(len(records), dtype=np.int64)
    for row, record in enumerate(records):
        query = queries.setdefault((record.query, record.instruction), len(queries))
        passage = passages.setdefault(record.passage, len(passages))
        if query == len(answers):
            answers.append({})
        if passage == len(kinds):
            kinds.append((record.instruction, record.symmetric))
        answers[query][passage] = 1
        rows[row] = query
    return RetrievalSet(
        name=name,
        queries=tuple(query for query, _ in queries),
        instructions=tuple(instruction for _, instruction in queries),
        passages=tuple(passages),
        kinds=tuple(kinds),
        relevance=relevance(answers),
        own=np.full(len(queries), -1, dtype=np.int64),
        rows=rows,
        sources=tuple(record.source for record in records),
        langs=tuple(record.lang for record in records),
        notes=notes,
    )


def _records(path: Path) -> tuple[list[Record], tuple[str, ...]]:
    """The good records of a file, their texts normalised, and a note of what was left out."""
    records: list[Record] = []
    reasons: Counter[str] = Counter()
    first = ""
    for number, line in lines(path):
        try:
            record = parse(_decoded(line))
        except BadRecord as error:
            reasons[error.reason] += 1
            first = first or f"line {number}: {error}"
            continue
        records.append(replace(record, query=normalise(record.query), passage=normalise(record.passage)))
    if not records:
        raise UserError(f"data={path}: no pair in it ({first or 'the file is empty'}); a row is {{query, passage}}")
    if not reasons:
        return records, ()
    counts = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
    return records, (f"{path}: {reasons.total()} rows left out: {counts} (first at {first})",)


def _decoded(line: bytes) -> Any:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise BadRecord("invalid JSON", str(error)) from None


# --- BEIR folders ----------------------------------------------------------------------------------------------


def _beir(folder: Path, name: str, split: str) -> RetrievalSet:
    """Queries are those that the qrels give at least one answer."""
    corpus = {key: (_document(row), row["text"]) for key, row in _objects(_member(folder, "corpus"))}
    if not corpus:
        raise UserError(f"data={folder}: its corpus is empty")
    texts = {key: row["text"] for key, row in _objects(_member(folder, "queries"))}
    judged, notes = _qrels(folder, split, texts, corpus)
    numbers = {key: number for number, key in enumerate(corpus)}
    unknown = sorted({passage for row in judged.values() for passage in row} - set(numbers))
    numbers |= {key: len(corpus) + place for place, key in enumerate(unknown)}
    answers = [{numbers[passage]: grade for passage, grade in row.items()} for row in judged.values()]
    own = np.array([_own(key, texts[key], corpus, numbers, judged[key]) for key in judged], dtype=np.int64)
    if (own >= 0).any():
        notes += (f"{folder}: {(own >= 0).sum()} queries stand in the corpus themselves and are no results of theirs",)
    return RetrievalSet(
        name=name,
        queries=tuple(texts[key].strip() for key in judged),
        instructions=("",) * len(judged),
        passages=tuple(text for text, _ in corpus.values()),
        kinds=(("", False),) * len(corpus),
        relevance=relevance(answers),
        own=own,
        rows=np.arange(len(judged)),
        sources=("",) * len(judged),
        langs=("",) * len(judged),
        notes=notes,
    )


def beir_parts(folder: Path, split: str) -> tuple[dict[str, str], dict[str, str], dict[str, dict[str, int]]]:
    """The bare parts of a BEIR folder: documents and queries by id, and all grades by query, those of 0 too.

    Raises:
        UserError: as `load` does.
    """
    documents = {key: _document(row) for key, row in _objects(_member(folder, "corpus"))}
    queries = {key: row["text"].strip() for key, row in _objects(_member(folder, "queries"))}
    judged: dict[str, dict[str, int]] = {}
    for query, passage, grade in _judgements(_qrels_file(folder, split)):
        judged.setdefault(query, {})[passage] = grade
    return documents, queries, judged


def _own(key: str, query: str, corpus: dict[str, tuple[str, str]], numbers: dict[str, int], row: dict[str, int]) -> int:
    """The passage that is the query itself (ArguAna, Quora): same id and same text, and not judged an answer.

    The id alone says nothing: where queries and documents are numbered separately, dropping the document with the
    query's number drops right answers (it once cost one language of MIRACL a quarter of its score).
    """
    if key not in corpus or row.get(key, 0) > 0 or normalise(corpus[key][1]) != normalise(query):
        return -1
    return numbers[key]


def _member(folder: Path, stem: str) -> Path:
    for suffix in SUFFIXES:
        if (folder / f"{stem}{suffix}").is_file():
            return folder / f"{stem}{suffix}"
    hint = f"; did you mean {folder / 'holdout.jsonl'}" if (folder / "holdout.jsonl").is_file() else ""
    raise UserError(f"data={folder}: no {stem}.jsonl in it, so it is no BEIR folder{hint}")


def _objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(id, row) of a BEIR file; ids are unique and every row has a text."""
    seen: set[str] = set()
    for number, line in lines(path):
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: no JSON: {error}") from None
        if not isinstance(row, dict) or "_id" not in row or not isinstance(row.get("text"), str):
            raise UserError(f"{path}, line {number}: a row is an object with `_id` and a `text`")
        key = str(row["_id"])
        if key in seen:
            raise UserError(f"{path}, line {number}: the id {key!r} stands there twice")
        seen.add(key)
        yield key, row


def _qrels(
    folder: Path, split: str, queries: dict[str, str], corpus: dict[str, Any]
) -> tuple[dict[str, dict[str, int]], tuple[str, ...]]:
    """{query id: {passage id: grade}} of the queries with an answer, in the file's order, and notes."""
    path = _qrels_file(folder, split)
    judged: dict[str, dict[str, int]] = {}
    strange_queries: set[str] = set()
    strange_passages = 0
    for query, passage, grade in _judgements(path):
        if query not in queries:
            strange_queries.add(query)
        elif grade > 0:
            judged.setdefault(query, {})[passage] = grade
            strange_passages += passage not in corpus
    if not judged:
        raise UserError(f"data={path}: no query with an answer ({len(strange_queries)} ids are not in queries.jsonl)")
    notes = []
    if strange_queries:
        notes.append(f"{path}: {len(strange_queries)} query ids are not in queries.jsonl; left out")
    if strange_passages:
        notes.append(f"{path}: {strange_passages} answers are not in the corpus; they count as never found")
    return judged, tuple(notes)


def _qrels_file(folder: Path, split: str) -> Path:
    path = folder / "qrels" / f"{split}.tsv"
    if not path.is_file():
        found = ", ".join(sorted(file.stem for file in (folder / "qrels").glob("*.tsv"))) or "none"
        raise UserError(f"data={folder}: no qrels/{split}.tsv in it; set split to one it has: {found}")
    return path


def _judgements(path: Path) -> Iterator[tuple[str, str, int]]:
    for number, line in lines(path):
        parts = line.decode("utf-8", errors="replace").rstrip("\r\n").split("\t")
        if number == 1 and parts[-1].strip() == "score":
            continue
        try:
            query, passage, grade = parts
            yield query, passage, int(grade)
        except ValueError:
            raise UserError(
                f"{path}, line {number}: not query-id, corpus-id and a whole score, with tabs between"
            ) from None


# --- files -----------------------------------------------------------------------------------------------------


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The non-empty lines of a plain, .gz or .zst file with their numbers from 1."""
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise UserError(f"data={path}: cannot be read: {error}") from None


def _open(path: Path) -> io.BufferedIOBase:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        return io.BufferedReader(zstandard.open(path, "rb"))
    return path.open("rb")
