"""Shards whose records carry mined negatives, with tokens where the shards that were mined have some."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data import scan
from data.index import Index
from data.mixture import Mixture
from data.reading import Policy
from data.scan import Unit
from data.shards import ShardWriter
from data.tokens import TextEncoder, fingerprint, load_tokenizer
from trainer.corpus import Passages
from trainer.embed import Progress
from trainer.mining import Mined, given
from trainer.negatives import NONE

_WHOLE = 1 << 60  # of a length: without a limit


@dataclass(frozen=True)
class Shard:
    """One shard to write: its source and file name, and the numbers of the units with its records."""

    source: str
    file: str
    units: tuple[int, ...]


def cut(mixture: Mixture, records: int) -> tuple[list[Unit], list[Shard]]:
    """Units of about `records` records, none of which spans two shards, and a shard to write for each one read."""
    units: list[Unit] = []
    shards: list[Shard] = []
    for number, source in enumerate(mixture.sources):
        for shard in range(len(source.index.shards)):
            first, last = map(int, np.searchsorted(source.blocks[:, 0], [shard, shard + 1]))
            found = list(_units(number, first, source.starts[first : last + 1], records))
            numbers = tuple(range(len(units), len(units) + len(found)))
            shards.append(Shard(source.name, f"{source.name}-{shard:06d}.tar", numbers))
            units += found
    return units, shards


def _units(source: int, first: int, starts: NDArray[np.int64], records: int) -> Iterator[Unit]:
    """Runs of blocks; `starts` are the first records of the blocks, and the end."""
    begin = 0
    for end in range(1, len(starts)):
        if starts[end] - starts[begin] >= records or end == len(starts) - 1:
            yield Unit(source, first + begin, first + end, int(starts[end] - starts[begin]))
            begin = end


class Tokeniser:
    """Makes the tokens of negatives as those of the shards were made.

    Args:
        described: what the shards' index says of its tokenizer.
        tokenizer: the same tokenizer.
        dtype: of the shards' tokens.
    """

    def __init__(self, described: dict[str, Any], tokenizer: Any, dtype: str) -> None:
        self.described, self.dtype = described, dtype
        self._encoder = TextEncoder(tokenizer, _WHOLE)
        self._max_tokens = described.get("max_tokens") or _WHOLE

    def __call__(self, texts: Sequence[str]) -> pa.ListArray:
        """The tokens of every text."""
        body = self._encoder.body(texts)
        rows = [row[: self._max_tokens] for row in np.split(body.ids, body.offsets[1:-1])] if texts else []
        return pa.array(rows, pa.list_(pa.type_for_alias(self.dtype)))


def tokeniser(mixture: Mixture, model_tokenizer: Any, policy: Policy = "strict") -> tuple[Tokeniser | None, str]:
    """What makes the tokens of negatives, or None with the reason; "" when no shards have tokens."""
    described, dtype = scan.tokenizer(mixture), scan.token_dtype(mixture, policy)
    if described is None or dtype is None:
        some = any(source.index.tokenizer for source in mixture.sources)
        return None, "not all sources have tokens of the same tokenizer" if some else ""
    if fingerprint(model_tokenizer) == described["fingerprint"]:
        return Tokeniser(described, model_tokenizer, dtype), ""
    name = str(described.get("name", ""))
    for place in (Path(name), Path(mixture.sources[0].index.folder) / name):
        if name and (place / "tokenizer.json").is_file():
            found = load_tokenizer(str(place))
            if fingerprint(found) == described["fingerprint"]:
                return Tokeniser(described, found, dtype), ""
    return None, f"their tokenizer {name!r} is not the model's, and is not to be found"


@dataclass(frozen=True, eq=False)
class Writer:
    """Writes shards out of mined units."""

    mixture: Mixture
    units: Sequence[Unit]
    passages: Passages
    tokeniser: Tokeniser | None
    policy: Policy = "strict"

    def __call__(
        self, shard: Shard, mined: Sequence[Path], folder: Path, scratch: Path, progress: Progress | None = None
    ) -> Index:
        """Write the rows that have all their negatives; the index of the shard, or of none when there is no such row.

        Args:
            mined: the files with the mined rows of its units.
            folder: where the shard goes.
            scratch: a folder to make and remove again.
        """
        dtype = self.tokeniser.dtype if self.tokeniser else None
        with ShardWriter(scratch, shard.source, shard_bytes=_WHOLE, token_dtype=dtype) as writer:
            for table, rows in self._blocks(shard, mined):
                scan.write_rows(writer, self._with_negatives(table, rows), tokens=dtype is not None)
                if progress:
                    progress(len(rows))
        infos = writer.close()
        folder.mkdir(exist_ok=True)
        for info in infos:
            os.replace(scratch / info.file, folder / shard.file)
        scratch.rmdir()
        return Index(str(folder), tuple(replace(info, file=shard.file) for info in infos))

    def _blocks(self, shard: Shard, mined: Sequence[Path]) -> Iterator[tuple[pa.Table, Mined]]:
        for unit, file in zip(shard.units, mined, strict=True):
            rows, start = np.load(file), 0
            for _, table in scan.tables(self.mixture, self.units[unit], policy=self.policy):
                yield table, rows[start : start + len(table)]
                start += len(table)

    def _with_negatives(self, table: pa.Table, mined: Mined) -> pa.Table:
        """The rows that have all their negatives, with them."""
        kept = np.flatnonzero((mined["numbers"] != NONE).all(axis=1))
        table, numbers = table.take(pa.array(kept)).combine_chunks(), mined["numbers"][kept]
        used = np.unique(numbers[numbers >= 0])
        brought = table["negatives"].combine_chunks()
        starts = brought.offsets.to_numpy() - brought.offsets[0].as_py()
        own = len(used) + starts[:-1, None] + given(numbers)
        places = np.where(numbers >= 0, np.searchsorted(used, numbers), own)
        texts = self.passages.texts(used)
        table = _with_lists(table, "negatives", pa.array(texts, pa.string()), places)
        if self.tokeniser is None:
            return table
        return _with_lists(table, "negative_tokens", self.tokeniser(texts), places)


def _with_lists(table: pa.Table, name: str, mined: pa.Array, places: NDArray[np.int64]) -> pa.Table:
    """The table with new lists in a column: of `mined` first, and behind them of all elements that the column has."""
    values = pa.concat_arrays([mined, table[name].combine_chunks().flatten()]).take(pa.array(places.reshape(-1)))
    offsets = pa.array(np.arange(len(table) + 1, dtype=np.int32) * places.shape[1], pa.int32())
    return table.set_column(table.column_names.index(name), name, pa.ListArray.from_arrays(offsets, values))
