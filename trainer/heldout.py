"""Groups that a cross-encoder is not trained on: how often it puts a query's passage above the negatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor

from data import mixture
from data.errors import UserError
from data.groups import COLUMNS, Numbers, pairs_of
from data.mixture import Source
from data.pairing import PairEncoder
from data.reading import read_block
from data.scores import Logits
from data.tokens import Ragged
from trainer import distributed

_SEED = 0


@dataclass(frozen=True, eq=False)
class Groups:
    """This rank's share of a source's groups.

    Attributes:
        name: of the source.
        tokens: one row for each of n pairs: the positives of the records, then all negatives.
        record: int64 [n], the record that a row belongs to; its positive is the row of that number.
        hidden: bool [n], negatives that have the text of their positive.
    """

    name: str
    tokens: Ragged
    record: Numbers
    hidden: NDArray[np.bool_]


def load(data: str | Sequence[str], limit: int, encoder: PairEncoder) -> list[Groups]:
    """The groups of mined shards, a part of them for each rank.

    Args:
        data: mined shards, or a mixture file.
        limit: groups of each source at most, drawn with a fixed seed; 0: all.

    Raises:
        UserError: nothing is there, or a source has no negatives. DataError: damaged shards.
    """
    return [_groups(source, limit, encoder) for source in mixture.load(data).sources]


def _groups(source: Source, limit: int, encoder: PairEncoder) -> Groups:
    tables = [read_block(source.index, *place).table.select(COLUMNS) for place in source.blocks.tolist()]
    table = pa.concat_tables(tables)
    if not len(table["negative_hash"].combine_chunks().flatten()):
        raise UserError(f"eval.data: the records of source {source.name} have no negatives; run quintet mine on them")
    drawn = np.random.default_rng(_SEED).permutation(len(table))[: limit or None]
    own = np.sort(drawn)[distributed.rank() :: distributed.world()]
    pairs = pairs_of([table.take(pa.array(own))])
    hidden = pairs.passage_hash == pairs.passage_hash[pairs.query_row]
    hidden[: pairs.records] = False
    rows = pairs.rows(np.arange(len(pairs)), encoder)
    return Groups(source.name, rows.take(np.arange(len(pairs))), pairs.query_row, hidden)


def evaluate(held_out: Sequence[Groups], score: Callable[[Ragged], Tensor]) -> dict[str, float]:
    """accuracy_at_1 and mrr_at_10 of every source, by metric name, over all ranks. A collective.

    Args:
        held_out: as loaded; every rank has the same sources.
        score: token rows [n] to logits [n, 1].
    """
    values = {}
    for groups in held_out:
        ranks = positions(score(groups.tokens)[:, 0].numpy(), groups.record, groups.hidden)
        reciprocal = np.where(ranks <= 10, 1 / ranks, 0)
        sums = [float((ranks == 1).sum()), float(reciprocal.sum()), float(len(ranks))]
        first, reciprocals, count = distributed.sums(sums)
        values[f"eval/{groups.name}/accuracy_at_1"] = first / max(count, 1)
        values[f"eval/{groups.name}/mrr_at_10"] = reciprocals / max(count, 1)
    return values


def positions(logits: Logits, record: Numbers, hidden: NDArray[np.bool_]) -> Numbers:
    """Where each record's positive ranks among its own passages, from 1, by rows as in `Groups`: int64 [records].

    A negative of equal logit counts as better, so that a model that says the same of everything gets nothing. Records
    that have nothing to compare with are left out.
    """
    records = int(record.max(initial=-1)) + 1
    against = ~hidden
    against[:records] = False
    better = against & (logits >= logits[record])
    compared = np.bincount(record[against], minlength=records) > 0
    ranks: Numbers = 1 + np.bincount(record[better], minlength=records)
    return ranks[compared]
