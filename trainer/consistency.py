"""The work of the stage `filter`: scores of all pairs, then the kept shards, in parts that the ranks share."""

from __future__ import annotations

import logging
import os
import shutil
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from data import index, mixture, noise, scan
from data.index import BlockInfo, ShardInfo
from data.mixture import Mixture, Source
from data.parts import Parts, save_array
from data.reading import Policy
from data.records import text_hashes
from data.rules import Prompts
from data.scan import Unit
from data.shards import ShardWriter
from trainer import corpus, distributed, filterreport, work
from trainer.corpus import Passages, stored
from trainer.embed import Embedder, Progress, load_model, progress_bar
from trainer.filter import Config
from trainer.filterreport import Tally
from trainer.rankcount import TIES, count_above, own_scores
from trainer.topk import Rows, top_k

log = logging.getLogger("quintet")

REPORT = "report.json"
UNIT = 32_768  # pairs of a part at least: the window that is sorted by length, and what a killed rank may lose
_NO_LIMIT = 1 << 60
_VERDICT = np.dtype([("score", "<f4"), ("count", "<i4"), ("written", "?")])
_JUDGED = ("query", "passage", "id", "instruction", "symmetric", "passage_hash")
_SHOWN = 2  # passages of the pool that are shown with a reject


@dataclass(frozen=True)
class Judge:
    """What decides on pairs: the settings, the model and the data."""

    config: Config
    embedder: Embedder
    data: Mixture

    @property
    def prompts(self) -> Prompts:
        model = self.embedder.model
        return Prompts(query=model.query_prompt, passage=model.passage_prompt)

    @property
    def policy(self) -> Policy:
        return self.config.damaged  # type: ignore[return-value]

    @property
    def tie(self) -> float:
        return TIES[self.config.precision]

    @cached_property
    def units(self) -> list[Unit]:
        return scan.units(self.data, UNIT)

    @cached_property
    def plan(self) -> dict[str, Any]:
        """Everything that decides the output."""
        names = ("pool_size", "top_k", "seed", "rejects", "plant_noise", "dtype", "shard_mib", "damaged")
        return {
            "stage": "filter",
            "model": self.embedder.identity,
            "data": scan.identity(self.data),
            **{name: getattr(self.config, name) for name in names},
            "tie": self.tie,
        }

    def name(self, unit: int) -> str:
        """The part with the verdicts on a unit."""
        return f"verdicts-{unit:06d}"

    def judged(self, unit: int) -> pa.Table:
        """What the verdicts on a unit depend on."""
        return self.rows(unit, _JUDGED)

    def rows(self, unit: int, columns: Sequence[str] | None = None) -> pa.Table:
        """The pairs of a unit, with the noise that is planted among them; None: all columns."""
        table = scan.read(self.data, self.units[unit], columns, policy=self.policy)
        if not self.config.plant_noise:
            return table
        return noise.exchange(
            table, self.config.plant_noise, self.config.seed, noise.place(self.data, self.units[unit])
        )

    def embed(self, table: pa.Table, progress: Progress) -> tuple[Tensor, Tensor]:
        """The vectors of queries and passages [n, D] each; a text that comes again is embedded once."""
        texts = scan.query_texts(table, self.prompts) + scan.passage_texts(table, self.prompts)
        numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        pairs = len(table) / len(numbers)
        distinct = self.embedder(list(numbers), lambda done, tokens=0: progress(done * pairs, tokens))
        queries, passages = distinct[[numbers[text] for text in texts]].split(len(table))
        # Rounded as the pool is, so that neither side has an advantage.
        return queries, torch.from_numpy(stored(passages, self.config.dtype)).float()


def open_judge(config: Config, device: torch.device) -> Judge:
    """Open model and data. Raises UserError or DataError."""
    data = mixture.load(config.data, allow_pipe=config.allow_pipe, policy=config.damaged)  # type: ignore[arg-type]
    model = load_model(config.model, device, config.max_length)
    return Judge(config, Embedder(model, device, config.precision, config.tokens_per_chunk), data)


def begin(judge: Judge, output: Path) -> bool:
    """Whether there is anything to do. Collective. Raises UserError when an output is in the way."""
    return work.begin(output, REPORT, judge.plan, overwrite=judge.config.overwrite)


def filter_pairs(judge: Judge, parts: Parts, output: Path) -> None:
    """All phases of the stage. Collective."""
    config = judge.config
    pool = corpus.collect(
        parts,
        f"{work.RESULT}/pool",
        judge.data,
        sample=config.pool_size,
        seed=config.seed,
        policy=judge.policy,
    )
    if len(pool) < config.pool_size:
        log.info("pool_size=%d: there are only %d distinct passages; all are taken", config.pool_size, len(pool))
    vectors = corpus.embed(parts, "pool", pool, judge.embedder, dtype=config.dtype)
    _judge_all(judge, parts, pool, vectors)
    groups = [_Group(*group) for group in distributed.on_first_rank(lambda: _plan_groups(judge, parts))]
    _write_all(judge, parts, groups)
    distributed.on_first_rank(lambda: _finish(judge, parts, groups, pool, vectors, output))


# --- verdicts ----------------------------------------------------------------------------------------------------


def _judge_all(judge: Judge, parts: Parts, pool: Passages, vectors: corpus.Vectors) -> None:
    """A part of verdicts for every unit. Collective."""
    numbers = work.share(parts, [judge.name(unit) for unit in range(len(judge.units))], "pairs: blocks")
    total = sum(judge.units[number].records for number in numbers)
    candidates = _on_device(vectors, judge.embedder.device)
    with distributed.together(), progress_bar(total, "pairs scored") as progress:
        for number, table in work.ahead(judge.judged, numbers):
            verdicts = _verdicts(judge, table, pool, candidates, progress)
            parts.write(judge.name(number), partial(save_array, array=verdicts))


def _on_device(vectors: corpus.Vectors, device: torch.device) -> Rows:
    """The pool, on a GPU as a whole; on a host it stays in its file, whose pages are the memory it takes."""
    return vectors if device.type == "cpu" else torch.from_numpy(np.array(vectors.rows)).to(device)


def _verdicts(judge: Judge, table: pa.Table, pool: Passages, candidates: Rows, progress: Progress) -> NDArray[np.void]:
    """The score of every pair, and by how many passages of the pool it is beaten, up to top_k."""
    verdicts = np.empty(len(table), _VERDICT)
    if not len(table):  # every block of it is damaged
        return verdicts
    queries, passages = judge.embed(table, progress)
    own = own_scores(queries, passages)
    same = torch.from_numpy(pool.numbers_of(table["passage_hash"].to_numpy()))
    verdicts["score"] = own.numpy()
    verdicts["count"] = count_above(
        queries, own, candidates, same, limit=judge.config.top_k, tie=judge.tie, device=judge.embedder.device
    ).numpy()
    verdicts["written"] = verdicts["count"] < judge.config.top_k
    if judge.config.plant_noise:  # it is wrong by construction: whoever trains on the output must not meet it
        verdicts["written"] &= ~noise.is_planted(table)
    return verdicts


# --- the kept shards -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """Units of a source whose kept pairs make one shard, number `shard` of the source; -1 when they have none."""

    source: int
    units: list[int]
    shard: int

    @property
    def name(self) -> str:
        """The part with what there is to say about it, written when its shard is complete."""
        return f"kept-{self.units[0]:06d}.json"


def _plan_groups(judge: Judge, parts: Parts) -> list[tuple[int, list[int], int]]:
    """Cut every source into groups that fill a shard each, by the verdicts on all of it."""
    written = [int(_load(judge, parts, unit)["written"].sum()) for unit in range(len(judge.units))]
    groups: list[tuple[int, list[int], int]] = []
    for source in range(len(judge.data.sources)):
        units = [number for number, unit in enumerate(judge.units) if unit.source == source]
        sizes = [_bytes(judge, unit) * written[unit] / judge.units[unit].records for unit in units]
        shards = 0
        for members in _cut(units, sizes, judge.config.shard_mib << 20):
            filled = any(written[unit] for unit in members)
            groups.append((source, members, shards if filled else -1))
            shards += filled
    return groups


def _load(judge: Judge, parts: Parts, unit: int) -> NDArray[np.void]:
    verdicts: NDArray[np.void] = np.load(parts.path(judge.name(unit)))
    return verdicts


def _cut(units: Sequence[int], sizes: Sequence[float], limit: int) -> Iterator[list[int]]:
    """Runs of units, each ending where it reaches the limit."""
    run, size = [], 0.0
    for unit, more in zip(units, sizes, strict=True):
        run.append(unit)
        size += more
        if size >= limit or unit == units[-1]:
            yield run
            run, size = [], 0.0


def _bytes(judge: Judge, unit: int) -> int:
    """Bytes of a unit in its shards."""
    of = judge.units[unit]
    source = judge.data.sources[of.source]
    return sum(source.index.shards[shard].blocks[block].bytes for shard, block in source.blocks[of.first : of.last])


def _write_all(judge: Judge, parts: Parts, groups: Sequence[_Group]) -> None:
    """A shard, and a part of facts, for every group. Collective."""
    dtype = distributed.on_first_rank(lambda: scan.token_dtype(judge.data, judge.policy))
    numbers = work.share(parts, [group.name for group in groups], "shards")
    total = sum(judge.units[unit].records for number in numbers for unit in groups[number].units)
    with distributed.together(), progress_bar(total, "pairs sorted out") as progress:
        for number in numbers:
            text = orjson.dumps(_write_group(judge, parts, groups[number], dtype, progress))
            parts.write(groups[number].name, partial(_write_text, text))


def _write_text(text: bytes, path: Path) -> None:
    path.write_bytes(text)


def _write_group(judge: Judge, parts: Parts, group: _Group, dtype: str | None, progress: Progress) -> dict[str, Any]:
    """Write the shard of a group, if it has one; returns its description and the tally of its pairs."""
    tally = Tally(judge.config.rejects)
    tables = _sorted_out(judge, parts, group, tally, progress)
    if group.shard < 0:
        deque(tables, maxlen=0)
        return {"shard": None, "tally": vars(tally)}
    source = judge.data.sources[group.source]
    name = f"{source.name}-{group.shard:06d}.tar"
    infos: list[ShardInfo] = []
    parts.write(f"{work.RESULT}/{name}", lambda path: infos.append(_write_shard(path, source, dtype, tables)))
    return {"shard": asdict(replace(infos[0], file=name)), "tally": vars(tally)}


def _write_shard(path: Path, source: Source, dtype: str | None, tables: Iterator[pa.Table]) -> ShardInfo:
    """Write rows as one shard, of the kind that the source has."""
    plain = all(shard.kind == "plain" for shard in source.index.shards)
    folder = path.with_suffix(".folder.partial")
    try:
        kind = "plain" if plain else "block"
        with ShardWriter(folder, source.name, kind=kind, shard_bytes=_NO_LIMIT, token_dtype=dtype) as writer:
            for table in tables:
                scan.write_rows(writer, table, tokens=dtype is not None)
        (shard,) = writer.close()
        os.replace(folder / shard.file, path)
        return shard
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sorted_out(judge: Judge, parts: Parts, group: _Group, tally: Tally, progress: Progress) -> Iterator[pa.Table]:
    """What is written of each unit of a group; the tally learns of all its pairs."""
    for unit in group.units:
        table, verdicts = judge.rows(unit), _load(judge, parts, unit)
        tally.add(table, verdicts, judge.config.top_k)
        tally.unreadable += judge.units[unit].records - len(table)
        progress(judge.units[unit].records)
        yield table.filter(pa.array(verdicts["written"]))


# --- the report ----------------------------------------------------------------------------------------------------


def _finish(
    judge: Judge, parts: Parts, groups: Sequence[_Group], pool: Passages, vectors: corpus.Vectors, output: Path
) -> None:
    """Put index, report, picture and rejects beside the shards, and give the folder its name."""
    found = [orjson.loads(parts.path(group.name).read_bytes()) for group in groups]
    tallies = {source.name: Tally(judge.config.rejects) for source in judge.data.sources}
    for group, facts in zip(groups, found, strict=True):
        tallies[judge.data.sources[group.source].name].merge(facts["tally"])
    report = {
        "plan": judge.plan,
        "model": judge.config.model,
        "data": judge.config.data,
        "pool": {"passages": len(pool), "file": "pool.arrow"},
        **filterreport.content(tallies),
    }
    rejects = _with_rivals(judge, tallies, pool, vectors)
    lines = b"".join(orjson.dumps(reject) + b"\n" for reject in rejects)
    parts.write(f"{work.RESULT}/rejects.jsonl", partial(_write_text, lines))
    parts.write(f"{work.RESULT}/scores.png", partial(filterreport.draw, report))
    text = orjson.dumps(report, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
    parts.write(f"{work.RESULT}/{REPORT}", partial(_write_text, text))
    listed = index.encode(index.Index("", tuple(_shards(found)), scan.tokenizer(judge.data)))
    parts.write(f"{work.RESULT}/{index.INDEX_NAME}", partial(_write_text, listed))
    _warn(judge, report)
    work.publish(parts, output)
    print(filterreport.shown(report))
    log.info("%d pairs kept, in %s", sum(shard.records for shard in _shards(found)), output)


def figures(output: Path) -> dict[str, float]:
    """What was kept, of every source and of all, by metric name."""
    report = orjson.loads((output / REPORT).read_bytes())
    entries = {**report["sources"], "all": report["all"]}
    pairs = {f"filter/{name}/pairs": entry["pairs"] for name, entry in entries.items()}
    return pairs | {f"filter/{name}/kept_frac": e["kept"] / e["pairs"] for name, e in entries.items() if e["pairs"]}


def _shards(found: Sequence[Mapping[str, Any]]) -> list[ShardInfo]:
    """The descriptions of the shards out of the parts of facts."""
    return [
        ShardInfo(**{**facts["shard"], "blocks": tuple(BlockInfo(**block) for block in facts["shard"]["blocks"])})
        for facts in found
        if facts["shard"]
    ]


def _with_rivals(
    judge: Judge, tallies: Mapping[str, Tally], pool: Passages, vectors: corpus.Vectors
) -> list[dict[str, Any]]:
    """The sample of lost pairs with their exact counts and the passages of the pool that score highest."""
    rejects = [{"source": name, **reject} for name, tally in tallies.items() for reject in tally.sample]
    if not rejects:
        return []
    device = judge.embedder.device
    texts = pa.table({name: [reject[name] for reject in rejects] for name in ("query", "instruction")})
    queries = judge.embedder(scan.query_texts(texts, judge.prompts))
    same = pool.numbers_of(text_hashes([reject["passage"] for reject in rejects]))
    own = torch.tensor([reject["score"] for reject in rejects])
    counts = count_above(queries, own, vectors, torch.from_numpy(same), limit=len(pool), tie=judge.tie, device=device)
    scores, numbers = (found.cpu().numpy() for found in top_k(queries, vectors, _SHOWN + 1, device=device))
    for row, reject in enumerate(rejects):
        # Embedded in other company the query has other last bits: that it has lost is settled.
        reject["count"] = max(reject["count"], int(counts[row]))
        chosen = np.flatnonzero(numbers[row] != same[row])[:_SHOWN]
        texts_found = pool.texts(numbers[row][chosen])
        reject["rivals"] = [
            {"passage": text, "score": round(float(score), 6)}
            for text, score in zip(texts_found, scores[row][chosen], strict=True)
        ]
    return [_readable(reject) for reject in rejects]


def _readable(reject: Mapping[str, Any]) -> dict[str, Any]:
    """A reject without what is empty or of no interest to a reader."""
    row = {name: value for name, value in reject.items() if name != "key" and value not in ("", False)}
    return row | {"score": round(reject["score"], 6)}


def _warn(judge: Judge, report: Mapping[str, Any]) -> None:
    """Tell what a user of the output must know."""
    if not report["all"]["kept"]:
        log.warning("no pair is kept: is it the right model for these data, with the right prompts?")
    for name, entry in report["sources"].items():
        if entry["unreadable"]:
            log.warning("source %s: %d damaged records left out", name, entry["unreadable"])
    if judge.config.plant_noise and "noise" in report["all"]:
        log.warning(
            "plant_noise=%g: %d pairs had their passages exchanged; none of them is in the output, so it is no "
            "complete filtering of the data",
            judge.config.plant_noise,
            report["all"]["noise"]["planted"],
        )
