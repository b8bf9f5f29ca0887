"""Jobs under a real Slurm of two nodes (slurm_cluster.sh): the same losses, and every way to be interrupted."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jobs
import pairs
import psutil
import pytest
import teachers
from pages import typed
from test_resume import trajectory

from trainer.crossencoder import fingerprint, open_teacher

ROOT = Path(__file__).resolve().parent.parent
CLUSTER = ROOT / "tests" / "slurm_cluster.sh"
STEPS = 60
SBIN = "/usr/sbin:/usr/bin"  # where Debian has the daemons

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not all(shutil.which(name, path=SBIN) for name in ("slurmctld", "slurmd", "munged")),
    reason="needs slurm-wlm, munge and root",
)


class Slurm:
    """A cluster, what jobs on it are given, and what Slurm says of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._hurried: set[tuple[str, str]] = set()  # jobs and their restarts
        self.environment = {**jobs.environment(), "SLURM_CONF": str(folder / "slurm.conf")}

    def call(self, *command: str) -> str:
        done = subprocess.run(
            command, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def submit(self, script: str, *arguments: str, nodes: int = 2, options: tuple[str, ...] = ()) -> str:
        """The number of a job of one task on each node, without a GPU."""
        shape = (f"--nodes={nodes}", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0")
        log = f"--output={self.folder}/%j.out"
        return self.call("sbatch", "--parsable", *shape, log, *options, f"slurm/{script}.sh", *arguments)

    def launch(self, *arguments: str) -> str:
        """The number of such a job on two nodes, submitted by the page's line for `quintet launch --slurm`."""
        (words,) = typed("quintet launch --slurm")
        place = words.index("pretrain")
        shape = ("--parsable", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0")
        options = [f"--sbatch={option}" for option in (*shape, f"--output={self.folder}/%j.out")]
        (self.folder / "my.yaml").write_text("lanes: 4\n")  # its --config is the reader's own
        return self.call(*words[:place], *options, *words[place:], str(self.folder / "my.yaml"), *arguments)

    def log(self, job: str) -> str:
        file = self.folder / f"{job}.out"
        return file.read_text(errors="replace") if file.exists() else ""

    def fields(self, job: str) -> dict[str, str]:
        words = self.call("scontrol", "show", "job", job, "-o").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str, what: Callable[[dict[str, str]], bool], seconds: float = 180) -> dict[str, str]:
        """The job's fields once they are so. Slurm keeps a requeued job back for two minutes; here it is five seconds.

        At once will not do: a node refuses a job that it has ended in the same second.
        """
        deadline = time.monotonic() + seconds
        while not what(fields := self.fields(job)):
            assert time.monotonic() < deadline, f"{fields}\n{self.log(job)[-5000:]}"
            start = (job, fields["Restarts"])
            if fields["JobState"] == "PENDING" and fields["Reason"] == "BeginTime" and start not in self._hurried:
                self.call("scontrol", "update", f"JobId={job}", "StartTime=now+5")
                self._hurried.add(start)
            time.sleep(0.2)
        return fields

    def wait_for_state(self, job: str, *states: str) -> dict[str, str]:
        return self.wait(job, lambda fields: fields["JobState"] in states)

    def wait_for_step(self, job: str, run_dir: Path, step: int) -> None:
        self.wait(job, lambda fields: max(jobs.steps(run_dir), default=0) >= step)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    folder = tmp_path_factory.mktemp("slurm")
    started = subprocess.run([CLUSTER, "start", folder], capture_output=True, text=True, timeout=90, check=False)
    try:
        assert started.returncode == 0, started.stderr
        yield Slurm(folder)
    finally:
        subprocess.run([CLUSTER, "stop", folder], timeout=90, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slurm jobs")  # with a blank


@pytest.fixture(scope="module")
def local(folder: Path) -> Path:
    """The run to compare with: two ranks under the deepspeed launcher, never interrupted."""
    overrides = jobs.settings(folder, run_dir=folder / "local", steps=STEPS)
    assert jobs.run(jobs.command(2, overrides), folder / "local.log") == 0
    return folder / "local"


def of_node(name: str) -> list[psutil.Process]:
    """The processes of a node: its slurmd, and the step daemons and ranks that it has started."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        words, variables = process.info["cmdline"] or [], process.info["environ"] or {}
        if variables.get("SLURMD_NODENAME") == name or words[-2:] == ["-N", name] or f"[{name}]" in " ".join(words):
            found.append(process)
    return found


def test_two_nodes_train_as_two_local_ranks_through_a_warning_a_requeue_and_the_loss_of_a_node(
    slurm: Slurm, folder: Path, local: Path
) -> None:
    run_dir = folder / "interrupted"
    job = slurm.launch(*jobs.settings(folder, run_dir=run_dir, steps=STEPS), "zero_stage=1")

    slurm.wait_for_step(job, run_dir, 4)
    slurm.call("scancel", "--signal=USR1", "--batch", job)  # as --signal=B:USR1@300 does before the end of the time
    slurm.wait(job, lambda fields: fields["Restarts"] == "1")

    slurm.wait_for_step(job, run_dir, 14)
    slurm.call("scontrol", "requeue", job)
    slurm.wait(job, lambda fields: fields["Restarts"] == "2")

    def again(fields: dict[str, str]) -> bool:
        return fields["Restarts"] == "3" or fields["JobState"] == "FAILED"

    slurm.wait_for_step(job, run_dir, 24)
    for process in of_node("node2"):
        process.send_signal(signal.SIGKILL)
    assert slurm.wait(job, again)["JobState"] != "FAILED", slurm.log(job)[-5000:]
    subprocess.run(
        [shutil.which("slurmd", path=SBIN) or "", "-N", "node2"], env=slurm.environment, timeout=30, check=True
    )

    assert slurm.wait_for_state(job, "COMPLETED", "FAILED")["JobState"] == "COMPLETED", slurm.log(job)[-5000:]
    assert trajectory(run_dir) == trajectory(local)
    assert [f"start {number}: 2 nodes" in slurm.log(job) for number in (1, 2, 3, 4, 5)] == [True] * 4 + [False]
    assert "lost node2, requeued (restart 3" in slurm.log(job)
    assert slurm.log(job).count("requeued (restart") == 2, "the requeue in between was not the job's own"


@pytest.mark.parametrize("words", typed("sbatch"), ids=" ".join)
def test_a_submission_of_a_page_is_taken_and_says_what_each_node_would_run(slurm: Slurm, words: list[str]) -> None:
    """As it stands, with --dry-run behind it, and what makes it a job for these two nodes before its script."""
    script = next(place for place, word in enumerate(words) if word.endswith(".sh"))
    shape = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0", "--time=5")
    options = ("--parsable", *words[1:script], *shape, f"--output={slurm.folder}/%j.out")
    job = slurm.call("sbatch", *options, *words[script:], "--dry-run")
    slurm.wait_for_state(job, "COMPLETED")
    stage = Path(words[script]).stem
    run = shlex.join(["quintet", *([] if stage == "stage" else [stage]), *words[script + 1 :]])
    first, *nodes = slurm.log(job).splitlines()
    assert first.startswith("job: 2 tasks on 2 nodes")
    assert len(nodes) == 2
    assert all(node.endswith(run) for node in nodes)


def test_neither_a_mistake_nor_a_cancelled_job_comes_back(slurm: Slurm, folder: Path) -> None:
    wrong = slurm.submit("pretrain", *jobs.settings(folder, run_dir=folder / "wrong"), "learning_rate=1", nodes=1)
    cancelled_run = folder / "cancelled"
    settings = jobs.settings(folder, run_dir=cancelled_run, steps=5000)
    cancelled = slurm.submit("pretrain", *settings, nodes=1)
    assert slurm.wait_for_state(wrong, "FAILED", "COMPLETED")["ExitCode"] == "2:0"
    assert "learning_rate" in slurm.log(wrong)
    slurm.wait_for_step(cancelled, cancelled_run, 2)
    slurm.call("scancel", cancelled)
    slurm.wait_for_state(cancelled, "CANCELLED")
    last = max(jobs.steps(cancelled_run))
    assert (cancelled_run / f"checkpoints/step-{last:08d}/done.json").exists(), "it saved before it ended"
    time.sleep(3)
    for job in (wrong, cancelled):
        assert (slurm.fields(job)["Restarts"], "requeued" in slurm.log(job)) == ("0", False)


def test_an_array_of_workers_scores_what_a_fine_tuning_beside_it_waits_for(slurm: Slurm, folder: Path) -> None:
    mined, teacher, scores = folder / "mined", teachers.bert(folder / "teacher"), folder / "scores"
    pairs.write_shards(mined, pairs.pairs(48, negatives=2), block_records=8)
    waiting = {
        "data": mined,
        "run_dir": folder / "finetuned",
        "scores": scores,
        "missing_scores": "wait",
        "teacher_fingerprint": fingerprint(open_teacher(str(teacher))),
        "negatives": 2,
    }
    tuning = slurm.submit("finetune", *jobs.settings(folder, **waiting), nodes=1)
    slurm.wait(tuning, lambda fields: "wait" in slurm.log(tuning))
    settings = [f"teacher={teacher}", f"data={mined}", f"scores={scores}"]
    array = slurm.submit("distill", *settings, nodes=1, options=("--array=0-1",))
    assert slurm.wait_for_state(tuning, "COMPLETED", "FAILED")["JobState"] == "COMPLETED", slurm.log(tuning)[-5000:]
    assert slurm.wait_for_state(f"{array}_0", "COMPLETED", "FAILED")["JobState"] == "COMPLETED"
    assert all(row["data/samples_unscored"] == 0 for row in jobs.steps(folder / "finetuned").values())
