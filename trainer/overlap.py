"""What the stage `decontaminate` makes of the comparison: counts and examples, and the shards that are kept."""

from __future__ import annotations

import logging
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
from numpy.typing import NDArray

from data import scan
from data.errors import UserError
from data.index import ShardInfo
from data.mixture import Mixture
from data.reading import Policy
from data.shards import ShardWriter, write_index
from data.staging import staged
from data.tables import table as text_table
from data.workers import num_cores, run_jobs
from trainer import sets
from trainer.contamination import REASONS, UNIT, Hits, Job, Rule, Texts, compare, gather, merged, opened, prepare
from trainer.decontaminate import Config
from trainer.lookup import Members
from trainer.sets import RetrievalSet

log = logging.getLogger("quintet")

REPORT, DROPPED = "overlap.json", "dropped.jsonl"


@dataclass(frozen=True, eq=False)
class Study:
    """All that the report needs: the settings, both sides' data, and where the hits of each unit are."""

    config: Config
    data: Mixture
    sets: list[RetrievalSet]
    texts: Texts
    units: list[scan.Unit]
    files: list[Path]

    @property
    def policy(self) -> Policy:
        return self.config.damaged  # type: ignore[return-value]

    @property
    def dropped(self) -> int:
        """The reasons to leave a record out, as bits."""
        return sum(1 << REASONS.index(reason) for reason in set(self.config.drop))

    def hits(self, unit: int) -> Hits:
        """What `compare` found in a unit."""
        with np.load(self.files[unit], allow_pickle=False) as found:
            hits: Hits = found["hits"]
        return hits


def carry_out(config: Config) -> None:
    """Do what `decontaminate.run` says."""
    output = Path(config.output) if config.output else None
    place = staged(output, overwrite=config.overwrite, mark=REPORT) if output else nullcontext()
    specs = (config.data,) if isinstance(config.data, str) else tuple(config.data)
    opened.cache_clear()  # the folder may have other data than the last time that this process looked
    with place as folder, tempfile.TemporaryDirectory(prefix=".hits-", dir=folder) as temporary:
        data = opened(specs, config.damaged, config.allow_pipe)
        evaluation = sets.load(config.against, split=config.split)
        texts = gather(evaluation)
        wanted, members = prepare(texts, Rule(config.ngram, config.shortest, config.characters))
        wanted.save(Path(temporary) / "wanted.npz")
        units = scan.units(data, UNIT)
        files = [Path(temporary) / f"{number:06d}.npz" for number in range(len(units))]
        study = Study(config, data, evaluation, texts, units, files)
        readable = _compare_all(study, specs, Path(temporary) / "wanted.npz")
        report = _report(study, readable, members)
        if folder is not None:
            if config.drop:
                report["dropped"] = _write_kept(study, folder)
            text = orjson.dumps(report, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
            (folder / REPORT).write_bytes(text)
    print(_shown(report))


def _compare_all(study: Study, specs: tuple[str, ...], wanted: Path) -> list[int]:
    """Compare all units; returns how many records of each can be read."""
    config = study.config
    jobs = [
        Job(specs, study.policy, config.allow_pipe, str(wanted), number, str(file))
        for number, file in enumerate(study.files)
    ]
    start = time.monotonic()
    readable = run_jobs(compare, jobs, workers=config.workers or num_cores(), title="comparing")
    seconds = max(time.monotonic() - start, 1e-9)
    log.info("%d pairs in %.1f s, %.0f a second", sum(readable), seconds, sum(readable) / seconds)
    return readable


# --- the report ----------------------------------------------------------------------------------------------------


def _report(study: Study, readable: Sequence[int], members: dict[str, Members]) -> dict[str, Any]:
    """The content of overlap.json."""
    training = {source.name: Counter[str]() for source in study.data.sources}
    overlap: dict[str, dict[str, Counter[str]]] = {name: {} for name in training}
    examples: list[dict[str, Any]] = []
    shown: Counter[tuple[str, int, str]] = Counter()
    met = {name: np.zeros(int(of.entries.max(initial=-1)) + 1, np.bool_) for name, of in members.items()}
    for number, unit in enumerate(study.units):
        name = study.data.sources[unit.source].name
        hits = study.hits(number)
        training[name].update(records=readable[number], unreadable=unit.records - readable[number])
        for key, counts in _counted(study, hits).items():
            overlap[name].setdefault(key, Counter()).update(counts)
        examples += _examples(study, number, hits, shown)
        with np.load(study.files[number], allow_pickle=False) as found:
            for lookup in set(met) & set(found.files):
                met[lookup][found[lookup]] = True
    settings = ("data", "against", "split", "ngram", "shortest", "characters", "drop")
    return {
        "settings": {name: getattr(study.config, name) for name in settings},
        "training": training,
        "evaluation": _touched(study, members, met),
        "overlap": overlap,
        "examples": examples,
    }


def _counted(study: Study, hits: Hits) -> dict[str, Counter[str]]:
    """Evaluation set -> records with each reason, and with any."""
    each = merged(hits, ("record", "set"))
    found = {}
    for number in np.unique(each["set"]).tolist():
        reasons = each["reasons"][each["set"] == number]
        counts = {reason: int((reasons >> bit & 1).sum()) for bit, reason in enumerate(REASONS)}
        found[study.sets[number].name] = Counter({**counts, "any": len(reasons)})
    return found


def _touched(study: Study, members: dict[str, Members], met: dict[str, NDArray[np.bool_]]) -> dict[str, dict[str, Any]]:
    """Evaluation set -> its queries and answers, and how many of them training data have."""
    texts, size = study.texts, len(study.texts.texts)
    flags = {name: np.zeros(size, np.bool_) for name in ("exact", "pairs", "runs")}
    for name, of in members.items():
        flags[name if name in flags else "runs"][of.owners[met[name][of.entries]]] = True
    found = {}
    for number, each in enumerate(study.sets):
        mine = texts.sets == number
        queries, answers = mine & texts.queries, mine & ~texts.queries
        found[each.name] = {
            "queries": int(queries.sum()),
            "passages": int(answers.sum()),
            "found": {
                "query": int((queries & flags["exact"]).sum()),
                "passage": int((answers & flags["exact"]).sum()),
                "pair": int((queries & flags["pairs"]).sum()),
                "query_ngram": int((queries & flags["runs"]).sum()),
                "passage_ngram": int((answers & flags["runs"]).sum()),
            },
            "notes": list(each.notes),
        }
    return found


def _examples(study: Study, number: int, hits: Hits, shown: Counter[tuple[str, int, str]]) -> list[dict[str, Any]]:
    """The first records of each source, set and reason, until `shown` has enough of them."""
    chosen: list[tuple[str, Any]] = []
    source = study.data.sources[study.units[number].source].name
    for of in np.unique(hits["set"]).tolist():
        for bit, reason in enumerate(REASONS):
            rows = hits[(hits["set"] == of) & (hits["reasons"] >> bit & 1 == 1)]
            _, first = np.unique(rows["record"], return_index=True)
            wanted = study.config.examples - shown[source, of, reason]
            chosen += [(reason, row) for row in rows[first[:wanted]]]
            shown[source, of, reason] += min(len(first), wanted)
    records = _records(study, number, {int(row["record"]) for _, row in chosen}) if chosen else {}
    return [_example(study, source, reason, row, records[int(row["record"])]) for reason, row in chosen]


def _example(study: Study, source: str, reason: str, hit: Any, record: dict[str, str]) -> dict[str, Any]:
    text = int(hit["text"])
    side = "queries" if study.texts.queries[text] else "passages"
    found = {
        "source": source,
        "record": int(hit["record"]),
        "id": record["id"],
        "set": study.sets[int(hit["set"])].name,
        "reason": reason,
        "found": f"{side}[{study.texts.numbers[text]}]",
    }
    if study.config.texts:
        found |= {"query": record["query"], "passage": record["passage"], "text": study.texts.texts[text]}
    return found


def _records(study: Study, number: int, wanted: set[int]) -> dict[int, dict[str, str]]:
    """Id and texts of some records of a unit, by their numbers in the source."""
    found: dict[int, dict[str, str]] = {}
    columns = ("id", "query", "passage")
    for first, block in scan.tables(study.data, study.units[number], columns, policy=study.policy):
        rows = [record - first for record in sorted(wanted) if first <= record < first + len(block)]
        found |= zip((first + row for row in rows), block.take(rows).to_pylist(), strict=True) if rows else ()
    return found


def _shown(report: dict[str, Any]) -> str:
    """The tables for the terminal."""
    rows, clean = [], 0
    for source, by_set in report["overlap"].items():
        for name in report["evaluation"]:
            counts = by_set.get(name)
            clean += not counts
            if counts:
                rows.append((source, name, *(f"{counts[reason]:,}" for reason in (*REASONS, "any"))))
    heads = ("source", "evaluation set", *(reason.replace("_ngram", " n-gram") for reason in REASONS), "any")
    parts = [text_table(heads, rows)] if rows else []
    parts.append(f"{len(rows)} of {len(rows) + clean} pairs of a source and an evaluation set overlap")
    heads = ("evaluation set", "of", "texts", "equal in training data", "n-gram in training data")
    lines = []
    for name, of in report["evaluation"].items():
        for side, size in (("query", of["queries"]), ("passage", of["passages"])):
            found = of["found"]
            lines.append((name, side, f"{size:,}", f"{found[side]:,}", f"{found[f'{side}_ngram']:,}"))
        parts += [f"{name}: {note}" for note in of["notes"]]
    parts.append(text_table(heads, lines))
    unreadable = sum(counts["unreadable"] for counts in report["training"].values())
    parts += [f"{unreadable:,} damaged records could not be compared, and are not kept"] if unreadable else []
    if "dropped" in report:
        lines = [(name, *(f"{counts[key]:,}" for key in _KEPT)) for name, counts in report["dropped"].items()]
        parts.append(text_table(("source", *(key.replace("_ngram", " n-gram") for key in _KEPT)), lines))
    return "\n\n".join(parts)


# --- the kept shards -----------------------------------------------------------------------------------------------

_KEPT = ("kept", "dropped", *REASONS)


def _write_kept(study: Study, folder: Path) -> dict[str, dict[str, int]]:
    """Write the records without a reason in `drop` as shards, and a line about each of the others; count both.

    Raises:
        UserError: nothing would be kept.
    """
    dtype = scan.token_dtype(study.data, study.policy)
    shards: list[ShardInfo] = []
    counts: dict[str, dict[str, int]] = {}
    with (folder / DROPPED).open("wb") as dropped:
        for number, source in enumerate(study.data.sources):
            plain = all(shard.kind == "plain" for shard in source.index.shards)
            size = study.config.shard_mib << 20
            kind = "plain" if plain else "block"
            found: Counter[str] = Counter()
            with ShardWriter(folder, source.name, kind=kind, shard_bytes=size, token_dtype=dtype) as writer:
                for kept, lines in _sorted_out(study, number, found):
                    scan.write_rows(writer, kept, tokens=dtype is not None)
                    dropped.writelines(orjson.dumps(line) + b"\n" for line in lines)
            shards += writer.close()
            counts[source.name] = {key: found[key] for key in _KEPT}
    if not shards:
        raise UserError(f"drop={study.config.drop}: every record overlaps, so none would be kept; drop fewer reasons")
    write_index(folder, shards, scan.tokenizer(study.data))
    return counts


def _sorted_out(study: Study, source: int, counts: Counter[str]) -> Iterator[tuple[pa.Table, list[dict[str, Any]]]]:
    """(rows to keep, what to say of the others) of each block of a source."""
    for number, unit in enumerate(study.units):
        if unit.source != source:
            continue
        hits = merged(study.hits(number), ("record", "set"))
        hits = hits[hits["reasons"] & study.dropped > 0]
        for first, block in scan.tables(study.data, unit, policy=study.policy):
            mine = hits[slice(*np.searchsorted(hits["record"], (first, first + len(block))))]
            out = np.unique(mine["record"] - first)
            keep = np.ones(len(block), np.bool_)
            keep[out] = False
            lines = _lines(study, study.data.sources[source].name, block.take(out), mine, counts)
            counts.update(kept=int(keep.sum()), dropped=len(out))
            yield block.filter(pa.array(keep)), lines


def _lines(study: Study, source: str, rows: pa.Table, hits: Hits, counts: Counter[str]) -> list[dict[str, Any]]:
    """What to say of dropped records, which are the rows in order; each is counted under all of its reasons."""
    lines = []
    starts = np.flatnonzero(np.diff(hits["record"], prepend=-1))
    for row, mine in zip(rows.to_pylist(), np.split(hits, starts)[1:], strict=True):
        reasons = {study.sets[int(hit["set"])].name: _words(int(hit["reasons"])) for hit in mine}
        counts.update({reason for found in reasons.values() for reason in found})
        line = {"source": source, "record": int(mine["record"][0]), "id": row["id"], "reasons": reasons}
        lines.append(line | ({"query": row["query"], "passage": row["passage"]} if study.config.texts else {}))
    return lines


def _words(reasons: int) -> list[str]:
    return [reason for bit, reason in enumerate(REASONS) if reasons >> bit & 1]
