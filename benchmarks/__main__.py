"""Runs the benchmarks: python -m benchmarks [--quick] [step] [loss] [reading] [scores]."""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
from typing import Any

SCRIPTS = ("step", "loss", "reading", "scores")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"which: {', '.join(SCRIPTS)}; all when none is named")
    parser.add_argument("--quick", action="store_true", help="small sizes, one repeat: shows that it runs; not saved")
    arguments = parser.parse_args()
    names = arguments.names or list(SCRIPTS)
    if unknown := sorted(set(names) - set(SCRIPTS)):
        parser.error(f"{', '.join(unknown)}: no such benchmark; there are {', '.join(SCRIPTS)}")
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
    if "tables" not in result:
        result = {**result, **_reading(result)}
    if quick:
        result["targets"] = []  # its sizes are not those that the targets speak of
    common.show(name, result)
    if not quick:
        print(f"written: {common.save(name, result, where).relative_to(common.ROOT)}")


def _reading(result: dict[str, Any]) -> dict[str, Any]:
    """The figures of benchmarks/reading.py as a table with its target."""
    from benchmarks import common

    states = ("warm", "cold")
    rows = [
        {
            "reader": name,
            **{f"{state}, records/s": round(result["records_per_s"][state][name]) for state in states},
            **{f"{state}, x peer": result["ratio_to_peer"][state][name] for state in states},
        }
        for name in result["records_per_s"]["warm"]
    ]
    slowest = min(result["ratio_to_peer"][state]["ours, blocks, texts"] for state in states)
    return {
        "tables": [common.table(f"{result['records']:,} records, peer: {result['peer']}", rows)],
        "targets": [common.target("our blocks as texts, records/s over the peer's", 5.0, slowest)],
    }


if __name__ == "__main__":
    main()
