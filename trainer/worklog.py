"""What a stage that takes no training steps tells of itself, through the same door as a training.

metrics.jsonl, and the offline runs of W&B, lie in a folder beside the output: that one holds the same bytes however
often the work was stopped, and is not there before it is done.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from data.errors import QuintetError, Stopped, UserError
from trainer import distributed, embed
from trainer.monitor import Monitor
from trainer.runfolder import Run

_AXIS = "work/seconds"
_LOGIN = re.compile(r"//[^/@\s]+@")  # of a URL


class Worklog:
    """Logs at the present moment."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor, self._begin = monitor, time.monotonic()

    def log(self, values: Mapping[str, float]) -> None:
        """Record values by metric name."""
        self._monitor.log(time.monotonic() - self._begin, values)

    def progress(self, what: str, rate: embed.Rate) -> None:
        """Record how far a phase is."""
        phase = re.sub("[^a-z]+", "_", what)
        self.log({f"work/{phase}/done": rate.done, f"work/{phase}/per_s": rate.done / max(rate.seconds, 1e-9)})


@contextmanager
def follow(folder: Path, stage: str, name: str, config: Any, run: Run | None = None) -> Iterator[Worklog]:
    """Tell of the work inside: its progress, what is logged, and how it ends. On ranks but 0 nothing is told.

    Args:
        folder: of metrics.jsonl; made when missing.
        name: of the run, unless the configuration has another.
        config: a stage's, with a section `wandb`.
        run: who it is, when it goes on with what an earlier start began.

    Raises:
        UserError: the folder cannot be written.
    """
    run = run or Run(secrets.token_hex(4), 1)
    place = replace(config.wandb, name=config.wandb.name or name)
    who = {"job_type": stage, "run_id": run.id, "attempt": run.attempt}
    shown: dict[str, Any] = {"config": _public(config), "steps": 0, "axis": _AXIS, "console": False}
    try:
        if distributed.rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
        monitor = Monitor(folder, place, rank=distributed.rank(), **who, **shown)  # type: ignore[arg-type]
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error}); name another output") from error
    log, code, reason = Worklog(monitor), 1, "crashed"
    try:
        with embed.listening(log.progress):
            yield log
        code, reason = 0, "done"
    except QuintetError as error:
        code, reason = error.exit_code, str(error) or "another rank ended the job"
        raise
    except KeyboardInterrupt:
        code, reason = Stopped.exit_code, "interrupted"
        raise
    finally:
        monitor.end(code, f"{stage} {name}: {reason}")
        monitor.finish(code)


def _public(config: Any) -> dict[str, Any]:
    """The plain keys of a configuration, without what stands before the @ of a URL."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return {name: _bare(value) for name, value in values.items() if isinstance(value, str | int | float | list)}


def _bare(value: Any) -> Any:
    if isinstance(value, list):
        return [_bare(each) for each in value]
    return _LOGIN.sub("//***@", value) if isinstance(value, str) else value
