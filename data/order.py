"""Which record comes when: arithmetic on (seed, step), with nothing to save, replay or exchange between ranks.

A source has records 0 .. N-1. They are dealt to L lanes as contiguous ranges that never change. A lane is an endless
sequence: its epoch e is a permutation of its records, and position p lies in epoch p // n. A batch takes m = B / L
records from every lane; which source they come from is a schedule that repeats its shares every period.
The world size enters nowhere but in the choice of the lanes that a rank reads. docs/data-order.md has the promises.

Random numbers are the raw output of numpy's Philox, a counter-based generator whose output numpy guarantees, sorted
to make permutations: numpy may change what Generator.permutation returns from one version to the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from data.errors import UserError

STATE_VERSION = 1
# Shares are multiples of 1 / PERIOD: the weights of a mixture are met to a tenth of a percent.
PERIOD = 1000
# A record id is source number << ROW_BITS | record number.
ROW_BITS = 40

# What random numbers are for; part of the counter, so that no two uses ever share a number.
_RECORDS, _SUBSTITUTES, _SCHEDULE = range(3)


@dataclass(frozen=True, eq=False)
class OrderSource:
    """What the order must know of a source.

    Attributes:
        name: it keys the source's random numbers, so adding another source changes no permutation of this one.
        starts: int64 [blocks + 1], the first record of every block, then the number of records.
        weight: any non-negative number; only the ratios between sources matter.
        fingerprint: changes when the records or their numbering change.
        flags: what else is done with its records, as plain data: it changes no order, but may not change in a run.
    """

    name: str
    starts: NDArray[np.int64]
    weight: float
    fingerprint: str
    flags: Mapping[str, Any] = field(default_factory=dict)

    @property
    def records(self) -> int:
        """Number of records."""
        return int(self.starts[-1])

    @cached_property
    def key(self) -> int:
        """The source's part of the random key."""
        return xxhash.xxh3_64_intdigest(self.name.encode())


@dataclass(frozen=True, eq=False)
class _Epoch:
    """One epoch of one lane: pieces of blocks in the order they come, and the first position of every window."""

    starts: NDArray[np.int64]
    stops: NDArray[np.int64]
    window_pieces: NDArray[np.int64]  # [windows + 1] the first piece of every window
    window_starts: NDArray[np.int64]  # [windows + 1] the first position of every window


@dataclass(frozen=True, eq=False)
class Order:
    """The order of all records for ever.

    Args:
        sources: in an order that the caller keeps fixed (a mixture sorts them by name).
        batch_size: records of a global batch, B; a multiple of `lanes`.
        lanes: L; every world size that divides it gives the same global batches.
        seed: 0 or more.
        homogeneous: one source a batch; otherwise each of the m slots of a lane has a source, the same in all lanes.
        shuffle_blocks: blocks whose records are mixed with each other; more mixes better and reads more at once.

    Raises:
        UserError: the numbers do not fit, with the values and what would fit.
    """

    sources: tuple[OrderSource, ...]
    batch_size: int
    lanes: int = 64
    seed: int = 0
    homogeneous: bool = True
    shuffle_blocks: int = 4

    def __post_init__(self) -> None:
        _check_numbers(self)
        _check_sources(self.sources, self.lanes)

    @property
    def per_lane(self) -> int:
        """m, the records that a batch takes from every lane."""
        return self.batch_size // self.lanes

    @property
    def period(self) -> int:
        """Units (steps when homogeneous, slots otherwise) after which the schedule has given every source its share."""
        return max(PERIOD, 10 * len(self.sources))

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Units of every period that each source gets."""
        return apportion([source.weight for source in self.sources], self.period)

    @property
    def shares(self) -> dict[str, float]:
        """The effective weights: the share of the records that comes from each source."""
        return {s.name: count / self.period for s, count in zip(self.sources, self.counts, strict=True)}

    def epochs(self, step: int) -> dict[str, float]:
        """How many times the steps before `step` have been through each source."""
        unit, per_unit = (step, self.batch_size) if self.homogeneous else (step * self.per_lane, self.lanes)
        return {s.name: self.count_before(n, unit) * per_unit / s.records for n, s in enumerate(self.sources)}

    def check_world(self, world: int) -> None:
        """Raise UserError when the lanes cannot be dealt evenly to `world` ranks."""
        if self.lanes % world:
            raise UserError(
                f"lanes={self.lanes}: not divisible by the world size {world}; use "
                f"{_around(self.lanes, world, 'lanes')}, or a world size out of "
                f"{', '.join(map(str, _divisors(self.lanes)))}"
            )

    # The schedule of sources

    def count_before(self, source: int, unit: int) -> int:
        """Units before `unit` that belong to a source, in time that does not grow with `unit`."""
        period, inside = divmod(unit, self.period)
        return period * self.counts[source] + int(np.count_nonzero(self._schedule(period)[:inside] == source))

    def slots(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source [m] and the position in its lane [m] of each slot of a batch: the same for all lanes."""
        m = self.per_lane
        if not self.homogeneous:
            return self._units(step * m, m)
        source, earlier = self._units(step, 1)
        return np.repeat(source, m), earlier * m + np.arange(m)

    def _units(self, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The sources of units first .. first + count - 1, and how many units of the same source came before each."""
        start = first // self.period
        stop = -(-(first + count) // self.period)
        offset = first - start * self.period
        sources = np.concatenate([self._schedule(p) for p in range(start, stop)])[offset : offset + count]
        earlier = np.empty(count, np.int64)
        for source in np.unique(sources):
            mine = np.flatnonzero(sources == source)
            earlier[mine] = self.count_before(int(source), first) + np.arange(len(mine))
        return sources, earlier

    @cached_property
    def _schedule(self) -> Any:
        """The source of every unit of a period, int64 [period]; a step needs at most a few periods."""
        return lru_cache(maxsize=8)(self._make_schedule)

    def _make_schedule(self, period: int) -> NDArray[np.int64]:
        """Unit k of a source's c is due at (k + phase) / c of the period; units come in the order they are due."""
        due, owner = [], []
        for number, (source, count) in enumerate(zip(self.sources, self.counts, strict=True)):
            phase = int(_draws(self.seed, source.key, 0, period, 0, _SCHEDULE, 1)[0] >> np.uint64(11)) * 2.0**-53
            due.append((np.arange(count) + phase) / max(count, 1))
            owner.append(np.full(count, number, np.int64))
        return np.concatenate(owner)[np.argsort(np.concatenate(due), kind="stable")]

    # The records of a batch

    def global_batch(self, step: int) -> NDArray[np.int64]:
        """Record ids [B] of a step in the canonical order: lane by lane, slot by slot."""
        return self.rank_batch(step, 0, 1)

    def rank_batch(self, step: int, rank: int, world: int) -> NDArray[np.int64]:
        """Record ids [B / world] that a rank reads: rows rank, rank + world, ... of the global batch as [lanes, m]."""
        sources, positions = self.slots(step)
        ids = np.empty((self.lanes // world, self.per_lane), np.int64)
        for source in np.unique(sources):
            slots = np.flatnonzero(sources == source)
            first = int(positions[slots[0]])
            for row, lane in enumerate(range(rank, self.lanes, world)):
                records = self.lane_records(int(source), lane, first, len(slots))
                ids[row, slots] = records | (int(source) << ROW_BITS)
        return ids.reshape(-1)

    def rank_epochs(self, step: int, rank: int, world: int) -> NDArray[np.int64]:
        """For each record of `rank_batch`, how many times its lane has been through its records before: [B / world]."""
        sources, positions = self.slots(step)
        lanes = np.arange(rank, self.lanes, world)[:, None]
        records = np.array([source.records for source in self.sources])[sources]
        return (positions // ((lanes + 1) * records // self.lanes - lanes * records // self.lanes)).reshape(-1)

    def lane_range(self, source: int, lane: int) -> tuple[int, int]:
        """The records [start, stop) of a source that a lane has."""
        records = self.sources[source].records
        return lane * records // self.lanes, (lane + 1) * records // self.lanes

    def lane_records(self, source: int, lane: int, position: int, count: int) -> NDArray[np.int64]:
        """The records [count] at consecutive positions of a lane, from any position at the same cost."""
        start, stop = self.lane_range(source, lane)
        parts = []
        while count:
            epoch, offset = divmod(position, stop - start)
            starts = self._epoch(source, lane, epoch).window_starts
            window = int(np.searchsorted(starts, offset, side="right")) - 1
            inside = offset - int(starts[window])
            part = self._window(source, lane, epoch, window)[inside : inside + count]
            parts.append(part)
            position += len(part)
            count -= len(part)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def substitutes(self, source: int, lane: int, position: int, limit: int) -> Iterator[tuple[int, int, int]]:
        """Where to look for another record when the one at a position of a lane cannot be read.

        At most `limit` pieces of blocks of the lane in random order, then, because a whole lane may lie in one damaged
        shard, at most `limit` blocks of the source: (first record, one past the last, a random number to choose by).
        """
        starts = self.sources[source].starts
        for stage, edges in enumerate((self._edges(source, lane), starts)):
            key, size = self.sources[source].key, len(edges) - 1
            places = np.argsort(_draws(self.seed, key, 2 * stage, position, lane, _SUBSTITUTES, size), kind="stable")
            choices = _draws(self.seed, key, 2 * stage + 1, position, lane, _SUBSTITUTES, size)
            for place in places[:limit]:
                yield int(edges[place]), int(edges[place + 1]), int(choices[place])

    def _edges(self, source: int, lane: int) -> NDArray[np.int64]:
        """Where the pieces of blocks that lie in a lane begin, then where the last one ends."""
        start, stop = self.lane_range(source, lane)
        blocks = self.sources[source].starts
        inner = blocks[np.searchsorted(blocks, start, side="right") : np.searchsorted(blocks, stop)]
        return np.concatenate([[start], inner, [stop]]).astype(np.int64)

    # Permutations are kept for this epoch and the next of every lane: 8 bytes a record of the open windows.

    @cached_property
    def _epoch(self) -> Any:
        return lru_cache(maxsize=2 * self.lanes * len(self.sources))(self._make_epoch)

    @cached_property
    def _window(self) -> Any:
        return lru_cache(maxsize=2 * self.lanes * len(self.sources))(self._make_window)

    def _make_epoch(self, source: int, lane: int, epoch: int) -> _Epoch:
        """Shuffle the pieces of a lane and group them into windows as even as can be."""
        edges = self._edges(source, lane)
        order = self._permutation(source, lane, epoch, 0, len(edges) - 1)
        starts, stops = edges[order], edges[order + 1]
        windows = -(-len(order) // self.shuffle_blocks)
        window_pieces = np.arange(windows + 1) * len(order) // windows
        positions = np.concatenate([[0], np.cumsum(stops - starts)])
        return _Epoch(starts, stops, window_pieces, positions[window_pieces])

    def _make_window(self, source: int, lane: int, epoch: int, window: int) -> NDArray[np.int64]:
        """The records of a window in the order they come."""
        plan = self._epoch(source, lane, epoch)
        pieces = slice(plan.window_pieces[window], plan.window_pieces[window + 1])
        spans = zip(plan.starts[pieces], plan.stops[pieces], strict=True)
        records = np.concatenate([np.arange(start, stop) for start, stop in spans])
        return records[self._permutation(source, lane, epoch, 1 + window, len(records))]

    def _permutation(self, source: int, lane: int, epoch: int, purpose: int, size: int) -> NDArray[np.int64]:
        draws = _draws(self.seed, self.sources[source].key, purpose, epoch, lane, _RECORDS, size)
        return np.argsort(draws, kind="stable")

    # What a checkpoint keeps

    def state(self) -> dict[str, Any]:
        """Everything that decides the order, as JSON. The position in it is the step; the world size is not in it."""
        return {
            "version": STATE_VERSION,
            "seed": self.seed,
            "lanes": self.lanes,
            "batch_size": self.batch_size,
            "homogeneous": self.homogeneous,
            "shuffle_blocks": self.shuffle_blocks,
            "period": self.period,
            "sources": {
                source.name: {
                    "records": source.records,
                    "share": count,
                    "fingerprint": _fingerprint(source),
                    **source.flags,
                }
                for source, count in zip(self.sources, self.counts, strict=True)
            },
        }

    def check(self, saved: Mapping[str, Any]) -> None:
        """Raise UserError naming every difference between a saved state and this order."""
        changes = differences(saved, self.state())
        if changes:
            raise UserError(
                f"the order of data is not the one of the checkpoint: {'; '.join(changes)}; restore what changed, or "
                "start again with fresh=true"
            )


def batch_number(step: int, passed_over: Iterable[tuple[int, int]]) -> int:
    """The number of the global batch that a step takes in a run that passes over ranges of batches, [first, stop).

    Step n takes the n-th, counted from 0, of the batches that lie in no range; ranges may touch and overlap.
    """
    number, end = step, 0
    for first, stop in sorted(passed_over):
        start, end = max(first, end), max(stop, end)
        if number >= start:
            number += end - start
    return number


def apportion(weights: Sequence[float], total: int) -> tuple[int, ...]:
    """Integers that add up to `total` in proportion to the weights, by largest remainder; at least 1 for a weight > 0.

    Ties go to the earlier weight. `total` must be at least the number of weights above 0.
    """
    whole = sum(weights)
    quotas = [weight / whole * total for weight in weights]
    counts = [max(int(quota), 1) if quota > 0 else 0 for quota in quotas]
    used = [n for n, quota in enumerate(quotas) if quota > 0]
    while sum(counts) < total:
        counts[max(used, key=lambda n: quotas[n] - counts[n])] += 1
    while sum(counts) > total:
        counts[min((n for n in used if counts[n] > 1), key=lambda n: quotas[n] - counts[n])] -= 1
    return tuple(counts)


def _draws(seed: int, key: int, a: int, b: int, lane: int, use: int, size: int) -> NDArray[np.uint64]:
    """`size` random numbers of a stream of their own for every combination of the other arguments."""
    counter = np.array([0, a, b, lane | use << 32], np.uint64)
    return np.random.Philox(key=np.array([seed, key], np.uint64), counter=counter).random_raw(size)


def _fingerprint(source: OrderSource) -> str:
    """The content of a source and its division into blocks: both decide the order."""
    return xxhash.xxh3_64_hexdigest(source.fingerprint.encode() + source.starts.astype("<i8").tobytes())


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Each differing entry of two nested mappings as "name old -> new"."""
    changes = []
    for name in [*new, *(name for name in old if name not in new)]:
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changes += differences(before, after, f"{prefix}{name}.")
        elif before != after:
            changes.append(f"{prefix}{name} {_shown(before)} -> {_shown(after)}")
    return changes


def _shown(value: object) -> str:
    if isinstance(value, Mapping):
        return f"{value.get('records')} records"
    return "absent" if value is None else str(value)


def _check_numbers(order: Order) -> None:
    if order.lanes < 1 or order.batch_size < 1 or order.shuffle_blocks < 1 or not 0 <= order.seed < 1 << 64:
        raise UserError(
            f"batch_size={order.batch_size}, lanes={order.lanes}, shuffle_blocks={order.shuffle_blocks} must be at "
            f"least 1, seed={order.seed} at least 0"
        )
    if order.batch_size % order.lanes:
        raise UserError(
            f"batch_size={order.batch_size}: not divisible by lanes={order.lanes}; "
            f"use {_around(order.batch_size, order.lanes, 'batch_size')}, or other lanes"
        )


def _check_sources(sources: Sequence[OrderSource], lanes: int) -> None:
    if not any(source.weight > 0 for source in sources):
        raise UserError("data: no source has a weight above 0, so there is nothing to read; give one a weight")
    for source in sources:
        if not 0 <= source.weight < float("inf"):
            raise UserError(f"source {source.name}: weight={source.weight} is no number of 0 or more; change it")
        if source.weight > 0 and not source.records:
            raise UserError(f"source {source.name}: it has no records; leave it out, or look for its shards elsewhere")
        if source.weight > 0 and source.records < lanes:
            raise UserError(
                f"source {source.name}: {source.records} records are fewer than lanes={lanes}, and every lane needs "
                f"one; use lanes={source.records} or less, add records, or leave the source out"
            )


def _around(value: int, divisor: int, name: str) -> str:
    """The multiples of `divisor` next to `value`, as text."""
    below, above = value // divisor * divisor, -(-value // divisor) * divisor
    return " or ".join(f"{name}={multiple}" for multiple in (below, above) if multiple)


def _divisors(value: int) -> list[int]:
    return [n for n in range(1, value + 1) if value % n == 0]
