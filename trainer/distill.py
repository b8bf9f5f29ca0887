"""Stage `distill`: a worker that writes a teacher's scores of mined shards into the score cache."""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data.errors import DataError, UserError
from data.settings import key
from trainer.monitor import StageWandbConfig

if TYPE_CHECKING:
    import torch

    from data.reading import Policy
    from data.scores import ScoreCache
    from trainer.crossencoder import Teacher
    from trainer.scoring import Shard, Worker

_log = logging.getLogger("quintet")

_STOP_FILE = "STOP"


@dataclass(frozen=True, kw_only=True)
class TemplateOverride:
    """What the teacher reads, instead of what its own folder says."""

    query: str | None = key(None, help="text of the first side, with {query} in it; null: the teacher's own")
    passage: str | None = key(None, help="text of the second side, with {passage} in it; null: the teacher's own")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Keys of `quintet distill`."""

    teacher: str = key(help="re-ranker: a folder or hub id of a sequence-classification model with one label")
    data: str | list[str] = key(help="mined shards: folders, globs, or a mixture file")
    scores: str = key(help="folder of the score cache; workers on any number of machines share it")
    check: bool = key(False, help="score nothing: verify the cache, and that it covers the data (exit code 3 if not)")
    follow: bool = key(False, help="wait for further shards until there is a file STOP in the folder scores")
    poll_seconds: float = key(10.0, help="follow: time between two looks at data", above=0)

    template: TemplateOverride = key(TemplateOverride(), help="the teacher's two texts")
    max_length: int = key(0, help="tokens of query and passage together; 0: the teacher's own, else 192", low=0)
    max_query_length: int = key(0, help="tokens of the query; 0: the teacher's own, else half of max_length", low=0)
    precision: str = key("fp32", help="matrix products of the teacher", choices=("fp32", "bf16", "fp16"))
    tokens_per_chunk: int | None = key(
        None, help="padded tokens of one forward pass; null: 65536 on a GPU, 512 (half precision: 2048) on a CPU", low=1
    )
    flush_pairs: int = key(4_096, help="scores in a file: at most so many are lost by a kill", low=1)
    claim_seconds: float = key(60.0, help="take over a shard when its worker elsewhere is silent for so long", above=0)

    damaged: str = key(
        "strict", help="damaged shards: strict stops, skip leaves out and tells", choices=("strict", "skip")
    )
    allow_pipe: bool = key(False, help="let shard lists run commands (pipe:)")
    wandb: StageWandbConfig = key(StageWandbConfig(), help="mirror of progress and results")
    device: str = key("auto", help="auto: CUDA when there is one", choices=("auto", "cpu", "cuda"))


def run(config: Config) -> None:
    """Score what has no score yet, or with `check` see whether anything has none.

    Raises:
        UserError: no teacher, two labels, shards without negatives, a disk that is full.
        DataError: damaged shards or cache; with `check`, missing scores.
        NumericError: the teacher gives NaN or infinity.
        Stopped: asked to stop; what was scored is written.
    """
    from data.scores import ScoreCache
    from trainer.crossencoder import fingerprint
    from trainer.device import pick_device

    device = pick_device("cpu" if config.check else config.device)
    teacher = _open_teacher(config, device)
    known = ScoreCache(config.scores, fingerprint(teacher))
    _about_the_cache(config, known)
    if config.check:
        _check(config, known)
    else:
        _work(config, teacher, known, device)


def _open_teacher(config: Config, device: torch.device) -> Teacher:
    from trainer.crossencoder import open_teacher

    return open_teacher(
        config.teacher,
        device,
        query=config.template.query,
        passage=config.template.passage,
        max_length=config.max_length,
        max_query_length=config.max_query_length,
    )


def _about_the_cache(config: Config, known: ScoreCache) -> None:
    from data.scores import fingerprints

    known.load()
    _log.info("teacher %s: %s scores in %s", config.teacher, f"{len(known):,}", known.folder)
    others = [name for name in fingerprints(config.scores) if name != known.fingerprint]
    if others and not len(known):
        _log.warning(
            "scores=%s holds scores of other teachers (%s) and none of this one (%s): another model, tokenizer, "
            "template or length is another teacher",
            config.scores,
            ", ".join(others),
            known.fingerprint,
        )


# --- the worker --------------------------------------------------------------------------------------------------


def _work(config: Config, teacher: Teacher, known: ScoreCache, device: torch.device) -> None:
    from trainer import worklog
    from trainer.preempt import StopRequest
    from trainer.scoring import Scorer, Worker

    name = f"{socket.gethostname()}-{os.getpid()}"
    scorer = Scorer(teacher, device, config.precision, config.tokens_per_chunk)
    # As rank 1 it heeds signals alone: the file STOP is for all workers, so none of them may remove it.
    with StopRequest(config.scores, rank=1) as stop:
        worker = Worker(scorer, known, stop, config.flush_pairs, config.claim_seconds, _policy(config))
        _write_about(config, teacher, known)
        with worklog.follow(known.folder / "log" / name, "distill", name, config) as log:
            worker.told = log.log
            try:
                _score_all(config, worker)
            finally:
                log.log(worker.figures())
                _print_tally(worker)


def _score_all(config: Config, worker: Worker) -> None:
    """Go through the data once, or again and again for shards that come later."""
    from trainer import distributed

    seen: set[str] = set()
    place = distributed.place()
    while True:
        last = not config.follow or (Path(config.scores) / _STOP_FILE).exists()
        shards = [shard for _, shards in _shards(config) for shard in shards if shard.key not in seen]
        # Ranks begin at different shards; claims then keep them apart.
        first = place.rank * len(shards) // place.world
        worker.score(shards[first:] + shards[:first])
        seen.update(shard.key for shard in shards)
        if last:
            return
        worker.wait(config.poll_seconds)


def _shards(config: Config) -> list[tuple[str, list[Shard]]]:
    """The shards of every source by its name; a worker that follows waits for data that is not there yet."""
    from data import mixture
    from trainer.scoring import shards_of

    try:
        sources = mixture.load(config.data, allow_pipe=config.allow_pipe, policy=_policy(config)).sources
    except UserError as error:
        if not config.follow or config.check:
            raise
        _log.info("waiting for data: %s", error)
        return []
    return [(source.name, shards_of(source)) for source in sources]


def _policy(config: Config) -> Policy:
    return "skip" if config.damaged == "skip" else "strict"


def _write_about(config: Config, teacher: Teacher, known: ScoreCache) -> None:
    """Leave word of which teacher the scores are: a fingerprint says nothing to a reader."""
    import orjson

    from data.parts import write_whole

    about = {"teacher": config.teacher, **asdict(teacher.pairs.settings)}
    text = orjson.dumps(about, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
    write_whole(known.folder / "about.json", lambda partial: partial.write_bytes(text))


def _print_tally(worker: Worker) -> None:
    from data.tables import table

    tally = worker.tally
    numbers = (tally.shards, tally.records, tally.pairs, tally.found, tally.scored)
    head = ["shards", "records", "pairs", "found", "scored"]
    print(table([*head, "rate"], [[*(f"{number:,}" for number in numbers), str(worker.rate)]]))
    if tally.bare:
        _log.warning("%d of %d records have no negatives: only their own pair was scored", tally.bare, tally.records)


# --- the check ---------------------------------------------------------------------------------------------------


def _check(config: Config, known: ScoreCache) -> None:
    """Print how much of every source is covered. Raises DataError when something is not."""
    from data.tables import table
    from trainer.scoring import coverage

    found = {name: coverage(known, shards, _policy(config)) for name, shards in _shards(config)}
    rows = [
        [name, f"{one.shards:,}", f"{one.pairs:,}", f"{one.pairs - one.missing:,}", f"{one.missing:,}"]
        for name, one in found.items()
    ]
    print(table(["source", "shards", "pairs", "scored", "missing"], rows))
    print(
        f"{known.folder}: {len(known):,} scores in {len(known.segments):,} files, all whole; {known.repeated:,} pairs "
        f"were scored more than once, with differences up to {known.spread:.2g}"
    )
    missing = sum(one.missing for one in found.values())
    if missing:
        pairs = sum(one.pairs for one in found.values())
        raise DataError(
            f"scores={config.scores}: {missing:,} of {pairs:,} pairs have no score by this teacher "
            f"({known.fingerprint}); run quintet distill without check"
        )
