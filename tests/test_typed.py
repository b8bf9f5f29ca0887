"""The command lines of the pages, typed: each runs to its end on small files that stand for the reader's.

The page's words come first; what makes a stage small, and where its work goes, is put behind them.
"""

from __future__ import annotations

import io
import itertools
import os
import shlex
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import jobs
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import teachers
import tiny
import yaml
from pages import PAGES, PROGRAMS, ROOT, Command, commands, typed
from pairs import pairs, write_shards

from data.records import Record
from launcher import cli

SMALL_TRAINING = [
    *("steps=2", "warmup_steps=1", "lanes=4", "batch_size=16", "save_every_steps=2", "max_length=24", "device=cpu"),
    *("wandb.mode=disabled", "precision=fp32", "log_every=1"),
]
NARROW = ["model.layers=1", "model.hidden_size=32", "model.heads=2", "model.intermediate_size=64"]
# Behind the words of a page. OUT is a folder that is not there yet.
SMALL = {
    "pack": ["output=OUT", "workers=1", "vocab_size=400"],
    "pretrain": ["run_dir=OUT", *SMALL_TRAINING, *NARROW],
    "teacher": ["run_dir=OUT", *SMALL_TRAINING, "negatives=3", "max_query_length=12"],
    "finetune": ["run_dir=OUT", *SMALL_TRAINING, "negatives=3"],
    "filter": ["output=OUT", "device=cpu", "pool_size=100", "max_length=24"],
    "mine": ["output=OUT", "device=cpu", "precision=fp32", "negatives=3", "depth=20"],
    "distill": ["device=cpu", "precision=fp32", "tokens_per_chunk=512"],
    "encode": ["output=OUT", "device=cpu"],
    "evaluate": ["output=OUT", "device=cpu"],
    "search": ["device=cpu"],
    "export": ["output=OUT"],
    "decontaminate": ["output=OUT"],
    "report": ["output=OUT.html", "device=cpu"],
}
# In the place of an ellipsis.
LEFT_OUT = {
    "pretrain": ["model.path=run/model", "data=shards"],
    "finetune": ["model.path=run/model"],
    "filter": ["model=run/model", "data=shards"],
    "mine": ["model=run/model", "data=shards"],
}
# What is the reader's own, or of another size.
THEIRS = {
    "checkpoint=run/checkpoints/step-00010000": "checkpoint=run/checkpoints/step-00000004",
    "teacher=TEACHER": "teacher=runs/teacher/model",
    "dimensions=128": "dimensions=16",
    "8": "2",  # of torchrun's --nproc-per-node
    "URL": str(ROOT),
}
# The lines that need more than a folder of small files, by their first words, and the module that types them.
ELSEWHERE = {
    "bash configs/cluster/prepare.sh": "test_cluster",
    "sbatch": "test_slurm",
    "quintet launch --slurm": "test_slurm",
    "quintet launch --hostfile": "test_hosts",
    "quintet doctor --hostfile": "test_hosts",
    "quintet dashboard": "test_dashboard",
    "wandb leet": "test_monitoring",
    "quintet plan --config my.yaml": "test_plan",
    "quintet launch evaluate": "test_long",
    "quintet plan measure=": "test_long",
    "quintet launch --ranks 2 plan": "test_long",
    "quintet collect": "test_long",
    "make": "test_long",
    "pip": "test_long",
    "sky": "test_long",
    "sudo": "test_long",
}


def _line(command: Command) -> str:
    return " ".join(command.words).removeprefix(".venv/bin/")


def _is_elsewhere(command: Command) -> bool:
    return _line(command).startswith((*ELSEWHERE, ".ci/run"))  # that is what runs this test


# One page has messages for commands, and test_quickstart.py types the other from its first line to its last.
LEFT = ("troubleshooting.md", "quickstart.md")
ALL = [command for page in PAGES if page.name not in LEFT for command in commands(page)]
ALL = [command for command in ALL if command.words[0] in PROGRAMS]
TYPED = list({_line(command): command for command in ALL if not _is_elsewhere(command)}.values())


def _jsonl(records: Sequence[Record]) -> bytes:
    keys = {"title": "query", "body": "passage", "query": "query", "passage": "passage", "lang": "lang"}
    rows = ({name: getattr(record, key) for name, key in keys.items()} for record in records)
    return b"".join(orjson.dumps(row) + b"\n" for row in rows)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the pages name: texts, shards, models, runs, scores, benchmarks."""
    desk = tmp_path_factory.mktemp("desk")
    shutil.copytree(ROOT / "configs", desk / "configs")
    _texts(desk)
    _models(desk)
    _shards(desk)
    _beir(desk / "beir/scifact", pairs(40, seed=3))
    for name in ("beir/msmarco", "copies/scifact"):
        shutil.copytree(desk / "beir/scifact", desk / name)
    words = jobs.settings(desk, run_dir=desk / "run", steps=4, save_every_steps=1, keep_last=4, device="cpu")
    assert cli.main(["pretrain", *words, f"data={desk}/shards", f"eval.data={desk}/shards/holdout.jsonl"]) == 0
    for name in ("first", "second", "mine", "noisy", "e5-small"):
        shutil.copytree(desk / "run", desk / "runs" / name)
    shutil.copytree(desk / "run", desk / "noisy")
    shutil.copytree(desk / "run/model", desk / "runs/a/model")
    scores = ["distill", f"teacher={desk}/runs/teacher/model", f"data={desk}/mined", f"scores={desk}/scores"]
    assert cli.main([*scores, *SMALL["distill"]]) == 0
    for name in ("e5", "me5"):
        shutil.copytree(desk / "scores", desk / "scores-of" / name)
        shutil.move(desk / "scores-of" / name, desk / "scores" / name)
    return desk


def _texts(desk: Path) -> None:
    for name in ("pairs.jsonl", "my-pairs.jsonl", "pairs/part.jsonl", "labelled/part.jsonl", "demo/pairs/part.jsonl"):
        (desk / name).parent.mkdir(parents=True, exist_ok=True)
        (desk / name).write_bytes(_jsonl(pairs(200)))
    (desk / "ccpairs").mkdir()
    with pa.output_stream(desk / "ccpairs/part.jsonl.zst", compression="zstd") as file:
        file.write(_jsonl(pairs(50)))
    (desk / "wiki").mkdir()
    columns = {"title": [pair.query for pair in pairs(50)], "body": [pair.passage for pair in pairs(50)]}
    pq.write_table(pa.table(columns), desk / "wiki/part.parquet")
    with pa.output_stream(desk / "qa.csv.gz", compression="gzip") as file:
        file.write(("title,body\n" + "".join(f"{p.query},{p.passage}\n" for p in pairs(50, seed=1))).encode())
    for name in ("texts.txt", "passages.txt"):
        (desk / name).write_text("".join(f"{pair.passage}\n" for pair in pairs(30)))
    for name in ("de-en.tsv", "translations.tsv"):
        (desk / name).write_text("".join(f"{pair.query}\t{pair.passage}\n" for pair in pairs(30)))
    (desk / "pairs.tsv").write_text("".join(f"{p.query}\t{p.passage}\t{n % 5}\n" for n, p in enumerate(pairs(30))))


def _models(desk: Path) -> None:
    """The hub's ids are folders here, which come first."""
    for name in ("bert", "google-bert/bert-base-uncased", "microsoft/MiniLM-L12-H384-uncased", "other/model"):
        tiny.bert(desk / name)
    of_xlmr = ("FacebookAI/xlm-roberta-base", "microsoft/Multilingual-MiniLM-L12-H384")
    for name in (*of_xlmr, "intfloat/multilingual-e5-small", "demo-full/e5-small"):
        tiny.xlmr(desk / name)
    tiny.bert(desk / "runs/multilingual-e5-base/model")
    teachers.bert(desk / "runs/teacher/model")
    teachers.electra(desk / "google/electra-base-discriminator")


def _shards(desk: Path) -> None:
    """Pairs with negatives, where they are needed and where they are not: scores of one folder are those of all."""
    of_mixtures = [
        source["shards"].removeprefix("../../")
        for file in ("me5-pretrain", "me5-finetune", "e5-finetune")
        for source in yaml.safe_load((ROOT / f"configs/mixtures/{file}.yaml").read_text())["sources"].values()
    ]
    of_pages = "shards kept filtered labelled folder mined shards/ccpairs shards/labelled shards/all shards/mined"
    for name in {*of_mixtures, *of_pages.split()}:
        write_shards(desk / name, pairs(120, negatives=7))
    for name in ("shards", "demo-full/shards"):
        (desk / name).mkdir(parents=True, exist_ok=True)
        (desk / name / "holdout.jsonl").write_bytes(_jsonl(pairs(40, seed=2)))
    tiny.wordpiece().save_pretrained(desk / "shards/tokenizer")


def _beir(folder: Path, records: Sequence[Record]) -> None:
    (folder / "qrels").mkdir(parents=True)
    documents = [{"_id": f"d{n}", "title": "", "text": record.passage} for n, record in enumerate(records)]
    queries = [{"_id": f"q{n}", "text": record.query} for n, record in enumerate(records)]
    (folder / "corpus.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in documents))
    (folder / "queries.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in queries))
    judged = "".join(f"q{n}\td{n}\t1\n" for n in range(len(records)))
    (folder / "qrels/test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}")


_numbers = itertools.count()


def _small(command: Command) -> list[str]:
    """The words of a command with what makes it small behind them, where the keys begin."""
    words = [THEIRS.get(word, word) for word in command.words]
    if words[0] in ("git", "export"):
        return words
    left_out = any(word in ("...", "…") or word.endswith("=...") for word in words)
    words = [word for word in words if word not in ("...", "…") and not word.endswith("=...")]
    if words[-1] == "--config":
        words.pop()
    stage = next(word for word in words if word in cli.STAGES or word == "doctor")
    if stage == "doctor":
        stage = next((word for word in words if word in cli.STAGES), "")
    extra = [*(LEFT_OUT.get(stage, []) if left_out else []), *SMALL.get(stage, [])]
    if stage == "distill" and "check=true" not in words:
        extra.append("scores=OUT")
    if any(word.startswith("tasks=") for word in words):
        extra += ["offline=true", "task_data=copies"]
    return [*words, *(word.replace("OUT", f"out/{next(_numbers)}") for word in extra)]


@pytest.mark.parametrize("command", TYPED, ids=str)
def test_a_command_line_of_a_page_runs_to_its_end(
    command: Command, desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(desk)
    words = _small(command)
    if "serve=true" in words:
        _serve(words, desk / "served.log")
    elif words[0] == "quintet":
        monkeypatch.setattr("sys.stdin", io.StringIO("river stone\n"))
        assert cli.main(words[1:]) == 0, capsys.readouterr().err
    else:
        assert jobs.run(["bash", "-c", shlex.join(words)], desk / "job.log") == 0


def _serve(words: list[str], log: Path) -> None:
    """A page that is opened until Ctrl-C."""
    job = jobs.start([jobs.QUINTET, *words[1:], "port=0"], log)
    try:
        while "http://127.0.0.1" not in log.read_text():
            assert job.poll() is None, log.read_text()
            time.sleep(0.05)
        os.killpg(job.pid, signal.SIGINT)
        assert job.wait(60) == cli.EXIT_INTERRUPTED, log.read_text()
    finally:
        jobs.end(job)


@pytest.mark.parametrize(("words", "module"), ELSEWHERE.items())
def test_a_line_that_is_left_to_another_module_is_typed_there(words: str, module: str) -> None:
    assert typed(words)
    assert f'typed("{words}")' in (Path(__file__).parent / f"{module}.py").read_text(encoding="utf-8")
