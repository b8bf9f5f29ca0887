"""Passages as a searchable collection on disk: distinct texts in one Arrow file, their vectors in one .npy file.

Both files are mapped into memory, so a collection may be larger than memory. They are made by all ranks of a job, in
parts (trainer/work.py), so that a killed job goes on where it stopped:

    passages = corpus.collect(parts, "corpus", mixture)          # the distinct passages of shards
    passages = corpus.collect(parts, "corpus", "beir/scifact")   # of a BEIR folder, a JSONL file or a text file
    vectors = corpus.embed(parts, "corpus", passages, embedder)
    scores, numbers = top_k(queries, vectors, k)                 # trainer/topk.py takes them block by block
    passages.texts(numbers), passages.ids(numbers), passages.hashes[numbers]

Texts with the same `text_hash` are one passage: the first of them, with its labels. Passages are numbered in the order
in which they come; a sample is in random order. All of it depends on data and seed only, not on the number of ranks.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice, pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from data import scan
from data.errors import UserError
from data.holdout import mix
from data.mixture import Mixture
from data.parts import Parts, array_header, save_array
from data.reading import Policy
from data.records import normalise, text_hashes
from data.rules import Prompts
from data.scan import Unit
from trainer import distributed, sets, work
from trainer.embed import Embedder, progress_bar

log = logging.getLogger("quintet")

Labels = TypeVar("Labels")
Hashes = NDArray[np.int64]
Keys = NDArray[np.uint64]

BLOCK = 16_384  # passages that are embedded together, and so the window that is sorted by length
_UNITS = 64  # about so many pieces of the shards are shared by the ranks while passages are collected
_MANY = 1 << 20  # pairs that may wait before those that cannot be drawn are dropped
_BATCH = 4096  # rows of a batch of an Arrow file

SCHEMA = pa.schema(
    [
        ("text", pa.large_string()),
        ("hash", pa.int64()),
        ("id", pa.string()),
        ("instruction", pa.string()),
        ("symmetric", pa.bool_()),
    ]
)
_KEYED = SCHEMA.append(pa.field("key", pa.uint64()))
_PAIR = np.dtype([("hash", "<i8"), ("key", "<u8")])


class Passages:
    """n distinct passages, mapped from an Arrow file.

    An id is SOURCE/NUMBER for the record of a shard, and for a file what `sets.documents` says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.table = mapped(path)

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def hashes(self) -> Hashes:
        """int64 [n]: `text_hash` of every passage; 8 bytes each, in memory."""
        return self.table["hash"].to_numpy()

    def texts(self, numbers: Sequence[int] | NDArray[np.int64]) -> list[str]:
        """The texts of some passages."""
        return self.table["text"].take(pa.array(numbers, pa.int64())).to_pylist()

    def ids(self, numbers: Sequence[int] | NDArray[np.int64]) -> list[str]:
        """The ids of some passages."""
        return self.table["id"].take(pa.array(numbers, pa.int64())).to_pylist()

    def prompted(self, start: int, stop: int, prompts: Prompts) -> list[str]:
        """What is encoded for the passages start .. stop - 1."""
        return scan.passage_texts(self.table.slice(start, stop - start), prompts, "text")

    def numbers_of(self, hashes: Hashes) -> NDArray[np.int64]:
        """The passage with each of the given text hashes, -1 where there is none."""
        order, ordered = self._by_hash
        places = np.searchsorted(ordered, hashes).clip(max=len(ordered) - 1)
        return np.where(ordered[places] == hashes, order[places], -1)

    @cached_property
    def _by_hash(self) -> tuple[NDArray[np.int64], Hashes]:
        order = np.argsort(self.hashes)
        return order, self.hashes[order]


class Vectors:
    """Rows [n, D] of a float16 or float32 .npy file; a slice of them is an fp32 tensor, read when it is asked for."""

    dtype = torch.float32

    def __init__(self, path: Path) -> None:
        self.rows: np.ndarray = np.load(path, mmap_mode="r")
        self.shape = self.rows.shape

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(self.rows[rows].astype(np.float32))


def mapped(path: Path) -> pa.Table:
    """The rows of an Arrow file, which stay in it until they are looked at."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


# --- collecting --------------------------------------------------------------------------------------------------


def collect(
    parts: Parts, name: str, data: Mixture | str, *, sample: int = 0, seed: int = 0, policy: Policy = "strict"
) -> Passages:
    """The distinct passages of the data, in the part NAME.arrow. Collective.

    Args:
        parts: of the stage; its plan has to name the data, the sample and the seed.
        data: sources of shards, whose passages are taken, or a path that `sets.documents` reads.
        sample: draw so many; 0, or more than there are: all. Every distinct text of shards is equally likely,
            however often it stands there. A path is always taken whole.
        seed: of the draw.
        policy: what happens to damaged shards.

    Raises:
        UserError: there is no passage.
        DataError: damaged shards, under `strict`.
    """
    if isinstance(data, str):
        work.once(parts, f"{name}.arrow", lambda path: _write_documents(path, data))
    elif not distributed.on_first_rank(lambda: parts.has(f"{name}.arrow")):
        _Collector(parts, name, data, sample, seed, policy)()
    return Passages(parts.path(f"{name}.arrow"))


@dataclass(frozen=True)
class _Collector:
    """Lists the hashes of all passages, chooses among them, fetches the chosen texts, and puts them in order.

    What they are put in order by is the key: the place in the data, or for a sample a random number that belongs to
    the text.
    """

    parts: Parts
    name: str
    mixture: Mixture
    sample: int
    seed: int
    policy: Policy

    def __call__(self) -> None:
        self._shared("hashes", self._list)
        distributed.on_first_rank(self._choose)
        self._shared("texts", self._fetch)
        work.once(self.parts, f"{self.name}.arrow", self._merge)
        distributed.on_first_rank(self._discard)

    @cached_property
    def _units(self) -> list[Unit]:
        return scan.units(self.mixture, -(-self.mixture.records // _UNITS))

    @cached_property
    def _before(self) -> list[int]:
        """Records of the sources before each source."""
        return [0, *np.cumsum([source.records for source in self.mixture.sources]).tolist()]

    def _part(self, what: str, number: int) -> str:
        return f"{Path(self.name).name}-{what}-{number:06d}"  # beside the work, not in its result

    def _shared(self, what: str, make: Callable[[int, Path], None]) -> None:
        """Make a part of every unit, each on the rank that it is dealt to."""
        numbers = work.share(self.parts, [self._part(what, n) for n in range(len(self._units))], f"{self.name} {what}")
        with distributed.together():
            for number in numbers:
                self.parts.write(self._part(what, number), partial(make, number))

    def _tables(self, number: int, columns: Sequence[str]) -> Iterator[tuple[int, pa.Table, NDArray[np.void]]]:
        """(first record, rows, _PAIR of each row) of the blocks of a unit."""
        unit = self._units[number]
        for first, table in scan.tables(self.mixture, unit, ["passage_hash", *columns], policy=self.policy):
            pairs = np.empty(len(table), _PAIR)
            pairs["hash"] = table["passage_hash"].to_numpy()
            if self.sample:
                pairs["key"] = mix(pairs["hash"].view(np.uint64), self.seed)
            else:
                pairs["key"] = np.arange(len(table)) + (self._before[unit.source] + first)
            yield first, table, pairs

    def _list(self, number: int, path: Path) -> None:
        """Write the distinct pairs of a unit; for a sample, only those that may be drawn."""
        listed = [np.empty(0, _PAIR)]
        for _, _, pairs in self._tables(number, []):
            listed.append(pairs)
            if self.sample and sum(map(len, listed)) > 2 * self.sample + _MANY:
                listed = [_chosen(np.concatenate(listed), self.sample)[0]]
        save_array(path, _chosen(np.concatenate(listed), self.sample)[0])

    def _choose(self) -> None:
        """Write for every unit the sorted hashes of what is taken from it."""
        listed = [np.load(self.parts.path(self._part("hashes", number))) for number in range(len(self._units))]
        chosen, rows = _chosen(np.concatenate(listed), self.sample)
        bounds = np.searchsorted(rows, np.cumsum(list(map(len, listed))))
        for number, (start, stop) in enumerate(pairwise([0, *bounds.tolist()])):
            if not self.parts.has(self._part("chosen", number)):
                hashes = np.sort(chosen["hash"][start:stop])
                self.parts.write(self._part("chosen", number), partial(save_array, array=hashes))

    def _fetch(self, number: int, path: Path) -> None:
        """Write what is taken from a unit, by key."""
        chosen = np.load(self.parts.path(self._part("chosen", number)))
        wanted = np.ones(len(chosen) + 1, np.bool_)  # one more, for hashes beyond the last
        wanted[-1] = False
        source = self.mixture.sources[self._units[number].source].name
        found = [_KEYED.empty_table()]
        for first, table, pairs in self._tables(number, ["passage", "instruction", "symmetric"]):
            hashes, rows = np.unique(pairs["hash"], return_index=True)
            places = np.searchsorted(chosen, hashes)
            places[~np.isin(hashes, chosen)] = len(chosen)
            rows = np.sort(rows[wanted[places]])
            wanted[places] = False
            found.append(_rows(table.take(pa.array(rows)), pairs[rows], [f"{source}/{first + row}" for row in rows]))
        keyed = pa.concat_tables(found)
        write_arrow(path, _KEYED, [keyed.take(pa.array(np.argsort(keyed["key"].to_numpy())))])

    def _merge(self, path: Path) -> None:
        """Write what was taken from all units, by key."""
        tables = [mapped(self.parts.path(self._part("texts", number))) for number in range(len(self._units))]
        keys = [table["key"].to_numpy() for table in tables]
        cuts = np.sort(np.concatenate(keys))[::_BATCH]
        starts = [np.append(np.searchsorted(key, cuts), len(key)) for key in keys]

        def batch(number: int) -> pa.Table:
            pieces = [
                table.slice(start[number], start[number + 1] - start[number])
                for table, start in zip(tables, starts, strict=True)
            ]
            joined = pa.concat_tables(pieces)
            return joined.take(pa.array(np.argsort(joined["key"].to_numpy()))).select(SCHEMA.names)

        write_arrow(path, SCHEMA, map(batch, range(len(cuts))))

    def _discard(self) -> None:
        for what in ("hashes", "chosen", "texts"):
            self.parts.discard(*(self._part(what, number) for number in range(len(self._units))))


def _chosen(pairs: NDArray[np.void], sample: int) -> tuple[NDArray[np.void], NDArray[np.int64]]:
    """The first pair of every hash, and of those the `sample` with the smallest keys (0: all), in order; their rows."""
    rows = np.sort(np.unique(pairs["hash"], return_index=True)[1])
    if 0 < sample < len(rows):
        rows = np.sort(rows[np.argpartition(pairs["key"][rows], sample)[:sample]])
    return pairs[rows], rows


def _rows(table: pa.Table, pairs: NDArray[np.void], ids: Sequence[str]) -> pa.Table:
    columns = [table["passage"].cast(pa.large_string()), pa.array(pairs["hash"]), pa.array(ids, pa.string())]
    return pa.Table.from_arrays(
        [*columns, table["instruction"], table["symmetric"], pa.array(pairs["key"])], schema=_KEYED
    )


def _write_documents(path: Path, place: str) -> None:
    """The distinct texts of a file or folder, normalised, in order. Raises UserError when there is none."""
    seen: set[int] = set()
    documents = sets.documents(place)
    write_arrow(path, SCHEMA, (_unseen(rows, seen) for rows in iter(lambda: list(islice(documents, _BATCH)), [])))
    if not seen:
        raise UserError(f"{place}: there is no text in it")


def _unseen(rows: Sequence[tuple[str, str]], seen: set[int]) -> pa.Table:
    """Those of the (id, text) whose text is not empty and new, as SCHEMA; `seen` learns their hashes."""
    texts = [normalise(text) for _, text in rows]
    kept, hashes = [], []
    for (key, _), text, value in zip(rows, texts, text_hashes(texts).tolist(), strict=True):
        if text and value not in seen:
            seen.add(value)
            kept.append((text, key))
            hashes.append(value)
    columns = [[text for text, _ in kept], hashes, [key for _, key in kept], [""] * len(kept), [False] * len(kept)]
    return pa.Table.from_arrays([pa.array(*pair) for pair in zip(columns, SCHEMA.types, strict=True)], schema=SCHEMA)


def write_arrow(path: Path, schema: pa.Schema, tables: Iterable[pa.Table], *, batch: int = _BATCH) -> None:
    """Write tables as an Arrow file of batches of `batch` rows."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for table in tables:
            writer.write_table(table.combine_chunks(), max_chunksize=max(1, batch))


# --- embedding ---------------------------------------------------------------------------------------------------


def embed(
    parts: Parts, name: str, passages: Passages, embedder: Embedder, *, dtype: str = "float32", block: int = BLOCK
) -> Vectors:
    """The vectors of all passages, each with its prompt, in the part NAME.npy. Collective.

    Args:
        parts: of the stage; its plan has to name the passages, `embedder.identity` and the dtype.
        dtype: float16 or float32.
        block: passages of a part: what a killed rank may lose.

    Raises:
        NumericError: the model gives NaN or infinity.
    """
    if not distributed.on_first_rank(lambda: parts.has(f"{name}.npy")):
        prompts = Prompts(query=embedder.model.query_prompt, passage=embedder.model.passage_prompt)
        starts = [*range(0, len(passages), block), len(passages)]
        names = [f"{name}-vectors-{number:06d}" for number in range(len(starts) - 1)]
        embed_parts(
            parts,
            names,
            np.diff(starts).tolist(),
            lambda number: (passages.prompted(starts[number], starts[number + 1], prompts), None),
            embedder,
            lambda path, vectors, _: path.write_bytes(stored(vectors, dtype).data),
            name,
        )
        shape = (len(passages), embedder.model.encoder.size)
        work.once(parts, f"{name}.npy", lambda path: join_rows(path, map(parts.path, names), shape, dtype))
        distributed.on_first_rank(lambda: parts.discard(*names))
    return Vectors(parts.path(f"{name}.npy"))


def embed_parts(
    parts: Parts,
    names: Sequence[str],
    sizes: Sequence[int],
    read: Callable[[int], tuple[Sequence[str], Labels]],
    embedder: Embedder,
    save: Callable[[Path, Tensor, Labels], object],
    what: str,
) -> None:
    """Embed blocks of texts, each into a part of its own, shared by all ranks. Collective.

    Args:
        names, sizes: of the blocks.
        read: block number -> its texts with their prompts, and what `save` needs beside their vectors. It is called
            while the block before it is embedded.
        save: (path, vectors fp32 [n, D], that) -> writes the part.
        what: is embedded, for the log.
    """
    numbers = work.share(parts, names, f"{what}: blocks")
    with distributed.together(), progress_bar(sum(sizes[n] for n in numbers), f"{what}: texts embedded") as progress:
        for number, (texts, labels) in work.ahead(read, numbers):
            vectors = embedder(texts, progress)
            parts.write(names[number], partial(_saved, save, vectors, labels))


def _saved(save: Callable[[Path, Tensor, Labels], object], vectors: Tensor, labels: Labels, path: Path) -> None:
    save(path, vectors, labels)


def stored(vectors: Tensor, dtype: str) -> np.ndarray:
    """Vectors as they are kept. Raises UserError for those that float16 cannot hold."""
    with np.errstate(over="ignore"):  # told below
        rows = vectors.numpy().astype(dtype, copy=False)
    if not np.isfinite(rows).all():
        raise UserError(f"dtype={dtype}: the model's vectors are too long for it; use dtype=float32")
    return rows


def join_rows(path: Path, pieces: Iterable[Path], shape: tuple[int, int], dtype: str) -> None:
    """Write a .npy file out of files of plain rows."""
    with open(path, "wb") as target:
        array_header(target, np.dtype(dtype), shape)
        for piece in pieces:
            with open(piece, "rb") as rows:
                shutil.copyfileobj(rows, target, 1 << 20)
