"""Rows of blocks to the batch that a training step takes: token ids, text hashes and the teacher's scores.

Work is done column by column; only texts that are tokenised on the fly become Python objects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data.errors import UserError
from data.rules import Prompts, passage_prefix, query_prefix
from data.targets import Targets
from data.tokens import Ragged, TextEncoder, concat, fingerprint

LABELS = ("instruction", "symmetric", "query_hash", "passage_hash")
# Rows of a source that are tokenised at start-up to see whether its stored tokens give the same ids.
SAMPLE_ROWS = 64

# Token ids of (query, passage) rows read together, as a cross-encoder takes them.
Joint = Callable[[Sequence[str], Sequence[str]], Ragged]


@dataclass(frozen=True, eq=False)
class Batch:
    """The part of a global batch that one rank embeds: b queries, each with its positive and k negatives.

    Attributes:
        tokens: b queries, then b positives, then b * k negatives (all of the first query, of the second, ...). For a
            cross-encoder: the b positives, then the b * k negatives, each in one row with its query.
        num_queries: b.
        num_negatives: k.
        query_hash: int64 [b], equal for equal texts.
        passage_hash: int64 [b * (1 + k)], in the order of the passages in `tokens`.
        record_ids: int64 [b], source number << 40 | record number, as read: a substitute has its own id.
        source: the name of the source; empty when records come from several.
        bad: records that were due here and could not be read, by cause; others of their lane stand in for them.
        scores: float32 [b, 1 + k], the teacher's logits of the positive and the negatives, NaN where it has none;
            None without a teacher.
        unscored: int64, the queries that should have scores and lack one or more.
        own_only: bool [b], the queries whose source has in_batch_negatives off; None when there are none.
    """

    tokens: Ragged
    num_queries: int
    num_negatives: int
    query_hash: NDArray[np.int64]
    passage_hash: NDArray[np.int64]
    record_ids: NDArray[np.int64]
    source: str = ""
    bad: dict[str, int] = field(default_factory=dict)
    scores: NDArray[np.float32] | None = None
    unscored: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    own_only: NDArray[np.bool_] | None = None

    @property
    def group_hash(self) -> NDArray[np.int64]:
        """int64 [b, 1 + k]: the passages of each query, its positive first."""
        positive, negatives = np.split(self.passage_hash, [self.num_queries])
        return np.column_stack([positive, negatives.reshape(self.num_queries, self.num_negatives)])


@dataclass(frozen=True, eq=False)
class Part:
    """Rows of one source, and where they go.

    Attributes:
        table: the rows, with at least the columns that `Collate.columns` names.
        rows: int64, the place in the batch of each row, rising.
        stored: whether to use the stored tokens instead of the texts.
        locate: describes a row of the table for a message: its source, shard and record.
        symmetric: stands for the rows' own flag, when not None.
        instruction: stands for the instruction of rows that have none.
        in_batch_negatives: whether the passages of other rows are negatives of these.
        scored: whether the teacher has scores for these rows.
        epochs: int64, how many times each row's lane has been through its records; None: 0.
    """

    table: pa.Table
    rows: NDArray[np.int64]
    stored: bool
    locate: Callable[[int], str]
    symmetric: bool | None = None
    instruction: str = ""
    in_batch_negatives: bool = True
    scored: bool = True
    epochs: NDArray[np.int64] | None = None


@dataclass(frozen=True, eq=False)
class _Columns:
    """A part in numbers: the ids and hashes of its sides, each with one row (or k) a record."""

    query: Ragged
    passage: Ragged
    negatives: Ragged
    query_hash: NDArray[np.int64]
    passage_hash: NDArray[np.int64]
    negative_hash: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class _Prefixes:
    """A prefix for each row: texts[codes[row]]."""

    texts: list[str]
    codes: NDArray[np.int64]

    def repeat(self, times: int) -> _Prefixes:
        return _Prefixes(self.texts, np.repeat(self.codes, times))


class Collate:
    """Makes batches; safe to share between threads.

    Args:
        tokenizer: a fast transformers tokenizer.
        max_length: tokens of a text at most, prefix and special tokens included.
        prompts: what goes before queries and passages.
        num_negatives: k, the negatives taken from each record: the k best, in the next epoch the next k, and so on
            round the record's list.
        targets: where the teacher's scores are.
        joint: makes rows for a cross-encoder; prompts and stored tokens are then without use.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        prompts: Prompts,
        num_negatives: int = 0,
        *,
        targets: Targets | None = None,
        joint: Joint | None = None,
    ) -> None:
        self.prompts = prompts
        self.num_negatives = num_negatives
        self.fingerprint = fingerprint(tokenizer)
        self.takes_stored = joint is None
        self._encoder = TextEncoder(tokenizer, max_length)
        self._targets, self._joint = targets, joint

    def columns(self, stored: bool) -> list[str]:
        """The columns that the rows of a part must have."""
        sides = ["query_tokens", "passage_tokens"] if stored else ["query", "passage"]
        negatives = ["negative_hash", "negative_tokens" if stored else "negatives"] if self.num_negatives else []
        return [*sides, *LABELS, *negatives]

    def misfit(self, sample: pa.Table, stored_by: dict[str, Any] | None, instruction: str = "") -> str:
        """Why stored tokens cannot be used for a source, empty when they can.

        Args:
            sample: rows with texts and tokens, of which the first SAMPLE_ROWS are compared.
            stored_by: what the index says of the tokenizer that made them.
            instruction: the source's own.
        """
        if stored_by is None or "query_tokens" not in sample.column_names:
            return "it has none"
        if stored_by.get("fingerprint") != self.fingerprint:
            return "they were made by another tokenizer"
        if 0 < stored_by.get("max_tokens", 0) < self._encoder.max_length:
            return f"they were cut at {stored_by['max_tokens']} tokens"
        sample = sample.slice(0, SAMPLE_ROWS)
        instruction = instruction or "Find what answers the query"
        for prefix in (self.prompts.query, self.prompts.passage, query_prefix(self.prompts, instruction), ""):
            for side in ("query", "passage"):
                whole = self._encoder.encode(sample[side].to_pylist(), prefix)
                composed = self._encoder.compose(_ragged(_whole(sample[f"{side}_tokens"])), prefix)
                if not (np.array_equal(whole.lengths, composed.lengths) and np.array_equal(whole.ids, composed.ids)):
                    return f"with the prefix {prefix!r} they are not the ids of the text"
        return ""

    def __call__(
        self, parts: Sequence[Part], record_ids: NDArray[np.int64], source: str = "", bad: dict[str, int] | None = None
    ) -> Batch:
        """The batch of all parts' rows in their places.

        Raises:
            UserError: a record has fewer negatives than asked for, or a score is missing and must not be.
        """
        b, k = len(record_ids), self.num_negatives
        columns = [self._columns(part) for part in parts]
        back = np.argsort(np.concatenate([part.rows for part in parts]))
        wide = (back[:, None] * k + np.arange(k)).reshape(-1)
        sides = [_side(columns, "passage", back), _side(columns, "negatives", wide)]
        if not self._joint:
            sides.insert(0, _side(columns, "query", back))
        passage_hash = _hashes(columns, "passage_hash")[back]
        negative_hash = _hashes(columns, "negative_hash")[wide]
        batch = Batch(
            tokens=concat(sides),
            num_queries=b,
            num_negatives=k,
            query_hash=_hashes(columns, "query_hash")[back],
            passage_hash=np.concatenate([passage_hash, negative_hash]),
            record_ids=record_ids,
            source=source,
            bad=bad or {},
            own_only=_own_only(parts, b),
        )
        return batch if self._targets is None else self._with_scores(batch, parts, self._targets)

    def _with_scores(self, batch: Batch, parts: Sequence[Part], targets: Targets) -> Batch:
        """The batch with its scores; complains of the first row without one where that is an error."""
        wanted = np.concatenate([part.rows[:0] if not part.scored else part.rows for part in parts])
        batch = score(replace(batch, unscored=np.sort(wanted)), targets)
        if targets.missing == "error" and len(batch.unscored):
            row = int(batch.unscored[0])
            part = next(part for part in parts if row in part.rows)
            raise targets.lacking(part.locate(int(np.flatnonzero(part.rows == row)[0])), len(batch.unscored))
        return batch

    def _columns(self, part: Part) -> _Columns:
        negatives = self._negatives(part)
        hashes = (
            np.empty(0, np.int64) if negatives is None else _taken(part.table["negative_hash"], negatives).to_numpy()
        )
        query, passage, hard = self._joint_sides(part, negatives) if self._joint else self._sides(part, negatives)
        return _Columns(
            query=query,
            passage=passage,
            negatives=hard,
            query_hash=part.table["query_hash"].to_numpy(),
            passage_hash=part.table["passage_hash"].to_numpy(),
            negative_hash=hashes,
        )

    def _sides(self, part: Part, negatives: NDArray[np.int64] | None) -> tuple[Ragged, Ragged, Ragged]:
        """Queries, passages and negatives, each with its prefix."""
        table, suffix = part.table, "_tokens" if part.stored else ""
        on_queries, on_passages = _prefixes(part, self.prompts)
        hard = concat([])
        if negatives is not None:
            column = _taken(table["negative_tokens" if part.stored else "negatives"], negatives)
            hard = self._encode(column, on_passages.repeat(self.num_negatives))
        query = self._encode(_whole(table["query" + suffix]), on_queries)
        return query, self._encode(_whole(table["passage" + suffix]), on_passages), hard

    def _joint_sides(self, part: Part, negatives: NDArray[np.int64] | None) -> tuple[Ragged, Ragged, Ragged]:
        """No queries, but passages and negatives with their query in one row."""
        assert self._joint is not None
        queries, passages = part.table["query"].to_pylist(), part.table["passage"].to_pylist()
        hard = concat([])
        if negatives is not None:
            repeated = [query for query in queries for _ in range(self.num_negatives)]
            hard = self._joint(repeated, _taken(part.table["negatives"], negatives).to_pylist())
        return concat([]), self._joint(queries, passages), hard

    def _encode(self, column: pa.Array, prefixes: _Prefixes) -> Ragged:
        """Ids of a side: its texts tokenised, or its stored tokens framed."""
        used, codes = np.unique(prefixes.codes, return_inverse=True)
        texts = [prefixes.texts[code] for code in used]
        if pa.types.is_list(column.type):
            return self._compose(_ragged(column), texts, codes)
        if len(texts) == 1:
            return self._encoder.encode(column.to_pylist(), texts[0])
        rows = zip(codes.tolist(), column.to_pylist(), strict=True)
        return self._encoder.encode([texts[code] + text for code, text in rows])

    def _compose(self, body: Ragged, prefixes: list[str], codes: NDArray[np.int64]) -> Ragged:
        if len(prefixes) == 1:
            return self._encoder.compose(body, prefixes[0])
        groups = [np.flatnonzero(codes == code) for code in range(len(prefixes))]
        parts = [self._encoder.compose(body.take(rows), text) for rows, text in zip(groups, prefixes, strict=True)]
        return concat(parts).take(np.argsort(np.concatenate(groups)))

    def _negatives(self, part: Part) -> NDArray[np.int64] | None:
        """Which of the part's negatives, counted over all rows, are taken: k of every row, others in every epoch."""
        k = self.num_negatives
        if not k:
            return None
        offsets = _whole(part.table["negative_hash"]).offsets.to_numpy()
        have = np.diff(offsets).astype(np.int64)
        short = np.flatnonzero(have < k)
        if len(short):
            row, fewest = int(short[0]), int(have.min())
            mend = f"mine more, or set negatives={fewest} or less" if fewest else "`quintet mine` finds some"
            raise UserError(f"negatives={k}: {part.locate(row)} has only {have[row]}; {mend}")
        first = offsets[:-1].astype(np.int64) - int(offsets[0])
        turns = np.zeros(len(have), np.int64) if part.epochs is None else part.epochs
        return (first[:, None] + (turns[:, None] * k + np.arange(k)) % have[:, None]).reshape(-1)


def score(batch: Batch, targets: Targets) -> Batch:
    """The batch with the logits of its `unscored` queries filled in; those that still lack one remain in it."""
    rows, groups = batch.unscored, batch.group_hash
    scores = np.full(groups.shape, np.nan, np.float32) if batch.scores is None else batch.scores.copy()
    scores[rows] = targets.logits(batch.query_hash[rows], groups[rows])
    return replace(batch, scores=scores, unscored=rows[np.isnan(scores[rows]).any(1)])


def _own_only(parts: Sequence[Part], size: int) -> NDArray[np.bool_] | None:
    if all(part.in_batch_negatives for part in parts):
        return None
    own_only = np.zeros(size, np.bool_)
    for part in parts:
        own_only[part.rows] = not part.in_batch_negatives
    return own_only


def _prefixes(part: Part, prompts: Prompts) -> tuple[_Prefixes, _Prefixes]:
    """The prefixes of the queries and of the passages of a part."""
    labels = _whole(part.table["instruction"]).dictionary_encode()
    instructions = [text or part.instruction for text in labels.dictionary.to_pylist()]
    of_row = labels.indices.to_numpy().astype(np.int64)
    if part.symmetric is None:
        symmetric = part.table["symmetric"].to_numpy().astype(np.int64)
    else:
        symmetric = np.full(len(of_row), part.symmetric, np.int64)
    on_queries = [query_prefix(prompts, text) for text in instructions]
    on_passages = [passage_prefix(prompts, text, same) for text in instructions for same in (False, True)]
    return _Prefixes(on_queries, of_row), _Prefixes(on_passages, 2 * of_row + symmetric)


def _whole(column: pa.ChunkedArray) -> pa.Array:
    """A column in one piece."""
    return column.combine_chunks()


def _taken(column: pa.ChunkedArray, chosen: NDArray[np.int64]) -> pa.Array:
    """The chosen elements of all rows' lists."""
    return _whole(column).flatten().take(pa.array(chosen))


def _ragged(column: pa.ListArray) -> Ragged:
    """A column of token lists."""
    return Ragged(
        column.flatten().to_numpy().astype(np.int32), np.diff(column.offsets.to_numpy()).astype(np.int32, copy=False)
    )


def _side(columns: Sequence[_Columns], name: str, rows: NDArray[np.int64]) -> Ragged:
    """One side of all parts, in the order of the batch. A single part is in it already: it has every row."""
    parts = [getattr(part, name) for part in columns]
    return concat(parts).take(rows) if len(parts) > 1 else parts[0]


def _hashes(columns: Sequence[_Columns], name: str) -> NDArray[np.int64]:
    return np.concatenate([getattr(part, name) for part in columns])
