"""The work of `quintet distill`: what a teacher says of the pairs of mined shards, into the score cache.

    scores/STOP                               ends workers that follow, once they have scored what is there
    scores/<fingerprint>/about.json           which teacher this is
                         claims/<shard>.json  who works on a shard (runfolder.Lease)
                         done/<shard>.json    the segments that hold all scores of a shard

Shards are named by their hash. Claims save work and nothing depends on them: the cache alone says what has been scored.
A worker scores the pairs of a window longest rows first, so what it leaves unscored when it is stopped or killed is cut
into the same batches by the next one, and gets the same scores.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import orjson
import torch
from torch import Tensor

from data import mixture
from data.errors import Stopped, UserError
from data.groups import Numbers, PairRows, windows
from data.index import Index
from data.parts import write_whole
from data.reading import Policy, read_block
from data.scores import Logits, ScoreCache, Scores, ScoreWriter
from trainer.attention import feed
from trainer.crossencoder import Teacher
from trainer.device import chunk_tokens
from trainer.embed import Rate, forwards, may_pack
from trainer.gradcache import plan
from trainer.preempt import StopRequest
from trainer.runfolder import Lease

log = logging.getLogger("quintet")

Item = TypeVar("Item")

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_SECONDS_BETWEEN_LINES = 15.0
_SECONDS_BETWEEN_LOOKS = 0.5  # at shards that others have claimed, and for a request to stop


@dataclass(frozen=True)
class Shard:
    """A shard to be scored: number `number` of an index."""

    index: Index
    number: int

    @property
    def key(self) -> str:
        """What it is called in the cache's folder: its content, wherever it lies."""
        return self.index.shards[self.number].sha256[:32]

    @property
    def path(self) -> str:
        return self.index.path(self.number)

    @property
    def records(self) -> int:
        return self.index.shards[self.number].records


class Scorer:
    """Runs a teacher over rows, batch by batch.

    Args:
        teacher: on `device`.
        precision: of the matrix products: fp32, or bf16 or fp16 by autocast.
        tokens_per_chunk: padded tokens of a batch at most, but at least one row; None: what suits the device.
    """

    def __init__(self, teacher: Teacher, device: torch.device, precision: str, tokens_per_chunk: int | None) -> None:
        self.teacher, self._device = teacher, device
        self._half = HALVES.get(precision)
        self._tokens_per_chunk = chunk_tokens(tokens_per_chunk, device, half=self._half is not None)
        self._packed = may_pack(teacher.encoder, device, precision)

    def __call__(self, rows: PairRows) -> Iterator[tuple[Numbers, Logits]]:
        """(some of the rows, their logits), longest rows first; further batches run while one is looked at."""
        chunks = plan(rows.lengths, self._tokens_per_chunk, self._packed)
        for chunk, logits in zip(chunks, forwards(partial(self._logits, rows), chunks, self._device), strict=True):
            yield chunk, logits.numpy()

    def _logits(self, rows: PairRows, chunk: Numbers) -> Tensor:
        teacher, tokens = self.teacher, rows.take(chunk)
        with torch.inference_mode(), self._autocast():
            logits = feed(
                *(teacher.encoder, tokens, np.arange(len(chunk)), self._device),
                packed=self._packed,
                padding_id=teacher.padding_id,
            )
        return logits[:, 0]

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self._device.type, dtype=self._half) if self._half else nullcontext()


@dataclass
class Tally:
    """What a worker has met: pairs of its shards, how many of them had a score already, records without negatives."""

    shards: int = 0
    records: int = 0
    pairs: int = 0
    found: int = 0
    scored: int = 0
    bare: int = 0


@dataclass
class Worker:
    """Scores shards into the cache `known` is read from; any number of workers may share both.

    Args:
        scorer: the teacher.
        known: the scores that are there; it must have been loaded.
        stop: asked between batches.
        flush_pairs: scores in a segment, and the most that are lost when the process is killed.
        claim_seconds: a claim that another machine's worker has not renewed for so long is taken over.
        policy: what happens to damaged shards.
        told: called now and then with `figures`.
    """

    scorer: Scorer
    known: ScoreCache
    stop: StopRequest
    flush_pairs: int
    claim_seconds: float = 60.0
    policy: Policy = "strict"
    tally: Tally = field(default_factory=Tally)
    rate: Rate = field(default_factory=lambda: Rate(0))
    told: Callable[[Mapping[str, float]], object] = lambda values: None
    _leases: dict[str, Lease] = field(default_factory=dict)
    _told: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._writer = ScoreWriter(self.known.folder.parent, self.known.fingerprint)

    def score(self, shards: Sequence[Shard]) -> None:
        """Have every pair of the shards scored, by this worker or by others that are at it; waits for those.

        Raises:
            Stopped: asked to; what was scored is written.
            DataError: a damaged shard or segment.
            UserError: the scores cannot be written.
        """
        left = list(shards)
        while left:
            held = [shard for n, shard in enumerate(left) if not self._finish(shard, left[n + 1 :])]
            if len(held) == len(left):
                self.wait(_SECONDS_BETWEEN_LOOKS)
            left = held

    def wait(self, seconds: float) -> None:
        """Sleep, and be woken by a request to stop. Raises Stopped."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._heed()
            time.sleep(min(_SECONDS_BETWEEN_LOOKS, seconds))

    def _finish(self, shard: Shard, later: Sequence[Shard]) -> bool:
        """Score a shard, unless it is done already; False when another worker holds it."""
        if self._is_done(shard):
            return True
        folder = self.known.folder / "claims"
        folder.mkdir(parents=True, exist_ok=True)
        lease = self._leases.setdefault(
            shard.key, Lease(folder, file=f"{shard.key}.json", limit_seconds=self.claim_seconds)
        )
        if not lease.attempt(time.monotonic()):
            return False
        try:
            self._score(shard, sum(other.records for other in later))
        finally:
            lease.give_back()
        return True

    def _score(self, shard: Shard, records_later: int) -> None:
        self.known.refresh()
        found, to_come = self.tally.found, self.tally.records + shard.records + records_later
        segments = []
        for scores in self._shard_scores(shard):
            self._writer.add(scores.query_hash, scores.passage_hash, scores.logit)
            self.tally.scored += len(scores)
            if self._writer.pending >= self.flush_pairs:
                segments.append(self._flush())
            self._heed()
            self._tell(shard, to_come)
        if self._writer.pending:
            segments.append(self._flush())
        self.tally.shards += 1
        # A score that was found may be in any segment, so only a shard that had none is known by its segments.
        if self.tally.found == found:
            self._mark_done(shard, segments)

    def _shard_scores(self, shard: Shard) -> Iterator[Scores]:
        for window in _ahead(self._windows(shard)):
            for chunk, logits in self.scorer(window.rows):
                self.rate.add(len(chunk), int(window.rows.lengths[chunk].sum()))
                yield Scores(window.query_hash[chunk], window.passage_hash[chunk], logits)

    def _windows(self, shard: Shard) -> Iterator[_Window]:
        """The pairs of each window that have no score; from then on they count as known, so each comes once."""
        for pairs in windows(shard.index, shard.number, policy=self.policy):
            _, found = self.known.lookup(pairs.query_hash, pairs.passage_hash)
            new = np.flatnonzero(~found)
            query_hash, passage_hash = pairs.query_hash[new], pairs.passage_hash[new]
            self.known.add(Scores(query_hash, passage_hash, np.zeros(len(new), np.float32)))
            self.tally.records += pairs.records
            self.tally.pairs += len(pairs)
            self.tally.found += len(pairs) - len(new)
            self.tally.bare += pairs.bare
            if len(new):
                yield _Window(query_hash, passage_hash, pairs.rows(new, self.scorer.teacher.pairs))

    def _flush(self) -> str:
        path = self._writer.flush()
        assert path is not None, "something is pending"
        return path.name

    def _heed(self) -> None:
        if self.stop.requested:
            self._writer.flush()
            raise Stopped(
                f"stopped by {self.stop.reason}; the {self.tally.scored:,} scores of this start are written; start "
                "again to go on"
            )

    def _tell(self, shard: Shard, to_come: int) -> None:
        """A line now and then: what was scored, how fast, and how long the shards take that are left, at this rate."""
        if time.monotonic() - self._told < _SECONDS_BETWEEN_LINES:
            return
        self._told, tally = time.monotonic(), self.tally
        unread = (to_come - tally.records) * (tally.pairs - tally.found) / max(tally.records, 1)
        self.rate.total = round(tally.pairs - tally.found + unread)
        log.info(
            "%s: %s pairs scored, %s found in the cache, %s",
            Path(shard.path).name,
            f"{tally.scored:,}",
            f"{tally.found:,}",
            self.rate,
        )
        self.told(self.figures())

    def figures(self) -> dict[str, float]:
        """What this worker has done, by metric name."""
        tally, pace = self.tally, self.rate.done / max(self.rate.seconds, 1e-9)
        counts = {"pairs": tally.pairs, "found": tally.found, "scored": tally.scored, "pairs_per_s": pace}
        return {f"distill/{name}": value for name, value in counts.items()}

    def _is_done(self, shard: Shard) -> bool:
        try:
            segments = orjson.loads(self._mark(shard).read_bytes())["segments"]
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return False
        if not self.known.segments.issuperset(segments):
            self.known.refresh()
        return self.known.segments.issuperset(segments)

    def _mark_done(self, shard: Shard, segments: Sequence[str]) -> None:
        content = orjson.dumps({"shard": shard.path, "segments": segments})
        write_whole(self._mark(shard), lambda partial: partial.write_bytes(content))

    def _mark(self, shard: Shard) -> Path:
        return self.known.folder / "done" / f"{shard.key}.json"


@dataclass(frozen=True, eq=False)
class _Window:
    """Pairs to be scored, and their rows."""

    query_hash: Numbers
    passage_hash: Numbers
    rows: PairRows


def _ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The items, each made by a thread while the one before is used."""
    with ThreadPoolExecutor(1, thread_name_prefix="quintet-pairs") as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item


# --- looking at what there is --------------------------------------------------------------------------------------


def shards_of(source: mixture.Source) -> list[Shard]:
    """The shards of a source. Raises UserError when its records have no negatives, as its first block shows."""
    shard, number = source.blocks[0].tolist()
    block = read_block(source.index, shard, number, policy="skip")
    if block.good and not len(block.table["negative_hash"].combine_chunks().flatten()):
        raise UserError(
            f"{source.index.path(shard)}: the records of source {source.name} have no negatives, so there is nothing "
            "to tell a query's passage from; run quintet mine on them first"
        )
    return [Shard(source.index, number) for number in range(len(source.index.shards))]


@dataclass(frozen=True)
class Coverage:
    """How many of the pairs of a source, or of several, have a score."""

    pairs: int = 0
    missing: int = 0
    shards: int = 0


def coverage(known: ScoreCache, shards: Sequence[Shard], policy: Policy) -> Coverage:
    """Look every pair of the shards up; a shard that lacks scores is no longer held for done."""
    total = Coverage()
    for shard in shards:
        pairs = missing = 0
        for window in windows(shard.index, shard.number, policy=policy):
            pairs += len(window)
            missing += int((~known.lookup(window.query_hash, window.passage_hash)[1]).sum())
        if missing:
            (known.folder / "done" / f"{shard.key}.json").unlink(missing_ok=True)
        total = Coverage(total.pairs + pairs, total.missing + missing, total.shards + 1)
    return total
