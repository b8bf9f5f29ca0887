"""The training stage as a user meets it: what it refuses, how it ends, what it leaves in the run folder."""

from __future__ import annotations

import copy
import io
import json
import math
import os
import pickle
import signal
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jobs
import pairs
import pytest
import ranks
import tiny
import torch

from data.errors import UserError
from launcher import cli
from trainer import checkpoint, distributed, loop


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("train")
    jobs.settings(made)
    return made


def pretrain(folder: Path, *arguments: str, **changes: Any) -> int:
    """`quintet pretrain` in this process."""
    return cli.main(["pretrain", *jobs.settings(folder, **changes), *arguments])


def test_a_short_run_leaves_a_complete_run_folder(folder: Path, capsys: pytest.CaptureFixture[str]):
    run_dir = folder / "run"
    held_out = folder / "held.jsonl"
    held_out.write_text(
        "".join(json.dumps({"query": r.query, "passage": r.passage}) + "\n" for r in pairs.pairs(20, seed=9))
    )
    assert pretrain(folder, run_dir=run_dir, steps=6, **{"eval.data": held_out, "eval.every_steps": 3}) == 0
    names = {path.name for path in run_dir.iterdir()}
    assert {"config.yaml", "ds_config.json", "environment.json", "metrics.jsonl", "exit.json", "model"} <= names
    assert json.loads((run_dir / "exit.json").read_text())["code"] == 0
    assert sorted(jobs.steps(run_dir)) == [1, 2, 3, 4, 5, 6]
    evaluated = [row["train/step"] for row in jobs.metrics(run_dir) if "eval/held/ndcg_at_10" in row]
    assert evaluated == [3, 6]
    assert json.loads((run_dir / "ds_config.json").read_text())["zero_optimization"]["stage"] == 0  # of 1
    shown = capsys.readouterr()
    assert "1, 16 pairs each, ZeRO-0 on cpu" in shown.out + shown.err, "one rank has nothing to share out"
    assert "16 queries x 16 candidates, 15 negatives a query" in shown.out + shown.err
    reopened = pytest.importorskip("sentence_transformers").SentenceTransformer(str(run_dir / "model"), device="cpu")
    assert reopened.prompts["query"] == "query: "


def test_a_finished_run_started_again_has_nothing_to_do(folder: Path):
    run_dir = folder / "again"
    assert pretrain(folder, run_dir=run_dir, steps=4) == 0
    assert pretrain(folder, run_dir=run_dir, steps=4) == 0
    assert sorted(jobs.steps(run_dir)) == [1, 2, 3, 4]
    assert len([row for row in jobs.metrics(run_dir) if "train/loss" in row]) == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": "nowhere"}, ["nowhere"]),
        ({"model.path": "nowhere"}, ["nowhere"]),
        ({"batch_size": 18}, ["batch_size=18", "lanes=4"]),
        ({"warmup_steps": 12}, ["warmup_steps=12", "steps=12"]),
        ({"precision": "fp16"}, ["fp16", "bf16"]),
        ({"max_length": 500}, ["max_length=500", "70"]),
        ({"model.path": "random"}, ["tokenizer"]),
        ({"lanes": 512, "batch_size": 512}, ["lanes=512", "300"]),
        ({"eval.data": "missing.jsonl"}, ["missing.jsonl"]),
        ({"zero_stage": 4}, ["zero_stage", "4"]),
        ({"temprature": 0.1}, ["temprature", "temperature"]),
        ({"device": "cuda"}, ["device=cuda"]),
    ],
)
def test_a_mistake_ends_with_code_2_and_one_message_that_names_it(
    changes: dict[str, Any], words: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    if "cuda" in changes.values() and torch.cuda.is_available():
        changes, words = {"device": "tpu"}, ["tpu"]
    assert pretrain(folder, run_dir=tmp_path / "run", **changes) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    assert "Traceback" not in message


def test_packed_attention_is_refused_for_a_family_that_has_none(folder: Path, tmp_path: Path, capsys):
    model = tiny.mpnet(tmp_path / "mpnet")
    arguments = {"model.path": model, "model.attention": "packed"}
    assert pretrain(folder, run_dir=tmp_path / "run", **arguments) == 2
    assert "mpnet" in capsys.readouterr().err


def test_packed_attention_trains_to_the_losses_of_padded_attention(folder: Path, tmp_path: Path):
    for attention in ("packed", "padded"):
        changes = {"run_dir": tmp_path / attention, "model.attention": attention, "model.dropout": 0.0}
        assert pretrain(folder, steps=4, **changes) == 0
    packed, padded = jobs.steps(tmp_path / "packed"), jobs.steps(tmp_path / "padded")
    assert packed[4]["data/padding_frac"] == 0.0 < padded[4]["data/padding_frac"]
    for step in packed:
        assert packed[step]["train/loss"] == pytest.approx(padded[step]["train/loss"], rel=1e-4)


def test_bf16_follows_fp32_within_its_precision(folder: Path, tmp_path: Path):
    for precision in ("bf16", "fp32"):
        changes = {"run_dir": tmp_path / precision, "precision": precision, "model.dropout": 0.0}
        assert pretrain(folder, steps=4, temperature=0.1, **changes) == 0
    bf16, fp32 = jobs.steps(tmp_path / "bf16"), jobs.steps(tmp_path / "fp32")
    for step in fp32:
        assert bf16[step]["train/loss"] == pytest.approx(fp32[step]["train/loss"], rel=0.02)
    assert bf16[4]["train/loss"] != fp32[4]["train/loss"]


def test_a_changed_data_setting_is_refused_on_resume_and_named(folder: Path, tmp_path: Path, capsys):
    assert pretrain(folder, run_dir=tmp_path / "run", steps=4) == 0
    assert pretrain(folder, run_dir=tmp_path / "run", steps=8, seed=1) == 2
    message = capsys.readouterr().err
    assert "seed" in message
    assert "fresh=true" in message
    assert pretrain(folder, run_dir=tmp_path / "run", steps=8, seed=1, fresh="true") == 0


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(folder: Path, tmp_path: Path, capsys):
    run_dir = tmp_path / "run"
    assert pretrain(folder, run_dir=run_dir, steps=6, save_every_steps=3) == 0
    file = run_dir / "checkpoints/step-00000006/optimizer/moments-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    assert pretrain(folder, run_dir=run_dir, steps=6, save_every_steps=3) == 0
    assert "moments-00000.safetensors" in capsys.readouterr().err
    repeated = [row["train/step"] for row in jobs.metrics(run_dir) if row["run/attempt"] == 2 and "train/loss" in row]
    assert repeated == [4, 5, 6]


@pytest.mark.parametrize("part", ["optimizer", "model"])
def test_a_pickle_in_a_checkpoint_that_is_vouched_for_is_not_opened(
    folder: Path, tmp_path: Path, part: str, capsys: pytest.CaptureFixture[str]
):
    """Whoever can write a checkpoint can make its hashes right; the files must still be safe to open."""
    run_dir, canary = tmp_path / "run", tmp_path / "canary"
    assert pretrain(folder, run_dir=run_dir, steps=5) == 0

    class Evil:
        def __reduce__(self) -> Any:
            return (canary.touch, ())

    saved = run_dir / "checkpoints" / "step-00000005"
    for file in (saved / part).glob("*.safetensors"):
        file.write_bytes(pickle.dumps(Evil()))
        file.with_suffix(".bin").write_bytes(pickle.dumps(Evil()))
        file.with_suffix(".pt").write_bytes(pickle.dumps(Evil()))
    manifest = json.loads((saved / "done.json").read_text())
    manifest.pop("digest", None)
    for name in manifest["files"]:
        manifest["files"][name] = checkpoint._seal_file(saved / name)
    checkpoint._write_manifest(saved, manifest)
    assert checkpoint.verify(saved) == [], "the test must get past the hashes"
    capsys.readouterr()
    assert pretrain(folder, run_dir=run_dir, steps=8) == 2
    said = capsys.readouterr().err
    assert "step-00000005" in said
    assert "Traceback" not in said
    assert not canary.exists()


def test_too_many_non_finite_steps_end_with_code_4_and_publish_nothing(folder: Path, tmp_path: Path, capsys):
    run_dir = tmp_path / "run"
    changes = {"run_dir": run_dir, "lr": 1e30, "warmup_steps": 0, "max_skipped_steps": 3, "max_grad_norm": 0}
    assert pretrain(folder, steps=12, save_every_steps=1, **changes) == 4
    assert "non-finite steps in a row" in capsys.readouterr().err
    assert json.loads((run_dir / "exit.json").read_text())["code"] == 4
    from safetensors.torch import load_file

    for weights in run_dir.glob("checkpoints/step-*/model/*.safetensors"):
        for name, tensor in load_file(weights).items():
            assert torch.isfinite(tensor).all(), f"{weights} {name}"


def test_a_file_that_another_rank_is_still_writing_is_left_to_that_rank(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from trainer import snapshot

    describe, take = snapshot._describe, snapshot.take

    def described(model: Path, *parts: Any) -> None:
        describe(model, *parts)
        (model / ".tmpAbc").touch()  # the name under which safetensors writes

    def taken(*parts: Any) -> Callable[[Path], list[Path]]:
        write = take(*parts)

        def written(staging: Path) -> list[Path]:
            files = write(staging)
            (staging / "model/.tmpAbc").unlink()
            return files

        return written

    monkeypatch.setattr(snapshot, "_describe", described)
    monkeypatch.setattr(snapshot, "take", taken)
    assert pretrain(folder, run_dir=tmp_path / "run", steps=4) == 0


def bf16_engine(model: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What an engine gives, called bare; and the plain model's vectors under autocast and in fp32."""
    from trainer.encoder import Encoder, load_backbone
    from trainer.engine import Engine, OptimizerSettings

    settings = OptimizerSettings(weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8, max_grad_norm=1.0)
    plain, cpu = Encoder(load_backbone(str(model))).eval(), torch.device("cpu")
    engine = Engine(copy.deepcopy(plain), settings, stage=1, local_batch=2, device=cpu, bf16=True)
    texts = torch.tensor([[2, 7, 3]]), torch.ones(1, 3, dtype=torch.bool)
    engine.module.eval()
    with torch.no_grad(), torch.autocast("cpu", enabled=False):  # as DeepSpeed has it around the model on a GPU
        got, exact = engine(*texts), plain(*texts)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = plain(*texts)
    return got, wanted, exact


def test_an_engine_runs_bf16_inside_the_model_where_deepspeed_cannot_turn_it_off(folder: Path, tmp_path: Path):
    ((got, wanted, exact),) = ranks.run(bf16_engine, 1, tmp_path, folder / "bert")
    assert torch.equal(got, wanted)
    assert not torch.equal(got, exact)


def nan_on_one_rank(model: Path) -> tuple[bool, float, bool, bool]:
    """Feed rank 1 weights' gradients of NaN, on stage after stage."""
    from trainer import distributed
    from trainer.encoder import Encoder, load_backbone
    from trainer.engine import Engine, OptimizerSettings

    verdicts = []
    for stage in (0, 1, 2, 3):
        settings = OptimizerSettings(weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8, max_grad_norm=1.0)
        engine = Engine(
            Encoder(load_backbone(str(model))), settings, stage=stage, local_batch=2, device=torch.device("cpu")
        )
        before = {name: engine.weight(name) for name in engine.shapes}
        with engine.accumulate():
            loss = engine(torch.tensor([[2, 7, 3]]), torch.ones(1, 3, dtype=torch.bool)).sum()
            engine.backward(loss * (math.nan if distributed.rank() == 1 else 1.0))
        applied = engine.step(0.1)
        unchanged = all(torch.equal(engine.weight(name), before[name]) for name in before)
        verdicts.append((applied, math.isfinite(engine.grad_norm), unchanged))
    return verdicts


def test_nan_on_one_rank_leaves_the_step_out_on_every_rank_at_every_stage(folder: Path, tmp_path: Path):
    for verdicts in ranks.run(nan_on_one_rank, 2, tmp_path, folder / "bert"):
        assert verdicts == [(False, False, True)] * 4


def damaged(folder: Path, tmp_path: Path) -> Path:
    """A copy of the shards with one bit of one record's text flipped."""
    shards = tmp_path / "shards"
    shards.mkdir()
    for file in (folder / "shards").iterdir():
        (shards / file.name).write_bytes(file.read_bytes())
    tar = next(shards.glob("*.tar"))
    with tarfile.open(tar) as archive:
        member = archive.getmembers()[2]
    content = bytearray(tar.read_bytes())
    content[member.offset_data + member.size // 2] ^= 4
    tar.write_bytes(content)
    return shards


def test_a_damaged_shard_ends_a_strict_run_with_code_3_and_its_name(folder: Path, tmp_path: Path, capsys):
    shards = damaged(folder, tmp_path)
    assert pretrain(folder, run_dir=tmp_path / "run", data=shards) == 3
    message = capsys.readouterr().err
    assert next(shards.glob("*.tar")).name in message
    assert "Traceback" not in message


def test_a_damaged_shard_is_counted_and_passed_over_under_skip(folder: Path, tmp_path: Path, capsys):
    shards = damaged(folder, tmp_path)
    run_dir = tmp_path / "run"
    # 20 batches of 16 out of 300 records: every record comes, and so does every damaged one.
    assert pretrain(folder, run_dir=run_dir, data=shards, damaged="skip", steps=20, max_bad_records=40) == 0
    (alert,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("data budget: ")]
    assert "damaged records left out, more than half of max_bad_records=40" in alert
    rows = jobs.steps(run_dir)
    assert sorted(rows) == list(range(1, 21))
    assert rows[20]["data/samples_bad"] == 32, "the block of the damaged record, and no more"


def test_damage_on_one_rank_alone_ends_all_ranks_with_code_3(folder: Path, tmp_path: Path):
    shards = damaged(folder, tmp_path)
    overrides = jobs.settings(folder, run_dir=tmp_path / "run", data=shards)
    code = jobs.run(jobs.command(2, overrides), tmp_path / "log")
    assert code == 3
    assert json.loads((tmp_path / "run/exit.json").read_text())["code"] == 3


def test_too_many_damaged_records_end_with_code_3(folder: Path, tmp_path: Path, capsys):
    shards = damaged(folder, tmp_path)
    changes = {"run_dir": tmp_path / "run", "data": shards, "damaged": "skip", "max_bad_records": 5}
    assert pretrain(folder, steps=20, **changes) == 3
    message = capsys.readouterr().err
    assert "more than max_bad_records=5; the warnings above name the shards" in message


def test_plain_tars_of_webdatasets_own_writer_train_without_an_index(folder: Path, tmp_path: Path):
    webdataset = pytest.importorskip("webdataset")
    shards = tmp_path / "plain"
    shards.mkdir()
    with webdataset.ShardWriter(str(shards / "mine-%06d.tar"), maxcount=60, verbose=0) as writer:
        for number, record in enumerate(pairs.pairs(200)):
            writer.write({"__key__": f"{number:06d}", "json": {"query": record.query, "passage": record.passage}})
    assert pretrain(folder, run_dir=tmp_path / "run", data=shards, steps=3, warmup_steps=1) == 0
    assert (shards / "index.json").exists()


def test_a_pickle_member_is_refused_and_never_read(folder: Path, tmp_path: Path, capsys):
    canary = tmp_path / "canary"
    shards = tmp_path / "plain"
    shards.mkdir()

    class Evil:
        def __reduce__(self) -> Any:
            return open, (str(canary), "w")

    import pickle

    with tarfile.open(shards / "evil-000000.tar", "w") as archive:
        content = pickle.dumps(Evil())
        member = tarfile.TarInfo("000000.pyd")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    assert pretrain(folder, run_dir=tmp_path / "run", data=shards) in (2, 3)
    assert "pickle" in capsys.readouterr().err
    assert not canary.exists()


def test_a_command_for_a_shell_is_refused_and_never_run(folder: Path, tmp_path: Path, capsys):
    canary = tmp_path / "canary"
    assert pretrain(folder, run_dir=tmp_path / "run", data=f"pipe:touch {canary}") == 2
    assert "pipe:" in capsys.readouterr().err
    assert not canary.exists()


def test_two_jobs_in_one_run_folder_the_second_is_told_who_is_there(folder: Path, tmp_path: Path):
    run_dir = tmp_path / "run"
    first = jobs.start(jobs.command(1, jobs.settings(folder, run_dir=run_dir, steps=10_000)), tmp_path / "first.log")
    try:
        jobs.wait_for_step(first, run_dir, 1)
        second = jobs.run(jobs.command(1, jobs.settings(folder, run_dir=run_dir)), tmp_path / "second.log")
        assert second == 2
        assert str(first.pid) in (tmp_path / "second.log").read_text()
    finally:
        jobs.end(first)


def test_a_random_model_of_each_architecture_trains(folder: Path, tmp_path: Path):
    for architecture in ("bert", "xlm-roberta", "mpnet"):
        model = {"path": "random", "architecture": architecture, "hidden_size": 16, "layers": 1, "heads": 2}
        model |= {"intermediate_size": 16, "max_positions": 32}
        changes = {f"model.{key}": value for key, value in model.items()}
        changes |= {"run_dir": tmp_path / architecture, "tokenizer": folder / "bert"}
        assert pretrain(folder, steps=2, warmup_steps=1, **changes) == 0


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ("", (0, 1, 0, 1)),
        ("RANK=5 WORLD_SIZE=8 LOCAL_RANK=1 LOCAL_WORLD_SIZE=4", (5, 8, 1, 4)),  # torchrun
        ("RANK=5 WORLD_SIZE=8 LOCAL_RANK=1 LOCAL_SIZE=4 SLURM_PROCID=1 SLURM_STEP_NUM_TASKS=2", (5, 8, 1, 4)),
        (
            "SLURM_PROCID=5 SLURM_LOCALID=1 SLURM_NTASKS=10 SLURM_STEP_NUM_TASKS=10 SLURM_STEP_TASKS_PER_NODE=4(x2),2",
            (5, 10, 1, 4),
        ),
        # A batch script without srun, and its srun -n1.
        ("SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=2 SLURM_TASKS_PER_NODE=1(x2)", (0, 1, 0, 1)),
        ("SLURM_PROCID=0 SLURM_NTASKS=1 SLURM_STEP_NUM_TASKS=1 SLURM_STEP_TASKS_PER_NODE=1", (0, 1, 0, 1)),
    ],
)
def test_the_rank_is_what_the_launcher_says(
    variables: str, place: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)  # an earlier job of this process may have left its own
    for variable in variables.split():
        monkeypatch.setenv(*variable.split("=", 1))
    assert distributed.place() == distributed.Place(*place)


def test_the_user_error_for_a_wrong_rank_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match="RANK=3"):
        distributed.place()


def test_a_stop_behind_a_checkpoint_writes_no_second_one(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    saved = []

    class Stopping(checkpoint.Saving):
        def __init__(self, run_dir: Path, step: int, *values: Any, **named: Any) -> None:
            saved.append(step)
            os.kill(os.getpid(), signal.SIGTERM)
            super().__init__(run_dir, step, *values, **named)

    monkeypatch.setattr(checkpoint, "Saving", Stopping)
    changes = {"run_dir": tmp_path / "run", "steps": 4, "warmup_steps": 1, "save_every_steps": 2}
    assert [pretrain(folder, **changes) for _ in range(2)] == [75, 0]
    assert saved == [2, 4]


def test_a_checkpoint_is_written_beside_the_steps_and_holds_the_state_after_its_own(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Compared with the checkpoint of a run that is stopped behind the same step, so that no other follows."""
    changes = {"steps": 4, "warmup_steps": 1, "save_every_steps": 2, "keep_last": 2}
    train_on, write_part = loop.Run._train_on, checkpoint._write_part

    def train_and_stop(run: loop.Run, batch: Any) -> None:
        train_on(run, batch)
        if run.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "_train_on", train_and_stop)
        assert pretrain(folder, run_dir=tmp_path / "stopped", **changes) == 75

    two_steps_later = threading.Event()

    def train_and_allow(run: loop.Run, batch: Any) -> None:
        train_on(run, batch)
        if run.step == 4:
            two_steps_later.set()

    def write_late(staging: Path, *rest: Any) -> None:
        assert two_steps_later.wait(60)
        write_part(staging, *rest)

    monkeypatch.setattr(loop.Run, "_train_on", train_and_allow)
    monkeypatch.setattr(checkpoint, "_write_part", write_late)
    assert pretrain(folder, run_dir=tmp_path / "beside", **changes) == 0
    stopped, beside = (checkpoint.load(tmp_path / name / "checkpoints/step-00000002") for name in ("stopped", "beside"))
    assert beside.manifest["files"] == stopped.manifest["files"]
    saved = [
        (row["train/step"], row["ckpt/last_step"]) for row in jobs.metrics(tmp_path / "beside") if "ckpt/bytes" in row
    ]
    assert saved == [(4, 2), (4, 4)]


def test_a_job_whose_folder_was_taken_over_publishes_nothing_any_more(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    taken_over, train_on, write_part = threading.Event(), loop.Run._train_on, checkpoint._write_part

    def train_and_lose(run: loop.Run, batch: Any) -> None:
        train_on(run, batch)
        if run.step == 3:
            run.lease.lost = True
            taken_over.set()

    def write_late(staging: Path, *rest: Any) -> None:
        assert taken_over.wait(60)
        write_part(staging, *rest)

    monkeypatch.setattr(loop.Run, "_train_on", train_and_lose)
    monkeypatch.setattr(checkpoint, "_write_part", write_late)
    assert pretrain(folder, run_dir=tmp_path / "run", steps=4, warmup_steps=1, save_every_steps=2) == 2
    assert "another job has taken over this folder" in capsys.readouterr().err
    assert not list((tmp_path / "run/checkpoints").glob("step-*"))


def test_secrets_of_the_environment_are_in_no_file_of_the_run(folder: Path, tmp_path: Path):
    """With a real offline W&B run: logs, metrics, W&B's files, checkpoint, manifest and model card are searched."""
    secrets = {
        "WANDB_API_KEY": "5ec2e7" * 6 + "abcd",
        "AWS_SECRET_ACCESS_KEY": "aws-canary-41",
        "HF_TOKEN": "hf_canary42",
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("eval:\n  limit: ${oc.env:QUINTET_LIMIT}\n")
    overrides = jobs.settings(folder, run_dir=tmp_path / "run", **{"wandb.mode": "offline"}, steps=4)
    command = [*jobs.command(1, overrides), "--config", str(recipe)]
    log = tmp_path / "log"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**secrets, "QUINTET_LIMIT": "7"}.items():
            patch.setenv(name, value)
        assert jobs.run(command, log) == 0
    files = [log, *(path for path in (tmp_path / "run").rglob("*") if path.is_file())]
    assert any(path.suffix == ".wandb" for path in files)
    assert any(path.name == "done.json" for path in files)
    for path in files:
        content = path.read_bytes()
        for name, value in secrets.items():
            assert value.encode() not in content, f"{name} is in {path}"
    assert "QUINTET_LIMIT" in (tmp_path / "run/config.yaml").read_text(), "stored as written, not as resolved"
