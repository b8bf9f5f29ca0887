"""A run's copy in object storage, on fsspec's own file systems: whole or not there, never in the way of the run."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from data import fetch
from data.errors import Stopped, UserError
from trainer import checkpoint, remote, runfolder
from trainer.checkpoint import MANIFEST
from trainer.remote import Mirror

ID = "4f6a01bc"


class Bucket(LocalFileSystem):
    """A store that a test can make fail or wait: `before` is called with the path of every file that is written."""

    protocol = "bucket"
    before: Callable[[str], None] = staticmethod(lambda path: None)

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).removeprefix("bucket://"))

    def put_file(self, path1: Any, path2: Any, callback: Any = None, **options: Any) -> None:
        type(self).before(path2)
        Path(path2).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path1, path2)

    def pipe_file(self, path: Any, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        type(self).before(path)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(value)


fsspec.register_implementation("bucket", Bucket, clobber=True)


@pytest.fixture(autouse=True)
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fetch, "FIRST_WAIT_SECONDS", 0.0)
    monkeypatch.setattr(remote, "RETRY_SECONDS", 0.05)
    yield
    Bucket.before = staticmethod(lambda path: None)


def mirror(
    run_dir: Path, url: str, *, keep_last: int = 2, keep_every: int = 0, limit: float = 30, rank: int = 0
) -> Mirror:
    return Mirror(url, run_dir, keep_last=keep_last, keep_every=keep_every, limit_seconds=limit, rank=rank)


def save(run_dir: Path, step: int, content: bytes = b"weights") -> checkpoint.Checkpoint:
    def write(staging: Path) -> None:
        (staging / "model").mkdir()
        (staging / "model" / "weights.bin").write_bytes(content * step)
        (staging / "moments.bin").write_bytes(str(step).encode() * 500)

    return checkpoint.Saving(run_dir, step, write, {}).publish()


def run_folder(folder: Path, run_id: str = ID) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    runfolder.write_json(folder / "run.json", {"id": run_id, "attempt": 1})
    (folder / "metrics.jsonl").write_text('{"train/step": 1}\n')
    (folder / "config.yaml").write_text("steps: 9\n")
    return folder


def end(copy: Mirror, run_dir: Path, code: int = 0) -> None:
    runfolder.finish(run_dir, code, "done", 9)
    copy.finish(code)


def wait_while(condition: Callable[[], bool]) -> None:
    while condition():
        time.sleep(0.005)


def wait_for_step(copy: Mirror, step: int) -> None:
    wait_while(lambda: copy.figures()["mirrored_step"] != step)


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.fixture
def mirrored(tmp_path: Path) -> Path:
    """A mirror with the steps 1, 2 and 3 of a run that was stopped."""
    run_dir = run_folder(tmp_path / "first")
    copy = mirror(run_dir, f"file://{tmp_path}/store", keep_last=3)
    copy.restore(fresh=False)
    copy.begin(ID, None)
    for step in (1, 2, 3):
        copy.send(save(run_dir, step))
        wait_for_step(copy, step)
    end(copy, run_dir, Stopped.exit_code)
    return tmp_path / "store"


def test_a_mirror_holds_the_run_as_the_run_folder_does(mirrored: Path, tmp_path: Path) -> None:
    assert json.loads((mirrored / "run.json").read_text()) == {"id": ID}
    for name in ("metrics.jsonl", "config.yaml", "run.json", "exit.json"):
        assert (mirrored / ID / name).read_bytes() == (tmp_path / "first" / name).read_bytes()
    for step in (1, 2, 3):
        assert checkpoint.verify(mirrored / ID / "checkpoints" / checkpoint.folder_name(step)) == []


def test_an_empty_run_folder_is_filled_with_the_newest_checkpoint(
    mirrored: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = tmp_path / "second"
    run_dir.mkdir()
    with caplog.at_level(logging.INFO):
        mirror(run_dir, str(mirrored)).restore(fresh=False)
    found = checkpoint.newest(run_dir)
    assert found is not None
    assert (found.step, steps(run_dir)) == (3, ["step-00000003"])
    assert found.manifest == checkpoint.load(tmp_path / "first/checkpoints/step-00000003").manifest
    assert json.loads((run_dir / "run.json").read_text())["id"] == ID
    assert (run_dir / "metrics.jsonl").read_text() == '{"train/step": 1}\n'
    assert "that of step 3 was restored from mirror=" in caplog.text


def test_every_damage_of_a_mirrored_checkpoint_is_found_and_the_one_before_is_taken(
    mirrored: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newest = mirrored / ID / "checkpoints/step-00000003"
    damages: list[Callable[[], object]] = [
        lambda: (newest / "model/weights.bin").write_bytes(b"Weights" * 3),
        lambda: (newest / "moments.bin").unlink(),
        lambda: (newest / MANIFEST).write_text((newest / MANIFEST).read_text()[:-30]),
        lambda: (newest / MANIFEST).write_bytes((newest.parent / "step-00000002" / MANIFEST).read_bytes()),
        lambda: (newest / MANIFEST).unlink(),
    ]
    whole = tmp_path / "whole"
    shutil.copytree(newest, whole)
    for number, damage in enumerate(damages):
        damage()
        run_dir = tmp_path / f"restored-{number}"
        run_dir.mkdir()
        mirror(run_dir, str(mirrored)).restore(fresh=False)
        assert steps(run_dir) == ["step-00000002"], number
        shutil.rmtree(newest)
        shutil.copytree(whole, newest)
    assert caplog.text.count("the checkpoint of step 3 is passed over") == 4  # without a manifest it is no checkpoint


def test_a_mirror_whose_every_checkpoint_is_damaged_is_told(mirrored: Path, tmp_path: Path) -> None:
    for file in mirrored.rglob("moments.bin"):
        file.write_bytes(b"")
    (tmp_path / "second").mkdir()
    with pytest.raises(UserError, match=r"mirror=.*no checkpoint of run 4f6a01bc is complete.*fresh=true"):
        mirror(tmp_path / "second", str(mirrored)).restore(fresh=False)


def test_a_manifest_may_not_name_files_outside_of_its_folder(mirrored: Path, tmp_path: Path) -> None:
    place = mirrored / ID / "checkpoints/step-00000003" / MANIFEST
    manifest = json.loads(place.read_text())
    manifest["files"]["../../outside"] = manifest["files"].pop("moments.bin")
    del manifest["digest"]
    checkpoint._write_manifest(place.parent, manifest)
    shutil.copy(place.parent / "moments.bin", mirrored / ID / "outside")  # where the name leads to in the mirror
    run_dir = tmp_path / "second"
    run_dir.mkdir()
    mirror(run_dir, str(mirrored)).restore(fresh=False)
    assert steps(run_dir) == ["step-00000002"]
    assert not list(run_dir.glob("**/outside"))


def test_checkpoints_that_are_there_and_a_fresh_start_are_left_alone(mirrored: Path, tmp_path: Path) -> None:
    run_dir = run_folder(tmp_path / "second")
    save(run_dir, 1)
    mirror(run_dir, str(mirrored)).restore(fresh=False)
    assert steps(run_dir) == ["step-00000001"]
    (tmp_path / "third").mkdir()
    mirror(tmp_path / "third", str(mirrored)).restore(fresh=True)
    assert list((tmp_path / "third").iterdir()) == []


def test_the_mirror_of_another_run_is_refused(mirrored: Path, tmp_path: Path) -> None:
    run_dir = run_folder(tmp_path / "second", "00000000")
    with pytest.raises(UserError, match=r"belongs to run 4f6a01bc, and .*second is run 00000000; name another"):
        mirror(run_dir, str(mirrored)).restore(fresh=False)


def test_a_fresh_run_beside_an_old_one_never_touches_it(mirrored: Path, tmp_path: Path) -> None:
    run_dir = run_folder(tmp_path / "second", "00000000")
    copy = mirror(run_dir, str(mirrored), keep_last=1)
    copy.restore(fresh=True)
    copy.begin("00000000", None)
    copy.send(save(run_dir, 1))
    end(copy, run_dir)
    assert steps(mirrored / ID) == ["step-00000001", "step-00000002", "step-00000003"]
    (tmp_path / "third").mkdir()
    mirror(tmp_path / "third", str(mirrored)).restore(fresh=False)
    assert steps(tmp_path / "third") == ["step-00000001"], "the newest run is the one that goes on"


def test_old_checkpoints_leave_the_mirror_as_they_leave_the_run_folder(tmp_path: Path) -> None:
    run_dir = run_folder(tmp_path / "run")
    copy = mirror(run_dir, f"{tmp_path}/store", keep_every=4)
    copy.begin(ID, None)
    (tmp_path / "store" / ID / "checkpoints/step-00000003").mkdir(parents=True)  # half of one, of a killed start
    (tmp_path / "store" / ID / "checkpoints/step-00000003/moments.bin").write_bytes(b"half")
    for step in (4, 5, 6, 7):
        copy.send(save(run_dir, step))
        wait_for_step(copy, step)
    end(copy, run_dir)
    assert steps(tmp_path / "store" / ID) == ["step-00000004", "step-00000006", "step-00000007"]


def test_nothing_waits_for_a_slow_store_and_the_newest_checkpoint_wins(tmp_path: Path) -> None:
    run_dir = run_folder(tmp_path / "run")
    reached, go_on = threading.Event(), threading.Event()

    def before(path: str) -> None:
        if "step-00000001" in path:
            reached.set()
            assert go_on.wait(30)

    copy = mirror(run_dir, f"bucket://{tmp_path}/store")
    copy.begin(ID, None)
    Bucket.before = staticmethod(before)
    copy.send(save(run_dir, 1))
    assert reached.wait(30)
    for step in (2, 3, 4):
        copy.send(save(run_dir, step))  # returns although the store hangs
        checkpoint.prune(run_dir, 1, spare=copy.held)
    assert copy.held == {1, 4}
    assert steps(run_dir) == ["step-00000001", "step-00000004"], "what is being copied stays, whatever keep_last says"
    go_on.set()
    end(copy, run_dir)
    assert steps(tmp_path / "store" / ID) == ["step-00000001", "step-00000004"]
    assert copy.held == set()


def test_the_manifest_is_the_last_file_of_a_checkpoint(tmp_path: Path) -> None:
    run_dir, written = run_folder(tmp_path / "run"), []
    Bucket.before = staticmethod(lambda path: written.append(path.rpartition(f"/{ID}/")[2]))
    copy = mirror(run_dir, f"bucket://{tmp_path}/store")
    copy.begin(ID, None)
    copy.send(save(run_dir, 1))
    (run_dir / "model").mkdir()
    (run_dir / "model" / "config.json").write_text("{}")
    end(copy, run_dir)
    of_step = [path for path in written if "step-00000001" in path]
    assert of_step[-1] == f"checkpoints/step-00000001/{MANIFEST}"
    assert sorted(of_step[:-1]) == [
        f"checkpoints/step-00000001/{name}" for name in ("model/weights.bin", "moments.bin")
    ]
    assert written.index("metrics.jsonl") < written.index(of_step[-1]), "it would go on as a run without a past"
    assert written[-1] == "exit.json"
    assert "model/config.json" in written
    assert (tmp_path / "store" / ID / "model/config.json").exists()


def test_a_file_in_a_plain_folder_is_replaced_and_never_written_in_its_place(tmp_path: Path) -> None:
    """A machine that is taken away amid a write leaves the file that was there: who has it open reads it to its end."""
    store = remote.Store(str(tmp_path / "store"))
    (tmp_path / "new").write_text("the second")
    for replace in (lambda: store.put(tmp_path / "new", "a/file"), lambda: store.write("a/file", b"the second")):
        store.write("a/file", b"the first")
        with open(tmp_path / "store/a/file", "rb") as open_before:
            replace()
            assert open_before.read() == b"the first"
        assert store.read("a/file") == b"the second"
        assert store.names("a") == ["file"]


def test_the_same_checkpoint_is_not_copied_twice_and_never_taken_away(tmp_path: Path) -> None:
    """A run that is stopped where it has just saved, or is started again and stopped at once, saves the same again."""
    run_dir, written = run_folder(tmp_path / "run"), []
    copy = mirror(run_dir, f"bucket://{tmp_path}/store")
    copy.begin(ID, save(run_dir, 1))
    end(copy, run_dir, Stopped.exit_code)
    Bucket.before = staticmethod(written.append)
    again = mirror(run_dir, f"bucket://{tmp_path}/store")
    again.restore(fresh=False)
    again.begin(ID, checkpoint.newest(run_dir))
    again.send(save(run_dir, 1))
    end(again, run_dir, Stopped.exit_code)
    assert not [path for path in written if "step-00000001" in path]
    other = mirror(run_dir, f"bucket://{tmp_path}/store")
    other.begin(ID, save(run_dir, 1, b"other weights"))
    end(other, run_dir, Stopped.exit_code)
    assert checkpoint.verify(tmp_path / "store" / ID / "checkpoints/step-00000001") == []
    assert (tmp_path / "store" / ID / "checkpoints/step-00000001/model/weights.bin").read_bytes() == b"other weights"


def test_a_failing_store_is_told_once_and_counted_and_the_checkpoint_comes_later(tmp_path: Path) -> None:
    run_dir, broken = run_folder(tmp_path / "run"), [True]

    def before(path: str) -> None:
        if broken[0] and "step-" in path:
            raise OSError("no route to the bucket")

    copy = mirror(run_dir, f"bucket://{tmp_path}/store")
    copy.begin(ID, None)
    Bucket.before = staticmethod(before)
    copy.send(save(run_dir, 1))
    wait_while(lambda: copy.figures()["mirror_failures"] < 3)
    (news,) = copy.news()
    assert "gave up after 5 attempts; the last one: OSError: no route to the bucket" in news
    broken[0] = False
    wait_for_step(copy, 1)
    assert copy.news() == []
    end(copy, run_dir)
    assert checkpoint.verify(tmp_path / "store" / ID / "checkpoints/step-00000001") == []


def test_the_end_waits_for_the_store_up_to_its_limit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_dir, go_on = run_folder(tmp_path / "run"), threading.Event()
    copy = mirror(run_dir, f"bucket://{tmp_path}/store", limit=0.2)
    copy.begin(ID, None)
    Bucket.before = staticmethod(lambda path: go_on.wait(30))
    copy.send(save(run_dir, 1))
    end(copy, run_dir, Stopped.exit_code)
    assert "lacks what was not copied within 0 s" in caplog.text
    go_on.set()


def test_a_mirror_that_cannot_be_used_ends_a_first_start(tmp_path: Path) -> None:
    run_dir = run_folder(tmp_path / "run")

    def refuse(path: str) -> None:
        raise PermissionError("AccessDenied")

    Bucket.before = staticmethod(refuse)
    copy = mirror(run_dir, f"bucket://{tmp_path}/store")
    copy.restore(fresh=False)
    with pytest.raises(
        UserError, match=r"bucket://.*/store/run\.json: refused \(AccessDenied\); look at the credentials"
    ):
        copy.begin(ID, None)
    with pytest.raises(UserError, match="mirror=nowhere://x: cannot be opened"):
        mirror(run_dir, "nowhere://x")


def test_a_mirror_that_cannot_be_read_is_no_reason_to_start_at_step_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def down(self: Bucket, path: str, **options: Any) -> bytes:
        raise TimeoutError("no answer")

    monkeypatch.setattr(Bucket, "cat_file", down, raising=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"mirror: .*gave up after 5 attempts.*no answer.*fresh=true"):
        mirror(tmp_path / "empty", f"bucket://{tmp_path}/store").restore(fresh=False)
    save(tmp_path / "full", 3)
    mirror(tmp_path / "full", f"bucket://{tmp_path}/store").restore(fresh=False)
    assert "going on with what is in" in caplog.text


def test_a_store_without_folders_is_a_mirror_too(tmp_path: Path) -> None:
    run_dir = run_folder(tmp_path / "run")
    copy = mirror(run_dir, "memory://bucket/run")
    copy.begin(ID, None)
    for step in (1, 2, 3):
        copy.send(save(run_dir, step))
    end(copy, run_dir)
    (tmp_path / "second").mkdir()
    mirror(tmp_path / "second", "memory://bucket/run/").restore(fresh=False)
    assert steps(tmp_path / "second") == ["step-00000003"]
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


def test_other_ranks_and_runs_without_a_mirror_do_nothing(tmp_path: Path) -> None:
    for copy in (mirror(tmp_path, ""), mirror(tmp_path, f"{tmp_path}/store", rank=1)):
        copy.restore(fresh=False)
        copy.begin(ID, None)
        copy.send(checkpoint.Checkpoint(tmp_path, 1, {}))
        copy.finish(0)
        assert (copy.held, copy.figures(), copy.news()) == (set(), {}, [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3::file://x", "not a folder or a URL"),
        ("s3://me:secret@bucket/x", "holds a password"),
        ("a\nb", "not a folder"),
    ],
)
def test_a_url_that_is_none_is_told_without_its_secrets(url: str, said: str) -> None:
    (problem,) = remote.problems(url)
    assert said in problem
    assert "secret" not in problem
