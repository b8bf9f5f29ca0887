"""`quintet doctor`: green where all is well, and each check red on what is really broken."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jobs
import psutil
import pytest

from launcher import checks, checks_hosts, checks_machine, checks_ranks, checks_run, checks_slurm, cli, local
from launcher.checks import Row

ROOT = Path(__file__).resolve().parent.parent
SBIN = "/usr/sbin:/sbin:/usr/bin:/bin"
KEY = "5ecre7" * 7  # long enough for W&B's own check of its form


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("doctor")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Away from the checkout's own scripts, with a build cache of our own, and in no job."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def doctor(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command line in a process of its own."""
    command = [jobs.QUINTET, "doctor", *words]
    variables = {**jobs.environment(), **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=240, check=False)


def told(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, list[Row]]]:
    """The exit code and the rows by name of a command line in this process."""
    code = cli.main(["doctor", "--json", *words])
    content = json.loads(capsys.readouterr().out)
    assert content["exit_code"] == code
    rows: dict[str, list[Row]] = {}
    for row in content["rows"]:
        rows.setdefault(row["name"], []).append(Row(**row))
    return code, rows


def one(rows: list[Row]) -> Row:
    (row,) = rows
    return row


# --- the whole -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_healthy_machine_configuration_and_data_are_green_and_end_with_0(folder: Path, tmp_path: Path) -> None:
    """The table and the JSON document have the same rows."""
    words = ["pretrain", *jobs.settings(folder, run_dir=tmp_path / "run")]
    document, table = doctor(*words, "--json"), doctor(*words)
    assert (document.returncode, table.returncode) == (0, 0), table.stdout
    content = json.loads(document.stdout)
    assert content["format"] == "quintet-doctor-1"
    rows = [(row["status"], row["name"]) for row in content["rows"]]
    assert [status for status, name in rows if name != "slurm" and name != "port" and status != "ok"] == []
    names = {name for _, name in rows}
    assert {"libraries", "gpus", "shm", "ulimits", "jit", "port", "wandb", "config", "device"} <= names
    assert {"data", "model", "lanes", "memory", "disk"} <= names
    shown = [line.split()[:2] for line in table.stdout.splitlines() if re.match(r"(ok|warn|BAD) ", line)]
    assert [(status.lower(), name) for status, name in shown] == rows


def test_every_row_that_is_not_ok_must_have_a_mend() -> None:
    with pytest.raises(AssertionError, match="says the mend"):
        Row("shm", "bad", "too small")


def test_a_check_that_fails_itself_is_a_red_row_and_not_the_end() -> None:
    def check() -> list[Row]:
        raise ImportError("libcudart.so.12: cannot open shared object file\nmore")

    row = one(checks.guarded("gpus", check))
    assert (row.status, row.name) == ("bad", "gpus")
    assert "ImportError: libcudart.so.12" in row.found


def test_help_is_listed_and_needs_no_heavy_library(capsys: pytest.CaptureFixture[str]) -> None:
    blocked = ["torch", "transformers", "deepspeed", "omegaconf", "numpy", "pyarrow", "wandb", "rich", "yaml"]
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked}))\n"
        "from launcher.cli import main; sys.exit(main(['doctor', '--help']))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert "--hostfile FILE" in result.stdout
    assert "Example: quintet doctor" in result.stdout
    cli.main(["--help"])
    assert "\n  doctor " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pretian"], "did you mean pretrain?"),
        (["pretrain", "finetune"], "finetune: not a stage"),
        (["--ranks", "0"], "--ranks 0: must be at least 1"),
        (["--ranks", "many"], "many"),
        (["--hostfile", "nowhere"], "--hostfile nowhere: cannot be read"),
    ],
)
def test_a_wrong_command_line_ends_with_2_and_one_message(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["doctor", *words]) == 2
    assert said in capsys.readouterr().err


# --- the machine ---------------------------------------------------------------------------------------------------


def test_a_torch_with_the_hole_in_its_loader_is_red(tmp_path: Path) -> None:
    """An older torch stands before the real one on the path, as far as its metadata goes."""
    old = tmp_path / "old" / "torch-2.9.1.dist-info"
    old.mkdir(parents=True)
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.9.1\n", encoding="utf-8")
    path = f"{tmp_path / 'old'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    result = doctor("--json", PYTHONPATH=path)
    assert result.returncode == 2
    row = next(row for row in json.loads(result.stdout)["rows"] if row["name"] == "torch")
    assert row["status"] == "bad"
    assert "2.9.1, below 2.10: its torch.load" in row["found"]
    assert "pip install 'torch>=2.10'" in row["mend"]


def test_a_library_that_is_missing_or_too_old_is_red_and_extras_are_not_asked_for() -> None:
    wanted = ["torch>=2.10", "no-such-library>=1.0", "psutil>=999.0", 'faiss-gpu>=1.9; extra == "index"']
    rows = {row.name: row for row in checks_machine.libraries(wanted)}
    assert set(rows) == {"no-such-library", "psutil"}
    assert rows["no-such-library"].found == "not installed"
    assert "below 999.0" in rows["psutil"].found


def test_a_small_or_full_shm_is_red_where_gpus_share_it(tmpfs: Callable[[str], Path]) -> None:
    small, large = tmpfs("32m"), tmpfs("1200m")
    assert one(checks_machine.shared_memory(str(small), 8)).status == "bad"
    assert one(checks_machine.shared_memory(str(small), 0)).status == "ok"  # a container of 64 MiB and no GPU
    assert one(checks_machine.shared_memory(str(large), 8)).status == "ok"
    (small / "left over").write_bytes(bytes(32 << 20))
    row = one(checks_machine.shared_memory(str(small), 0))
    assert row.status == "bad"
    assert "--shm-size" in row.mend
    assert one(checks_machine.shared_memory(str(small / "none"), 0)).status == "bad"


def test_a_low_limit_of_open_files_is_red(tmp_path: Path) -> None:
    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))

    command = [jobs.QUINTET, "doctor", "--json"]
    result = subprocess.run(
        command, env=jobs.environment(), capture_output=True, text=True, timeout=120, check=False, preexec_fn=lower
    )
    assert result.returncode == 2, result.stderr
    row = next(row for row in json.loads(result.stdout)["rows"] if row["name"] == "ulimits")
    assert (row["status"], row["mend"][:9]) == ("bad", "ulimit -n")


def test_locked_memory_matters_where_there_is_infiniband() -> None:
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))\n"
        "from launcher.checks_machine import limits\n"
        "print(*(row.status for there in (True, False) for row in limits(there)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert result.stdout.split() == ["warn", "ok"], result.stderr


def test_a_lock_that_a_killed_build_left_is_red_and_its_mend_removes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = tmp_path / "extensions" / "py311 cpu" / "shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert one(checks_machine.build_locks(tmp_path / "extensions")).status == "warn"  # perhaps another machine's
    os.utime(lock, (time.time() - 3600, time.time() - 3600))
    code, rows = told(capsys)
    row = one(rows["jit"])
    assert (code, row.status) == (2, "bad")
    assert shlex.split(row.mend) == ["rm", str(lock)]
    subprocess.run(shlex.split(row.mend), check=True)
    assert one(checks_machine.build_locks(tmp_path / "extensions")).status == "ok"


def test_an_old_lock_whose_build_is_running_is_left_alone(tmp_path: Path) -> None:
    from torch.utils.file_baton import FileBaton

    (tmp_path / "op").mkdir()
    baton = FileBaton(str(tmp_path / "op" / "lock"))  # what a build holds
    assert baton.try_acquire()
    os.utime(tmp_path / "op" / "lock", (0, 0))
    assert one(checks_machine.build_locks(tmp_path)).status == "ok"
    os.close(baton.fd)  # as the kernel does for a killed build
    assert one(checks_machine.build_locks(tmp_path)).status == "bad"


def test_a_port_that_is_taken_is_red_when_it_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as held:
        held.bind(("", 0))
        held.listen()
        number = held.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(number))
        row = one(checks_machine.port())
        assert row.status == "bad"
        assert str(number) in row.found
        other = re.search(r"MASTER_PORT=(\d+)", row.mend)
    assert one(checks_machine.port()).status == "ok"
    assert other
    monkeypatch.setenv("MASTER_PORT", other[1])
    assert one(checks_machine.port()).status == "ok"
    monkeypatch.setenv("MASTER_PORT", "70000")
    assert one(checks_machine.port()).status == "bad"


def test_a_wandb_that_does_not_answer_is_a_warning_and_the_key_is_never_shown(folder: Path, tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{local.free_port()}"
    variables = {"WANDB_BASE_URL": address, "WANDB_API_KEY": KEY, "WANDB_MODE": "online"}
    words = ["pretrain", *jobs.settings(folder, run_dir=tmp_path / "run", **{"wandb.mode": "auto"})]
    document, table = doctor(*words, "--json", "--debug", **variables), doctor(*words, **variables)
    assert document.returncode == 0, document.stdout
    row = next(row for row in json.loads(document.stdout)["rows"] if row["name"] == "wandb")
    assert (row["status"], address in row["found"]) == ("warn", True)
    assert "wandb.mode=offline" in row["mend"]
    for text in (document.stdout, document.stderr, table.stdout, table.stderr):
        assert KEY not in text


def test_a_secret_that_a_message_repeats_is_taken_out(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A configuration may put the key where it does not belong, and the message names the value."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    words = jobs.settings(folder, run_dir=tmp_path / "run", **{"model.path": f"/models/{KEY}"})
    assert cli.main(["doctor", "pretrain", *words]) == 2
    shown = capsys.readouterr()
    assert "/models/***" in shown.out
    assert KEY not in shown.out + shown.err


def test_without_a_key_a_run_is_offline_and_only_who_asked_for_more_is_warned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert one(checks_machine.weights_and_biases("auto")).status == "ok"
    monkeypatch.delenv("WANDB_MODE")
    assert one(checks_machine.weights_and_biases("auto")).status == "ok"
    row = one(checks_machine.weights_and_biases("online"))
    assert (row.status, "wandb login" in row.mend) == ("warn", True)


# --- a configuration -----------------------------------------------------------------------------------------------


def test_all_mistakes_of_a_configuration_are_red_rows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows = told(capsys, "pretrain", *jobs.settings(folder, run_dir="run", lr=-1, stesp=3))
    assert code == 2
    found = [f"{row.status} {row.found}; {row.mend}" for row in rows["config"]]
    assert len(found) == 2
    assert any("stesp" in text and "did you mean" in text for text in found)


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> tuple[list[str], Path]:
    """The words of a configuration with shards of its own, and one of these."""
    words = jobs.settings(folder, run_dir=tmp_path / "run", data=tmp_path / "shards")
    shutil.copytree(folder / "shards", tmp_path / "shards")
    return words, next((tmp_path / "shards").glob("*.tar"))


def test_a_cut_shard_is_red_and_named(damaged: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    words, shard = damaged
    os.truncate(shard, shard.stat().st_size // 2)
    code, rows = told(capsys, "pretrain", *words)
    row = one(rows["data"])
    assert (code, row.status, shard.name in row.found) == (2, "bad", True)
    code, rows = told(capsys, "pretrain", *words, "damaged=skip")
    assert (code, one(rows["data"]).status) == (0, "warn")


def test_a_flipped_bit_is_found_with_deep(damaged: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    words, shard = damaged
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert one(told(capsys, "pretrain", *words)[1]["data"]).status == "ok"
    row = one(told(capsys, "pretrain", *words, "--deep")[1]["data"])
    assert (row.status, shard.name in row.found) == ("bad", True)


def test_shards_without_an_index_or_on_another_machine_are_not_read(
    damaged: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, shard = damaged
    index = shard.parent / "index.json"
    index.unlink()
    for data in (shard.parent, shard, tmp_path / "sh*", f"{tmp_path}/{{shards,other}}", f"file:{shard.parent}"):
        row = one(told(capsys, "pretrain", *words, f"data={data}")[1]["data"])
        assert (row.status, "quintet pack --index" in row.mend) == ("warn", True), data
    assert not index.exists()
    (tmp_path / "mixture.yaml").write_text("sources: {far: {shards: 'https://example.org/shards'}}\n")
    row = one(told(capsys, "pretrain", *words, f"data={tmp_path / 'mixture.yaml'}")[1]["data"])
    assert (row.status, "https://example.org/shards" in row.found) == ("warn", True)


def test_missing_shards_are_red(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = jobs.settings(folder, run_dir=tmp_path / "run", data=tmp_path / "nothing")
    code, rows = told(capsys, "pretrain", *words)
    row = one(rows["data"])
    assert (code, row.status, str(tmp_path / "nothing") in row.found) == (2, "bad", True)
    assert "folders of shards" in row.mend


def test_a_held_out_set_that_is_not_there_is_red(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = jobs.settings(folder, run_dir=tmp_path / "run", **{"eval.data": tmp_path / "held-out.jsonl"})
    code, rows = told(capsys, "pretrain", *words)
    assert (code, one(rows["eval"]).status, one(rows["model"]).status) == (2, "bad", "ok")
    (tmp_path / "held-out.jsonl").write_text('{"query": "a b", "passage": "c d"}\n')
    code, rows = told(capsys, "pretrain", *words)
    assert (code, one(rows["eval"]).found) == (0, "held-out: 1 queries")


@pytest.mark.parametrize("path", ["no/such-model", "/no/such/folder"])
def test_a_model_that_cannot_be_opened_offline_is_red(
    folder: Path, tmp_path: Path, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = jobs.settings(folder, run_dir=tmp_path / "run", **{"model.path": path})
    code, rows = told(capsys, "pretrain", *words)
    row = one(rows["model"])
    assert (code, row.status, path in row.found) == (2, "bad", True)
    assert ("hf download no/such-model" in row.mend) == (path == "no/such-model")


def test_a_model_without_its_weights_is_red(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = jobs.settings(folder, run_dir=tmp_path / "run", **{"model.path": tmp_path / "bert"})
    shutil.copytree(folder / "bert", tmp_path / "bert")
    weights = tmp_path / "bert" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    code, rows = told(capsys, "pretrain", *words)
    assert (code, one(rows["model"]).status) == (2, "bad")


def test_lanes_that_cannot_be_dealt_to_the_ranks_are_red(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = jobs.settings(folder, run_dir=tmp_path / "run")  # 4 lanes
    code, rows = told(capsys, "pretrain", *words, "--ranks", "3")
    row = one(rows["lanes"])
    assert (code, row.status) == (2, "bad")
    assert "one of 1, 2, 4 ranks" in row.mend
    assert told(capsys, "pretrain", *words, "--ranks", "2")[0] == 0


def test_too_little_disk_for_the_checkpoints_is_red(
    folder: Path, tmpfs: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """27,072 parameters, three fp32 numbers each, two checkpoints kept and one being written: 974,592 bytes."""
    small = tmpfs("940k")
    code, rows = told(capsys, "pretrain", *jobs.settings(folder, run_dir=small / "run"))
    assert (code, one(rows["disk"]).status) == (2, "bad")
    code, rows = told(capsys, "pretrain", *jobs.settings(folder, run_dir=small / "run", keep_last=1))
    assert (code, one(rows["disk"]).status) == (0, "ok")


def test_disk_counts_the_checkpoints_that_are_there(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    parameters = free // 12 // 2  # two checkpoints fit, three do not
    assert one(checks_run.disk(str(tmp_path / "new"), parameters, 2)).status == "bad"
    (tmp_path / "old" / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "old" / "checkpoints" / "step-00000002").mkdir(parents=True)
    assert one(checks_run.disk(str(tmp_path / "old"), parameters, 2)).status == "ok"
    (tmp_path / "file").touch()
    assert one(checks_run.disk(str(tmp_path / "file"), 1, 2)).status == "bad"


def test_memory_counts_what_a_rank_holds() -> None:
    """100 parameters: 16 bytes each at stage 0; at stage 1 the moments are shared by the ranks."""
    assert one(checks_run.memory(100, 0, 8, 1599)).status == "bad"
    assert one(checks_run.memory(100, 0, 8, 1700)).status == "warn"
    assert one(checks_run.memory(100, 0, 8, 2100)).status == "ok"
    assert one(checks_run.memory(100, 1, 8, 1599)).status == "ok"


def test_other_stages_have_their_model_and_data_opened(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs.settings(folder)
    words = [f"model={folder / 'bert'}", f"data={folder / 'shards'}", f"output={tmp_path / 'kept'}"]
    code, rows = told(capsys, "filter", *words)
    assert (code, one(rows["model"]).status, one(rows["data"]).status) == (0, "ok", "ok")
    code, rows = told(capsys, "distill", f"teacher={folder / 'bert'}", words[1], f"scores={tmp_path / 'scores'}")
    assert (code, one(rows["model"]).status) == (2, "bad")  # it is no re-ranker


# --- hosts -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sshd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An sshd of our own at 127.0.0.1, and the options that lead to it."""
    program = shutil.which("sshd", path=SBIN)
    if not program or not shutil.which("ssh") or os.geteuid():
        pytest.skip("needs openssh-server and root")
    for name in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    number = local.free_port()
    settings = ["ListenAddress 127.0.0.1", f"Port {number}", f"HostKey {tmp_path}/host_key", "StrictModes no"]
    settings += [f"AuthorizedKeysFile {tmp_path}/key.pub", "PidFile none", "UsePAM no", "PermitRootLogin yes"]
    (tmp_path / "sshd.conf").write_text("\n".join(settings) + "\n")
    server = subprocess.Popen([program, "-D", "-f", tmp_path / "sshd.conf", "-E", tmp_path / "sshd.log"])
    options = f"-p {number} -i {tmp_path}/key -o IdentitiesOnly=yes -o StrictHostKeyChecking=no"
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", f"{options} -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR")
    try:
        deadline = time.monotonic() + 20
        while socket.socket().connect_ex(("127.0.0.1", number)):
            assert time.monotonic() < deadline, (tmp_path / "sshd.log").read_text()
            time.sleep(0.05)
        yield
    finally:
        server.kill()
        server.wait()


def test_hosts_are_reached_compared_and_the_unreachable_one_is_red(
    sshd: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hostfile").write_text("127.0.0.1 slots=1  # here\nno-such-host.invalid slots=1\n")
    code, rows = told(capsys, "--hostfile", str(tmp_path / "hostfile"))
    assert code == 2
    assert one(rows["127.0.0.1"]).status == "ok", rows
    assert "same versions" in one(rows["127.0.0.1"]).found
    lost = one(rows["no-such-host.invalid"])
    assert lost.status == "bad"
    assert "`ssh no-such-host.invalid true` must work" in lost.mend


def test_a_host_whose_key_is_not_accepted_asks_no_question(
    sshd: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key.pub").write_text("")
    row = one(checks_hosts.rows({"127.0.0.1": 1}))
    assert (row.status, "Permission denied" in row.found) == ("bad", True)


def test_hosts_with_other_versions_clocks_or_too_few_gpus_are_named() -> None:
    here = {name: checks_hosts._version(name) for name in ("quintet", "torch", "deepspeed", "transformers")}

    def judged(skew: float = 0.0, gpus: int = 8, **versions: str) -> list[str]:
        answer = checks_hosts.Answer(skew, gpus, {**here, **versions})
        return [f"{row.status} {row.found}" for row in checks_hosts.judged("node7", 8, answer)]

    assert [text[:2] for text in judged()] == ["ok"]
    assert judged(torch="2.12.0") == [f"bad torch 2.12.0, here {here['torch']}"]
    assert judged(skew=2.5) == ["warn its clock is 2.5 s off"]
    assert judged(skew=400.0) == ["bad its clock is 400.0 s off"]
    assert judged(gpus=4) == ["bad 4 GPUs for 8 slots"]
    assert [text[:2] for text in judged(gpus=0)] == ["ok"]  # a job on CPUs


def test_the_way_to_a_host_is_not_taken_for_skew() -> None:
    """The host read its clock between ours: only what lies outside is certain."""
    content = {"time": 1000.0, "gpus": 0, "versions": {}}
    assert checks_hosts._read(content, 995.0, 1003.0).skew == 0
    assert checks_hosts._read(content, 1004.0, 1009.0).skew == 4
    assert checks_hosts._read(content, 990.0, 993.0).skew == 7


# --- Slurm -----------------------------------------------------------------------------------------------------------

GOOD = "#!/bin/bash\n#SBATCH --requeue\n#SBATCH --signal=B:USR1@300\nsrun quintet pretrain\n"


@pytest.mark.parametrize(
    ("text", "statuses", "said"),
    [
        (GOOD, ["ok"], "bash can read it"),
        (GOOD.replace("--signal=B:USR1@300", "--nodes=1"), ["warn"], "--signal"),
        (GOOD.replace("#SBATCH --requeue\n", ""), ["warn"], "--requeue"),
        (GOOD + "if true; then\n", ["bad"], "syntax error"),
        ("#!/bin/bash\nsrun quintet evaluate  # not pretrain\n", ["ok"], "bash can read it"),
    ],
)
def test_a_script_is_read_for_what_keeps_its_work(tmp_path: Path, text: str, statuses: list[str], said: str) -> None:
    script = tmp_path / "job.sh"
    script.write_text(text, encoding="utf-8")
    rows = checks_slurm.script_rows(script)
    assert [row.status for row in rows] == statuses
    assert said in rows[0].found


def test_our_own_scripts_are_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    scripts = [script for script in sorted(Path("slurm").glob("*.sh")) if checks_slurm._directives(script)]
    assert len(scripts) >= 7
    assert {row.status for script in scripts for row in checks_slurm.script_rows(script)} == {"ok"}


def test_a_missing_script_and_a_broken_site_env_are_red(tmp_path: Path) -> None:
    assert one(checks_slurm.script_rows(tmp_path / "none.sh")).status == "bad"
    site = tmp_path / "site.env"
    assert checks_slurm.site_rows(site) == []
    site.write_text("export NCCL_SOCKET_IFNAME=ib0\n")
    assert one(checks_slurm.site_rows(site)).status == "ok"
    site.write_text('export NCCL_SOCKET_IFNAME="ib0\n')
    assert one(checks_slurm.site_rows(site)).status == "bad"


@pytest.mark.skipif(
    os.geteuid() != 0 or not all(shutil.which(name, path=SBIN) for name in ("slurmctld", "slurmd", "munged")),
    reason="needs slurm-wlm, munge and root",
)
def test_a_real_slurm_judges_a_script_that_asks_for_too_much_and_joins_the_ranks_of_two_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = ROOT / "tests" / "slurm_cluster.sh"
    fits, large = tmp_path / "fits.sh", tmp_path / "large.sh"
    fits.write_text(GOOD.replace("--requeue", "--requeue\n#SBATCH --nodes=2"))
    large.write_text(GOOD.replace("--requeue", "--requeue\n#SBATCH --nodes=64"))
    assert checks_slurm.cluster_rows()[0].status == "warn"  # no cluster yet
    try:
        subprocess.run([cluster, "start", tmp_path / "slurm"], check=True, capture_output=True, timeout=120)
        monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm" / "slurm.conf"))
        code, rows = told(capsys, "--slurm", str(fits), "--slurm", str(large))
        assert one(checks_slurm.submission(large, named=False)).status == "warn"
        shape = ["--nodes=2", "--ntasks-per-node=1", f"--output={tmp_path}/job"]
        command = ["sbatch", *shape, "slurm/stage.sh", "doctor"]
        subprocess.run(command, cwd=ROOT, env=os.environ | jobs.environment(), check=True, timeout=60)
        deadline = time.monotonic() + 120
        while not (tmp_path / "job").exists() or " checks: " not in (tmp_path / "job").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.2)
    finally:
        subprocess.run([cluster, "stop", tmp_path / "slurm"], capture_output=True, timeout=120, check=False)
    assert one(rows["slurm"]).status == "ok", rows
    assert one(rows["fits.sh"]).status == "ok", rows
    row = rows["large.sh"][-1]
    assert (code, row.status, "sbatch --test-only" in row.found) == (2, "bad", True)
    assert "gloo, 32 MiB over 2 ranks" in (tmp_path / "job").read_text()


# --- ranks -----------------------------------------------------------------------------------------------------------


def rank(number: int, world: int, port: int, address: str = "127.0.0.1", *before: str) -> subprocess.Popen[str]:
    """A rank as torchrun and deepspeed start it."""
    place = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    variables = {**jobs.environment(), **place, "MASTER_ADDR": address, "MASTER_PORT": str(port)}
    command = [*before, jobs.QUINTET, "doctor", "--json"]
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def outcome(ranks: list[subprocess.Popen[str]]) -> tuple[list[int], dict[str, Row]]:
    """The exit codes of all ranks, and what rank 0 said; the others print nothing."""
    try:
        said = [process.communicate(timeout=200) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [out for out, _ in said[1:]] == [""] * (len(ranks) - 1)
    rows = [Row(**row) for row in json.loads(said[0][0])["rows"]]
    return [process.returncode for process in ranks], {row.name: row for row in rows}


def test_two_ranks_under_the_launcher_report_their_bandwidth(tmp_path: Path) -> None:
    command = [jobs.QUINTET, "launch", "--ranks", "2", "doctor", "--json"]
    done = subprocess.run(command, env=jobs.environment(), capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)["rows"]}
    assert re.fullmatch(r"gloo, 32 MiB over 2 ranks on 1 host: \d+\.\d\d GB/s", rows["all-reduce"]["found"])
    for name in ("rank 0", "rank 1"):
        found = re.search(r"all-reduce (\S+) GB/s, link (\S+) GB/s, (\S+) GFLOP/s", rows[name]["found"])
        assert found
        assert all(float(speed.replace(",", "")) > 0 for speed in found.groups())
    assert rows["clocks"]["status"] == "ok"


@pytest.mark.slow
def test_a_rank_that_gets_a_fifth_of_its_processor_is_named() -> None:
    """The kernel stops and continues it, as it does to one that shares its core with other jobs."""
    port = local.free_port()
    slow = rank(1, 2, port)
    process, done = psutil.Process(slow.pid), threading.Event()

    def hinder() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            while not done.is_set():
                process.suspend()
                done.wait(0.08)
                process.resume()
                done.wait(0.02)

    before = -1.0
    while (used := sum(process.cpu_times()[:2])) != before:  # until it waits for rank 0, having imported everything
        before = used
        time.sleep(1)
    hindrance = threading.Thread(target=hinder)
    hindrance.start()
    try:
        codes, rows = outcome([rank(0, 2, port), slow])
    finally:
        done.set()
        hindrance.join()
    assert codes == [0, 0]
    assert (rows["rank 0"].status, rows["rank 1"].status) == ("ok", "warn"), rows
    assert "SLOW, its products" in rows["rank 1"].found
    assert socket.gethostname() in rows["rank 1"].mend


def test_a_rank_that_never_comes_is_said_with_the_place_of_meeting() -> None:
    port = local.free_port()
    program = (
        "from launcher import checks_ranks\n"
        "for row in checks_ranks.rows([], timeout_seconds=3): print(row.status, row.found)"
    )
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    variables = {**jobs.environment(), **place}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=False)
    assert f"bad not all 2 ranks were at 127.0.0.1:{port} within 3 s" in done.stdout, done.stderr


def test_a_rank_that_finds_no_first_rank_says_so_itself() -> None:
    program = (
        "import sys; from launcher import checks_ranks, cli\n"
        "checks_ranks.rows.__defaults__ = (3.0,)\n"
        "sys.exit(cli.main(['doctor']))"
    )
    place = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    variables = {**jobs.environment(), **place, "MASTER_PORT": str(local.free_port())}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "[rank 1] doctor: not all 2 ranks were at" in done.stderr


def test_a_rank_that_leaves_in_the_middle_is_a_red_row() -> None:
    port = local.free_port()
    program = (
        "import os, torch; from trainer import distributed; distributed.start(torch.device('cpu'), 60); os._exit(1)"
    )
    place = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    leaving = subprocess.Popen([sys.executable, "-c", program], env={**jobs.environment(), **place})
    codes, rows = outcome([rank(0, 2, port)])
    leaving.wait(60)
    assert codes == [2]
    assert (rows["ranks"].status, "broke off" in rows["ranks"].found) == ("bad", True)


def test_ranks_whose_port_is_taken_are_told_to_take_another() -> None:
    with socket.socket() as held:
        held.bind(("", 0))
        held.listen()
        codes, rows = outcome([rank(0, 2, held.getsockname()[1])])
    assert codes == [2]
    assert rows["ranks"].status == "bad"
    assert "MASTER_PORT" in rows["ranks"].mend


@pytest.mark.slow
def test_a_rank_behind_a_slow_cable_is_named() -> None:
    """Three network namespaces on a bridge, one of which sends at 200 Mbit/s, far less than a busy machine does."""
    if os.geteuid() or not shutil.which("tc", path=SBIN):
        pytest.skip("needs root and iproute2")
    names = [f"qdoctor{number}" for number in range(3)]
    with contextlib.ExitStack() as stack:
        run = lambda text: subprocess.run(text.split(), check=True, capture_output=True)  # noqa: E731
        try:
            run("ip link add qdoctor type bridge")
            stack.callback(run, "ip link delete qdoctor")
            run("ip link set qdoctor up")
            for number, name in enumerate(names):
                run(f"ip netns add {name}")
                stack.callback(run, f"ip netns delete {name}")
                run(f"ip link add cable netns {name} type veth peer name {name}")
                run(f"ip link set {name} master qdoctor up")
                run(f"ip -n {name} address add 10.78.0.{number + 1}/24 dev cable")
                run(f"ip -n {name} link set cable up")
                run(f"ip -n {name} link set lo up")
            run("ip netns exec qdoctor2 tc qdisc add dev cable root tbf rate 200mbit burst 256kb latency 400ms")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"needs the right to make network namespaces: {error.stderr}")
        prefix = ("ip", "netns", "exec")
        ranks = [rank(n, 3, 29791, "10.78.0.1", *prefix, name) for n, name in enumerate(names)]
        codes, rows = outcome(ranks)
    assert codes == [0, 0, 0]
    assert [rows[f"rank {n}"].status for n in range(3)] == ["ok", "ok", "warn"], rows
    assert "SLOW, it sends and receives" in rows["rank 2"].found


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, 8])
def test_every_link_of_the_ring_is_measured_once_and_no_rank_has_two_at_a_time(world: int) -> None:
    found = checks_ranks.phases(world)
    links = [(first, last) for phase in found for first, last in phase.items()]
    ring = {(rank, (rank + 1) % world) for rank in range(world)} if world > 2 else {(0, 1)} if world == 2 else set()
    assert (set(links), len(links)) == (ring, len(ring))
    for phase in found:
        assert len({*phase, *phase.values()}) == 2 * len(phase)


def test_a_host_is_slow_when_all_its_links_to_other_hosts_are() -> None:
    """Four hosts of two ranks: links inside of a host are fast, and tell nothing of its cable."""
    hosts = ["a", "a", "b", "b", "c", "c", "d", "d"]

    def judged(*links: float) -> list[str]:
        ranks = [checks_ranks.Measured(host, 0.0, 1e9, link, 1e12) for host, link in zip(hosts, links, strict=True)]
        return [row.name for row in checks_ranks.judged(ranks, "gloo") if row.status != "ok"]

    assert judged(90, 10, 90, 10, 90, 10, 90, 10) == []
    assert judged(90, 10, 90, 1, 90, 1, 90, 10) == ["rank 4", "rank 5"]  # b-c and c-d are slow: c
    assert judged(90, 10, 90, 1, 90, 10, 90, 10) == []  # one link alone: nobody knows whose fault


def test_hosts_tell_the_first_rank_what_is_wrong_there_once() -> None:
    ranks = [checks_ranks.Measured(host, 0.0, 1e9, 1e9, 1e12) for host in ("a", "a", "b", "b")]
    full = Row("shm", "bad", "0 of 64 MiB are free", "--shm-size=1g")
    assert checks_ranks._elsewhere([[full], [], [full], []], ranks) == [
        Row("shm", "bad", "0 of 64 MiB are free", "--shm-size=1g", host="b")
    ]


def test_clocks_of_other_hosts_are_compared() -> None:
    ranks = [checks_ranks.Measured(host, clock, 1e9, 1e9, 1e12) for host, clock in (("a", 50.0), ("b", 53.0))]
    rows = [row for row in checks_ranks.judged(ranks, "gloo") if row.status != "ok"]
    assert [(row.name, row.status) for row in rows] == [("b", "warn")]
