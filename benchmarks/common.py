"""What every benchmark needs: alternating timings, memory in child processes, where it ran, and how it is shown.

A benchmark is a module with `measure(quick) -> dict`. Of the dict, "tables" (see `table`) and "targets" (see `target`)
are printed, and everything is written as JSON beside the environment.
"""

from __future__ import annotations

import ctypes
import datetime
import gc
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table

Result = TypeVar("Result")
Key = TypeVar("Key")

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DEMO = ROOT / "demo-full"  # what `make demo-full` has left, where it has been
LIBRARIES = ("torch", "transformers", "sentence-transformers", "deepspeed", "webdataset", "numpy", "pyarrow")


class GateError(Exception):
    """Two variants do not compute the same thing, so timing them would say nothing."""


# --- time --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Seconds of every repeat, by the wall and by the CPUs of the whole process."""

    wall: tuple[float, ...]
    cpu: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds of the wall."""
        return statistics.median(self.wall)

    @property
    def median_cpu(self) -> float:
        return statistics.median(self.cpu)

    def cells(self) -> dict[str, str]:
        """The timing as it stands in a table: medians, with the smallest and the largest."""
        return {
            f"{clock} s": f"{statistics.median(seconds):.3g} ({min(seconds):.3g}-{max(seconds):.3g})"
            for clock, seconds in (("wall", self.wall), ("CPU", self.cpu))
        }


def alternate(work: Mapping[str, Callable[[], object]], repeats: int, warm_ups: int = 1) -> dict[str, Timing]:
    """Time everything in turns, A B C A B C, so that a slow minute of the machine hits all alike."""
    for _ in range(warm_ups):
        for run in work.values():
            run()
    rounds = [{name: _time(run) for name, run in work.items()} for _ in range(repeats)]
    return {name: Timing(*zip(*(one[name] for one in rounds), strict=True)) for name in work}


def _time(run: Callable[[], object]) -> tuple[float, float]:
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def ratio(peers: Sequence[Timing], ours: Timing) -> float:
    """How many times faster ours is than the fastest of the peers: by wall or by CPU, whichever says less."""
    wall = min(peer.median for peer in peers) / ours.median
    return min(wall, min(peer.median_cpu for peer in peers) / ours.median_cpu)


def rivals(found: Mapping[Key, Timing]) -> list[Key]:
    """Of a search: the two fastest by wall and the fastest by CPU, to be measured again beside the rest."""
    by_wall = sorted(found, key=lambda key: found[key].median)[:2]
    return list(dict.fromkeys([*by_wall, min(found, key=lambda key: found[key].median_cpu)]))


# --- memory ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Resident bytes of a process before some work, and what the work added at its peak."""

    before: int
    extra: int


def extra_memory(run: Callable[[], object]) -> Memory:
    """Run in a process of its own (`in_child`): what another part once took and gave back would hide the peak."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that is still resident would be used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again at what is resident now
    before = _status("VmRSS")
    run()
    return Memory(before, _status("VmHWM") - before)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return int(value) * 1024


def in_child(function: Callable[..., Result], *args: Any) -> Result:
    """Call an importable function in a process of its own, forked from one that has imported what is slow to import.

    So each starts with the same memory and none waits for imports; nothing that this process did is in it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.step"])  # which has all of both sides; the first call's list holds
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


# --- correctness -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tolerance:
    """How far two computations may be apart: loss and gradient in shares of the reference's; the gradients' cosine."""

    loss: float
    gradient: float
    cosine: float


FP32 = Tolerance(1e-5, 1e-4, 0.99999)


def gate(
    name: str, got: tuple[float, torch.Tensor], wanted: tuple[float, torch.Tensor], tolerance: Tolerance = FP32
) -> dict[str, float]:
    """Compare (loss, all gradients in a row) with a reference before anything is timed.

    Raises:
        GateError: they are further apart than tolerated.
    """
    difference = abs(got[0] - wanted[0]) / abs(wanted[0])
    ours, reference = got[1].double(), wanted[1].double()
    cosine = float(torch.nn.functional.cosine_similarity(ours, reference, dim=0))
    error = float((ours - reference).norm() / reference.norm())
    if not (difference <= tolerance.loss and cosine >= tolerance.cosine and error <= tolerance.gradient):
        raise GateError(
            f"{name}: the loss differs by {difference:.1e}; the gradient by {error:.1e}, at a cosine of {cosine:.7f}"
        )
    return {"loss_difference": difference, "gradient_cosine": cosine, "gradient_error": error}


# --- results -----------------------------------------------------------------------------------------------------


def table(title: str, rows: Sequence[Mapping[str, object]]) -> dict[str, Any]:
    """Rows of equal keys, in the order in which they are shown."""
    return {"title": title, "rows": [dict(row) for row in rows]}


def target(claim: str, wanted: float, got: float, *, at_most: bool = False) -> dict[str, Any]:
    """A number that was promised, what was measured, and whether that keeps the promise."""
    return {"claim": claim, "wanted": wanted, "got": got, "met": got <= wanted if at_most else got >= wanted}


def environment() -> dict[str, Any]:
    """Hardware, threads, versions and commit."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_1_min": os.getloadavg()[0],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "commit": _commit(),
    }


def _cpu_model() -> str:
    """The name, and family and model, since a virtual machine may hide the rest of the name."""
    fields = dict(
        [part.strip() for part in line.split(":", 1)]
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if ":" in line
    )
    if "model name" not in fields:
        return platform.machine()
    vector = "AVX-512" if "avx512f" in fields.get("flags", "") else "no AVX-512"
    return f"{fields['model name']} (family {fields['cpu family']}, model {fields['model']}, {vector})"


def _commit() -> str:
    """The checkout's commit, marked when tracked files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "not a git checkout"


def show(name: str, result: Mapping[str, Any]) -> None:
    """Print the tables and the targets."""
    console = Console(width=max(Console().width, 140))
    for one in result["tables"]:
        shown = Table(*one["rows"][0], title=one["title"], title_justify="left")
        for row in one["rows"]:
            shown.add_row(*(_cell(value) for value in row.values()))
        console.print(shown)
    for one in result["targets"]:
        verdict = "met" if one["met"] else "NOT MET"
        console.print(f"{name}: {one['claim']}: wanted {one['wanted']:.3g}, got {one['got']:.3g}: {verdict}")


def _cell(value: object) -> str:
    return f"{value:,.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def save(name: str, result: Mapping[str, Any], where: Mapping[str, Any]) -> Path:
    """Write the result beside its environment; one file a day and benchmark, the last run of the day stands."""
    today = datetime.date.today().isoformat()
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}-{today}.json"
    document = {"benchmark": name, "date": today, "environment": where, **result}
    file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return file
