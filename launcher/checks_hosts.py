"""Checks of `quintet doctor` on the hosts of a hostfile: reachable by ssh, the same installation, the same time."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from launcher.checks import Row, bad, ok, warn

_COMPARED = ("quintet", "torch", "deepspeed", "transformers")
# What each host is asked, by the interpreter that deepspeed would start there: the same path as here.
_QUESTION = """
import glob, importlib.metadata as m, json, time
versions = {}
for name in %r:
    try:
        versions[name] = m.version(name)
    except m.PackageNotFoundError:
        versions[name] = "none"
print(json.dumps({"time": time.time(), "gpus": len(glob.glob("/dev/nvidia[0-9]*")), "versions": versions}))
"""
_SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
_TIMEOUT_SECONDS = 60.0
# Beyond one second the logs of two hosts cannot be laid side by side; munge, and so Slurm, refuses what is five
# minutes old.
SKEW_SECONDS, LARGE_SKEW_SECONDS = 1.0, 300.0


@dataclass(frozen=True)
class Answer:
    """What a host said: its clock lies `skew` seconds or more from ours (0: within what the way took)."""

    skew: float
    gpus: int
    versions: Mapping[str, str]


def rows(hosts: Mapping[str, int]) -> list[Row]:
    """Ask all hosts at once; one row for each that is well, more for others."""
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(_ask, hosts))
    found = []
    for (host, wanted), answer in zip(hosts.items(), answers, strict=True):
        found += [answer] if isinstance(answer, Row) else judged(host, wanted, answer)
    return found


def _ask(host: str) -> Answer | Row:
    """The answer of one host, or the row that says why there is none. pdsh's options for ssh are used here too."""
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(_QUESTION % (_COMPARED,))}"
    extra = shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))
    before = time.time()
    try:
        done = subprocess.run(
            [*_SSH, *extra, host, command], stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=_TIMEOUT_SECONDS, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        return bad(host, "there is no ssh here", "install the OpenSSH client (Debian: openssh-client)")
    except subprocess.TimeoutExpired:
        found = f"ssh gave no answer in {_TIMEOUT_SECONDS:.0f} s"
        return bad(host, found, f"ssh -v {host} shows where it waits; take the host out until it answers")
    after = time.time()
    if done.returncode:
        return _failure(host, done.returncode, done.stderr)
    try:
        return _read(json.loads(done.stdout.splitlines()[-1]), before, after)
    except (ValueError, IndexError, KeyError, TypeError):
        found = f"its answer is none: {done.stdout[-80:]!r}"
        return bad(host, found, "what the shell's start-up files print must not come into non-interactive sessions")


def _failure(host: str, code: int, said: str) -> Row:
    reason = next(iter(reversed(said.strip().splitlines())), f"exit code {code}")
    if code == 255:  # ssh's own
        mend = f"`ssh {host} true` must work without a question: name, network, sshd, a key in its authorized_keys"
    else:
        mend = f"the same checkout and .venv must be at the same path there: {sys.executable}"
    return bad(host, reason, mend)


def _read(content: Mapping[str, Any], before: float, after: float) -> Answer:
    # The host looked at its clock between our two looks at ours: what lies outside is skew, whatever the way took.
    skew = max(before - content["time"], content["time"] - after, 0.0)
    return Answer(skew, int(content["gpus"]), dict(content["versions"]))


def judged(host: str, wanted: int, answer: Answer) -> list[Row]:
    """What a host's answer is worth.

    Args:
        wanted: its slots.
    """
    found = [skew_row(host, answer.skew)] if answer.skew > SKEW_SECONDS else []
    for name in _COMPARED:
        here, there = _version(name), answer.versions.get(name, "none")
        if here != there:
            found.append(
                bad(host, f"{name} {there}, here {here}", "the same installation on all hosts: `make install`")
            )
    if 0 < answer.gpus < wanted:
        found.append(bad(host, f"{answer.gpus} GPUs for {wanted} slots", f"write slots={answer.gpus} in the hostfile"))
    return found or [ok(host, f"reached, same versions, {answer.gpus} GPUs for {wanted} slots")]


def skew_row(host: str, seconds: float) -> Row:
    """A clock that goes differently."""
    found, mend = f"its clock is {seconds:.1f} s off", "let chrony or systemd-timesyncd set the clock of every host"
    return (bad if seconds > LARGE_SKEW_SECONDS else warn)(host, found, mend)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"
