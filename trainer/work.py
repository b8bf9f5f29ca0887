"""How the ranks of a job share work that is cut into parts: dealt out, kept on disk, done once even after a kill.

The phases of a stage follow each other; in each, every rank makes its share of the parts that are still missing:

    for number in work.share(parts, names):
        parts.write(names[number], ...)

`carry_out` is the frame of a stage around its phases.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import orjson
import torch

from data import staging
from data.errors import Stopped, UserError
from data.parts import Parts
from trainer import distributed, worklog
from trainer.device import keep_freed_memory, pick_device
from trainer.preempt import die_with_parent, leaving_when_warned
from trainer.runfolder import Run, write_json

log = logging.getLogger("quintet")

Item = TypeVar("Item")
Made = TypeVar("Made")
Settings = TypeVar("Settings", bound=Any)
Task = TypeVar("Task", bound=Any)

RESULT = "result"  # the folder of those parts that become the output
# Ranks wait for each other at the end of a phase only, and a phase may take days.
_TIMEOUT_SECONDS = 14 * 24 * 3600.0


@contextmanager
def job(
    device: torch.device, timeout_seconds: float = _TIMEOUT_SECONDS, start_seconds: float = distributed.START_SECONDS
) -> Iterator[None]:
    """Join the other ranks of this job, if it has any, and leave them at the end. Raises UserError."""
    if "LOCAL_RANK" in os.environ:
        die_with_parent()  # a launcher that is killed takes its ranks along
    if device.type == "cpu":
        keep_freed_memory()
    distributed.start(device, timeout_seconds, start_seconds=start_seconds)
    try:
        yield
    finally:
        distributed.stop()


def carry_out(
    config: Settings,
    open_task: Callable[[Settings, torch.device], Task],
    begin: Callable[[Task, Path], bool],
    phases: Callable[[Task, Parts, Path], None],
    figures: Callable[[Path], Mapping[str, float]] | None = None,
) -> None:
    """The frame of a stage: join the ranks, open what it needs, and do what is not done yet. Collective.

    Args:
        config: names the `output` and the `device`.
        open_task: opens model and data; an error on any rank ends all.
        begin: whether there is anything to do.
        phases: does it, and publishes the output.
        figures: what an output says of itself, by metric name; such a stage has a section `wandb`, and its work is
            told in the folder NAME.log beside the output.
    """
    output = Path(config.output).expanduser().absolute()
    device = pick_device(config.device)
    with job(device), leaving_when_warned(Stopped.exit_code):
        with distributed.together():
            task = open_task(config, device)
        if not begin(task, output):
            return
        with open_parts(output, task.plan) as parts:
            try:
                if figures is None:
                    phases(task, parts, output)
                else:
                    with _told(config, parts, output) as told:
                        phases(task, parts, output)
                        told.log(distributed.on_first_rank(lambda: dict(figures(output))))
            except KeyboardInterrupt:
                log.info("what is finished is kept; start the same command to go on")
                raise


def _told(config: Settings, parts: Parts, output: Path) -> AbstractContextManager[worklog.Worklog]:
    """Tell of the work on an output; all starts of one work are one run. Collective."""

    def next_start() -> tuple[str, int]:
        file = parts.path("run.json")
        before = Run(**orjson.loads(file.read_bytes())) if file.exists() else Run(secrets.token_hex(4), 0)
        run = Run(before.id, before.attempt + 1)
        write_json(file, vars(run))  # no part: it changes
        return run.id, run.attempt

    run = Run(*distributed.on_first_rank(next_start))
    stage = type(config).__module__.rpartition(".")[2]
    return worklog.follow(output.with_name(f"{output.name}.log"), stage, output.name, config, run)


def folder_of(output: Path) -> Path:
    """Where the work on an output is kept until it is done."""
    return output.with_name(f".{output.name}.work")


def open_parts(output: Path, plan: Mapping[str, Any]) -> Parts:
    """The parts of the work on an output, held by rank 0. Collective; `plan` and the errors are those of Parts."""
    folder = folder_of(output)
    held: list[Parts] = []
    distributed.on_first_rank(lambda: held.append(Parts(folder, plan)))
    return held[0] if held else Parts(folder, plan, hold=False)


def share(parts: Parts, names: Sequence[str], what: str = "parts") -> list[int]:
    """The numbers of those parts that this rank is to make: what is missing, dealt to the ranks in turn. Collective."""

    def look() -> list[int]:
        missing = [number for number, name in enumerate(names) if not parts.has(name)]
        if len(missing) < len(names):
            log.info("%s: %d of %d were finished before", what, len(names) - len(missing), len(names))
        return missing

    missing: list[int] = distributed.on_first_rank(look)
    return missing[distributed.rank() :: distributed.world()]


def once(parts: Parts, name: str, write: Callable[[Path], object]) -> Path:
    """Have rank 0 make a part, unless it is there; where it is. Collective."""

    def make() -> None:
        if not parts.has(name):
            parts.write(name, write)

    distributed.on_first_rank(make)
    return parts.path(name)


def ahead(make: Callable[[Item], Made], items: Sequence[Item]) -> Iterator[tuple[Item, Made]]:
    """(item, make(item)) in order, each made in a thread while the one before it is used: read while computing."""
    with ThreadPoolExecutor(1) as pool:
        due = [pool.submit(make, item) for item in items[:1]]
        for number, item in enumerate(items):
            made = due.pop().result()
            due += [pool.submit(make, following) for following in items[number + 1 : number + 2]]
            yield item, made


# --- the output ------------------------------------------------------------------------------------------------


def begin(output: Path, mark: str, plan: Mapping[str, Any], *, overwrite: bool) -> bool:
    """Whether there is anything to do: not when the output has been made with the same plan. Collective.

    Args:
        mark: the file of an output that says, under "plan", what it was made with.
        overwrite: replace an output of another plan; without the mark in it none is.

    Raises:
        UserError: the output is there and may not be replaced.
    """

    def look() -> bool:
        if _done_before(output, mark, plan):
            log.info("%s is there, made with the same settings: nothing to do; remove it to make it again", output)
            shutil.rmtree(folder_of(output), ignore_errors=True)
            return False
        staging.check_output(output, overwrite, mark)
        return True

    return distributed.on_first_rank(look)


def _done_before(output: Path, mark: str, plan: Mapping[str, Any]) -> bool:
    try:
        found = orjson.loads((output / mark).read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return False
    return isinstance(found, dict) and found.get("plan") == orjson.loads(orjson.dumps(plan))


def publish(parts: Parts, output: Path) -> None:
    """Give the part folder RESULT its name beside the work, and remove the work. Raises UserError."""
    try:
        staging.publish(parts.path(RESULT), output)
    except OSError as error:
        raise UserError(f"output={output}: cannot be written ({error.strerror or error}); name another") from error
    parts.remove()
