"""Many 64-bit hashes looked up in a sorted array, most of which are not there."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
Ints = NDArray[np.int64]

_SLOTS_A_KEY = 16  # so that one in 16 of the hashes that are not there is searched for all the same
_MOST_SLOTS = 1 << 27


@dataclass(frozen=True, eq=False)
class Lookup:
    """Entries [e], each a hash and its owner; sorted by hash, and a hash may stand in several entries."""

    keys: Hashes
    owners: Ints

    @cached_property
    def _shift(self) -> np.uint64:
        slots = min(max(1 << 12, _SLOTS_A_KEY * len(self.keys)), _MOST_SLOTS)
        return np.uint64(64 - (slots - 1).bit_length())

    @cached_property
    def _filled(self) -> NDArray[np.bool_]:
        """Whether a hash with these first bits stands in any entry."""
        filled = np.zeros(1 << (64 - int(self._shift)), np.bool_)
        filled[self.keys >> self._shift] = True
        return filled

    def find(self, keys: Hashes) -> tuple[Ints, Ints]:
        """(places in `keys`, entries) of all that have the same hash."""
        places = np.flatnonzero(self._filled[keys >> self._shift])
        first = np.searchsorted(self.keys, keys[places], side="left")
        there = first < len(self.keys)
        there[there] = self.keys[first[there]] == keys[places[there]]
        places, first = places[there], first[there]
        counts = np.searchsorted(self.keys, keys[places], side="right") - first
        offsets = np.cumsum(counts) - counts
        entries = np.repeat(first - offsets, counts) + np.arange(counts.sum())
        return np.repeat(places, counts), entries


@dataclass(frozen=True, eq=False)
class Members:
    """Which owners each entry of a Lookup stands for: [m] entries, and [m] owners."""

    entries: Ints
    owners: Ints


def build(keys: Hashes, owners: Ints, groups: Ints) -> tuple[Lookup, Members]:
    """One entry for each hash and group of owners, under the smallest owner of them: what many share is found once."""
    order = np.lexsort((owners, groups, keys))
    keys, owners, groups = keys[order], owners[order], groups[order]
    first = np.ones(len(keys), np.bool_)
    first[1:] = (keys[1:] != keys[:-1]) | (groups[1:] != groups[:-1])
    return Lookup(keys[first], owners[first]), Members(np.cumsum(first) - 1, owners)
