"""The order of records: promises checked by brute force on small cases."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data.order
from data.errors import UserError
from data.order import ROW_BITS, Order, OrderSource, apportion


def source(name: str = "a", records: int = 100, block: int = 16, weight: float = 1.0) -> OrderSource:
    starts = np.array([*range(0, records, block), records])
    return OrderSource(name, starts, weight, f"{name} has {records}")


def rows(ids: np.ndarray) -> list[int]:
    return (ids & ((1 << ROW_BITS) - 1)).tolist()


ORDERS = st.builds(
    lambda extra, lanes, block, shuffle, seed, slots: Order(
        (source("a", lanes + extra, block),), lanes * slots, lanes, seed, shuffle_blocks=shuffle
    ),
    st.integers(0, 200),
    st.sampled_from([1, 2, 8, 24]),
    st.integers(1, 40),
    st.integers(1, 5),
    st.integers(0, 2**64 - 1),
    st.integers(1, 5),
)


@given(ORDERS, st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_lanes_share_out_the_records_and_every_epoch_has_each_once(order: Order, epoch: int) -> None:
    seen: list[int] = []
    sizes = set()
    for lane in range(order.lanes):
        start, stop = order.lane_range(0, lane)
        sizes.add(stop - start)
        seen += order.lane_records(0, lane, epoch * (stop - start), stop - start).tolist()
    assert sorted(seen) == list(range(order.sources[0].records))
    assert max(sizes) - min(sizes) <= 1


@given(ORDERS, st.integers(0, 40), st.data())
@settings(max_examples=60, deadline=None)
def test_any_piece_of_a_lane_equals_the_lane_read_one_record_at_a_time(
    order: Order, at: int, draw: st.DataObject
) -> None:
    lane = draw.draw(st.integers(0, order.lanes - 1))
    one_by_one = [order.lane_records(0, lane, at + n, 1).item() for n in range(30)]
    assert order.lane_records(0, lane, at, 30).tolist() == one_by_one


@pytest.mark.parametrize("homogeneous", [True, False])
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_ranks_of_any_world_read_the_lanes_of_the_same_global_batches_and_share_no_record(
    world: int, homogeneous: bool
) -> None:
    sources = source("a", 83, 7, 3.0), source("b", 65, 50, 1.0)
    order = Order(sources, 24, 8, seed=5, homogeneous=homogeneous)
    for step in (0, 1, 2, 57, 3001):
        canonical = order.global_batch(step).reshape(8, 3)
        parts = [order.rank_batch(step, rank, world) for rank in range(world)]
        for rank, part in enumerate(parts):
            assert part.tolist() == canonical[rank::world].reshape(-1).tolist()
        assert not any(set(a.tolist()) & set(b.tolist()) for n, a in enumerate(parts) for b in parts[:n])


def test_steps_go_through_the_source_once_an_epoch() -> None:
    order = Order((source(records=96),), 24, 8)
    for epoch in range(3):
        ids = np.concatenate([order.global_batch(epoch * 4 + step) for step in range(4)])
        assert sorted(rows(ids)) == list(range(96))


def test_lanes_of_uneven_length_stay_within_one_epoch_of_each_other() -> None:
    order = Order((source(records=85, block=9),), 16, 8)
    times = Counter(row for step in range(50) for row in rows(order.global_batch(step)))
    # 100 records of every lane of 10 or 11
    assert set(times.values()) <= {9, 10}
    assert len(times) == 85


def test_epochs_seeds_and_lanes_are_shuffled_independently() -> None:
    def lane(order: Order, lane: int, epoch: int) -> tuple[int, ...]:
        start, _ = order.lane_range(0, lane)
        return tuple((order.lane_records(0, lane, epoch * 50, 50) - start).tolist())

    orders = [Order((source(records=100, block=100),), 2, 2, seed) for seed in range(3)]
    seen = {lane(order, n, epoch) for order in orders for n in range(2) for epoch in range(5)}
    assert len(seen) == 30


def test_within_a_window_every_record_is_equally_likely_at_every_position() -> None:
    order = Order((source(records=5, block=2),), 1, 1, shuffle_blocks=3)
    table = np.zeros((5, 5))
    for epoch in range(2000):
        table[np.arange(5), order.lane_records(0, 0, epoch * 5, 5)] += 1
    expected = 400
    chi_squared = ((table - expected) ** 2 / expected).sum()
    assert chi_squared < 39.3  # 16 degrees of freedom, p = 0.001


def test_a_stretch_of_a_lane_touches_few_blocks() -> None:
    blocks, size, shuffle = 64, 10, 4
    order = Order((source(records=2 * blocks * size, block=size),), 2, 2, shuffle_blocks=shuffle)
    for start in range(0, blocks * size, 40):
        touched = set((order.lane_records(0, 1, start, 40) // size).tolist())
        assert len(touched) == shuffle


def test_another_source_changes_no_permutation() -> None:
    alone = Order((source("b"),), 8, 4)
    together = Order((source("a"), source("b")), 8, 4)
    assert alone.lane_records(0, 2, 17, 60).tolist() == together.lane_records(1, 2, 17, 60).tolist()


# The schedule of sources


MIX = (source("a", 100, 16, 5.0), source("b", 90, 16, 2.5), source("c", 80, 16, 0.001), source("off", 70, 16, 0.0))


@pytest.mark.parametrize("homogeneous", [True, False])
def test_sources_and_positions_equal_a_loop_that_counts(homogeneous: bool) -> None:
    order = Order(MIX, 12, 4, seed=3, homogeneous=homogeneous)
    used = [0] * len(MIX)  # records of each source that every lane has given
    units = [0] * len(MIX)
    unit = 0
    for step in range(900):
        sources, positions = order.slots(step)
        for slot, (number, position) in enumerate(zip(sources, positions, strict=True)):
            if slot == 0 or not homogeneous:
                assert [order.count_before(n, unit) for n in range(len(MIX))] == units
                units[number] += 1
                unit += 1
            assert position == used[number]
            used[number] += 1
        ids = order.global_batch(step).reshape(4, 3)
        assert (ids >> ROW_BITS == sources).all()
        assert len(set(sources)) == 1 or not homogeneous


def test_every_period_keeps_the_weights_and_no_source_waits_long() -> None:
    order = Order(MIX, 4, 4)
    drawn = np.array([order.slots(step)[0][0] for step in range(3 * order.period)])
    for period in drawn.reshape(3, -1):
        assert np.bincount(period, minlength=4).tolist() == list(order.counts)
    weights = np.array([s.weight for s in MIX]) / sum(s.weight for s in MIX)
    assert np.abs(np.array(list(order.shares.values())) - weights).max() <= 1 / order.period
    assert order.shares["c"] == 1 / order.period
    assert order.shares["off"] == 0
    for step in range(len(drawn)):
        counts = np.bincount(drawn[:step], minlength=4)
        assert np.abs(counts - step * np.array(list(order.shares.values()))).max() <= len(MIX)


def test_epochs_count_the_records_that_were_read() -> None:
    for homogeneous in (True, False):
        order = Order(MIX, 12, 4, homogeneous=homogeneous)
        read = Counter(int(i) >> ROW_BITS for step in range(700) for i in order.global_batch(step))
        expected = {s.name: read[n] / s.records for n, s in enumerate(MIX)}
        assert order.epochs(700) == pytest.approx(expected)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20), st.integers(20, 300))
@settings(max_examples=200, deadline=None)
def test_apportion_gives_whole_numbers_near_the_quotas(weights: list[float], total: int) -> None:
    counts = apportion(weights, total)
    quotas = np.array(weights) / sum(weights) * total
    assert sum(counts) == total
    assert min(counts) >= 1
    if quotas.min() >= 1:
        assert np.abs(np.array(counts) - quotas).max() < 1


def test_apportion_by_hand() -> None:
    assert apportion([1, 1, 1], 10) == (4, 3, 3)
    assert apportion([0, 1, 3], 8) == (0, 2, 6)
    assert apportion([1e-9, 1e-9, 1], 10) == (1, 1, 8)


# Restoring


def work_of_first_batch(order: Order, step: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    calls = []
    draws = data.order._draws

    def counted(*args: int) -> np.ndarray:
        calls.append(args[-1])
        return draws(*args)

    with monkeypatch.context() as patch:
        patch.setattr(data.order, "_draws", counted)
        order.global_batch(step)
    return len(calls), sum(calls)


@pytest.mark.parametrize("homogeneous", [True, False])
def test_the_first_batch_costs_the_same_at_any_step(homogeneous: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def fresh() -> Order:
        return Order((source("a", 6400, 50, 2.0), source("b", 6400, 50)), 64, 8, homogeneous=homogeneous)

    # The sources have the same size, so a step costs at most two windows and two epochs of every lane and source.
    work = {step: work_of_first_batch(fresh(), step, monkeypatch) for step in (0, 10, 1_000, 100_000, 10_000_000)}
    calls, numbers = zip(*work.values(), strict=True)
    assert max(calls) <= 2 * 2 * 2 * 8 + 2 * 2
    assert max(numbers) <= 2 * 2 * 8 * (16 + 200) + 4


def test_the_state_is_small_json_and_is_accepted_by_an_equal_order() -> None:
    order = Order(MIX, 12, 4, seed=3)
    state = json.loads(json.dumps(order.state()))
    assert len(json.dumps(state)) < 1000
    Order(MIX, 12, 4, seed=3).check(state)


def test_every_change_is_named_with_both_values() -> None:
    saved = Order((source("a"), source("b", 90), source("c")), 12, 4, seed=3).state()
    now = Order((source("a", weight=2.0), source("b", 91), source("d")), 16, 8, seed=4, shuffle_blocks=2)
    with pytest.raises(UserError) as error:
        now.check(saved)
    text = str(error.value)
    for change in (
        "seed 3 -> 4",
        "lanes 4 -> 8",
        "batch_size 12 -> 16",
        "shuffle_blocks 4 -> 2",
        "sources.a.share 334 -> 500",
        "sources.b.records 90 -> 91",
        "sources.b.fingerprint ",
        "sources.c 100 records -> absent",
        "sources.d absent -> 100 records",
        "fresh=true",
    ):
        assert change in text
    assert "homogeneous" not in text
    assert "sources.a.records" not in text


def test_another_division_into_blocks_is_another_order() -> None:
    with pytest.raises(UserError, match=r"sources\.a\.fingerprint"):
        Order((source(block=8),), 8, 4).check(Order((source(block=16),), 8, 4).state())


def test_an_empty_state_is_refused() -> None:
    with pytest.raises(UserError, match="seed absent -> 0"):
        Order((source(),), 8, 4).check({})


def test_numpy_gives_the_published_philox_numbers() -> None:
    # Random123's known answer for philox4x64-10 with key and counter 0; numpy counts up before each block.
    before_zero = np.full(4, 2**64 - 1, np.uint64)
    drawn = np.random.Philox(key=np.zeros(2, np.uint64), counter=before_zero).random_raw(4)
    known = ["16554d9eca36314c", "db20fe9d672d0fdc", "d7e772cee186176b", "7e68b68aec7ba23b"]
    assert [f"{n:016x}" for n in drawn] == known


# Substitutes


def test_substitutes_try_the_lane_first_and_then_the_whole_source() -> None:
    order = Order((source(records=103, block=10),), 4, 4)
    start, stop = order.lane_range(0, 1)
    places = [(a, b) for a, b, _ in order.substitutes(0, 1, 7, limit=64)]
    own = [place for place in places if start <= place[0] and place[1] <= stop]
    assert places[: len(own[:4])] == own[:4]
    covered = sorted(record for a, b in places[:4] for record in range(a, b))
    assert covered == list(range(start, stop))
    assert sorted(places[4:]) == [(n, min(n + 10, 103)) for n in range(0, 103, 10)]
    assert len(list(order.substitutes(0, 1, 7, limit=2))) == 4


# Refusals


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        ({"batch_size": 100, "lanes": 64}, ["batch_size=100", "lanes=64", "batch_size=64", "batch_size=128"]),
        ({"batch_size": 128, "lanes": 128}, ["source a", "100 records", "lanes=128", "lanes=100"]),
        ({"batch_size": 0, "lanes": 4}, ["batch_size=0"]),
        ({"batch_size": 4, "lanes": 4, "seed": -1}, ["seed=-1"]),
    ],
)
def test_numbers_that_do_not_fit_are_refused_with_what_fits(arguments: dict[str, int], texts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        Order((source(),), **arguments)
    assert all(text in str(error.value) for text in texts)


def test_a_world_that_does_not_divide_the_lanes_is_refused_with_what_fits() -> None:
    order = Order((source(),), 24, 12)
    order.check_world(6)
    with pytest.raises(UserError) as error:
        order.check_world(8)
    assert "lanes=8 or lanes=16" in str(error.value)
    assert "1, 2, 3, 4, 6, 12" in str(error.value)


@pytest.mark.parametrize(
    ("weight", "text"),
    [
        (0.0, "no source has a weight"),
        (-1.0, "weight"),
        (float("nan"), "weight"),
        (float("inf"), "is no number of 0 or more"),
    ],
)
def test_weights_that_choose_nothing_are_refused(weight: float, text: str) -> None:
    with pytest.raises(UserError, match=text):
        Order((source(weight=weight),), 4, 4)


def test_an_empty_source_is_refused() -> None:
    with pytest.raises(UserError, match="source a: it has no records"):
        Order((source(records=0),), 4, 4)
