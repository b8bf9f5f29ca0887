"""Wrong pairs put among the right ones on purpose, to see whether a filter finds them.

A planted pair has the passage of another pair of its source. Its id begins with PLANTED, so that nobody takes it for
a real one later.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from numpy.typing import NDArray

from data import scan
from data.index import Index
from data.mixture import Mixture
from data.scan import Unit
from data.shards import ShardWriter, write_index

PLANTED = "planted:"
_SIDE = ("passage", "passage_hash", "passage_tokens")
_UNIT = 32_768  # records of a source among which passages are exchanged


def is_planted(table: pa.Table) -> NDArray[np.bool_]:
    """Which rows are planted pairs."""
    return pc.starts_with(table["id"], PLANTED).to_numpy()


def exchange(table: pa.Table, share: float, seed: int, place: str) -> pa.Table:
    """Exchange the passages of a share of the rows, chosen at random, among each other.

    Args:
        place: names these rows; with the seed it decides which are chosen.

    Returns:
        The table with other passages; rows that got another text than their own are marked by their id.
    """
    random = np.random.default_rng([seed, xxhash.xxh3_64_intdigest(place.encode())])
    chosen = random.permutation(len(table))[: round(share * len(table))]
    source = np.arange(len(table))
    source[chosen] = np.roll(chosen, 1)  # in random order, so each gets that of a random other one
    before = table["passage_hash"].to_numpy()
    for name in (name for name in _SIDE if name in table.column_names):
        table = _replaced(table, name, table[name].take(pa.array(source)))
    changed = pa.array(before != before[source])
    marked = pc.binary_join_element_wise(PLANTED, table["id"].cast(pa.string()), "")
    return _replaced(table, "id", pc.if_else(changed, marked, table["id"]))


def _replaced(table: pa.Table, name: str, column: pa.ChunkedArray) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, column)


def place(mixture: Mixture, unit: Unit) -> str:
    """What names the rows of a unit for `exchange`."""
    return f"{mixture.sources[unit.source].name}/{unit.first}"


def plant(mixture: Mixture, output: Path, share: float, seed: int) -> Index:
    """Write the shards of a mixture again, with a share of the pairs of every source planted."""
    dtype, shards = scan.token_dtype(mixture), []
    units = scan.units(mixture, _UNIT)
    for number, source in enumerate(mixture.sources):
        with ShardWriter(output, source.name, token_dtype=dtype) as writer:
            for unit in (unit for unit in units if unit.source == number):
                table = exchange(scan.read(mixture, unit), share, seed, place(mixture, unit))
                scan.write_rows(writer, table, tokens=dtype is not None)
        shards += writer.close()
    return write_index(output, shards, scan.tokenizer(mixture))
