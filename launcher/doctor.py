"""`quintet doctor`: are this machine, the cluster, a configuration and its data fit to run? Says what to mend."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import json
import logging
import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from data.errors import EXIT_DONE, UserError
from launcher import checks_hosts, checks_machine, checks_ranks, checks_run, checks_slurm, launch
from launcher.checks import BAD, OK, WARN, Row, guarded
from launcher.hosts import read_hostfile

HELP = """\
Are this machine, the cluster, a configuration and its data fit to run? Every red row says the mend.

Usage: quintet doctor [STAGE] [--config FILE]... [key=value]... [options]

  STAGE              whose configuration this is: {stages}; pretrain where none is named
  --config FILE      as for the stage; with a configuration its data, model, memory and disk are checked, too
  --ranks N          processes that the job will have; else those of this job, of the hostfile, or of the GPUs here
  --deep             read all shards and compare their hashes
  --hostfile FILE    ask every host of the file: ssh, versions, clock
  --slurm SCRIPT     a batch script to check, may be repeated; else those in ./slurm where sbatch is at hand
  --json             one JSON document instead of the table
  --debug            show where a check failed itself

Under deepspeed, torchrun, srun or `quintet launch` the ranks also meet, and their network is measured.
Exit code: 0, or 2 when a row is red (bad); warnings do not count.

Example: quintet doctor pretrain --config configs/pretrain/small.yaml data=shards run_dir=runs/small"""

log = logging.getLogger("quintet")

FORMAT = "quintet-doctor-1"
_LABELS = {BAD: ("BAD", "bold red"), WARN: ("warn", "yellow")}


def main(words: Sequence[str], stages: Mapping[str, Any]) -> int:
    """Run a command line behind `quintet doctor` and return the exit code.

    Args:
        stages: the table of stages of the command line: their module, and the keys that they set themselves.

    Raises:
        UserError: the command line is wrong; nothing was checked.
    """
    options = parse(words)
    if options is None:
        return EXIT_DONE
    os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's library is imported: nothing is fetched here
    with _quiet(options.debug):
        rows, first = _examine(options, stages)
    if first:
        _show(rows, options.json)
    for row in rows if not first else []:
        if row.name == "ranks":  # there may be no first rank that could say it
            log.error("doctor: %s; %s", row.found, row.mend)
    return _exit_code(rows)


def parse(words: Sequence[str]) -> argparse.Namespace | None:
    """The options, checked; None where only help was asked for, which is then printed. Raises UserError."""
    parser = argparse.ArgumentParser(prog="quintet doctor", add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--deep", action="store_true")
    parser.add_argument("--hostfile")
    parser.add_argument("--slurm", action="append", default=[])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--debug", action="store_true")
    parser.add_argument("--local_rank", "--local-rank", type=int)  # launchers append it
    try:
        options, rest = parser.parse_known_args(list(words))
    except argparse.ArgumentError as error:
        raise UserError(f"{error}; quintet doctor --help lists the options") from None
    if options.help:
        print(HELP.format(stages=", ".join(_STAGES)))
        return None
    names = [word for word in rest if "=" not in word and not word.startswith("-")]
    if len(names) > 1 or (names and names[0] not in _STAGES):
        near = difflib.get_close_matches(names[-1], _STAGES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"give one of {', '.join(_STAGES)}"
        raise UserError(f"{names[-1]}: not a stage that the doctor knows; {hint}")
    options.words = [word for word in rest if word not in names and word != "--"]
    asked = names or options.config or options.words
    options.stage = (names or ["pretrain"])[0] if asked else ""
    if options.ranks is not None and options.ranks < 1:
        raise UserError(f"--ranks {options.ranks}: must be at least 1")
    return options


_STAGES = (*checks_run.TRAINED, "filter", "mine", "distill", "encode")


def _examine(options: argparse.Namespace, stages: Mapping[str, Any]) -> tuple[list[Row], bool]:
    """All rows, and whether this process is the one that shows them."""
    from trainer import distributed

    here = distributed.place()
    first = here.rank == 0
    # One rank of each machine looks at it.
    rows = checks_machine.rows() if here.local_rank == 0 else []
    if here.world > 1:
        rows += guarded("ranks", checks_ranks.rows, tuple(rows))
    if not first:
        return rows, False
    hosts = {host.name: host.slots for host in read_hostfile(options.hostfile)} if options.hostfile else {}
    rows += guarded("hosts", checks_hosts.rows, hosts)
    rows += guarded("slurm", checks_slurm.rows, options.slurm, options.stage)
    config: Any = None
    if options.stage:
        stage = stages[options.stage]
        config_class = importlib.import_module(stage.module).Config
        config, found = checks_run.configuration(config_class, options.config, options.words, stage.fixed)
        rows += found
    mode = config.wandb.mode if options.stage in checks_run.TRAINED and config else "auto"
    rows += guarded("wandb", checks_machine.weights_and_biases, mode)
    if config is not None:
        ranks, ranks_here = _ranks(options.ranks, hosts) if here.world == 1 else (here.world, here.local_world)
        deep = options.deep
        rows += checks_run.rows(options.stage, config, ranks=ranks, ranks_here=ranks_here, deep=deep)
    return rows, True


def _ranks(wanted: int | None, hosts: Mapping[str, int]) -> tuple[int, int]:
    """Ranks of the job that is meant, and how many of them share a machine's memory."""
    if hosts:
        return wanted or sum(hosts.values()), max(hosts.values())
    ranks = wanted or launch.gpus() or 1
    return ranks, min(ranks, os.cpu_count() or 1)


@contextlib.contextmanager
def _quiet(debug: bool) -> Iterator[None]:
    """Rows say what there is to say: no log beside them, and on stdout nothing that a library writes there."""
    level = log.level
    log.setLevel(logging.DEBUG if debug else logging.CRITICAL)
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(stdout, 1)
        os.close(stdout)
        log.setLevel(level)


def _exit_code(rows: Sequence[Row]) -> int:
    return UserError.exit_code if any(row.status == BAD for row in rows) else EXIT_DONE


def _show(rows: Sequence[Row], as_json: bool) -> None:
    """Print the rows, with every secret of the environment taken out, should a library's message hold one."""
    from trainer.monitor import redacted

    plain = redacted([asdict(row) for row in rows])
    if as_json:
        content = {"format": FORMAT, "host": socket.gethostname(), "exit_code": _exit_code(rows), "rows": plain}
        print(json.dumps(content, indent=2), flush=True)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True, highlight=False)
    names = [f"{row['name']} ({row['host']})" if row["host"] else row["name"] for row in plain]
    width = min(max(map(len, names)), 24)
    for name, row in zip(names, plain, strict=True):
        label, style = _LABELS.get(row["status"], ("ok", "green"))
        console.print(Text.assemble((f"{label:<4}", style), f"  {name:<{width}}  {row['found']}"))
        if row["mend"]:
            console.print(Text(f"{'':{width + 8}}-> {row['mend']}"))
    counts = [f"{sum(row['status'] == status for row in plain)} {status}" for status in (OK, WARN, BAD)]
    console.print(f"{len(plain)} checks: {', '.join(counts)}")
