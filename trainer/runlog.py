"""A run folder read back: its curves without what a restart repeated, how it stands, and what it was made of.

Everything here may be missing, damaged or written by a stranger: what cannot be read is counted, never raised.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import orjson
import yaml

from data.errors import Stopped
from trainer import runfolder

# The command that each objective belongs to: what a run is called in the log, in W&B and in lists.
STAGES = {"contrastive": "pretrain", "distillation": "finetune", "ranking": "teacher"}

Row = dict[str, float]
_EVERY_RUN_HAS = ("config.yaml", "metrics.jsonl", "run.json")


@dataclass
class Start:
    """One start of a run: what it logged first and last, and the seconds its logged steps took."""

    number: int
    first_step: int
    first_time: float
    last_step: int = 0
    last_time: float = 0.0
    step_seconds: float = 0.0


@dataclass(frozen=True)
class RunLog:
    """A run folder as it was at one moment.

    Attributes:
        name: how the run is called beside others.
        rows: what was logged at each step, in order; of a step that was repeated, what the last start said. Values
            that are no finite numbers are NaN or infinite.
        starts: every start that logged something; the first row of each but the first is where a restart shows.
        repeated: rows left out since a later start came by their step again.
        damaged: lines of metrics.jsonl that cannot be read.
        config, environment, exit, results, evaluation, identity: the folder's files; empty where there is none.
        incidents: how many there were, by kind.
        running: a process works in the folder now.
    """

    folder: Path
    name: str
    rows: list[Row] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    repeated: int = 0
    damaged: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)
    exit: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    incidents: Counter[str] = field(default_factory=Counter)
    running: bool = False

    @property
    def stage(self) -> str:
        return STAGES.get(str(self.config.get("objective")), "-")

    @property
    def state(self) -> str:
        """running, done, stopped (start it again to go on), failed, or new: nothing was logged yet."""
        if self.running:
            return "running"
        if self.exit:
            return {0: "done", Stopped.exit_code: "stopped"}.get(self.exit.get("code", 1), "failed")
        return "failed" if self.rows or self.identity else "new"

    @property
    def reason(self) -> str:
        """How the run ended, in a few words."""
        if self.running:
            return ""
        return str(self.exit.get("reason", "")) or ("ended without exit.json" if self.state == "failed" else "")

    @cached_property
    def step(self) -> int:
        """The last step that was logged, or that the run says it ended with."""
        last = int(self.rows[-1]["train/step"]) if self.rows else 0
        ended = self.exit.get("step")
        return max(last, ended) if isinstance(ended, int) and not self.running else last

    @property
    def steps(self) -> int | None:
        """How many steps the run is to take."""
        wanted = self.config.get("steps")
        return wanted if isinstance(wanted, int) else None

    @property
    def attempts(self) -> int:
        """How often the run was started."""
        counted = self.identity.get("attempt")
        return max(len(self.starts), counted if isinstance(counted, int) else 0)

    @property
    def seconds(self) -> float:
        """What the logged steps took, over all starts, without pauses between and saves within them."""
        return sum(start.step_seconds for start in self.starts)

    @property
    def updated(self) -> float:
        """When the run last said something, in seconds since 1970; 0 if never."""
        ended = self.exit.get("time")
        logged = max((start.last_time for start in self.starts), default=0.0)
        return max(logged, float(ended) if isinstance(ended, int | float) else 0.0)

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """The steps at which a metric was logged, and its values."""
        rows = [row for row in self.rows if metric in row]
        return [int(row["train/step"]) for row in rows], [row[metric] for row in rows]

    def last(self, metric: str) -> float | None:
        return next((row[metric] for row in reversed(self.rows) if metric in row), None)

    def held_out(self) -> list[str]:
        """The groups that held-out metrics were logged for: data sets, each followed by its sources."""
        names = {name for row in self.rows for name in row if name.startswith("eval/")}
        return sorted({name.removeprefix("eval/").rpartition("/")[0] for name in names})

    def best_ndcg(self) -> float | None:
        """The highest nDCG@10 of an evaluation in training, as a mean over data sets; else that of results.json."""
        groups = self.held_out()
        whole = [name for name in groups if not any(name.startswith(f"{other}/") for other in groups)]
        keys = [f"eval/{name}/ndcg_at_10" for name in whole]
        means = [_mean([row[key] for key in keys]) for row in self.rows if keys and all(key in row for key in keys)]
        finite = [mean for mean in means if math.isfinite(mean)]
        if finite:
            return max(finite)
        scores = [entry.get("ndcg_at_10") for entry in self.results.values() if isinstance(entry, Mapping)]
        numbers = [float(score) for score in scores if isinstance(score, int | float)]
        return _mean(numbers) if numbers else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _EVERY_RUN_HAS) and not (folder / "index.json").is_file()


def read(folder: Path, name: str = "") -> RunLog:
    """Everything that a run folder says; never raises for what is missing or damaged in it."""
    config, environment = mapping(folder / "config.yaml"), mapping(folder / "environment.json")
    every = config.get("log_every")
    rows, starts, repeated, damaged = _curves(folder / "metrics.jsonl", every if isinstance(every, int) else 1)
    return RunLog(
        folder,
        name or folder.resolve().name,
        rows,
        starts,
        repeated,
        damaged,
        config,
        environment,
        identity=mapping(folder / "run.json"),
        exit=mapping(folder / "exit.json"),
        results=mapping(folder / "results.json"),
        evaluation=mapping(folder / "evaluation.json"),
        incidents=_incidents(folder / "incidents.jsonl"),
        running=runfolder.is_held(folder),
    )


def mapping(path: Path) -> dict[str, Any]:
    """A JSON or YAML file with a mapping; empty when there is no such file or it holds something else."""
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return {str(name): value for name, value in values.items()} if isinstance(values, dict) else {}


def _curves(path: Path, log_every: int) -> tuple[list[Row], list[Start], int, int]:
    """Rows, starts, rows repeated, lines damaged."""
    rows: dict[int, Row] = {}
    starts: list[Start] = []
    repeated = damaged = 0
    for row in _lines(path):
        if row is None:
            damaged += 1
            continue
        step, attempt = int(row["train/step"]), int(row.get("run/attempt", 1))
        if not starts or starts[-1].number != attempt:
            undone = [other for other in rows if other >= step] if starts else []
            repeated += len(undone)
            for other in undone:
                del rows[other]
            since = step if not starts else min(step, log_every)
            starts.append(Start(attempt, step, row.get("run/time", 0.0)))
        else:
            since = step - starts[-1].last_step
        _count(starts[-1], row, step, since)
        rows.setdefault(step, {}).update(row)
    return [rows[step] for step in sorted(rows)], starts, repeated, damaged


def _count(start: Start, row: Row, step: int, since: int) -> None:
    """Note a row of this start, which comes `since` steps after the one before it."""
    seconds = since * row.get("perf/step_s", 0.0)
    start.step_seconds += seconds if math.isfinite(seconds) else 0.0
    start.last_step, start.last_time = step, row.get("run/time", start.last_time)


def _lines(path: Path) -> Iterator[Row | None]:
    """The rows of metrics.jsonl; None for a line that is none. A last line without its end is still being written."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError:
        return
    yield from map(_row, lines)


def _row(line: bytes) -> Row | None:
    try:
        values = orjson.loads(line)
        row = {name: _number(value) for name, value in values.items()}
        kept = {name: value for name, value in row.items() if value is not None}
        return kept if math.isfinite(kept["train/step"]) and kept["train/step"] >= 0 else None
    except (ValueError, AttributeError, KeyError):
        return None


def _number(value: Any) -> float | None:
    """A number as Journal writes it: JSON has no word for those that are not finite."""
    if isinstance(value, int | float):
        return value
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else None


def _incidents(path: Path) -> Counter[str]:
    counts: Counter[str] = Counter()
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return counts
    for line in lines:
        try:
            counts[str(orjson.loads(line)["kind"])] += 1
        except (ValueError, TypeError, KeyError):
            counts["unreadable"] += 1
    return counts


def names_of(folders: Sequence[Path]) -> list[str]:
    """Short names that tell the folders apart: the last part of each path, with as much before it as that takes."""
    parts = [Path(os.path.abspath(folder)).parts for folder in folders]
    for length in range(1, max(map(len, parts), default=1)):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested configuration by dotted names; lists stay whole."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def natural(text: str) -> list[tuple[int, int, str]]:
    """A key that sorts run-2 before run-10."""
    pieces = re.split(r"(\d+)", text)
    return [(1, int(piece), "") if piece.isdecimal() else (0, 0, piece.lower()) for piece in pieces if piece]
