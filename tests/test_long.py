"""The command lines of the pages that fetch packages or take minutes to an hour: `make test ARGS="-m long"`.

They run in a fresh clone, in the order of the pages. What makes one shorter stands behind the page's words.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jobs
import pytest
import tiny
from pages import ROOT, typed

SHORTER = {
    "make test": ["ARGS=tests/test_commands.py"],
    "make bench": ["ARGS=--quick"],
    "quintet launch evaluate": ["offline=true", "device=cpu"],
    "quintet plan measure=": ["device=cpu"],
}
INSTALLS = typed("make install")
LINES = [
    *(words for words in typed("make") if words not in INSTALLS),
    *typed("quintet collect"),
    *typed("quintet plan measure="),
    *typed("quintet launch --ranks 2 plan"),
    *typed("quintet launch evaluate"),
]
HOURS = 3 * 3600

pytestmark = [pytest.mark.long, pytest.mark.timeout(HOURS)]


def _clone(folder: Path) -> Path:
    subprocess.run(["git", "clone", "--quiet", ROOT, folder], check=True)
    return folder


def _type(folder: Path, words: list[str], log: Path) -> int:
    line = f"unset OMP_NUM_THREADS; cd {shlex.quote(str(folder))} && {shlex.join(words)}"  # all cores, as users have
    return jobs.run(["bash", "-c", line], log, HOURS)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = _clone(tmp_path_factory.mktemp("long") / "clone")
    tiny.bert(folder / "run/model")  # which a page names
    return folder


@pytest.mark.parametrize("words", INSTALLS, ids=" ".join)
def test_an_installation_has_the_command(words: list[str], tmp_path: Path) -> None:
    folder = _clone(tmp_path / "clone")
    assert _type(folder, words, tmp_path / "log") == 0
    assert _type(folder, [".venv/bin/quintet", "--version"], tmp_path / "log") == 0


@pytest.mark.parametrize("words", LINES, ids=" ".join)
def test_a_line_runs_to_its_end(words: list[str], clone: Path, tmp_path: Path) -> None:
    line = " ".join(words)
    shorter = [word for beginning, behind in SHORTER.items() if line.startswith(beginning) for word in behind]
    assert _type(clone, [*words, *shorter], tmp_path / "log") == 0


# SkyPilot's own command line and task, up to where it would look for machines. `words` are those behind `launch`.
READ = """\
import sys
import sky
from sky.client.cli import command

launch = command.cli.get_command(None, "jobs").get_command(None, "launch")
given = launch.make_context("launch", sys.argv[1:]).params
task = sky.Task.from_yaml(given["entrypoint"][0])
task.update_envs(given["env"])
(resources,) = task.resources
print(task.envs["MIRROR"], task.envs["DATA"], resources.accelerators, resources.job_recovery["recover_on_exit_codes"])
"""


def test_skypilot_installs_and_takes_the_page_s_line_and_our_task(tmp_path: Path) -> None:
    ((pip, *packages), (sky, *words)) = (*typed("pip"), *typed("sky"))
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    assert _type(tmp_path, [f"{tmp_path}/venv/bin/{pip}", *packages], tmp_path / "log") == 0
    assert (sky, words[:2]) == ("sky", ["jobs", "launch"])
    command = [f"{tmp_path}/venv/bin/python", "-c", READ, *words[2:]]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    assert said == "s3://bucket/runs/base s3://bucket/shards {'H100': 8} [75]\n"


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("apt-get"), reason="needs root, and Debian or Ubuntu")
@pytest.mark.parametrize("words", typed("sudo"), ids=" ".join)
def test_debian_packages_that_a_page_names_are_there(words: list[str], tmp_path: Path) -> None:
    assert _type(tmp_path, words[1:], tmp_path / "log") == 0
