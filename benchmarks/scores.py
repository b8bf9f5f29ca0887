"""The score cache and the teacher that fills it.

Reading: a warm cache on disk, opened and asked for the pairs of batches as the trainer does, beside SQLite with the
same rows and a primary key, asked for the same pairs. Scoring: windows of mined shards through the distillation
worker's scorer, tokenising included, beside sentence-transformers' CrossEncoder.predict at the best of its batch
sizes, on the same model and texts.
"""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sentence_transformers import CrossEncoder
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from benchmarks.common import DEMO, GateError, Timing, alternate, ratio, rivals, table, target
from data.groups import Numbers, Pairs, windows
from data.index import read
from data.records import Record
from data.scores import ScoreCache, Scores, ScoreWriter
from data.shards import ShardWriter, write_index
from trainer.crossencoder import open_teacher
from trainer.device import keep_freed_memory
from trainer.scoring import Scorer

SEED, TEACHER = 5, "0" * 32
COLLECTED_TEACHER, COLLECTED_PAIRS = DEMO / "teacher" / "model", DEMO / "mined"


@dataclass(frozen=True)
class Case:
    """Scores in the cache and in a file of it; pairs of a batch; then the teacher's size and its work."""

    scores: int = 4_000_000
    segment: int = 4_096
    batch: int = 2_048  # 256 queries, a positive and 7 negatives
    batches: int = 100
    layers: int = 6
    size: int = 384
    queries: int = 64
    negatives: int = 7
    batch_sizes: tuple[int, ...] = (8, 16, 32, 64, 128)
    repeats: int = 5
    device: str = "cpu"
    precision: str = "fp32"  # or bf16: ours by autocast, the peer's weights as a whole


FULL = Case()
QUICK = Case(scores=20_000, segment=1_000, batches=3, layers=1, size=32, queries=6, batch_sizes=(8, 16), repeats=1)


def measure(quick: bool = False) -> dict[str, Any]:
    case = QUICK if quick else FULL
    keep_freed_memory()  # as every stage does; the peer, in the same process, has it too
    reading = _reading(case)
    scored = {f"a teacher of {case.layers} layers of {case.size}, fp32": scoring(case)}
    if not quick and COLLECTED_TEACHER.is_dir():
        scored["collected text, the teacher of make demo-full, fp32"] = collected_scoring(case)
    return {
        "settings": vars(case) | {"seed": SEED},
        "correctness": {f"largest difference of a logit, {name}": each["difference"] for name, each in scored.items()},
        "tables": [
            table(f"{case.scores:,} scores, warm, by batches of {case.batch:,}", reading["rows"]),
            *(table(name, each["rows"]) for name, each in scored.items()),
        ],
        "targets": [
            target("scores a second out of a warm cache, opening it included", 200_000, reading["opened"]),
            target("scores a second out of an open cache", 200_000, reading["looked up"]),
            *(target(f"{name}: over CrossEncoder.predict's best", 1.3, each["ratio"]) for name, each in scored.items()),
        ],
    }


# --- reading -----------------------------------------------------------------------------------------------------


def _reading(case: Case) -> dict[str, Any]:
    random = np.random.default_rng(SEED)
    limits = np.iinfo(np.int64)
    query, passage = random.integers(limits.min, limits.max, (2, case.scores))
    logit = random.normal(0, 5, case.scores).astype(np.float32)
    asked = random.integers(0, case.scores, (case.batches, case.batch))
    with tempfile.TemporaryDirectory() as folder:
        writer = ScoreWriter(folder, TEACHER)
        for start in range(0, case.scores, case.segment):
            rows = slice(start, start + case.segment)
            writer.add(query[rows], passage[rows], logit[rows])
            writer.flush()
        cache = ScoreCache(folder, TEACHER)
        cache.load()
        database = _database(Path(folder) / "scores.sqlite", Scores(query, passage, logit))
        batches = [(query[rows], passage[rows]) for rows in asked]
        wanted = logit[asked]
        _same("the cache", np.stack([cache.lookup(*batch)[0] for batch in batches]), wanted)
        _same("SQLite", np.stack([_ask(database, *batch) for batch in batches]), wanted)
        work: dict[str, Callable[[], object]] = {
            "ours, opened": lambda: ScoreCache(folder, TEACHER).load(),
            "ours, looked up": lambda: [cache.lookup(*batch) for batch in batches],
            "SQLite, looked up": lambda: [_ask(database, *batch) for batch in batches],
        }
        timings = alternate(work, case.repeats)
        database.close()
    counts = dict(zip(work, (case.scores, asked.size, asked.size), strict=True))
    rows = [
        {"what": name, **timing.cells(), "scores/s": round(counts[name] / timing.median)}
        for name, timing in timings.items()
    ]
    opened, looked_up = (timings[f"ours, {name}"].median for name in ("opened", "looked up"))
    return {
        "rows": rows,
        # every score read from disk and asked for once
        "opened": 1 / (opened / case.scores + looked_up / asked.size),
        "looked up": asked.size / looked_up,
    }


def _database(file: Path, rows: Scores) -> sqlite3.Connection:
    database = sqlite3.connect(file)
    database.execute(
        "CREATE TABLE scores (query INTEGER, passage INTEGER, logit REAL, PRIMARY KEY (query, passage)) WITHOUT ROWID"
    )
    columns = (rows.query_hash.tolist(), rows.passage_hash.tolist(), rows.logit.tolist())
    database.executemany("INSERT INTO scores VALUES (?, ?, ?)", zip(*columns, strict=True))
    database.commit()
    return database


def _ask(database: sqlite3.Connection, query: np.ndarray, passage: np.ndarray) -> np.ndarray:
    ask = database.cursor()
    statement = "SELECT logit FROM scores WHERE query = ? AND passage = ?"
    pairs = zip(query.tolist(), passage.tolist(), strict=True)
    return np.array([ask.execute(statement, pair).fetchone()[0] for pair in pairs], np.float32)


def _same(name: str, got: np.ndarray, wanted: np.ndarray) -> None:
    if not np.array_equal(got, wanted):
        raise GateError(f"{name} gives other scores than were written")


# --- scoring -----------------------------------------------------------------------------------------------------


def scoring(case: Case) -> dict[str, Any]:
    """A random teacher, and all pairs of a window of random words."""
    records = _records(case)
    with tempfile.TemporaryDirectory() as folder:
        model, mined = _model(Path(folder) / "model", case, records), Path(folder) / "mined"
        with ShardWriter(mined, "mined") as writer:
            for record in records:
                writer.write(record)
        (pairs,) = windows(write_index(mined, writer.close()), 0)
        return _beside_predict(case, model, [Part(pairs, np.arange(len(pairs)))])


def collected_scoring(case: Case) -> dict[str, Any]:
    """The teacher of `make demo-full`, and some pairs of each source that it scored; no text of them is cut."""
    random, parts = np.random.default_rng(SEED), []
    encoder = open_teacher(str(COLLECTED_TEACHER), torch.device(case.device)).pairs
    index = read(COLLECTED_PAIRS / "index.json", COLLECTED_PAIRS)
    for shard in range(len(index.shards)):
        pairs = next(windows(index, shard))
        part = Part(pairs, random.choice(len(pairs), 2 * case.queries, replace=False))
        queries, passages = zip(*part.texts(), strict=True)
        parts.append(Part(pairs, part.chosen[encoder.whole(queries, passages)]))
    return _beside_predict(case, COLLECTED_TEACHER, parts)


class Part(NamedTuple):
    """Some of the pairs of a window."""

    pairs: Pairs
    chosen: Numbers

    def texts(self) -> list[tuple[str, str]]:
        pairs = self.pairs
        places = zip(pairs.query_row[self.chosen].tolist(), pairs.passage_row[self.chosen].tolist(), strict=True)
        return [(pairs.queries[query].as_py(), pairs.passages[passage].as_py()) for query, passage in places]


def _beside_predict(case: Case, model: Path, parts: Sequence[Part]) -> dict[str, Any]:
    device, half = torch.device(case.device), case.precision == "bf16"
    scorer = Scorer(open_teacher(str(model), device), device, case.precision, None)
    weights = {"dtype": torch.bfloat16 if half else torch.float32}
    length = scorer.teacher.pairs.settings.max_length
    peer = CrossEncoder(str(model), max_length=length, device=case.device, model_kwargs=weights)
    texts = [text for part in parts for text in part.texts()]

    def ours() -> np.ndarray:
        return np.concatenate([_scored(scorer, part) for part in parts])

    def theirs(batch_size: int) -> np.ndarray:
        raw = torch.nn.Identity()
        return peer.predict(texts, batch_size=batch_size, activation_fn=raw, show_progress_bar=False)

    got, wanted = ours(), theirs(case.batch_sizes[0])
    difference = float(np.abs(got - wanted).max())
    alike = np.corrcoef(got, wanted)[0, 1] > 0.99 if half else difference <= 1e-4
    if not alike:
        raise GateError(f"the logits differ by {difference:.1e}")
    timings = _alternated(case, ours, theirs)
    ours_timing, peers = timings["ours"], [timing for name, timing in timings.items() if name != "ours"]
    rows = [{"what": name, **timing.cells(), "pairs/s": len(texts) / timing.median} for name, timing in timings.items()]
    return {"rows": rows, "ratio": ratio(peers, ours_timing), "difference": difference}


def _alternated(case: Case, ours: Callable[[], object], theirs: Callable[[int], object]) -> dict[str, Timing]:
    """Ours beside the peer at those of its batch sizes that one search found best."""
    search = {size: (lambda size=size: theirs(size)) for size in case.batch_sizes}
    best = rivals(alternate(search, 1))
    work = {"ours": ours, **{f"CrossEncoder.predict, batches of {size}": search[size] for size in best}}
    return alternate(work, case.repeats)


def _scored(scorer: Scorer, part: Part) -> np.ndarray:
    rows = part.pairs.rows(part.chosen, scorer.teacher.pairs)
    logits = np.empty(len(part.chosen), np.float32)
    for chunk, found in scorer(rows):
        logits[chunk] = found
    return logits


def _records(case: Case) -> list[Record]:
    """Queries of some words and passages of uneven lengths, their negatives drawn from all passages as in mining."""
    random = np.random.default_rng(SEED)
    words = [f"w{number}" for number in range(3_000)]

    def texts(count: int, mean: float, deviation: float) -> list[str]:
        lengths = np.clip(random.lognormal(mean, deviation, count), 3, 400).astype(int)
        return [" ".join(random.choice(words, length)) for length in lengths]

    queries, passages = texts(case.queries, 2.0, 0.4), texts(3 * case.queries, 4.2, 0.6)
    drawn = [random.choice(len(passages), 1 + case.negatives, replace=False) for _ in queries]
    found = [[passages[number] for number in row] for row in drawn]
    return [Record(query, first, negatives=tuple(rest)) for query, (first, *rest) in zip(queries, found, strict=True)]


def _model(folder: Path, case: Case, records: Sequence[Record]) -> Path:
    """A BERT with random weights and a WordPiece tokenizer of these texts."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=3_500, special_tokens=special, show_progress=False)
    backend.train_from_iterator([text for r in records for text in (r.query, r.passage, *r.negatives)], trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(["pad_token", "unk_token", "cls_token", "sep_token", "mask_token"], special, strict=True))
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=inputs, **names)
    config = AutoConfig.for_model(
        "bert",
        vocab_size=len(tokenizer),
        num_labels=1,
        hidden_size=case.size,
        num_hidden_layers=case.layers,
        num_attention_heads=case.size // 32,
        intermediate_size=4 * case.size,
        max_position_embeddings=192,
        initializer_range=0.1,
    )
    torch.manual_seed(SEED)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
