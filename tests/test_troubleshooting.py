"""docs/troubleshooting.md knows every message of the code, and the messages that it tells of are really given."""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
import teachers
import tiny
import torch
from messages import GAP, Site, sites
from pages import ROOT
from pairs import pairs
from safetensors.torch import load_file, save_file

from data import records
from launcher import cli

PAGE = ROOT / "docs/troubleshooting.md"
SITES = sites()
# These pass on a message that is made, and listed here, elsewhere.
PASSED_ON = {
    "data/docstrings.py:members",
    "data/indexing.py:_fault",
    "data/mixture.py:_from_file",
    "data/mixture.py:_problems",
    "data/reading.py:_read_arrow",
    "data/reading.py:_recover",
    "data/reading.py:damaged",
    "data/reading.py:sample",
    "data/shards.py:_place",
    "data/wheels.py:members",
    "launcher/config.py:_limit_problems",
    "launcher/config.py:_load",
    "launcher/config.py:_resolve",
    "launcher/config.py:_written_values",
    "launcher/launch.py:_parse",
    "launcher/sources.py:_compose_file",
    "launcher/sources.py:read_file",
    "launcher/sources.py:read_override",
    "trainer/export.py:check",
    "trainer/guard.py:_end_of_agreement",
}
# What is no error of ours, or is written without one, and the file that has its words; "" for a shell's or torch's.
ELSEWHERE = {
    "there is no command …; did you mean …?": "launcher/cli.py",
    "data=…: neither a folder nor a .tar file": "data/shards.py",
    "data=…: no such folder or file": "data/shards.py",
    "quintet watchdog: rank … on …: in … of step … for … s, no progress; …": "trainer/watchdog.py",
    "… has not been heard of for … s, it was in … of step …": "trainer/watchdog.py",
    "rank … holds other weights than the other …": "trainer/guard.py",
    "ranks … hold different weights and none has a majority": "trainer/guard.py",
    "quintet needs Python 3.11 or newer": "Makefile",
    "quintet needs Python's venv module": "Makefile",
    "torch.OutOfMemoryError: CUDA out of memory": "",
    "exit code 137": "",
    "quintet: command not found": "",
}

TRAIN = "quintet pretrain data=shards run_dir=run model.path=model"
TEACH = "quintet teacher data=shards run_dir=run tokenizer=model device=cpu wandb.mode=disabled"
SMALL = "batch_size=16 lanes=4 max_length=24 steps=3 warmup_steps=1 device=cpu wandb.mode=disabled"
# Entries of the page, and command lines that end with one of their messages.
PROVOKED = {
    "A command or an option does not exist": [
        "quintet pretain",
        "quintet launch --rank 2 encode",
        "quintet launch search model=m input=i",
        "quintet launch --ranks 0 encode",
        "quintet launch --ranks 2 --slurm encode",
        "quintet launch --sbatch=--nodes=2 encode",
        "quintet doctor pack",
        "quintet doctor --ranks many",
        "quintet doctor --ranks 0",
    ],
    "A key does not exist or is missing": [
        f"{TRAIN} stepz=3",
        f"{TRAIN} model=small",
        f"{TRAIN} steps",
        f"{TRAIN} --steps",
        f"{TRAIN} list.yaml",
        f"{TRAIN} objective=ranking",
        f"{TRAIN} --config twice.yaml",
        "quintet pretrain run_dir=run",
    ],
    "A value is of the wrong kind": [
        f"{TRAIN} steps=many",
        f"{TRAIN} steps=2.0",
        f"{TRAIN} lr=fast",
        f"{TRAIN} fresh=maybe",
        f"{TRAIN} --config bare.yaml",
        f"{TRAIN} seed=010",
        f"{TRAIN} zero_stage=5",
        f"{TRAIN} batch_size=1",
        f"{TRAIN} 'betas=[1'",
        f"{TRAIN} 'steps=!!python/name:os.system x'",
        f"{TRAIN} 'betas=[!!float x, \"${{seed}}\"]'",
        f"{TRAIN} --config deep.yaml",
        f"{TRAIN} --config alias.yaml",
    ],
    "A configuration file cannot be read": [
        f"{TRAIN} --config nowhere.yaml",
        f"{TRAIN} --config shards",
        f"{TRAIN} --config latin.yaml",
        f"{TRAIN} --config broken.yaml",
        f"{TRAIN} --config list.yaml",
        f"{TRAIN} --config loop.yaml",
    ],
    "A variable or a reference does not resolve": [
        f"{TRAIN} 'tokenizer=${{oc.env:QUINTET_NOT_SET}}'",
        f"{TRAIN} 'tokenizer=${{nothing}}'",
        f"{TRAIN} 'tokenizer=${{'",
        f"{TRAIN} 'steps=${{run_dir}}'",
    ],
    "Two keys contradict each other": [
        f"{TRAIN} steps=10 warmup_steps=10",
        f"{TRAIN} precision=fp16",
        f"{TRAIN} model.path=random",
        f"{TRAIN} model.path=random tokenizer=t model.heads=5",
        f"{TRAIN} spike.action=rollback spike.factor=0",
        f"{TRAIN} scores=scores",
        f"{TRAIN} loss.guide.weight=1",
        "quintet finetune data=shards run_dir=run model.path=model",
        "quintet export",
        "quintet encode model=model input=texts.txt output=vectors.npy format=arrow",
        "quintet filter model=model data=shards output=kept plant_noise=1",
        "quintet mine model=model data=shards output=mined negatives=2 random_negatives=3",
        "quintet plan cluster.gpus=[]",
        f"{TRAIN} loss.teacher_margin=0.1",
        "quintet export checkpoint=model output=copy average=2",
    ],
    "The batch does not divide": [f"{TRAIN} batch_size=100"],
    "The input is not there or of no known kind": [
        "quintet pack output=new input=nothing.jsonl",
        "quintet pack output=new input=*.nothing",
        "quintet pack output=new input=https://example.org/pairs.jsonl",
        "quintet pack output=new input=texts.txt",
        "quintet pack output=new input=empty",
        "quintet pack output=new input=[]",
        "quintet pack output=new input=indexed",
        "quintet pack output=new input=judged",
        "quintet pack output=new input=developed",
        "quintet pack output=new input=described",
        "quintet pack output=new input=lonely/qrels/train.tsv",
    ],
    "The columns are not found": [
        "quintet pack output=new input=pairs.jsonl columns.query=title",
        "quintet pack output=new input=odd.jsonl",
        "quintet pack output=new input=pairs.jsonl columns.titel=title",
        "quintet pack output=new input=pairs.jsonl 'columns.query=[title, name]'",
    ],
    "Too many records are bad": [
        "quintet pack output=new workers=1 input=bad.jsonl",
        "quintet pack output=new workers=1 input=bad.jsonl max_bad_fraction=1",
    ],
    "Pack settings that cannot be": [
        "quintet pack input=pairs.jsonl",
        "quintet pack input=pairs.jsonl output=new source=a/b",
        "quintet pack input=pairs.jsonl output=new tokenizer=model train_tokenizer=true",
        "quintet pack input=pairs.jsonl output=new tokenizer=model format=plain",
    ],
    "Collecting pairs fails": [
        "quintet collect output=new sources=[]",
        "quintet collect output=new sources=[homeasistant]",
        "quintet collect output=new languages=[german]",
        "quintet collect output=new layers=[0]",
        "quintet collect output=new model=e5-small layers=[3,1]",
        "quintet collect output=new model=e5-small min_count=3",
        "quintet collect output=new versions.numpy=2.0",
    ],
    "Shards are not found": [
        "quintet filter model=model output=kept data=nowhere",
        "quintet filter model=model output=kept data=empty",
        "quintet filter model=model output=kept data=texts.txt",
        "quintet filter model=model output=kept data=shards/none-000000.tar",
        "quintet filter model=model output=kept data=bare/none-000000.tar",
        "quintet filter model=model output=kept 'data=shards/pairs-{0.tar'",
        "quintet filter model=model output=kept data=shards/x*.tar",
        "quintet filter model=model output=kept data=[]",
        "quintet pack index=true input=pairs.jsonl",
        "quintet pack index=true input=empty",
    ],
    "The index does not fit": ["quintet filter model=model output=kept data=strange"],
    "Damaged shards": ["quintet filter model=model output=kept data=cut"],
    "A mixture file is wrong": [
        "quintet filter model=model output=kept data=nowhere.yaml",
        "quintet filter model=model output=kept data=broken.yaml",
        "quintet filter model=model output=kept data=list.yaml",
        "quintet filter model=model output=kept data=weights.yaml",
        "quintet filter model=model output=kept data=[weights.yaml,shards]",
        "quintet filter model=model output=kept data=again.yaml",
        "quintet filter model=model output=kept data=alike.yaml",
        "quintet filter model=model output=kept data=names.yaml",
    ],
    "A source is too small or has no weight": [
        f"{TRAIN} data=weightless.yaml {SMALL}",
        f"{TRAIN} {SMALL} lanes=256 batch_size=256",
    ],
    "A store does not answer": [
        "quintet filter model=model output=kept data=ftp://example.org/shards",
        "quintet filter model=model output=kept 'data=pipe:cat shards/pairs-000000.tar'",
        "quintet filter model=model output=kept data=gs://bucket/pairs-000000.tar",
    ],
    "A model cannot be opened": [
        "quintet search model=nowhere input=texts.txt query=a",
        "quintet search model=empty input=texts.txt query=a",
        "quintet search model=hollow input=texts.txt query=a",
        f"{TRAIN} {SMALL} model.path=random tokenizer=model model.architecture=nothing",
        "quintet export checkpoint=[model,other] output=copy",
        "quintet plan model.path=sizeless",
        f"{TEACH} max_length=64 model.path=partial",
        f"{TEACH} model.path=nowhere",
    ],
    "Tokenizer and model do not fit": [
        "quintet pack input=pairs.jsonl output=new tokenizer=empty",
        "quintet evaluate model=model data=pairs.jsonl output=new max_length=5000",
        f"{TRAIN} {SMALL} model.path=narrow",
        f"{TRAIN} {SMALL} loss.guide.path=short",
    ],
    "A teacher cannot be used": [
        "quintet distill teacher=model data=shards scores=scores",
    ],
    "Negatives are missing or too few": [
        "quintet mine model=model data=shards output=mined corpus=nowhere",
        "quintet mine model=model data=shards output=of-judged corpus=judged",
        "quintet mine model=model data=shards output=of-latin corpus=latin",
        "quintet mine model=model data=shards output=of-foldered corpus=foldered",
    ],
    "The output is there already": [
        "quintet pack input=pairs.jsonl output=shards",
        "quintet pack input=pairs.jsonl output=pairs.jsonl",
        "quintet pack input=pairs.jsonl output=model overwrite=true",
        "quintet export checkpoint=model output=empty",
    ],
    "A folder cannot be written, or the disk is full": [
        "quintet pack input=pairs.jsonl workers=1 output=texts.txt/new",
        "quintet filter model=model data=shards output=texts.txt/new",
        "quintet evaluate model=model data=pairs.jsonl output=texts.txt/new",
        "quintet launch --hostfile hosts encode model=model input=texts.txt output=texts.txt/new/er",
        f"{TRAIN} run_dir=texts.txt/run {SMALL}",
    ],
    "A run does not go on": [
        "quintet export run_dir=empty",
        f"{TRAIN} run_dir=harmed {SMALL}",
        f"{TRAIN} run_dir=rolled {SMALL}",
    ],
    "Numbers that are not finite": [
        "quintet search model=nan input=texts.txt query=a",
        "quintet encode model=long input=texts.txt output=new dtype=float16 device=cpu",
    ],
    "Ranks do not find each other": [
        "RANK=3 WORLD_SIZE=2 quintet filter model=model data=shards output=kept",
        "RANK=first quintet filter model=model data=shards output=kept",
    ],
    "A GPU is not seen": ["CUDA_VISIBLE_DEVICES= quintet search model=model input=texts.txt query=a device=cuda"],
    "The launcher cannot start": [
        "quintet launch --hostfile nowhere encode model=model input=texts.txt output=new",
        "quintet launch --hostfile empty.jsonl encode model=model input=texts.txt output=new",
        "quintet launch --hostfile texts.txt encode model=model input=texts.txt output=new",
        "quintet launch --slurm encode model=model input=texts.txt output=new",
        "PATH=nowhere quintet launch --slurm evaluate model=model data=pairs.jsonl output=new",
        "PATH=nowhere quintet launch --hostfile hosts encode model=model input=texts.txt output=new",
        "quintet launch --hostfile hosts encode model=model input=texts.txt 'output=my place/new'",
    ],
    "W&B or TensorBoard cannot be had": [
        "quintet teacher data=shards run_dir=run model.path=model wandb.examples=3",
        "WANDB_BASE_URL=http://127.0.0.1:9 WANDB_API_KEY= NETRC=nowhere quintet dashboard",
    ],
    "The mirror in object storage": [
        f"{TRAIN} mirror=a::b",
        f"{TRAIN} mirror=s3://me:secret@bucket/run",
        f"{TRAIN} mirror=harmed {SMALL}",
    ],
    "Evaluation data are not readable": [
        "quintet evaluate model=model output=new data=nowhere",
        "quintet evaluate model=model output=new data=texts.txt",
        "quintet evaluate model=model output=new data=empty",
        "quintet evaluate model=model output=new data=empty.jsonl",
        "quintet evaluate model=model output=new data=[]",
        "quintet evaluate model=model output=new data=judged split=train",
        "quintet evaluate model=model output=new data=[pairs.jsonl,pairs.jsonl]",
        "quintet evaluate model=model output=new data=unread",
        "quintet evaluate model=model output=new sts=half.jsonl",
        "quintet evaluate model=model output=new data=pairs.jsonl sts=pairs.tsv",
    ],
    "A task of a benchmark is not known or has no result": [
        "quintet evaluate model=model output=scores tasks=beer",
        "quintet evaluate model=model output=scores tasks=miracl/xx",
        "quintet evaluate model=model output=scores tasks=SciFact task_data=nowhere",
        "quintet evaluate model=model output=scores tasks=SciFact",
    ],
    "A file of sentences, labels or groups is not readable": [
        "quintet evaluate model=model output=scores sts=nowhere.tsv",
        "quintet evaluate model=model output=scores sts=bare.yaml",
        "quintet evaluate model=model output=scores sts=empty.jsonl",
        "quintet evaluate model=model output=scores sts=pairs.jsonl",
        "quintet evaluate model=model output=scores classification=empty",
        "quintet evaluate model=model output=scores reranking=pairs.jsonl",
        "quintet evaluate model=model output=scores reranking=texts.txt",
        "quintet evaluate model=model output=scores classification=alike",
        "quintet evaluate model=model output=scores reranking=empty.jsonl",
        "quintet evaluate model=model output=scores sts=latin.tsv",
        "quintet evaluate model=model output=scores sts=rows.jsonl",
    ],
    "Texts to encode or search are not readable": [
        "quintet search model=model query=a input=nowhere",
        "quintet search model=model query=a input=empty.jsonl",
        "quintet search model=model query=a input=latin.yaml",
        "quintet search model=model query=a input=bad.jsonl",
    ],
    "An export cannot be as asked": [
        "quintet export checkpoint=model output=copy int8=true",
        "quintet export checkpoint=model output=copy dry_run=true",
        "quintet export checkpoint=model output=copy dimensions=9999",
        "quintet export checkpoint=teacher output=copy onnx=true int8=true",
        "quintet export checkpoint=teacher output=copy dimensions=8",
    ],
    "The hub refuses an upload": ["HF_HUB_OFFLINE=1 HF_TOKEN=x quintet export checkpoint=model output=up push=me/mine"],
    "Overlaps cannot be looked for or left out": [
        "quintet decontaminate data=shards against=pairs.jsonl drop=[query]",
        "quintet decontaminate data=shards against=pairs.jsonl drop=[words] output=apart",
        "quintet decontaminate data=shards against=pairs.jsonl drop=[query] output=apart workers=1",
        "quintet decontaminate data=shards against=pairs.jsonl ngram=3",
    ],
    "The search cannot be asked, or its page not opened": [
        "quintet search model texts.txt compare=model",
        "quintet search model texts.txt query=a serve=true",
        "quintet search model texts.txt query=",
        "quintet search model texts.txt serve=true host=192.0.2.1",
    ],
    "There is nothing to report on": [
        "quintet report nowhere",
        "quintet report model",
        "quintet report runs=[]",
        "quintet runs nowhere",
        "quintet runs empty",
    ],
    "A plan cannot be made": [
        "quintet plan model.path=model cluster.device=cpu",
        "quintet plan model.path=model measured=[pairs.jsonl]",
        "quintet plan model.path=model measured=[old.json]",
        "quintet plan model.path=model measured=[card.json] precision=fp32",
    ],
}
# Command lines, and what is said where a package is not installed.
MISSING = {
    "faiss": (
        "quintet mine model=model data=shards output=near index=IVF4,Flat device=cpu",
        "index: needs faiss, which is not installed",
    ),
    "onnx": (
        "quintet export checkpoint=model output=graph onnx=true",
        "onnx=true: needs …; pip install 'quintet[onnx]'",
    ),
    "mteb": (
        "quintet evaluate model=model output=new sts=pairs.tsv",
        "tasks and local files other than data need the library mteb",
    ),
    "wandb_workspaces": ("quintet dashboard project=mine", "dashboard: wandb-workspaces is not installed"),
}
# Entries whose messages take more: ranks, signals, a whole run. The test that brings one about.
SHOWN = {
    "Scores are missing": "test_scores.py::test_a_cache_is_found_by_its_folder_or_by_its_teachers",
    "Another job works there": (
        "test_parts.py::test_another_job_is_refused_while_the_folder_is_held_and_other_ranks_are_not"
    ),
    "The run was stopped": "test_distill.py::test_a_request_to_stop_writes_what_is_scored_and_ends_with_75",
    "Ranks hold different weights": (
        "test_numeric.py::test_a_flipped_bit_of_one_rank_of_three_is_found_within_one_interval_and_the_rank_named"
    ),
    "Nothing moves any more": "test_watchdog.py::test_a_stopped_rank_is_named_and_the_job_resumes_to_the_same_losses",
    "An export differs": "test_export.py::test_a_reader_that_disagrees_prevents_the_export",
}
# Entries about what is no message of ours.
ADVICE = {
    "Loss that does not fall, scores that stay low",
    "Out of memory",
    "A package is missing",
    "The commands are not found",
}


RATES = '{"products": 1, "elements": 1, "layer_pass": 1, "loss": 1, "update": 1, "step": 1}'
FILES = {
    "odd.jsonl": '{"first": "a", "second": "b"}\n',
    "bad.jsonl": '{"query": "", "passage": "a"}\n{"query": 3, "passage": "b"}\n{"query\n',
    "empty.jsonl": "",
    "texts.txt": "one text\nanother text\n",
    "broken.yaml": "sources: {a: [\n",
    "list.yaml": "- a\n- b\n",
    "loop.yaml": "include: loop.yaml\n",
    "twice.yaml": "steps: 3\nsteps: 4\n",
    "weights.yaml": "sources: {a: {shards: shards, weight: 1}, b: {shards: shards}}\n",
    "bare.yaml": "tokenizer: no\n",
    "deep.yaml": "steps: " + "[" * 9000,
    "alias.yaml": "betas: &a [*a]\n",
    "alike.yaml": "homogeneous: maybe\nsources: {a: {shards: shards}}\n",
    "developed/corpus.jsonl": '{"_id": "d", "text": "a"}\n',
    "developed/queries.jsonl": '{"_id": "q", "text": "b"}\n',
    "developed/qrels/dev.tsv": "query-id\tcorpus-id\tscore\nq\td\t1\n",
    "described/dataset_dict.json": "{",
    "again.yaml": "sources: {a: {shards: shards}, a: {shards: shards}}\n",
    "names.yaml": "sources: {3: {shards: shards}, b: {shards: 4}}\n",
    "weightless.yaml": "sources: {a: {shards: shards, weight: 0}}\n",
    "indexed/state.json": '{"_indices_data_files": [{"filename": "indices.arrow"}]}',
    "judged/corpus.jsonl": '{"_id": "d", "text": "a"}\n',
    "judged/queries.jsonl": '{"_id": "q", "text": "b"}\n',
    "judged/qrels/train.tsv": "query-id\tcorpus-id\tscore\nq\td\n",
    "harmed/run.json": "{",
    "rolled/rollbacks.json": "{",
    "lonely/qrels/train.tsv": "query-id\tcorpus-id\tscore\nq\td\t1\n",
    "hosts": "worker-1 slots=1\n",
    "unread/corpus.jsonl": '{"_id": "d", "text\n',
    "unread/queries.jsonl": '{"_id": "q", "text": "b"}\n',
    "unread/qrels/test.tsv": "query-id\tcorpus-id\tscore\nq\td\t1\n",
    "foldered/corpus.jsonl": '{"_id": "d", "text": "a"}\n',
    "foldered/corpus.jsonl.old/part": "",
    "pairs.tsv": "a\tb\t1\nc\td\t2\n",
    "latin/corpus.jsonl": '{"_id": "d", "text": "a"}\n',
    "half.jsonl": '{"sentence1\n',
    "rows.jsonl": "[1]\n",
    "alike/train.tsv": "text\tlabel\na\tx\nb\tx\n",
    "alike/test.tsv": "text\tlabel\nc\tx\n",
    "sizeless/config.json": '{"model_type": "bert"}',
    "slurm/evaluate.sh": "",
    "old.json": '{"format": 0, "memory": 1, "links": null, "rates": RATES}',
    "card.json": '{"format": 1, "memory": 1, "links": null, "precision": "fp32", "device": "H200", "rates": RATES}',
}


def _entries() -> dict[str, list[str]]:
    """The headings of the third level, with the messages in the code block below each."""
    entries: dict[str, list[str]] = {}
    title = ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            title = line.removeprefix("### ") if line.startswith("### ") else ""
        elif title and not line.startswith("    "):
            entries.setdefault(title, [])
        elif title:
            entries.setdefault(title, []).append(line.strip())
    return entries


ENTRIES = _entries()
PATTERNS = [pattern for patterns in ENTRIES.values() for pattern in patterns]


def _pattern(text: str) -> re.Pattern[str]:
    """A message as the page writes it, which may stop early."""
    return re.compile(".*?".join(map(re.escape, text.split(GAP))), re.DOTALL)


def _covers(pattern: str, message: str) -> bool:
    """Is this the message? A line of the page without two words is so general that it has to be the whole of it."""
    wordy = len(re.findall("[A-Za-z]{2,}", pattern)) >= 2
    return pattern == message or (wordy and bool(_pattern(pattern.strip(GAP)).search(message)))


# The page and the code


def test_every_message_of_the_code_is_on_the_page() -> None:
    unknown = [
        str(site)
        for site in SITES
        if not any(_covers(pattern, site.text) for pattern in PATTERNS)
        and f"{site.file}:{site.function}" not in PASSED_ON
    ]
    assert not unknown, "write these messages, or their beginning, into an entry of docs/troubleshooting.md"


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_line_of_the_page_is_a_message_of_the_code(pattern: str) -> None:
    if pattern in ELSEWHERE:
        text = (ROOT / ELSEWHERE[pattern]).read_text(encoding="utf-8") if ELSEWHERE[pattern] else pattern
        words = [part.strip(" ;:?") for part in re.split(f"{GAP}|: |, ", pattern)]
        assert all(part in text for part in words if len(part) > 9)
    else:
        assert any(_covers(pattern, site.text) for site in SITES)


def test_what_passes_a_message_on_exists_and_makes_none_itself() -> None:
    made = {f"{site.file}:{site.function}" for site in SITES}
    assert made >= PASSED_ON


def test_a_new_message_would_be_missed() -> None:
    new = Site("data/new.py", "run", 1, "input=…: the moon is in the wrong quarter; wait")
    assert not any(_covers(pattern, new.text) for pattern in PATTERNS)


def test_every_reason_to_reject_a_record_is_on_the_page() -> None:
    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    assert all(f"*{reason}*" in text for reason in records.REASONS)


# The page and what users see


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with good and bad files of all kinds."""
    desk = tmp_path_factory.mktemp("desk")
    rows = [{"query": pair.query, "passage": pair.passage} for pair in pairs(160)]
    (desk / "pairs.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    for name, text in FILES.items():
        (desk / name).parent.mkdir(parents=True, exist_ok=True)
        (desk / name).write_text(text.replace("RATES", RATES), encoding="utf-8")
    for name in ("latin.yaml", "latin.tsv", "latin/qrels/train.tsv"):
        (desk / name).parent.mkdir(parents=True, exist_ok=True)
        (desk / name).write_bytes("model: größer\n".encode("latin-1"))
    (desk / "empty").mkdir()
    tiny.bert(desk / "model")
    _break_models(desk)
    assert cli.main(["pack", f"input={desk}/pairs.jsonl", f"output={desk}/shards", "workers=1"]) == 0
    for name in ("cut", "strange"):
        shutil.copytree(desk / "shards", desk / name)
    os.truncate(desk / "cut/pairs-000000.tar", 700)
    (desk / "bare").mkdir()
    shutil.copy(desk / "shards/pairs-000000.tar", desk / "bare")
    (desk / "strange/index.json").write_text("{}", encoding="utf-8")
    return desk


def _break_models(desk: Path) -> None:
    for name in ("nan", "hollow"):
        shutil.copytree(desk / "model", desk / name)
    weights = load_file(desk / "nan/model.safetensors")
    save_file(
        {key: torch.full_like(value, torch.nan) for key, value in weights.items()}, desk / "nan/model.safetensors"
    )
    (desk / "hollow/model.safetensors").write_bytes(b"nothing")
    shutil.copytree(desk / "model", desk / "long")
    (desk / "long/quintet.json").write_text('{"normalize": false}', encoding="utf-8")
    weights = load_file(desk / "model/model.safetensors")
    save_file({key: value * 1e6 for key, value in weights.items()}, desk / "long/model.safetensors")
    tiny.bert(desk / "short", max_position_embeddings=16)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(desk / "model" / name, desk / "short")
    tiny.bert(desk / "narrow", vocab_size=50)
    tiny.bert(desk / "other", intermediate_size=32)
    teachers.bert(desk / "teacher")
    shutil.copytree(desk / "model", desk / "partial")
    weights.pop("encoder.layer.0.output.dense.weight")
    save_file(weights, desk / "partial/model.safetensors")
    settings = {"template": {"query": "{query}", "passage": "{passage}"}, "max_length": 24, "max_query_length": 8}
    (desk / "teacher/pairing.json").write_bytes(orjson.dumps(settings))


@pytest.fixture(scope="module")
def said(desk: Path) -> Callable[[str], list[str]]:
    """What the command lines of an entry end with."""
    return functools.cache(lambda entry: [_said(line, desk) for line in PROVOKED[entry]])


def _said(line: str, desk: Path) -> str:
    words = shlex.split(line)
    with pytest.MonkeyPatch.context() as changed, contextlib.redirect_stderr(io.StringIO()) as errors:
        changed.chdir(desk)
        while "=" in words[0]:
            changed.setenv(*words.pop(0).split("=", 1))
        code = cli.main(words[1:])
    return f"{errors.getvalue()}exit code {code}"


@pytest.mark.parametrize("entry", PROVOKED)
def test_a_message_is_given_as_the_page_has_it(entry: str, said: Callable[[str], list[str]]) -> None:
    for line, message in zip(PROVOKED[entry], said(entry), strict=True):
        assert message.endswith(("exit code 2", "exit code 3", "exit code 4")), f"{line}: {message}"
        assert any(_pattern(pattern.strip(GAP)).search(message) for pattern in ENTRIES[entry]), f"{line}: {message}"


@pytest.mark.parametrize("package", MISSING)
def test_a_package_that_is_missing_is_named(package: str, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    line, text = MISSING[package]
    assert text in PATTERNS
    assert _pattern(text).search(_said(line, desk))


def test_every_line_of_the_page_is_provoked_here_or_quoted_by_another_test(said: Callable[[str], list[str]]) -> None:
    messages = [message for entry in PROVOKED for message in said(entry)]
    quotes = _quotes()
    left = [
        pattern
        for pattern in PATTERNS
        if pattern not in ELSEWHERE
        and not any(map(_pattern(pattern.strip(GAP)).search, messages))
        and not any(_is_quoted(site.text, quotes) for site in SITES if _covers(pattern, site.text))
    ]
    assert not left, "\n".join(left)


def _quotes() -> set[str]:
    """What the other tests expect to read: their texts, and what regular expressions match word for word."""
    quotes = set()
    for file in (ROOT / "tests").glob("test_*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if file != Path(__file__) else ():
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                quotes |= {_bare(re.sub(r"\\(.)", r"\1", part)) for part in re.split(r"\.\*|\n", node.value)}
    return {quote for quote in quotes if len(quote) > 7}


def _bare(text: str) -> str:
    return text.strip(" :;,=")


def _is_quoted(message: str, quotes: set[str]) -> bool:
    """Do tests have one of its parts, or as much of one as is not there by chance?"""
    parts = [part for part in map(_bare, message.split(GAP)) if len(part) > 7]
    runs = {part[at : at + 18] for part in parts for at in range(max(1, len(part) - 17))}
    return any(quote in part for quote in quotes for part in parts) or any(
        run in quote for quote in quotes for run in runs
    )


def test_every_entry_has_a_test_that_brings_its_message_about() -> None:
    assert set(ENTRIES) == {*PROVOKED, *SHOWN, *ADVICE}


@pytest.mark.parametrize("entry", SHOWN)
def test_the_test_that_shows_an_entry_speaks_of_its_message(entry: str) -> None:
    file, _, name = SHOWN[entry].partition("::")
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    function = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name)
    constants = [node.value for node in ast.walk(function) if isinstance(node, ast.Constant)]
    words = [value for value in constants if isinstance(value, str)]
    said = [part for text in words for part in text.split(".*")]
    texts = [site.text for site in SITES if any(_covers(pattern, site.text) for pattern in ENTRIES[entry])]
    quoted = any(len(part) > 7 and part in text for part in said for text in [*texts, *ENTRIES[entry]])
    patterns = [_pattern(pattern.strip(GAP)) for pattern in ENTRIES[entry]]
    assert quoted or any(pattern.search(text) for text in words for pattern in patterns)
