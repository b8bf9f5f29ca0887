"""Stage `runs`: the runs below a folder, in the terminal."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data.errors import UserError
from data.settings import key

if TYPE_CHECKING:
    from trainer.runlog import RunLog

# Folders of a run, and of old ones, in which no run is looked for; and how deep one may lie below the root.
_CLOSED = {"checkpoints", "model", "wandb"}
_DEPTH = 4
_HEAD = ("run", "stage", "state", "step", "loss", "nDCG@10", "pairs/s", "starts", "last sign")
_COLOURS = {"running": "cyan", "done": "green", "stopped": "yellow", "failed": "red", "new": "dim"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Keys of `quintet runs`."""

    root: str = key("runs", help="folder below which runs are looked for, or a run folder")


def run(config: Config) -> None:
    """Print a line for each run, the one that changed last first.

    Raises:
        UserError: there is no such folder, or no run in it.
    """
    from trainer import runlog

    root = Path(config.root)
    if not root.is_dir():
        raise UserError(f"root={config.root}: no such folder; give one that has run folders in it")
    logs = [runlog.read(folder, _name(folder, root)) for folder in _found(root)]
    if not logs:
        raise UserError(f"root={config.root}: no run folder in it, down to {_DEPTH} levels below")
    logs.sort(key=lambda log: (-log.updated, runlog.natural(log.name)))
    now = time.time()
    _show([_cells(log, now) for log in logs])


def _found(root: Path) -> Iterator[Path]:
    from trainer.runlog import is_run

    for place, folders, _ in os.walk(root):
        folder = Path(place)
        if is_run(folder):
            yield folder
        deep = len(folder.relative_to(root).parts) >= _DEPTH
        folders[:] = [] if deep else [name for name in folders if not _passed_over(name)]


def _passed_over(name: str) -> bool:
    return name in _CLOSED or name.startswith((".", "before-"))


def _name(folder: Path, root: Path) -> str:
    return str(folder.relative_to(root)) if folder != root else folder.resolve().name


def _cells(log: RunLog, now: float) -> tuple[str, ...]:
    return (
        log.name,
        log.stage,
        log.state,
        f"{log.step:,}/{log.steps:,}" if log.steps else f"{log.step:,}",
        _figure(log.last("train/loss"), ".4f"),
        _figure(log.best_ndcg(), ".3f"),
        _figure(log.last("perf/samples_per_s"), ",.0f"),
        str(log.attempts),
        f"{_age(now - log.updated)} ago" if log.updated else "-",
    )


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _age(seconds: float) -> str:
    """One unit: 40 s, 5 min, 3 h, 12 d."""
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _show(rows: list[tuple[str, ...]]) -> None:
    """In colour and to the terminal's width on a terminal; plain columns elsewhere."""
    if not sys.stdout.isatty():
        from data.tables import table

        print(table(_HEAD, rows))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, header_style="bold", pad_edge=False)
    for number, name in enumerate(_HEAD):
        grid.add_column(name, justify="right" if 3 <= number <= 7 else "left", overflow="fold")
    for row in rows:
        cells = [Text(cell) for cell in row]  # a name is no markup
        cells[2].stylize(_COLOURS[row[2]])
        grid.add_row(*cells)
    Console().print(grid)
