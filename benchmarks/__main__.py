"""Runs the benchmarks: python -m benchmarks [--quick] [name ...]."""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys

SCRIPTS = ("step", "ranks", "loss", "encoding", "reading", "scores", "search", "mining", "plan", "checkpoint")
GPU = "gpu"  # runs when it is named


def main() -> None:
    known = ", ".join([*SCRIPTS, GPU])
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="name",
        help=f"which: {', '.join(SCRIPTS)}, {GPU}; all but the last when none is named",
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, one repeat: shows that it runs; not saved")
    arguments = parser.parse_args()
    names = arguments.names or list(SCRIPTS)
    if unknown := sorted(set(names) - {*SCRIPTS, GPU}):
        parser.error(f"{', '.join(unknown)}: no such benchmark; there are {known}")
    if len(names) == 1:
        run(names[0], arguments.quick)
        return
    flags = ["--quick"] if arguments.quick else []
    # A process each: threads, memory and settings that one library leaves behind are not the next one's.
    codes = [subprocess.run([sys.executable, "-m", "benchmarks", name, *flags]).returncode for name in names]
    sys.exit(max(codes))


def run(name: str, quick: bool) -> None:
    """Measure one, print its tables, and write them unless quick."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from benchmarks import common

    where = common.environment()
    print(f"{name}: {where['cpu']}, {where['cores']} cores, {where['threads']} threads, commit {where['commit']}")
    try:
        result = importlib.import_module(f"benchmarks.{name}").measure(quick)
    except common.GateError as error:
        sys.exit(f"{name}: not timed, since the variants do not compute the same: {error}")
    if quick:
        result["targets"] = []  # its sizes are not those that the targets speak of
    common.show(name, result)
    if not quick:
        print(f"written: {common.save(name, result, where).relative_to(common.ROOT)}")


if __name__ == "__main__":
    main()
