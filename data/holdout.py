"""The evaluation split: records that share no text with the rest, however long the chain of shared texts.

Two records that share a query or a passage text (on either side) belong to one component, and so does whatever
shares a text with either of them. Components are held out whole. Nothing here knows texts, only their hashes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]


def mix(values: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """Scramble 64-bit values with a seed: a bijection for each seed (the finaliser of splitmix64, Steele 2014)."""
    with np.errstate(over="ignore"):
        state = values + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % (1 << 64))
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def components(query_hash: Ints, passage_hash: Ints) -> Ints:
    """int64 [n]: for each record, the smallest text hash of its connected component.

    Records are edges between texts. Every round hooks each component's root under the smallest root that it
    touches and then flattens the trees; hashes being random, some log n rounds are enough.
    """
    texts, nodes = np.unique(np.concatenate([query_hash, passage_hash]), return_inverse=True)
    left, right = nodes[: len(query_hash)], nodes[len(query_hash) :]
    parent = np.arange(len(texts))
    while True:
        roots = parent[left], parent[right]
        apart = roots[0] != roots[1]
        if not apart.any():
            break
        left, right = left[apart], right[apart]
        low, high = np.minimum(*roots)[apart], np.maximum(*roots)[apart]
        np.minimum.at(parent, high, low)
        parent = _flattened(parent)
    return texts[parent[nodes[: len(query_hash)]]]


def _flattened(parent: NDArray[np.intp]) -> NDArray[np.intp]:
    while not np.array_equal(parent, grandparent := parent[parent]):
        parent = grandparent
    return parent


def choose(component: Ints, stratum: NDArray[np.int32], *, fraction: float, maximum: int = 0, seed: int = 0) -> Flags:
    """Which records to hold out: whole components, in an order drawn from the seed, until each stratum has its share.

    The share of a stratum is `fraction` of its records, rounded, and at most `maximum` (0: no bound). A component
    with more than a tenth of the share of any of its strata (and more than four records of it) is never taken, so
    that no single text makes up the split. The choice does not depend on the order of the records.

    Args:
        component: [n], as `components` gives them.
        stratum: [n], small numbers from 0, such as those of (source, language).

    Returns:
        [n], true for records to hold out.
    """
    records = np.bincount(stratum)
    share = np.floor(fraction * records + 0.5).astype(np.int64)
    share = np.minimum(share, maximum) if maximum else share
    names, number = np.unique(component, return_inverse=True)
    rank = np.empty(len(names), np.int64)
    rank[np.argsort(mix(names.view(np.uint64), seed), kind="stable")] = np.arange(len(names))
    row_rank = rank[number]
    cells, counts = np.unique(row_rank * len(records) + stratum, return_counts=True)
    taken = _fill(cells // len(records), cells % len(records), counts, share, len(names))
    return taken[row_rank]


def _fill(rank: Ints, stratum: Ints, count: Ints, share: Ints, num_components: int) -> Flags:
    """Take components in rank order as long as they fit into every stratum they have records in.

    Args:
        rank, stratum, count: one cell for each stratum of each component, by rank.
        share: records wanted of each stratum.

    Returns:
        [num_components] by rank. Every round takes all components that fit behind those before them; the first
        of a round always fits, so it ends.
    """
    taken = np.zeros(num_components, np.bool_)
    left, largest = share.copy(), np.maximum(4, share // 10)
    while True:
        fits = _all_cells(count <= np.minimum(left, largest)[stratum], rank, num_components)[rank]
        rank, stratum, count = rank[fits], stratum[fits], count[fits]
        if not len(rank):
            return taken
        accepted = _all_cells(_running_total(stratum, count) <= left[stratum], rank, num_components)[rank]
        taken[rank[accepted]] = True
        left -= np.bincount(stratum[accepted], count[accepted], len(left)).astype(np.int64)
        rank, stratum, count = rank[~accepted], stratum[~accepted], count[~accepted]


def _all_cells(good: Flags, rank: Ints, num_components: int) -> Flags:
    """[num_components]: whether all cells of the component are good."""
    return np.bincount(rank[~good], minlength=num_components) == 0


def _running_total(stratum: Ints, count: Ints) -> Ints:
    """For each cell, the sum of the counts of its stratum up to and including it."""
    order = np.argsort(stratum, kind="stable")
    totals = np.cumsum(count[order])
    first = np.searchsorted(stratum[order], stratum[order], side="left")
    running = np.empty_like(totals)
    running[order] = totals - (totals[first] - count[order][first])
    return running
