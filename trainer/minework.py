"""The work of the stage `mine` in parts that ranks share: the collection, the negatives of every unit, the shards."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import orjson
import torch
import xxhash

from data import index, mixture, scan
from data.errors import UserError
from data.mixture import Mixture
from data.parts import Parts, save_array
from data.reading import Policy
from data.scan import Unit
from data.shards import write_index
from trainer import approximate, corpus, distributed, known, mined, minereport, pools, work
from trainer.corpus import Passages, Vectors
from trainer.embed import Embedder, load_model, progress_bar
from trainer.known import Known
from trainer.mine import Config
from trainer.mined import Shard, Tokeniser, Writer
from trainer.mining import Miner, Settings
from trainer.negatives import Rules
from trainer.pools import Pools

log = logging.getLogger("quintet")

REPORT = "report.json"
_NOT_PLANNED = (
    "model",
    "data",
    "corpus",
    "output",
    "tokens_per_chunk",
    "precision",
    "device",
    "allow_pipe",
    "wandb",
    "overwrite",
)


@dataclass(frozen=True)
class Task:
    """What is mined, with what."""

    config: Config
    embedder: Embedder
    data: Mixture

    @property
    def policy(self) -> Policy:
        return cast(Policy, self.config.damaged)

    @property
    def within(self) -> str:
        """Which passages a row may get: a corpus that is named, or a single source, is one pool."""
        alone = self.config.within == "source" and len(self.data.sources) == 1
        return "all" if self.config.corpus or alone else self.config.within

    @property
    def settings(self) -> Settings:
        config = self.config
        rules = Rules(config.skip_top, config.depth, config.margin, config.absolute_margin)
        return Settings(config.negatives, config.random_negatives, config.sampling, rules, config.fill, config.seed)

    @cached_property
    def plan(self) -> dict[str, Any]:
        """Everything that decides the output."""
        return {
            "stage": "mine",
            "model": self.embedder.identity,
            "data": scan.identity(self.data),
            "corpus": _contents(Path(self.config.corpus)) if self.config.corpus else {},
            **{name: value for name, value in vars(self.config).items() if name not in _NOT_PLANNED},
        }


def open_task(config: Config, device: torch.device) -> Task:
    """Open model and data. Raises UserError or DataError."""
    if config.corpus and not Path(config.corpus).exists():
        raise UserError(
            f"corpus={config.corpus}: no such file or folder; give a BEIR folder, a JSONL or a text file, or nothing "
            "for the passages of the shards"
        )
    data = mixture.load(config.data, allow_pipe=config.allow_pipe, policy=cast(Policy, config.damaged))
    model = load_model(config.model, device)
    return Task(config, Embedder(model, device, config.precision, config.tokens_per_chunk), data)


def _contents(path: Path) -> dict[str, str]:
    """The hash of every file that decides a collection and its known answers."""
    files = [path]
    if path.is_dir():
        names = ("corpus.jsonl*", "queries.jsonl*", "qrels/*.tsv")
        files = sorted(file for name in names for file in path.glob(name))
    return {file.relative_to(path.parent).as_posix(): _hash(file) for file in files}


def _hash(file: Path) -> str:
    digest = xxhash.xxh3_128()
    try:
        with open(file, "rb") as content:
            while chunk := content.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise UserError(f"corpus={file}: cannot be read ({error.strerror}); name another") from None
    return digest.hexdigest()


def begin(task: Task, output: Path) -> bool:
    """Whether there is anything to do. Collective. Raises UserError when an output is in the way."""
    return work.begin(output, REPORT, task.plan, overwrite=task.config.overwrite)


def mine(task: Task, parts: Parts, output: Path) -> None:
    """All phases of the stage. Collective."""
    passages = corpus.collect(parts, "corpus", task.config.corpus or task.data, policy=task.policy)
    vectors = corpus.embed(parts, "corpus", passages, task.embedder, dtype=task.config.dtype)
    units, shards = mined.cut(task.data, task.config.unit)
    files = _mine_units(parts, units, _miner(task, parts, passages, vectors))
    tokeniser, no_tokens = _tokeniser(task)
    indexes = _write_shards(parts, shards, files, Writer(task.data, units, passages, tokeniser, task.policy))

    def finish() -> None:
        _write_index(task, parts, indexes, tokeniser)
        sources = _facts(task, units, files)
        about = {"model": task.embedder.model.name, "passages": len(passages), "no_tokens": no_tokens}
        report = {"plan": task.plan, **about, "sources": sources}
        text = orjson.dumps(report, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
        parts.write(f"{work.RESULT}/{REPORT}", lambda path: path.write_bytes(text))
        work.publish(parts, output)
        log.info("negatives out of %s passages; the shards are in %s", f"{len(passages):,}", output)
        print(minereport.table_of(sources))

    distributed.on_first_rank(finish)


def figures(output: Path) -> dict[str, float]:
    """What every source got, by metric name."""
    values = {
        f"mine/{name}/{fact}": facts[fact]
        for name, facts in orjson.loads((output / REPORT).read_bytes())["sources"].items()
        for fact in ("records", "short", "positive_first")
    }
    return {name: value for name, value in values.items() if value is not None}


def _miner(task: Task, parts: Parts, passages: Passages, vectors: Vectors) -> Miner:
    """What mines units, with the tables it needs. Collective."""
    pairs = work.once(
        parts, "known.npy", lambda path: known.write(path, task.data, task.config.corpus, policy=task.policy)
    )
    groups = None
    if task.within != "all":
        groups = work.once(
            parts,
            "pools.npy",
            lambda path: pools.write_groups(path, task.data, passages, task.within, policy=task.policy),
        )
    loaded, near = pools.load(vectors, task.embedder.device), _index(task, parts, vectors)
    choice = Pools(passages, vectors, groups, task.within, loaded, near)
    return Miner(task.data, choice, Known(pairs), task.embedder, task.settings, task.policy)


def _index(task: Task, parts: Parts, vectors: Vectors) -> approximate.Index | None:
    """What proposes candidates, built once and read by every rank. Collective."""
    factory = task.config.index
    if not factory:
        return None
    if task.within != "all":
        raise UserError(
            f"index={factory}: is one of all passages, and within={task.within} asks for those of each source; set "
            "within=all, or name a corpus"
        )
    path = work.once(parts, "corpus.index", lambda path: approximate.build(path, vectors, factory))
    with distributed.together():
        return approximate.Index(path, task.config.index_search)


def _mine_units(parts: Parts, units: Sequence[Unit], miner: Miner) -> list[Path]:
    """A part with the mined rows of every unit. Collective."""
    names = [f"mined-{number:06d}" for number in range(len(units))]
    numbers = work.share(parts, names, "records: blocks")
    total = sum(units[number].records for number in numbers)
    with distributed.together(), progress_bar(total, "records mined") as progress:
        for number, table in work.ahead(lambda number: miner.read(units[number]), numbers):
            parts.write(names[number], partial(save_array, array=miner(units[number], table)))
            progress(units[number].records)
    return [parts.path(name) for name in names]


def _tokeniser(task: Task) -> tuple[Tokeniser | None, str]:
    """What makes tokens, if the shards have some, or why there are none. Collective."""
    with distributed.together():
        made, reason = mined.tokeniser(task.data, task.embedder.model.tokenizer, task.policy)
    if reason:
        log.warning("the shards are written without tokens, so training will tokenise their texts: %s", reason)
    return made, reason


def _write_shards(parts: Parts, shards: Sequence[Shard], files: Sequence[Path], writer: Writer) -> list[Path]:
    """Every shard, and then a part with its index. Collective."""
    names = [f"written-{number:06d}.json" for number in range(len(shards))]
    numbers = work.share(parts, names, "shards")
    total = sum(writer.units[unit].records for number in numbers for unit in shards[number].units)
    with distributed.together(), progress_bar(total, "records written") as progress:
        for number in numbers:

            def write(path: Path, shard: Shard = shards[number]) -> None:
                scratch = parts.path(f".{shard.file}.partial")
                rows = [files[unit] for unit in shard.units]
                path.write_bytes(index.encode(writer(shard, rows, parts.path(work.RESULT), scratch, progress)))

            parts.write(names[number], write)
    return [parts.path(name) for name in names]


def _write_index(task: Task, parts: Parts, indexes: Sequence[Path], tokeniser: Tokeniser | None) -> None:
    result = parts.path(work.RESULT)
    written = [shard for path in indexes for shard in index.read(path, result).shards]
    if not written:
        raise UserError(
            f"fill=drop: none of the {task.data.records} records has negatives={task.config.negatives}; lower it, "
            "raise depth or margin, or set fill=random"
        )
    write_index(result, written, tokeniser.described if tokeniser else None)


def _facts(task: Task, units: Sequence[Unit], files: Sequence[Path]) -> dict[str, minereport.Facts]:
    """Source -> what its records got."""

    def rows_of(source: int) -> Any:
        return (np.load(file) for unit, file in zip(units, files, strict=True) if unit.source == source)

    return {
        source.name: minereport.facts(rows_of(number), task.settings) for number, source in enumerate(task.data.sources)
    }
