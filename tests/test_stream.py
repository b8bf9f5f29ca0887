"""Batches of ranks: against shards read record by record, with threads, and with damaged shards."""

from __future__ import annotations

import itertools
import logging
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tiny
from pairs import pairs, write_shards

from data import mixture
from data.collate import Batch, Collate
from data.errors import DataError, UserError
from data.mixture import Mixture
from data.order import ROW_BITS, Order
from data.reading import Block, read_block
from data.records import Record, text_hash
from data.rules import Prompts
from data.shards import ShardWriter, write_index
from data.stream import Cache, Stream
from data.tokens import TextEncoder, fingerprint

LENGTH = 24


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.wordpiece()


def write_tokenised(folder: Path, records: list[Record], source: str, tokenizer: Any, stored_by: str = "") -> None:
    encoder = TextEncoder(tokenizer, LENGTH)
    with ShardWriter(folder, source, block_records=8, token_dtype="uint16") as writer:
        for record in records:
            query, passage, *negatives = encoder.body([record.query, record.passage, *record.negatives]).lists()
            writer.write(record, (query, passage, negatives))
    write_index(folder, writer.close(), {"fingerprint": stored_by or fingerprint(tokenizer)})


@pytest.fixture
def sources(tmp_path: Path, tokenizer: Any) -> dict[str, list[Record]]:
    """Three sources of all kinds under tmp_path, of several shards each; their records by name."""
    found = {name: pairs(count, source=name, seed=count, negatives=2) for name, count in SIZES.items()}
    write_shards(tmp_path / "arrow", found["arrow"], source="arrow", shard_bytes=10_240)
    write_shards(tmp_path / "plain", found["plain"], source="plain", kind="plain", shard_bytes=30_720)
    write_tokenised(tmp_path / "tokens", found["tokens"], "tokens", tokenizer)
    return found


SIZES = {"arrow": 100, "plain": 61, "tokens": 37}


def load(tmp_path: Path, names: list[str], homogeneous: bool = True, policy: Any = "strict") -> Mixture:
    return mixture.load([str(tmp_path / name) for name in names], homogeneous=homogeneous, policy=policy)


def stream(found: Mixture, tokenizer: Any, negatives: int = 0, order: Order | None = None, **options: Any) -> Stream:
    collate = Collate(tokenizer, LENGTH, Prompts(), negatives)
    return Stream(found, order or found.order(16, lanes=8, seed=3), collate, **options)


def take(batches: Any, count: int) -> list[Batch]:
    """The first `count` batches of `Stream.batches`, whose steps must follow each other."""
    pairs = list(itertools.islice(batches, count))
    batches.close()
    assert [step for step, _ in pairs] == list(range(pairs[0][0], pairs[0][0] + count))
    return [batch for _, batch in pairs]


def content(batch: Batch) -> dict[str, Any]:
    values = {name: value.tolist() for name, value in vars(batch).items() if isinstance(value, np.ndarray)}
    return values | {"tokens": batch.tokens.lists(), "source": batch.source, "bad": batch.bad}


# What is in a batch


@pytest.mark.parametrize("homogeneous", [True, False])
@pytest.mark.parametrize("negatives", [0, 2])
def test_batches_hold_the_records_of_the_order(
    tmp_path: Path, sources: dict[str, list[Record]], tokenizer: Any, homogeneous: bool, negatives: int
) -> None:
    found = load(tmp_path, [*sources], homogeneous)
    order = found.order(16, lanes=8, seed=3)
    names = sorted(sources)
    for step, batch in enumerate(take(stream(found, tokenizer, negatives, order).batches(), 12)):
        assert batch.record_ids.tolist() == order.global_batch(step).tolist()
        records = [sources[names[i >> ROW_BITS]][i & ((1 << ROW_BITS) - 1)] for i in batch.record_ids.tolist()]
        texts = ["query: " + r.query for r in records] + ["passage: " + r.passage for r in records]
        hard = [text for r in records for text in r.negatives[:negatives]]
        texts += ["passage: " + text for text in hard]
        rows = [tokenizer(text, truncation=True, max_length=LENGTH)["input_ids"] for text in texts]
        assert batch.tokens.lists() == rows
        assert batch.query_hash.tolist() == [text_hash(r.query) for r in records]
        assert batch.passage_hash.tolist() == [text_hash(text) for text in [*(r.passage for r in records), *hard]]
        used = {r.source for r in records}
        assert batch.source == (used.pop() if len(used) == 1 else "")


@pytest.mark.parametrize("homogeneous", [True, False])
def test_the_ranks_of_any_world_make_up_the_batch_of_one(
    tmp_path: Path, sources: dict[str, list[Record]], tokenizer: Any, homogeneous: bool
) -> None:
    found = load(tmp_path, [*sources], homogeneous)
    alone = stream(found, tokenizer)
    for world in (2, 4, 8):
        ranks = [stream(found, tokenizer, rank=rank, world=world) for rank in range(world)]
        for step in (0, 1, 500):
            whole, parts = alone.batch(step), [one.batch(step) for one in ranks]
            order = np.stack([np.arange(16).reshape(8, 2)[rank::world] for rank in range(world)]).reshape(-1)
            for name in ("record_ids", "query_hash", "passage_hash"):
                joined = np.concatenate([getattr(part, name) for part in parts])
                assert joined.tolist() == getattr(whole, name)[order].tolist()
            queries = [row for part in parts for row in part.tokens.lists()[: part.num_queries]]
            assert queries == [whole.tokens.lists()[row] for row in order]


def test_stored_tokens_are_used_and_no_text_is_tokenised(
    tmp_path: Path, sources: dict[str, list[Record]], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = stream(load(tmp_path, ["tokens"]), tokenizer, 2)
    monkeypatch.setattr(TextEncoder, "encode", None)
    assert len(opened.batch(0).tokens) == 16 * 4


@pytest.mark.parametrize("stored_by", ["", "another"])
def test_tokens_that_do_not_fit_are_left_with_one_warning_and_change_nothing(
    tmp_path: Path, tokenizer: Any, stored_by: str, caplog: pytest.LogCaptureFixture
) -> None:
    records = pairs(40, source="t")
    wrong = tokenizer if stored_by else tiny.unigram()
    write_tokenised(tmp_path / "wrong", records, "t", wrong, stored_by or fingerprint(tokenizer))
    write_shards(tmp_path / "texts", records, source="t")
    expected = stream(load(tmp_path, ["texts"]), tokenizer)
    with caplog.at_level(logging.WARNING, "quintet"):
        opened = stream(load(tmp_path, ["wrong"]), tokenizer)
        batches = take(opened.batches(), 3)
    assert [message for message in caplog.messages if "its stored tokens are not used" in message] == caplog.messages
    assert len(caplog.messages) == 1
    # Other shards, so another fingerprint of the source, but the same records: the same order
    assert [content(batch) for batch in batches] == [content(expected.batch(step)) for step in range(3)]


def test_the_mixture_decides_for_its_source(tmp_path: Path, tokenizer: Any) -> None:
    write_shards(tmp_path / "a", pairs(40, source="a"), source="a")
    (tmp_path / "mix.yaml").write_text("sources: {a: {shards: a, symmetric: true}}")
    batch = stream(mixture.load(str(tmp_path / "mix.yaml")), tokenizer).batch(0)
    prefix = tokenizer("query:")["input_ids"][:-1]
    assert all(row[: len(prefix)] == prefix for row in batch.tokens.lists())


def test_too_few_negatives_are_told_with_shard_and_record(tmp_path: Path, tokenizer: Any) -> None:
    records = pairs(39, source="a", negatives=2)
    records.insert(21, Record("q", "p", negatives=("one",)))
    write_shards(tmp_path / "a", records, source="a", kind="plain", shard_bytes=10_240)
    found = load(tmp_path, ["a"])
    shard = next(n for n in range(9) if sum(s.records for s in found.sources[0].index.shards[: n + 1]) > 21)
    opened = stream(found, tokenizer, 2)
    with pytest.raises(UserError) as error:
        take(opened.batches(), 5)
    first = sum(s.records for s in found.sources[0].index.shards[:shard])
    assert f"record 21 of source a ({tmp_path}/a/a-{shard:06d}.tar, record {21 - first} in it)" in str(error.value)


@pytest.mark.parametrize("homogeneous", [True, False])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_record_shows_other_negatives_every_time_it_comes(
    tmp_path: Path, tokenizer: Any, homogeneous: bool, world: int
) -> None:
    """Its n-th time it has the n-th slice of its list, wherever its lane stands and whoever reads it."""
    records = {name: pairs(count, source=name, seed=count, negatives=5) for name, count in (("a", 37), ("b", 22))}
    for name in records:
        write_shards(tmp_path / name, records[name], source=name)
    found = load(tmp_path, ["a", "b"], homogeneous)
    order = found.order(16, lanes=8, seed=3)
    ranks = [stream(found, tokenizer, 2, order, rank=rank, world=world) for rank in range(world)]
    times: Counter[int] = Counter()
    for step in range(14):
        for one in ranks:
            batch = one.batch(step)
            hard = batch.group_hash[:, 1:].tolist()
            for record, taken in zip(batch.record_ids.tolist(), hard, strict=True):
                texts = records["ab"[record >> ROW_BITS]][record & ((1 << ROW_BITS) - 1)].negatives
                start = 2 * times[record]
                assert taken == [text_hash(texts[(start + n) % 5]) for n in range(2)]
                times[record] += 1
    assert max(times.values()) > 2


def test_a_substitute_takes_the_turn_of_the_place_it_stands_in(tmp_path: Path, tokenizer: Any) -> None:
    records = pairs(96, source="a", negatives=5)
    write_shards(tmp_path / "a", records, source="a")
    found = load(tmp_path, ["a"], policy="skip")
    path, offset = place(found, 40)
    flip(path, offset + 700)
    order = found.order(16, lanes=8, seed=3)
    opened = stream(found, tokenizer, 2, order, policy="skip")
    for step, epoch in ((3, 0), (9, 1), (15, 2)):
        batch = opened.batch(step)
        for record, taken in zip(batch.record_ids.tolist(), batch.group_hash[:, 1:].tolist(), strict=True):
            assert taken == [text_hash(records[record].negatives[(2 * epoch + n) % 5]) for n in range(2)]


def test_three_shards_on_eight_ranks_give_equal_steps(tmp_path: Path, tokenizer: Any) -> None:
    write_shards(tmp_path / "a", pairs(50, source="a"), source="a", kind="plain", shard_bytes=20_000)
    found = load(tmp_path, ["a"])
    assert len(found.sources[0].index.shards) == 3
    for rank in range(8):
        batches = take(stream(found, tokenizer, rank=rank, world=8).batches(), 30)
        assert {(batch.num_queries, len(batch.tokens)) for batch in batches} == {(2, 4)}


def test_a_world_that_does_not_fit_is_refused(tmp_path: Path, sources: Any, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="not divisible by the world size 3"):
        stream(load(tmp_path, ["arrow"]), tokenizer, world=3)


# Reading ahead


def test_threads_and_caches_change_no_batch(tmp_path: Path, sources: Any, tokenizer: Any) -> None:
    found = load(tmp_path, [*sources], homogeneous=False)
    plain = stream(found, tokenizer, 2, read_ahead=0)
    expected = [content(plain.batch(step)) for step in range(20)]
    for options in (
        {"read_ahead": 0},
        {"read_ahead": 1, "workers": 1},
        {"read_ahead": 7, "workers": 5},
        {"read_ahead": 3, "workers": 4, "max_cache_bytes": 1},
    ):
        batches = take(stream(found, tokenizer, 2, **options).batches(), 20)
        assert [content(batch) for batch in batches] == expected
        late = take(stream(found, tokenizer, 2, **options).batches(13), 7)
        assert [content(batch) for batch in late] == expected[13:]


def test_an_error_is_raised_at_its_own_step(tmp_path: Path, sources: Any, tokenizer: Any) -> None:
    found = load(tmp_path, ["arrow"])
    order = found.order(16, lanes=8, seed=3)
    # A block that the first batch does not need, and the first step that does
    later = next(n for n in range(0, 100, 8) if not any(n <= i < n + 8 for i in order.global_batch(0)))
    first = next(step for step in range(9) if any(later <= i < later + 8 for i in order.global_batch(step)))
    assert first > 0
    opened = stream(found, tokenizer, order=order, read_ahead=5, workers=3)
    path, offset = place(found, later)
    flip(path, offset + 700)
    batches = opened.batches()
    for step in range(first):
        assert next(batches)[0] == step
    with pytest.raises(DataError, match=path.name):
        next(batches)
    assert list(batches) == []


def test_closing_does_not_wait_for_a_read_that_hangs(
    tmp_path: Path, sources: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = stream(load(tmp_path, ["arrow"]), tokenizer, read_ahead=3, workers=1)
    batches = opened.batches()
    next(batches)
    hangs, go_on = threading.Event(), threading.Event()
    prepared = []

    def hang(step: int) -> Any:
        hangs.set()
        go_on.wait(60)
        prepared.append(step)
        return Batch, {}

    monkeypatch.setattr(opened, "_prepare", hang)
    for _ in range(3):
        next(batches)  # those were asked for before
    assert hangs.wait(60)
    batches.close()
    assert not go_on.is_set()
    go_on.set()
    for thread in threading.enumerate():
        if thread.name.startswith("quintet-read"):
            thread.join(60)
    assert len(prepared) == 1


# Damage


def place(found: Mixture, record: int) -> tuple[Path, int]:
    """The shard and the offset of the block of a record of the first source."""
    source = found.sources[0]
    number = int(np.searchsorted(source.starts, record, side="right")) - 1
    shard, block = source.blocks[number].tolist()
    return Path(source.index.path(shard)), source.index.shards[shard].blocks[block].offset


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0xFF
    path.write_bytes(content)


def epoch(found: Mixture, tokenizer: Any, world: int, steps: int, **options: Any) -> list[list[Batch]]:
    """The batches of every rank, under the policy `skip`."""
    ranks = [stream(found, tokenizer, rank=rank, world=world, policy="skip", **options) for rank in range(world)]
    return [take(one.batches(), steps) for one in ranks]


def test_damage_is_an_error_under_strict(tmp_path: Path, sources: Any, tokenizer: Any) -> None:
    found = load(tmp_path, ["arrow"])
    path, offset = place(found, 50)
    flip(path, offset + 700)
    with pytest.raises(DataError) as error:
        take(stream(found, tokenizer).batches(), 7)
    assert error.value.exit_code == 3
    assert f"{path}, offset {offset}" in str(error.value)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_skip_puts_records_of_the_same_lane_in_the_place_of_lost_ones(
    tmp_path: Path, tokenizer: Any, world: int, caplog: pytest.LogCaptureFixture
) -> None:
    write_shards(tmp_path / "a", pairs(96, source="a"), source="a")
    found = load(tmp_path, ["a"], policy="skip")
    order = found.order(16, lanes=8, seed=3)
    path, offset = place(found, 40)
    flip(path, offset + 700)
    lost = set(range(40, 48))
    ranks = epoch(found, tokenizer, world, 6)  # 96 records: one epoch
    assert sum((Counter(b.bad) for batches in ranks for b in batches), Counter()) == {"changed payload": 8}
    for step in range(6):
        due = [order.rank_batch(step, rank, world).tolist() for rank in range(world)]
        for rank, batches in enumerate(ranks):
            batch = batches[step]
            assert (batch.num_queries, len(batch.tokens), len(batch.query_hash)) == (
                16 // world,
                32 // world,
                16 // world,
            )
            for row, (wanted, read) in enumerate(zip(due[rank], batch.record_ids.tolist(), strict=True)):
                lane = rank + row // 2 * world
                start, stop = order.lane_range(0, lane)
                assert start <= read < stop
                assert (read == wanted) == (wanted not in lost)
                assert read not in lost
    # Lane 3 has records 36 to 47, so only one rank meets the damage.
    assert len(caplog.messages) == 1
    assert f"source a: 8 records lost: changed payload: {path}, offset {offset}" in caplog.messages[0]


def test_substitutes_do_not_depend_on_the_world_the_threads_or_the_past(tmp_path: Path, tokenizer: Any) -> None:
    write_shards(tmp_path / "a", pairs(96, source="a"), source="a")
    found = load(tmp_path, ["a"], policy="skip")
    path, offset = place(found, 40)
    flip(path, offset + 700)
    whole = [b.record_ids.reshape(8, 2) for b in epoch(found, tokenizer, 1, 12, read_ahead=0)[0]]
    for rank, batches in enumerate(epoch(found, tokenizer, 2, 12, workers=3)):
        for step, batch in enumerate(batches):
            assert batch.record_ids.tolist() == whole[step][rank::2].reshape(-1).tolist()
    late = stream(found, tokenizer, policy="skip").batch(11)
    assert late.record_ids.tolist() == whole[11].reshape(-1).tolist()


def test_a_bad_record_is_counted_the_first_time_it_comes(tmp_path: Path, tokenizer: Any) -> None:
    write_shards(tmp_path / "a", pairs(96, source="a"), source="a", kind="plain")
    found = load(tmp_path, ["a"], policy="skip")
    path, _ = place(found, 0)
    content = path.read_bytes()
    at = content.index(b"000000-00000030.json")
    flip(path, at + 2)
    ranks = epoch(found, tokenizer, 2, 30)  # five epochs
    assert sum((Counter(b.bad) for batches in ranks for b in batches), Counter()) == {"damaged header": 1}
    opened = stream(found, tokenizer, policy="skip")
    alone = [opened.batch(step).bad for step in range(30)]
    assert [sum((Counter(bad) for bad in alone[n : n + 6]), Counter()) for n in range(0, 30, 6)] == [
        {"damaged header": 1}
    ] * 5


@pytest.mark.parametrize("keep", [0, 1000, 4096])
def test_a_rank_whose_lanes_lie_in_a_lost_shard_goes_on(
    tmp_path: Path, tokenizer: Any, keep: int, caplog: pytest.LogCaptureFixture
) -> None:
    write_shards(tmp_path / "a", pairs(96, source="a"), source="a", kind="plain", shard_bytes=1 << 14)
    found = load(tmp_path, ["a"])
    path = Path(found.sources[0].index.path(0))
    path.write_bytes(path.read_bytes()[:keep])
    found = load(tmp_path, ["a"], policy="skip")
    first = found.sources[0].index.shards[0].records
    order = found.order(16, lanes=8, seed=3)
    assert order.lane_range(0, 0)[1] <= first
    ranks = [stream(found, tokenizer, rank=rank, world=8, policy="skip") for rank in range(8)]
    batches = [take(one.batches(), 6) for one in ranks]
    assert {(b.num_queries, len(b.tokens)) for all_steps in batches for b in all_steps} == {(2, 4)}
    bad = sum((Counter(b.bad) for all_steps in batches for b in all_steps), Counter())
    readable = sum(block.good for block in blocks(found, 0))
    assert bad.total() == first - readable > order.lane_range(0, 0)[1] / 2
    assert set(bad) <= {"empty file", "cut in a header", "cut in data", "cut at a member boundary", "lost behind a cut"}


def blocks(found: Mixture, shard: int) -> list[Block]:
    index = found.sources[0].index
    return [read_block(index, shard, n, policy="skip") for n in range(len(index.shards[shard].blocks))]


def test_a_source_with_nothing_readable_ends_the_run(tmp_path: Path, tokenizer: Any) -> None:
    write_shards(tmp_path / "a", pairs(40, source="a"), source="a")
    (tmp_path / "a" / "a-000000.tar").unlink()
    opened = stream(load(tmp_path, ["a"], policy="skip"), tokenizer, policy="skip")
    with pytest.raises(DataError, match="source a: nothing readable for lane 0"):
        opened.batch(0)


# The cache


def block(records: int) -> Block:
    return Block(pa.table({"x": pa.array(range(records), pa.int64())}), records, records)


def test_the_cache_stays_within_its_bytes_and_keeps_what_was_used_last() -> None:
    cache, reads = Cache(5 * 80), []

    def get(key: int) -> None:
        def read() -> Block:
            reads.append(key)
            return block(10)

        cache.get(key, read)

    for key in (0, 1, 2, 3, 4, 0, 5, 0, 6):
        get(key)
        assert cache.bytes <= 5 * 80
    assert reads == [0, 1, 2, 3, 4, 5, 6]
    get(1)
    assert reads[-1] == 1


def test_a_block_larger_than_the_cache_is_given_all_the_same() -> None:
    cache = Cache(8)
    assert cache.get("a", lambda: block(100)).good == 100
    assert cache.get("b", lambda: block(100)).good == 100
    assert cache.bytes == 800


def test_threads_that_want_one_block_read_it_once_and_share_its_error() -> None:
    cache, reads, outcomes = Cache(1 << 20), [], []
    started, go_on = threading.Event(), threading.Event()

    def read() -> Block:
        reads.append(1)
        started.set()
        assert go_on.wait(60)
        raise DataError("broken")

    def get() -> None:
        try:
            cache.get("a", read)
        except DataError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=get) for _ in range(4)]
    threads[0].start()
    assert started.wait(60)
    for thread in threads[1:]:
        thread.start()
    go_on.set()
    for thread in threads:
        thread.join(60)
    # Those that came after the error tried again; none waits for ever, none is told of a block that is not there.
    assert outcomes == ["broken"] * 4
    assert cache.get("a", lambda: block(1)).good == 1


def test_a_cache_too_small_for_the_open_blocks_is_told(
    tmp_path: Path, sources: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "quintet"):
        stream(load(tmp_path, ["arrow"]), tokenizer, max_cache_bytes=1000)
    assert "lower shuffle_blocks" in caplog.text
