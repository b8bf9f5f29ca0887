"""`quintet launch [options] STAGE ...`: a stage on several ranks, started again where it stopped, with an honest end.

The exit code is 0 only when the run folder says that the run is done. A job that was preempted (75) is started again;
one that was stopped through this process is not.
"""

from __future__ import annotations

import argparse
import difflib
import glob
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from data.errors import EXIT_DONE, Stopped, UserError
from launcher import local

log = logging.getLogger("quintet")

# Commands that share their work among ranks, or look at them.
PARALLEL = ("pretrain", "filter", "mine", "teacher", "distill", "finetune", "encode", "evaluate", "plan", "doctor")
_TRAINED = ("pretrain", "teacher", "finetune")


class Job(Protocol):
    """Ranks that have been started: local.Ranks or hosts.HostRanks."""

    asked: bool

    def signals(self) -> AbstractContextManager[None]: ...

    def wait(self) -> int: ...


HELP = """\
A stage on several processes, restarted after a preemption, with an exit code that can be trusted.

Usage: quintet launch [options] STAGE [--config FILE]... [key=value]...

On this machine:
  --ranks N        processes; the number of GPUs, or 1 where there are none
On several machines, over ssh:
  --hostfile FILE  lines such as `worker-1 slots=8`; the first host runs rank 0
With Slurm:
  --slurm          submit slurm/STAGE.sh; --sbatch OPTION, as often as needed, goes to sbatch

  --restarts N     how often a run that stopped with a checkpoint (exit code 75) is started again (20)

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
    if options.on_host:
        from launcher import hosts

        return hosts.on_host(options.on_host)
    if options.help or not rest:
        print(HELP.format(stages=", ".join(PARALLEL)))
        return EXIT_DONE
    stage, arguments = rest[0], rest[1:]
    if stage not in PARALLEL:
        raise UserError(f"{stage}: not a stage that runs on several ranks, as {', '.join(PARALLEL)} do")
    config = check(stage, arguments)
    if config is None:
        return EXIT_DONE
    if options.slurm:
        return _submit(stage, arguments, options.sbatch)
    return _restarted(_starter(stage, arguments, options, config), stage, config, options.restarts)


def _starter(stage: str, arguments: Sequence[str], options: argparse.Namespace, config: Any) -> Callable[[], Job]:
    """What starts the job once."""
    command = [str(Path(sys.executable).with_name("quintet")), stage, *arguments]
    if options.hostfile:
        from launcher import hosts

        return partial(hosts.HostRanks, command, hosts.read_hostfile(options.hostfile), _shared_folder(config))
    return partial(local.Ranks, command, options.ranks or gpus() or 1, os.environ)


def _shared_folder(config: Any) -> Path:
    """A folder that every host of the job sees: where the stage leaves its work; this one where it leaves none."""
    for name in ("run_dir", "scores"):
        if hasattr(config, name):
            return Path(getattr(config, name))
    return Path(config.output).absolute().parent if hasattr(config, "output") else Path()


def _restarted(start: Callable[[], Job], stage: str, config: Any, restarts: int) -> int:
    """Run a job, again and again while it stops with a checkpoint that nobody here has asked for."""
    run_dir = Path(config.run_dir) if stage in _TRAINED else None
    for number in range(restarts + 1):
        code, asked = _once(start, run_dir)
        if code != Stopped.exit_code or asked:
            return code
        if number < restarts:
            log.info("launch: stopped with a checkpoint; restart %d of %d", number + 1, restarts)
    log.error("launch: stopped with a checkpoint after %d restarts, the most that --restarts allows", restarts)
    return code


def _once(start: Callable[[], Job], run_dir: Path | None) -> tuple[int, bool]:
    """Start the ranks and wait for them: the exit code, and whether a signal to this process has ended them."""
    before = _ending(run_dir)
    job = start()
    with job.signals():
        code = job.wait()
    if run_dir and code == EXIT_DONE:
        code = _verdict(before, _ending(run_dir), run_dir)
    return code, job.asked


def _submit(stage: str, arguments: Sequence[str], options: Sequence[str]) -> int:
    """Hand slurm/STAGE.sh to sbatch, with what slurm/site.env says, and return sbatch's exit code."""
    script = Path("slurm") / f"{stage}.sh"
    if not script.is_file():
        raise UserError(f"--slurm: {script} is not here; start from the folder of the project")
    if not shutil.which("sbatch"):
        raise UserError("--slurm: sbatch is not on the PATH; log in to a node of the cluster that may submit jobs")
    # site.env is bash, and the jobs read it as such
    site = 'set -a; if [ -f slurm/site.env ]; then . slurm/site.env; fi; exec sbatch "$@"'
    return subprocess.run(["bash", "-c", site, "sbatch", *options, str(script), *arguments]).returncode


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
    parser.add_argument("--hostfile")
    parser.add_argument("--slurm", action="store_true")
    parser.add_argument("--sbatch", action="append", default=[])
    parser.add_argument("--restarts", type=int, default=20)
    parser.add_argument("--on-host")  # for hosts.py alone
    parser.add_argument("stage", nargs=argparse.REMAINDER)
    try:
        options, unknown = parser.parse_known_args(list(words))
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from None
    if unknown:
        near = difflib.get_close_matches(
            unknown[0], ("--ranks", "--hostfile", "--slurm", "--sbatch", "--restarts"), n=1
        )
        hint = f"did you mean {near[0]}?" if near else "quintet launch --help lists the options"
        raise UserError(f"{unknown[0]}: no such option; {hint}")
    for name in ("ranks", "restarts"):
        value = getattr(options, name)
        if value is not None and value < (name == "ranks"):
            raise UserError(f"--{name} {value}: must be at least {int(name == 'ranks')}")
    if sum([options.ranks is not None, options.hostfile is not None, options.slurm]) > 1:
        raise UserError(
            "--ranks, --hostfile, --slurm: choose one; a hostfile has its slots, Slurm its --sbatch options"
        )
    if options.sbatch and not options.slurm:
        raise UserError(f"--sbatch {options.sbatch[0]}: goes with --slurm")
    return options, options.stage
