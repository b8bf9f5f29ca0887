"""`quintet launch [options] STAGE ...`: a stage on several ranks, started again where it stopped, with an honest end.

The exit code is 0 only when the run folder says that the run is done. A job that was preempted (75) is started again;
one that was stopped through this process is not.
"""

from __future__ import annotations

import argparse
import glob
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.errors import EXIT_DONE, Stopped, UserError
from launcher import local

log = logging.getLogger("quintet")

# Commands that share their work among ranks, or look at them.
PARALLEL = ("pretrain", "filter", "mine", "teacher", "distill", "finetune", "encode", "doctor")
_TRAINED = ("pretrain", "teacher", "finetune")

HELP = """\
A stage on several processes of this machine, restarted after a preemption, with an exit code that can be trusted.

Usage: quintet launch [--ranks N] [--restarts N] STAGE [--config FILE]... [key=value]...

  --ranks N      processes; the number of GPUs, or 1 where there are none
  --restarts N   how often a run that stopped with a checkpoint (exit code 75) is started again (20)

Stages: {stages}

SIGTERM, SIGUSR1 and Ctrl-C go to all ranks: they write a checkpoint and the launcher leaves with 75.

Example: quintet launch --ranks 2 pretrain --config configs/tiny/pretrain.yaml data=shards run_dir=run"""


def main(words: Sequence[str], check: Any) -> int:
    """Run a command line behind `quintet launch` and return the exit code.

    Args:
        check: reads the configuration of a stage: (name, words) -> config, or None when the words ask for help only.

    Raises:
        UserError, ConfigError: the command line or the configuration is wrong; nothing was started.
    """
    options, rest = _parse(words)
    if options.help or not rest:
        print(HELP.format(stages=", ".join(PARALLEL)))
        return EXIT_DONE
    stage, arguments = rest[0], rest[1:]
    if stage not in PARALLEL:
        raise UserError(f"{stage}: not a stage that runs on several ranks, as {', '.join(PARALLEL)} do")
    config = check(stage, arguments)
    if config is None:
        return EXIT_DONE
    ranks = options.ranks or gpus() or 1
    run_dir = Path(config.run_dir) if stage in _TRAINED else None
    command = [str(Path(sys.executable).with_name("quintet")), stage, *arguments]
    for start in range(options.restarts + 1):
        code, asked = _once(command, ranks, run_dir)
        if code != Stopped.exit_code or asked:
            return code
        if start < options.restarts:
            log.info("launch: stopped with a checkpoint; restart %d of %d", start + 1, options.restarts)
    log.error("launch: stopped with a checkpoint after %d restarts, the most that --restarts allows", options.restarts)
    return code


def _once(command: Sequence[str], ranks: int, run_dir: Path | None) -> tuple[int, bool]:
    """Start the ranks and wait for them: the exit code, and whether a signal to this process has ended them."""
    before = _ending(run_dir)
    job = local.Ranks(command, ranks, os.environ)
    with job.signals():
        code = job.wait()
    if run_dir and code == EXIT_DONE:
        code = _verdict(before, _ending(run_dir), run_dir)
    return code, job.asked


def _ending(run_dir: Path | None) -> dict[str, Any]:
    """How the run folder says that the last start ended; empty where it says nothing."""
    try:
        ending = json.loads((run_dir / "exit.json").read_bytes()) if run_dir else {}
    except (OSError, ValueError):
        return {}
    return ending if isinstance(ending, dict) else {}


def _verdict(before: dict[str, Any], after: dict[str, Any], run_dir: Path) -> int:
    """The exit code where all ranks left with 0: ranks that leave so have not always done their work."""
    if after.get("code") == EXIT_DONE and after != before:
        return EXIT_DONE
    said = f"an exit.json with code {after['code']}" if "code" in after and after != before else "no new exit.json"
    log.error("launch: all ranks left with 0, but %s has %s: the run is not done", run_dir, said)
    return 1


def gpus() -> int:
    """The GPUs that a job may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip()])
    return len(glob.glob("/dev/nvidia[0-9]*"))


def _parse(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="quintet launch", add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--restarts", type=int, default=20)
    parser.add_argument("stage", nargs=argparse.REMAINDER)
    try:
        options = parser.parse_args(list(words))
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from None
    for name in ("ranks", "restarts"):
        value = getattr(options, name)
        if value is not None and value < (name == "ranks"):
            raise UserError(f"--{name} {value}: must be at least {int(name == 'ranks')}")
    return options, options.stage
