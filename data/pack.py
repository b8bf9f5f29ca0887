"""Stage `pack`: records in any common form to shards with an index, a held-out split and a report of what was left out.

The output folder holds the shards and index.json; holdout.jsonl and holdout/SOURCE.jsonl; rejects.jsonl, the first
rejected rows of each reason with file and line; pack.json, the settings and counts; and tokenizer/ when one was
trained. It appears when all of it is complete.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from data import index, inputs, layouts
from data.errors import DataError, UserError
from data.settings import key
from data.staging import staged
from data.tables import table
from data.workers import num_cores, run_jobs

if TYPE_CHECKING:  # they import pyarrow, which --help can do without
    from data.packing import Plan, Shape, Written
    from data.readers import Part
    from data.spill import Parsed, Reject

_log = logging.getLogger("quintet")
_MARK = "pack.json"
_ALWAYS = ("source", "languages", "records", "duplicates", "held out", "training", "shards", "MB")  # even if all 0
_EXAMPLES = 20  # rejected rows of a reason that are written out


@dataclass(frozen=True, kw_only=True)
class Config:
    """Keys of `quintet pack`."""

    input: str | list[str] = key(help="files, globs and folders: .jsonl[.gz|.zst], .json, .csv, .tsv, .parquet, ...")
    output: str = key("", help="folder for the shards; it must be new or empty")
    columns: dict[str, str | list[str]] = key({}, help="our field -> their column: {query: title, passage: body}")
    source: str = key("", help="source of records that name none; empty: the name of their file")
    lang: str = key("", help="BCP-47 language of records that name none")
    instruction: str = key("", help="instruction of records that have none")
    symmetric: bool = key(False, help="both sides of every record are queries (paraphrases, translations)")
    format: str = key(
        "block", help="shards of Arrow blocks, or plain ones of a JSON member a record", choices=("block", "plain")
    )
    tokenizer: str = key("", help="folder or hub id; block shards then hold the tokens as well")
    train_tokenizer: bool = key(
        False, help="train a tokenizer on the training pairs and use it; goes to output/tokenizer"
    )
    vocab_size: int = key(32_000, help="pieces of the trained tokenizer", low=400)
    tokenizer_sample: int = key(100_000, help="texts to train the tokenizer on, balanced over languages", low=1)
    max_tokens: int = key(512, help="tokens stored of a text at most; 0: all", low=0)
    holdout_fraction: float = key(
        0.01, help="share of each source and language held out for evaluation", low=0, high=0.5
    )
    holdout_max: int = key(1000, help="records of a source and language held out at most; 0: no bound", low=0)
    limit: int = key(0, help="records kept of each source, a random sample; 0: all", low=0)
    max_bad_fraction: float = key(0.5, help="stop when more of the input's records than this are bad", low=0, high=1)
    shard_mib: int = key(64, help="size of a shard, in MiB", low=1, high=4096)
    seed: int = key(0, help="of the shuffle, the sample and the held-out split", low=0)
    workers: int = key(0, help="processes; 0: one for each core", low=0)
    overwrite: bool = key(False, help="replace an output that an earlier pack wrote")
    index: bool = key(False, help="write only index.json, for input folders of shards that have none")

    def check(self) -> list[str]:
        """One message for each setting that cannot be, or not together with another."""
        problems = layouts.problems(self.columns)
        if not self.input:
            problems.append(f"input={self.input}: nothing to pack; name files, globs or folders")
        if not (self.output or self.index):
            problems.append("output: must be given (folder for the shards); write output=FOLDER")
        if self.source and not index.SOURCE_NAME.fullmatch(self.source):
            problems.append(f"source={self.source}: not usable as a file name; use letters, digits and _ . + @ -")
        if self.tokenizer and self.train_tokenizer:
            problems.append(f"tokenizer={self.tokenizer}: cannot go with train_tokenizer=true; remove one of them")
        if self.tokenizer and self.format == "plain":
            problems.append(f"tokenizer={self.tokenizer}: plain shards hold no tokens; remove it or set format=block")
        return problems


def run(config: Config) -> None:
    """Pack `config.input` into `config.output` and print what came of it.

    Raises:
        UserError: input that is missing, unreadable or empty, or an output that is in the way.
        DataError: more than max_bad_fraction of the records are bad; nothing is written.
    """
    if config.index:
        _index(config)
        return
    from data import readers

    start = time.monotonic()
    files = inputs.find(config.input)
    layouts.Layouts(config.columns).check({file: readers.columns(file) for file in files})
    parts = [part for file in files for part in readers.split(file)]
    with staged(Path(config.output), overwrite=config.overwrite, mark=_MARK) as folder:
        report = _pack(config, parts, folder)
    print(report)
    _log.info("packed into %s in %.0f s", config.output, time.monotonic() - start)


def _pack(config: Config, parts: Sequence[Part], folder: Path) -> str:
    """All of the work, in a folder that is ours; returns the report to print."""
    from data import packing, shards

    tokenizer = _described(config.tokenizer, config.tokenizer, config) if config.tokenizer else None
    with tempfile.TemporaryDirectory(prefix=".spill-", dir=folder) as spill:
        parsed = _parse(config, parts, Path(spill))
        rejects = _numbered(parts, parsed)
        _check_quality(config, parsed, rejects)
        plan = _decide(config, parsed)
        if config.train_tokenizer:
            tokenizer = _train(config, plan, folder)
        packing.save_verdicts(plan)
        jobs = packing.shard_jobs(plan, _shape(config, folder), config.shard_mib << 20)
        written = run_jobs(packing.write_shard, jobs, workers=_num_workers(config), title="writing shards")
        packing.write_holdout(plan, folder)
    shards.write_index(folder, [item.shard for item in written], tokenizer if config.format == "block" else None)
    (folder / "rejects.jsonl").write_bytes(b"".join(orjson.dumps(reject) + b"\n" for reject in rejects))
    facts = _facts(plan, written)
    _write_papers(config, folder, parts, parsed, facts, tokenizer)
    return _report(facts, parsed, rejects)


def _num_workers(config: Config) -> int:
    return config.workers or num_cores()


def _parse(config: Config, parts: Sequence[Part], spill: Path) -> list[Parsed]:
    from data.spill import Constants, parse_part

    constants = Constants(config.columns, config.seed, config.source, config.lang, config.instruction, config.symmetric)
    jobs = [(part, constants, spill / f"{number:06d}") for number, part in enumerate(parts)]
    return run_jobs(parse_part, jobs, workers=_num_workers(config), title="reading")


def _numbered(parts: Sequence[Part], parsed: Sequence[Parsed]) -> list[Reject]:
    """The first rejected rows of each reason, numbered within their files rather than within their parts."""
    before: Counter[str] = Counter()
    shown: Counter[str] = Counter()
    rejects = []
    for part, result in zip(parts, parsed, strict=True):
        for reject in result.rejects:
            shown[reject.reason] += 1
            if shown[reject.reason] <= _EXAMPLES:
                rejects.append(replace(reject, line=reject.line + before[part.file]))
        before[part.file] += result.rows
    return rejects


def _bad(parsed: Sequence[Parsed]) -> Counter[str]:
    return sum((Counter(result.bad) for result in parsed), Counter())


def _check_quality(config: Config, parsed: Sequence[Parsed], rejects: Sequence[Reject]) -> None:
    """Stop when too many records are bad or none is good."""
    bad, good = _bad(parsed).total(), sum(result.records for result in parsed)
    first = f"; the first is {_where(rejects[0])}: {rejects[0].reason} ({rejects[0].detail})" if rejects else ""
    if not bad + good:
        raise UserError(f"input={config.input}: holds no records")
    if bad > config.max_bad_fraction * (bad + good):
        counts = ", ".join(f"{count:,} {reason}" for reason, count in _bad(parsed).most_common())
        raise DataError(
            f"max_bad_fraction={config.max_bad_fraction:g}: {bad:,} of {bad + good:,} records are bad ({counts})"
            f"{first}; correct the input or the columns, or raise max_bad_fraction; nothing is written"
        )
    if not good:
        raise UserError(f"input={config.input}: all of its {bad:,} records are bad{first}")


def _decide(config: Config, parsed: Sequence[Parsed]) -> Plan:
    from data.packing import Share, decide

    starts = accumulate((result.rows for result in parsed), initial=0)
    runs = [(run, start) for result, start in zip(parsed, starts, strict=False) for run in result.runs]
    share = Share(config.seed, config.limit, config.holdout_fraction, config.holdout_max)
    return decide([run for run, _ in runs], [start for _, start in runs], share)


def _train(config: Config, plan: Plan, folder: Path) -> dict[str, Any]:
    """Train the tokenizer into the folder; returns what the index says about it."""
    from data.packing import sample_texts
    from data.tokens import train_tokenizer

    texts = sample_texts(plan, config.tokenizer_sample)
    _log.info("training a tokenizer of %d pieces on %d texts", config.vocab_size, len(texts))
    train_tokenizer(texts, config.vocab_size, folder / "tokenizer")
    return _described(str(folder / "tokenizer"), "tokenizer", config)


def _described(path: str, name: str, config: Config) -> dict[str, Any]:
    """What the index says about the tokens: whose they are and where they were cut (0: nowhere)."""
    from data.tokens import fingerprint, load_tokenizer

    return {"name": name, "fingerprint": fingerprint(load_tokenizer(path)), "max_tokens": config.max_tokens}


def _shape(config: Config, folder: Path) -> Shape:
    from data.packing import Shape

    tokenizer = str(folder / "tokenizer") if config.train_tokenizer else config.tokenizer
    return Shape(folder, config.format, tokenizer if config.format == "block" else "", config.max_tokens)


# Reports


def _facts(plan: Plan, written: Sequence[Written]) -> dict[str, dict[str, Any]]:
    """Source -> its counts, sizes and mean lengths."""
    from data import packing

    counts = {
        name: _by_source(plan, plan.count(verdict))
        for name, verdict in (
            ("training", packing.TRAIN),
            ("duplicates", packing.DUPLICATE),
            ("over_limit", packing.OVER_LIMIT),
            ("held_out", packing.HELD_OUT),
        )
    }
    facts = {}
    for source in plan.sources:
        mine = [item for item in written if item.shard.source == source]
        languages: Counter[str] = sum((Counter(item.shard.languages) for item in mine), Counter())
        facts[source] = {
            "records": sum(counts[name][source] for name in counts),
            **{name: counts[name][source] for name in counts},
            "shards": len(mine),
            "bytes": sum(item.shard.bytes for item in mine),
            **_mean_lengths(mine),
            "languages": dict(sorted(languages.items())),
        }
    return facts


def _by_source(plan: Plan, by_stratum: Iterable[int]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for (source, _), count in zip(plan.strata, by_stratum, strict=True):
        counts[source] += int(count)
    return counts


def _mean_lengths(written: Sequence[Written]) -> dict[str, float]:
    records = max(1, sum(item.shard.records for item in written))
    names = ("query_words", "passage_words", "query_tokens", "passage_tokens")
    return {name: round(sum(getattr(item, name) for item in written) / records, 2) for name in names}


def _write_papers(
    config: Config,
    folder: Path,
    parts: Sequence[Part],
    parsed: Sequence[Parsed],
    facts: dict[str, dict[str, Any]],
    tokenizer: dict[str, Any] | None,
) -> None:
    """Write pack.json: how the folder came about."""
    files: dict[str, dict[str, Any]] = {}
    for part, result in zip(parts, parsed, strict=True):
        counts = files.setdefault(part.file, {"records": 0, "bad": Counter()})
        counts["records"] += result.records
        counts["bad"].update(result.bad)
    # These change nothing about the result.
    settings = {name: value for name, value in asdict(config).items() if name not in ("workers", "overwrite", "index")}
    paper = {"settings": settings, "input": files, "sources": facts, "tokenizer": tokenizer}
    (folder / _MARK).write_bytes(orjson.dumps(paper, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def _report(facts: dict[str, dict[str, Any]], parsed: Sequence[Parsed], rejects: Sequence[Reject]) -> str:
    rows = [_row(source, fact) for source, fact in facts.items()]
    used = [name for name in rows[0] if name in _ALWAYS or any(row[name] not in ("0", "0.0") for row in rows)]
    parts = [table(used, [[row[name] for name in used] for row in rows])]
    bad = _bad(parsed)
    if bad:
        first = {reject.reason: reject for reject in reversed(rejects)}
        lines = [(reason, f"{count:,}", _where(first[reason])) for reason, count in bad.most_common()]
        parts.append(table(("rejected", "records", "first at"), lines))
    return "\n\n".join(parts)


def _row(source: str, fact: dict[str, Any]) -> dict[str, str]:
    counts = ("records", "duplicates", "over_limit", "held_out", "training", "shards")
    means = ("query_words", "passage_words", "query_tokens", "passage_tokens")
    row = {"source": source, "languages": str(len(fact["languages"]))}
    row |= {name.replace("_", " "): f"{fact[name]:,}" for name in counts}
    row |= {"MB": f"{fact['bytes'] / 1e6:.1f}"}
    return row | {name.replace("_", " "): f"{fact[name]:.1f}" for name in means}


def _where(reject: Reject) -> str:
    return f"{reject.file}:{reject.line}"


# Index alone


def _index(config: Config) -> None:
    """Write index.json for each input folder and print what it lists."""
    for name in [config.input] if isinstance(config.input, str) else config.input:
        if not Path(name).is_dir():
            raise UserError(f"input={name}: index=true wants a folder of .tar shards, and this is none")
        print(_index_folder(config, Path(name)))


def _index_folder(config: Config, folder: Path) -> str:
    from data import indexing, opening, shards

    files = opening.tar_files(folder)
    if not files:
        raise UserError(f"input={folder}: holds no .tar file to index")
    look = partial(indexing.index_shard, source=config.source or None, policy="skip")
    infos = run_jobs(look, [folder / file for file in files], workers=_num_workers(config), title="indexing")
    bad: Counter[str] = sum((Counter(info.bad) for info in infos), Counter())
    good = sum(info.records for info in infos)
    if bad.total() > config.max_bad_fraction * (bad.total() + good) or not good:
        causes = ", ".join(f"{count:,} {cause}" for cause, count in bad.most_common())
        raise DataError(
            f"input={folder}: {good:,} good records and {bad.total():,} problems ({causes}); nothing is written"
        )
    written = shards.write_index(folder, infos, _old_tokenizer(folder))
    rows = [(source, str(len(languages)), f"{records:,}") for source, (records, languages) in written.sources.items()]
    parts = [table(("source", "languages", "records"), rows)]
    if bad:
        parts.append(table(("left out", "samples"), [(cause, f"{count:,}") for cause, count in bad.most_common()]))
    return "\n\n".join(parts)


def _old_tokenizer(folder: Path) -> dict[str, Any] | None:
    """What the index that is replaced said about tokens: the shards themselves do not tell whose they are."""
    try:
        return index.read(folder / index.INDEX_NAME, folder).tokenizer
    except (OSError, DataError):
        return None
