"""Checks of `quintet doctor` on scripts for Slurm."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from launcher.checks import OK, Row, bad, ok, warn

_TIMEOUT_SECONDS = 30.0
# Stages that keep what they have done, so that a warning of the end and a second start are worth something.
_RESUMED = re.compile(r"^[^#\n]*\b(pretrain|finetune|teacher|filter|mine|distill)\b", re.MULTILINE)


def rows(scripts: Sequence[str], stage: str = "") -> list[Row]:
    """Check the scripts given; without any, that of the stage in ./slurm, or all there, where sbatch is at hand."""
    if not scripts and not shutil.which("sbatch"):
        return []
    ours = [str(path) for path in sorted(Path("slurm").glob(f"{stage or '*'}.sh")) if _directives(path)]
    found, answers = [], False
    if shutil.which("sbatch"):
        found = cluster_rows()
        answers = found[0].status == OK
    for script in scripts or ours:
        found += script_rows(Path(script))
        if answers and Path(script).is_file():
            found += submission(Path(script), named=bool(scripts))
    return found + site_rows(Path("slurm/site.env"))


def cluster_rows() -> list[Row]:
    """Whether there is a cluster behind sbatch."""
    try:
        done = _run("scontrol", "ping")
    except (OSError, subprocess.TimeoutExpired) as error:
        return [warn("slurm", f"scontrol gives no answer: {error}", _LOGIN)]
    if done.returncode:
        return [warn("slurm", f"no controller answers: {_last_line(done.stderr or done.stdout)}", _LOGIN)]
    return [ok("slurm", _last_line(done.stdout))]


_LOGIN = "try on a login node of the cluster; SLURM_CONF names its configuration where it lies elsewhere"


def script_rows(script: Path) -> list[Row]:
    """Whether bash can read a script, and whether the work of its job survives the time limit and a lost node."""
    name = script.name
    if not script.is_file():
        return [bad(name, f"{script}: no such file", "give the path of a batch script, as slurm/pretrain.sh")]
    syntax = _run("bash", "-n", str(script))
    if syntax.returncode:
        return [bad(name, _last_line(syntax.stderr), "correct the script; `bash -n` must pass")]
    found, directives = [], _directives(script)
    resumed = bool(_RESUMED.search(script.read_text(encoding="utf-8", errors="replace")))
    if resumed and "signal" not in directives:
        lost = "no --signal: the job is not warned of its end and loses the work since its last checkpoint"
        found.append(warn(name, lost, "add #SBATCH --signal=B:USR1@300, and pass the signal on as slurm/stage.sh does"))
    if resumed and "requeue" not in directives:
        mend = "add #SBATCH --requeue; a run that is started again goes on"
        found.append(warn(name, "no --requeue: preemption or a lost node ends the job", mend))
    return found or [ok(name, f"bash can read it{', and its work survives a restart' if resumed else ''}")]


def _directives(script: Path) -> set[str]:
    """The options of sbatch that a script sets, without their values."""
    text = script.read_text(encoding="utf-8", errors="replace")
    return set(re.findall(r"^#SBATCH\s+--([a-z-]+)", text, re.MULTILINE))


def submission(script: Path, *, named: bool) -> list[Row]:
    """What sbatch says of the script, without submitting it.

    Args:
        named: by the user. Others may want options that only the user knows, so that a refusal is a warning.
    """
    try:
        done = _run("sbatch", "--test-only", str(script))
    except subprocess.TimeoutExpired:
        return [warn(script.name, "sbatch gives no answer", "ask `sinfo` whether the controller is up")]
    if not done.returncode:
        return []
    reason = _last_line(done.stderr)
    mend = (
        "change its #SBATCH lines, or submit it with other options: --account, --partition, --gpus-per-node; see sinfo"
    )
    return [(bad if named else warn)(script.name, f"sbatch --test-only: {reason}", mend)]


def site_rows(file: Path) -> list[Row]:
    """slurm/site.env, which every job reads first, can be read by bash."""
    if not file.exists():
        return []
    done = _run("bash", "-n", str(file))
    if done.returncode:
        return [bad("site.env", _last_line(done.stderr), f"{file} must be a file that bash can read: `bash -n {file}`")]
    return [ok("site.env", str(file))]


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False
    )


def _last_line(text: str) -> str:
    return next(iter(reversed(text.strip().splitlines())), "no reason given")
