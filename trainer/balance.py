"""Deals a global batch out anew so that every rank has as many tokens: a step waits for the slowest rank.

Only who embeds a pair changes. The batch, its loss and the model's gradient are what they were.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data.collate import Batch
from data.tokens import Ragged
from trainer import distributed

_REFINED = 64  # rounds, the last ones, in which ranks choose by what they have


def deal(batch: Batch) -> Batch:
    """This rank's part of the global batch, dealt anew. All ranks come here in every step. Collective.

    A pair moves with its negatives, its hashes and its scores; `source` and `bad` stay with the rank that read them.
    """
    if distributed.world() == 1:
        return batch
    rows, shape = _rows_of_pairs(batch), (distributed.world(), batch.num_queries)
    mine = batch.tokens.lengths[rows].sum(1, dtype=np.int64)
    tokens = distributed.gather_rows(torch.from_numpy(mine)).numpy().reshape(shape)
    owner = owners(tokens.reshape(-1), len(tokens)).reshape(shape)
    going, coming = owner[distributed.rank()], owner == distributed.rank()
    leaving = np.argsort(going, kind="stable")
    fields = _exchange(_fields(batch, rows)[leaving], np.bincount(going, minlength=len(tokens)), coming.sum(1))
    texts = batch.tokens.take(rows[leaving].reshape(-1))
    sent = np.bincount(going, mine, len(tokens)).astype(np.int64)
    return _assembled(batch, fields, _exchange(texts.ids, sent, (tokens * coming).sum(1)))


def owners(tokens: NDArray[np.int64], world: int) -> NDArray[np.int64]:
    """Which rank gets each pair: [n] tokens -> int64 [n], n / world pairs a rank.

    Longest first, a round of `world` pairs at a time: the rank that has least takes the longest of a round (Graham
    1969, "Bounds on multiprocessing timing anomalies", with equal counts). All but the last rounds go to and fro
    instead, which needs no look at the sums.
    """
    order = np.argsort(-tokens, kind="stable").reshape(-1, world)
    plain = max(0, len(order) - _REFINED)
    ranks = np.tile(np.arange(world), (len(order), 1))
    ranks[1:plain:2] = ranks[0, ::-1]
    held = np.zeros(world, np.int64)
    np.add.at(held, ranks[:plain], tokens[order[:plain]])
    for number in range(plain, len(order)):
        ranks[number] = np.argsort(held, kind="stable")
        held[ranks[number]] += tokens[order[number]]
    found = np.empty(len(tokens), np.int64)
    found[order] = ranks
    return found


def _rows_of_pairs(batch: Batch) -> NDArray[np.int64]:
    """int64 [b, rows of a pair]: the rows of `tokens` that belong to each pair, its negatives last."""
    b, k = batch.num_queries, batch.num_negatives
    pairs = np.arange(b)[:, None]
    sides = len(batch.tokens) // b - k  # query and passage, or the two in one row
    return np.hstack([pairs + b * np.arange(sides), sides * b + pairs * k + np.arange(k)])


def _fields(batch: Batch, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """All of a pair but its tokens, as one row of numbers: int64 [b, ...]."""
    b = batch.num_queries
    unscored = np.zeros(b, np.bool_)
    unscored[batch.unscored] = True
    own_only = np.zeros(b, np.bool_) if batch.own_only is None else batch.own_only
    lengths = batch.tokens.lengths[rows]
    columns: list[NDArray[Any]] = [batch.record_ids, batch.query_hash, batch.group_hash, lengths, unscored, own_only]
    if batch.scores is not None:
        columns.append(batch.scores.view(np.int32))  # bits: NaN stays NaN
    return np.column_stack([column.astype(np.int64) for column in columns])


def _assembled(batch: Batch, fields: NDArray[np.int64], ids: NDArray[np.int32]) -> Batch:
    """The batch of the pairs that came, in the order of `Batch`; the inverse of `_fields`."""
    b, k = batch.num_queries, batch.num_negatives
    group, width = 1 + k, len(batch.tokens) // b
    edges = np.cumsum([1, 1, group, width, 1, 1])
    record_ids, query_hash, hashes, lengths, unscored, own_only, bits = np.split(fields, edges, axis=1)
    places = _rows_of_pairs(batch).reshape(-1)
    came = Ragged(ids, lengths.reshape(-1).astype(np.int32))
    return replace(
        batch,
        tokens=came.take(np.argsort(places)),
        query_hash=query_hash[:, 0].copy(),  # in one piece, as what is searched in should be
        passage_hash=np.concatenate([hashes[:, 0], hashes[:, 1:].reshape(-1)]),
        record_ids=record_ids[:, 0].copy(),
        scores=None if batch.scores is None else bits.astype(np.int32).view(np.float32),
        unscored=np.flatnonzero(unscored),
        own_only=None if batch.own_only is None else own_only[:, 0].astype(np.bool_),
    )


def _exchange(rows: NDArray[Any], out: NDArray[np.int64], into: NDArray[np.int64]) -> NDArray[Any]:
    received = distributed.deal_rows(torch.from_numpy(np.ascontiguousarray(rows)), out.tolist(), into.tolist())
    return np.asarray(received.numpy())
