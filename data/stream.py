"""The batches of a rank, one for every step for ever: what the order asks for, read, substituted and collated.

`batch(step)` depends on the step and on the bytes of the shards, on nothing that happened before. Threads read ahead
(Arrow, the tokenizer and numpy work outside of Python's lock) and hand their batches over in the order of the steps.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Generator, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data.collate import Batch, Collate, Part
from data.errors import DataError
from data.mixture import Mixture, Source
from data.order import ROW_BITS, Order, batch_number
from data.reading import Block, Policy, cause, read_block
from data.readthrough import bring_all, limit_bytes, origin

log = logging.getLogger("quintet")

MAX_CACHE_BYTES = 4 << 30
READ_AHEAD = 4
# Blocks of a lane, and after them blocks of its source, in which a readable substitute is looked for.
MAX_SUBSTITUTE_BLOCKS = 64


class Stream:
    """The batches of one rank.

    Args:
        mixture: the sources.
        order: made by `mixture.order`.
        collate: makes batches out of rows.
        rank, world: this rank reads the lanes rank, rank + world, ...
        policy: what happens to damaged data: `strict` raises DataError; `skip` puts another readable record of the
            same lane (or, when the whole lane is lost, of the source) in its place and counts it.
        workers: threads that prepare batches.
        read_ahead: batches that are prepared before they are asked for; 0 uses no thread.
        max_cache_bytes: limit of the blocks that are kept decoded; fewer are kept where fewer are open at a time.

    Raises:
        UserError: the lanes cannot be dealt to `world` ranks.
        DataError: the first block of a source is damaged, under `strict`.
    """

    def __init__(
        self,
        mixture: Mixture,
        order: Order,
        collate: Collate,
        *,
        rank: int = 0,
        world: int = 1,
        policy: Policy = "strict",
        workers: int = 1,
        read_ahead: int = READ_AHEAD,
        max_cache_bytes: int = MAX_CACHE_BYTES,
    ) -> None:
        order.check_world(world)
        self._order, self._collate = order, collate
        self._rank, self._world = rank, world
        self._workers, self._read_ahead = workers, read_ahead
        _check_room_on_disk(mixture, order, order.lanes // world)
        cache = Cache(_cache_bytes(mixture, order, order.lanes // world, max_cache_bytes))
        self._readers = [_Reader(source, policy, cache) for source in mixture.sources]
        self._stored = [reader.opens_stored(collate) for reader in self._readers]

    def batch(self, step: int) -> Batch:
        """The batch of a step; `bad` counts every record that was due in it and could not be read.

        Raises:
            DataError: damage under `strict`, or a source with nothing readable.
            UserError: a record has fewer negatives than asked for, or a score is missing and must not be.
        """
        return self._prepare(step)[0]

    def batches(
        self, start_step: int = 0, passed_over: Sequence[tuple[int, int]] = ()
    ) -> Generator[tuple[int, Batch], None, None]:
        """(step, batch) for every step from `start_step`, for ever; an error is raised at its own step.

        Step n takes batch n, or a later one where ranges of batches are passed over (`order.batch_number`).
        Here `bad` counts a bad record only the first time it comes. Closing the iterator stops the reading ahead.
        """
        known: set[int] = set()
        with closing(self._ahead(start_step, passed_over)) as ahead:
            for step, (batch, lost) in enumerate(ahead, start_step):
                fresh = {record: why for record, why in lost.items() if record not in known}
                known.update(fresh)
                yield step, replace(batch, bad=dict(Counter(fresh.values())))

    def _ahead(
        self, start_step: int, passed_over: Sequence[tuple[int, int]]
    ) -> Generator[tuple[Batch, dict[int, str]], None, None]:
        """What `_prepare` gives for every step, made by threads before it is asked for."""
        numbers = (batch_number(step, passed_over) for step in itertools.count(start_step))
        if not self._read_ahead:
            yield from map(self._prepare, numbers)
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="quintet-read")
        pending = deque(pool.submit(self._prepare, next(numbers)) for _ in range(self._read_ahead))
        try:
            while True:
                result = pending.popleft().result()
                pending.append(pool.submit(self._prepare, next(numbers)))
                yield result
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _prepare(self, step: int) -> tuple[Batch, dict[int, str]]:
        """The batch of this number, and the ids of the records it lost with the causes."""
        ids = self._order.rank_batch(step, self._rank, self._world)
        lost = self._substitute(step, ids)
        epochs = self._order.rank_epochs(step, self._rank, self._world)
        numbers = ids >> ROW_BITS
        used = np.unique(numbers)
        parts = [self._part(int(number), ids, epochs, np.flatnonzero(numbers == number)) for number in used]
        name = self._order.sources[int(used[0])].name if len(used) == 1 else ""
        return self._collate(parts, ids, name, dict(Counter(lost.values()))), lost

    def _part(self, number: int, ids: NDArray[np.int64], epochs: NDArray[np.int64], rows: NDArray[np.int64]) -> Part:
        """The records of one source that stand at `rows` of the batch."""
        reader, stored = self._readers[number], self._stored[number]
        source, records = reader.source, ids[rows] & ((1 << ROW_BITS) - 1)
        return Part(
            table=reader.take(records, self._collate.columns(stored)),
            rows=rows,
            stored=stored,
            locate=lambda row: source.locate(int(records[row])),
            symmetric=source.symmetric,
            instruction=source.instruction,
            in_batch_negatives=source.in_batch_negatives,
            scored=source.scores,
            epochs=epochs[rows],
        )

    def _substitute(self, step: int, ids: NDArray[np.int64]) -> dict[int, str]:
        """Replace, in place, the ids that cannot be read; returns those with the causes."""
        lost: dict[int, str] = {}
        per_lane = self._order.per_lane
        _, positions = self._order.slots(step)
        for row, why in self._unreadable(ids):
            lost[int(ids[row])] = why
            number = int(ids[row]) >> ROW_BITS
            lane = self._rank + row // per_lane * self._world
            ids[row] = number << ROW_BITS | self._substitute_for(number, lane, int(positions[row % per_lane]))
        return lost

    def _unreadable(self, ids: NDArray[np.int64]) -> list[tuple[int, str]]:
        """The rows of a batch whose records cannot be read, with the causes."""
        found = []
        numbers = ids >> ROW_BITS
        for number in np.unique(numbers):
            rows = np.flatnonzero(numbers == number)
            missing = self._readers[number].missing(ids[rows] & ((1 << ROW_BITS) - 1))
            found += [(int(rows[at]), why) for at, why in missing]
        return found

    def _substitute_for(self, number: int, lane: int, position: int) -> int:
        """A readable record for a position of a lane: always the same one."""
        reader = self._readers[number]
        for start, stop, draw in self._order.substitutes(number, lane, position, MAX_SUBSTITUTE_BLOCKS):
            readable = reader.readable(start, stop)
            if readable:
                return start + draw % readable
        raise DataError(
            f"source {reader.source.name}: nothing readable for lane {lane} within {MAX_SUBSTITUTE_BLOCKS} blocks; "
            "fetch its shards again, or leave the source out"
        )


class _Reader:
    """Rows of one source by record number."""

    def __init__(self, source: Source, policy: Policy, cache: Cache) -> None:
        self.source = source
        self._policy, self._cache = policy, cache
        self._reported: set[int] = set()

    def opens_stored(self, collate: Collate) -> bool:
        """Whether the stored tokens of the source are what its texts would give; warns when there are some that do not.

        A block is compared: the first one that can be read out of a few.
        """
        if self.source.index.tokenizer is None or not collate.takes_stored:
            return False
        blocks = (self._block(number) for number in range(min(8, len(self.source.blocks))))
        sample = next((block.table for block in blocks if block.good), None)
        if sample is None:
            return False
        misfit = collate.misfit(sample, self.source.index.tokenizer, self.source.instruction)
        if misfit:
            log.warning("source %s: its stored tokens are not used, %s; texts are tokenised", self.source.name, misfit)
        return not misfit

    def take(self, records: NDArray[np.int64], columns: list[str]) -> pa.Table:
        """The rows of the records, in their order."""
        order = np.argsort(records, kind="stable")
        numbers, rows = self._places(records[order])
        parts = [
            self._block(int(numbers[group[0]])).table.select(columns).take(pa.array(rows[group]))
            for group in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(numbers)) + 1)
        ]
        return pa.concat_tables(parts).take(pa.array(np.argsort(order)))

    def missing(self, records: NDArray[np.int64]) -> list[tuple[int, str]]:
        """(place in `records`, cause) of every record that cannot be read."""
        numbers, rows = self._places(records)
        used, inverse = np.unique(numbers, return_inverse=True)
        self._bring(used)
        blocks = [self._block(int(number)) for number in used]
        good = np.array([block.good for block in blocks])
        found = []
        for at in np.flatnonzero(rows >= good[inverse]).tolist():
            block = blocks[inverse[at]]
            # The n-th lost record of a block goes with its n-th problem, the rest with the last.
            nth = min(int(rows[at]) - block.good, len(block.problems) - 1)
            found.append((at, cause(block.problems[nth])))
        return found

    def _bring(self, blocks: NDArray[np.int64]) -> None:
        """Copy the shards of some blocks side by side, where they lie elsewhere and no block of theirs is kept."""
        index = self.source.index
        absent = [number for number in blocks.tolist() if (self.source.name, number) not in self._cache]
        shards = sorted({int(shard) for shard in self.source.blocks[absent, 0]})
        bring_all([(index.path(shard), index.shards[shard].bytes, index.shards[shard].sha256) for shard in shards])

    def readable(self, start: int, stop: int) -> int:
        """How many of the records start .. stop - 1, which lie in one block, can be read; those come first."""
        numbers, rows = self._places(np.array([start]))
        return max(0, min(self._block(int(numbers[0])).good - int(rows[0]), stop - start))

    def _places(self, records: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The block and the row in it of every record."""
        numbers = np.searchsorted(self.source.starts, records, side="right") - 1
        return numbers, records - self.source.starts[numbers]

    def _block(self, number: int) -> Block:
        return self._cache.get((self.source.name, number), lambda: self._read(number))

    def _read(self, number: int) -> Block:
        shard, block = self.source.blocks[number]
        read = read_block(self.source.index, int(shard), int(block), policy=self._policy)
        if read.problems and number not in self._reported:
            self._reported.add(number)
            more = f" (and {len(read.problems) - 1} more)" if len(read.problems) > 1 else ""
            lost = read.records - read.good
            log.warning("source %s: %d records lost: %s%s", self.source.name, lost, read.problems[0], more)
        return read


@dataclass
class _Entry:
    block: Future[Block]
    bytes: int = 0


class Cache:
    """The blocks used last, at most `max_bytes` of them; a block that two threads ask for is read once."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()

    def get(self, key: Hashable, read: Callable[[], Block]) -> Block:
        """The block of a key, read when it is not here; an error of `read` is raised to all who wait for it."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
            else:
                mine = self._entries[key] = _Entry(Future())
        if entry is not None:
            return entry.block.result()
        try:
            block = read()
        except BaseException as error:
            with self._lock:
                del self._entries[key]
            mine.block.set_exception(error)
            raise
        mine.block.set_result(block)
        self._admit(mine, block.table.nbytes)
        return block

    def __contains__(self, key: Hashable) -> bool:
        with self._lock:
            return key in self._entries

    def _admit(self, entry: _Entry, size: int) -> None:
        """Count a block that was read, and forget the longest unused ones; those being read are not counted yet."""
        with self._lock:
            entry.bytes = size
            self.bytes += size
            for key, old in list(self._entries.items()):
                if self.bytes <= self.max_bytes:
                    return
                if old is not entry and old.bytes:
                    del self._entries[key]
                    self.bytes -= old.bytes


def _cache_bytes(mixture: Mixture, order: Order, lanes: int, limit: int) -> int:
    """Room for the blocks that are open at a time, those of one window of every lane, and for half as many more.

    Says so when the limit is below that: blocks are then read again and again.
    """
    needed = 0
    for source in mixture.sources:
        blocks = [block.bytes for shard in source.index.shards for block in shard.blocks]
        needed += sum(blocks) * min(len(blocks), lanes * order.shuffle_blocks) // max(len(blocks), 1)
    if needed > limit:
        log.warning(
            "shuffle_blocks=%d: about %d MB of blocks are open at a time, more than the %d MB that are kept; reading "
            "slows down, lower shuffle_blocks",
            order.shuffle_blocks,
            needed >> 20,
            limit >> 20,
        )
    return min(needed * 3 // 2, limit)


def _check_room_on_disk(mixture: Mixture, order: Order, lanes: int) -> None:
    """Say so when the shards that are open at a time, two for each lane of this host, pass the limit of the cache."""
    limit = limit_bytes()
    if limit is None:
        return
    needed = 0
    for source in mixture.sources:
        sizes = [s.bytes for n, s in enumerate(source.index.shards) if origin(os.path.dirname(source.index.path(n)))]
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        needed += sum(sizes) * min(len(sizes), 2 * lanes * ranks) // max(len(sizes), 1)
    if needed > limit:
        what = "about %.3g GB of shards are open at a time, more than the %g GB that are kept"
        log.warning(f"QUINTET_CACHE_GB: {what}; they are copied again and again, raise it", needed / 1e9, limit / 1e9)
