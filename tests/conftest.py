"""The environment of the tests: offline, and no more threads than the cores carry. Set before torch is imported."""

from __future__ import annotations

import glob
import logging
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
if not glob.glob("/dev/nvidia[0-9]*"):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
for launcher_variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
    os.environ.pop(launcher_variable, None)  # inside a Slurm job the tests are still jobs of their own
signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # started in the background, they and their jobs are deaf to it


# Modules that want the cores, the network namespaces or a Slurm for themselves.
JOBS = "cloud cluster doctor hosts launch numeric pool resume slurm step train watchdog"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what run.sh runs one after the other."""
    for item in items:
        if isinstance(item, pytest.Function) and item.module.__name__.removeprefix("test_") in JOBS.split():
            item.add_marker(pytest.mark.jobs)


@pytest.fixture(autouse=True)
def plain_log() -> Iterator[None]:
    """Undo what the command line, called in a test, does to our logger: other tests read it through caplog."""
    logger = logging.getLogger("quintet")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture(autouse=True)
def no_service_of_wandb() -> Iterator[None]:
    """wandb, used in this process, leaves the address of its helper in the environment, where later jobs look."""
    yield
    os.environ.pop("WANDB_SERVICE", None)


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts small file systems: size -> folder."""
    mounted: list[Path] = []

    def mount(size: str) -> Path:
        place = tmp_path / f"tmpfs-{len(mounted)}"
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=False)
        if done.returncode:
            pytest.skip("needs root and the right to mount a tmpfs")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", place], check=True)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium. Of a module, not of the session: while it is open, this thread cannot asyncio.run."""
    if not os.path.exists("/usr/bin/chromium"):
        pytest.skip("needs /usr/bin/chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        yield chromium
        chromium.close()
