"""Benchmarks through mteb, local tasks, and the published figures beside them."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import ranks
import tiny
import torch
import yaml

from data.errors import NumericError, UserError
from data.rules import Prompts
from launcher.cli import main
from trainer import evaluate, localdata, published, shared
from trainer.encoder import Model, ModelSettings, open_model, save_settings
from trainer.margin import best_by_margin, f1_of_each

WORDS = ["quick", "brown", "fox", "jumps", "over", "lazy", "dog", "living", "room", "temperature", "sofa", "lamp"]
SIDES = ("sentence1", "sentence2")


def _text(draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS, k=6))


def _lines(path: Path, rows: Sequence[object]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model with two prompts, and a file for every kind of local task."""
    folder, draw = tmp_path_factory.mktemp("files"), random.Random(0)
    save_settings(tiny.bert(folder / "first"), ModelSettings())
    save_settings(tiny.bert(folder / "second", num_hidden_layers=1), ModelSettings())
    pairs = [(_text(draw), _text(draw)) for _ in range(40)]
    (folder / "pairs.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in pairs), encoding="utf-8")
    graded = [f"{draw.random() * 5}\t{_text(draw)}\t{_text(draw)}\n" for _ in range(30)]
    (folder / "graded.tsv").write_text("score\tsentence2\tsentence1\n" + "".join(graded), encoding="utf-8")
    for split in ("train", "test"):
        rows = [{"text": _text(draw), "label": ["cold", "warm"][number % 2]} for number in range(40)]
        _lines(folder / "moods" / f"{split}.jsonl", rows)
    groups = [
        {"query": _text(draw), "positive": [_text(draw)], "negative": [_text(draw) for _ in range(4)]}
        for _ in range(20)
    ]
    return {
        "first": str(folder / "first"),
        "second": str(folder / "second"),
        "bitext": str(folder / "pairs.tsv"),
        "sts": str(folder / "graded.tsv"),
        "classification": str(folder / "moods"),
        "reranking": _lines(folder / "groups.jsonl", groups),
        "data": _lines(folder / "asked.jsonl", [{"query": _text(draw), "passage": _text(draw)} for _ in range(150)]),
    }


@pytest.fixture(scope="module")
def model(files: dict[str, str]) -> Model:
    return open_model(files["first"])


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """trainer.benchmark, which imports mteb."""
    os.environ.setdefault("MTEB_CACHE", str(tmp_path_factory.mktemp("mteb")))
    from trainer import benchmark

    return benchmark


def _adapter(door: ModuleType, model: Model, **options: Any) -> Any:
    return door.Adapter(model, shared.SharedEncoder(model, torch.device("cpu")), **options)


def _evaluate(files: dict[str, str], output: Path, keys: Sequence[str], model: str = "first", **changes: Any) -> dict:
    given = {key: files[key] for key in keys}
    evaluate.run(evaluate.Config(model=files[model], output=str(output), device="cpu", **(given | changes)))
    return json.loads((output / "results.json").read_text())


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The texts of every call of the encoder."""
    calls: list[list[str]] = []
    whole = shared.encode_texts

    def counted(model: Model, texts: Sequence[str], **options: Any) -> torch.Tensor:
        calls.append(list(texts))
        return whole(model, texts, **options)

    monkeypatch.setattr(shared, "encode_texts", counted)
    return calls


# --- E5's protocol ---------------------------------------------------------------------------------------------


def test_mteb_s_own_mock_tasks_pass(door: ModuleType, model: Model, tmp_path: Path) -> None:
    from mteb.mocks import MOCK_TASK_TEST_GRID

    runner = door.Runner(_adapter(door, model), tmp_path)
    kinds = set()
    for task in MOCK_TASK_TEST_GRID:
        result = runner(task)
        assert not isinstance(result, door.Missing), result
        assert np.isfinite(door.entry(task, result)["score"])
        kinds.add(task.metadata.type)
    assert {"BitextMining", "Classification", "Clustering", "PairClassification", "Retrieval", "Reranking"} < kinds


# (task, what stands before a query or any text, what before a document): the protocol of E5's evaluation code
PREFIXES = [
    ("SciFact", "query: ", "passage: "),
    ("MIRACLRetrieval", "query: ", "passage: "),
    ("QuoraRetrieval", "query: ", "query: "),
    ("SciDocsRR", "query: ", "query: "),
    ("STS17", "query: ", "query: "),
    ("Tatoeba", "query: ", "query: "),
    ("Banking77Classification", "query: ", "query: "),
    ("TwentyNewsgroupsClustering", "query: ", "query: "),
    ("TwitterSemEval2015", "query: ", "query: "),
    ("SummEval", "query: ", "query: "),
]


@pytest.mark.parametrize(("name", "query", "document"), PREFIXES)
def test_only_documents_of_retrieval_are_passages(
    door: ModuleType, model: Model, name: str, query: str, document: str
) -> None:
    import mteb
    from mteb.types import PromptType

    adapter, task = _adapter(door, model), mteb.get_task(name).metadata
    found = [adapter.prefix(task, side) for side in (None, PromptType.query, PromptType.document)]
    assert found == [query, query, document]


@pytest.mark.parametrize(
    ("name", "instruction", "bare"),
    [
        ("SciFact", "Given a scientific claim, retrieve documents that support or refute the claim", True),
        ("STS17", "Retrieve semantically similar text", False),
    ],
)
def test_an_instruct_model_gets_the_task_s_instruction_and_nothing_before_documents(
    door: ModuleType, model: Model, name: str, instruction: str, bare: bool
) -> None:
    import mteb
    from mteb.types import PromptType

    adapter, task = _adapter(door, model, instruct=True), mteb.get_task(name).metadata
    query = adapter.prefix(task, PromptType.query)
    assert query.startswith(f"Instruct: {instruction}")
    assert query.endswith("\nQuery: ")
    assert adapter.prefix(task, PromptType.document) == ("" if bare else query)


def test_vectors_have_length_one_but_for_classification(door: ModuleType, model: Model) -> None:
    import mteb

    def lengths(name: str) -> np.ndarray:
        vectors = adapter.encode([{"text": ["a sofa", "a lamp"]}], task_metadata=mteb.get_task(name).metadata, **where)
        return np.linalg.norm(vectors, axis=1)

    adapter, where = _adapter(door, model), {"hf_split": "test", "hf_subset": "default"}
    assert lengths("STS17") == pytest.approx([1, 1], abs=1e-6)
    assert (np.abs(lengths("Banking77Classification") - 1) > 0.1).all()
    assert model.encoder.normalize


def test_a_broken_model_is_an_error_and_no_score(door: ModuleType, files: dict[str, str], tmp_path: Path) -> None:
    broken = open_model(files["second"])
    with torch.no_grad():
        next(broken.encoder.parameters()).fill_(float("nan"))
    from trainer import localtasks

    task = localtasks.sts("graded", localdata.graded_pairs(Path(files["sts"])))
    with pytest.raises(NumericError, match="NaN or infinity"):
        door.Runner(_adapter(door, broken), tmp_path)(task)


# --- the same figures as others ---------------------------------------------------------------------------------


def test_local_tasks_score_as_mteb_scores_the_exported_model(
    door: ModuleType, model: Model, files: dict[str, str], tmp_path: Path
) -> None:
    """The reference is sentence-transformers under mteb's own wrapper, with the prompts of the exported folder."""
    import mteb
    from sentence_transformers import SentenceTransformer

    from trainer import classic, export, localtasks, sets
    from trainer.card import Card

    classic.write(model, tmp_path / "exported", Card(), export._sentence_transformers)
    reference = SentenceTransformer(str(tmp_path / "exported"), device="cpu")
    (asked,) = sets.load(files["data"])
    pairs = localtasks.bitext("pairs", localdata.translations(Path(files["bitext"])))
    plain = localtasks._new(mteb.abstasks.AbsTaskBitextMining, "pairs", "BitextMining", "f1", "1")
    kinds = {
        "graded": localtasks.sts("graded", localdata.graded_pairs(Path(files["sts"]))),
        "pairs": localtasks._with(plain, pairs.dataset),
        "groups": localtasks.reranking("groups", *localdata.groups(Path(files["reranking"]))),
        "asked": localtasks.retrieval_task("asked", asked, Prompts(query="", passage="")),
    }
    ours = _evaluate(files, tmp_path / "ours", ["sts", "bitext", "reranking"], retrieval=files["data"])
    for name, task in kinds.items():
        found = mteb.evaluate(reference, task, co2_tracker=False, cache=None, show_progress_bar=False)
        theirs = door.entry(task, found.task_results[0])
        assert ours[name].keys() - {"margin_f1", "margin_accuracy"} == theirs.keys()
        for figure in theirs.keys() - {"type", "metric"}:
            assert ours[name][figure] == pytest.approx(theirs[figure], abs=1e-5), (name, figure)
    embed = shared.SharedEncoder(model, torch.device("cpu"))
    left, right = (embed([f"query: {text}" for text in pairs.dataset["default"]["test"][side]]) for side in SIDES)
    nearest = (left @ right.T).argmax(dim=1).numpy()
    assert f1_of_each(nearest).mean() == pytest.approx(ours["pairs"]["f1"], abs=1e-6)
    own = _evaluate(files, tmp_path / "own", ["data"])["asked"]
    for figure in ("ndcg_at_10", "mrr_at_10", "recall_at_100"):
        assert own[figure] == pytest.approx(ours["asked"][figure], abs=1e-5)  # mteb rounds to 5 places


def test_a_query_in_the_corpus_is_no_result_of_its_own_in_mteb_either(files: dict[str, str], tmp_path: Path) -> None:
    folder, draw = tmp_path / "arguments", random.Random(1)
    texts = [_text(draw) for _ in range(40)]
    _lines(folder / "corpus.jsonl", [{"_id": f"t{n}", "text": text} for n, text in enumerate(texts)])
    _lines(folder / "queries.jsonl", [{"_id": f"t{n}", "text": texts[n]} for n in range(10)])
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text("".join(f"t{n}\tt{39 - n}\t2\n" for n in range(10)), encoding="utf-8")
    own = _evaluate(files, tmp_path / "own", [], data=str(folder))["arguments"]
    theirs = _evaluate(files, tmp_path / "mteb", [], retrieval=str(folder))["arguments"]
    for figure in ("ndcg_at_10", "mrr_at_10", "recall_at_100"):
        assert own[figure] == pytest.approx(theirs[figure], abs=1e-5)


# --- margin ----------------------------------------------------------------------------------------------------


def test_the_margin_is_the_published_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, 8, generator=generator) for n in (40, 30))
    left, right = (torch.nn.functional.normalize(vectors, dim=1) for vectors in (left.abs(), right.abs()))
    cosines = (left.double() @ right.double().T).numpy()
    expected = []
    for i in range(40):
        scores = []
        for j in range(30):
            near_i = sorted(cosines[i], reverse=True)[:4]
            near_j = sorted(cosines[:, j], reverse=True)[:4]
            scores.append(cosines[i, j] / (sum(near_i) / 8 + sum(near_j) / 8))
        expected.append(int(np.argmax(scores)))
    assert expected != cosines.argmax(axis=1).tolist()
    assert best_by_margin(left, right).tolist() == expected


def test_a_sentence_near_to_everything_loses_by_margin() -> None:
    left = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8]])
    hub = torch.tensor([[0.8, 0.6]])
    right = torch.nn.functional.normalize(torch.cat([torch.tensor([[1.0, -0.8]]), hub, torch.tensor([[-0.3, 1.0]])]))
    assert (left @ right.T).argmax(dim=1).tolist() == [1, 1, 1]
    assert best_by_margin(left, right, neighbours=3).tolist() == [0, 1, 2]


def test_f1_of_each_is_that_of_its_precision_and_recall() -> None:
    found = np.array([0, 0, 2, 2, 5, 5])
    # 0: found twice, once rightly; 2: the same; 5: the same; 1, 3, 4: never found
    f1 = 2 * 0.5 * 1.0 / (0.5 + 1.0)
    assert f1_of_each(found) == pytest.approx([f1, 0, f1, 0, 0, f1])


# --- results ---------------------------------------------------------------------------------------------------


def test_what_is_finished_is_not_evaluated_again_and_each_checkpoint_has_its_own(
    files: dict[str, str], tmp_path: Path, encoded: list[list[str]]
) -> None:
    keys = ["sts", "bitext", "classification", "reranking"]
    first = _evaluate(files, tmp_path, keys)
    assert encoded
    encoded.clear()
    assert _evaluate(files, tmp_path, keys) == first
    assert encoded == []
    second = _evaluate(files, tmp_path, keys, model="second")
    assert encoded
    assert second["graded"]["score"] != first["graded"]["score"]
    found = list((tmp_path / "mteb" / "results").rglob("graded.json"))
    assert [path.parent.parent.name for path in sorted(found)] == ["local__first", "local__second"]
    about = json.loads((tmp_path / "evaluation.json").read_text())
    assert any(path.parent.name.startswith(about["weights_xxh3_128"]) for path in found)
    encoded.clear()
    other = evaluate.PromptOverride(query="ask: ")
    _evaluate(files, tmp_path, ["sts"], prompts=other)
    assert all(text.startswith("ask: ") for call in encoded for text in call)
    assert len(list((tmp_path / "mteb" / "results" / "local__first").iterdir())) == 2


def test_results_go_by_the_run_s_name_or_the_hub_s(door: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "mine" / "model").mkdir(parents=True)
    given = [str(tmp_path / "mine"), str(tmp_path / "mine" / "model"), "intfloat/e5-small"]
    assert [door._mteb_name(name) for name in given] == ["local/mine", "local/mine", "intfloat/e5-small"]


def test_a_changed_file_and_a_result_that_was_cut_off_are_evaluated_again(
    files: dict[str, str], tmp_path: Path, encoded: list[list[str]]
) -> None:
    file = tmp_path / "graded.tsv"
    file.write_text("a sofa\ta lamp\t1\nthe room\tthe dog\t2\nthe fox\tthe fox\t5\n", encoding="utf-8")
    before = _evaluate(files, tmp_path / "out", [], sts=str(file))
    file.write_text("a sofa\ta lamp\t5\nthe room\tthe dog\t4\nthe fox\tthe fox\t1\n", encoding="utf-8")
    after = _evaluate(files, tmp_path / "out", [], sts=str(file))
    assert before["graded"]["score"] == pytest.approx(-after["graded"]["score"])
    (result,) = (tmp_path / "out" / "mteb").rglob("graded.json")
    result.write_text(result.read_text()[:100])
    encoded.clear()
    assert _evaluate(files, tmp_path / "out", [], sts=str(file)) == after
    assert encoded


def _on_ranks(files: dict[str, str], output: str) -> int:
    os.environ["MTEB_CACHE"] = output
    keys = ["data", "sts", "bitext", "classification"]
    given = {key: files[key] for key in keys}
    evaluate.run(evaluate.Config(model=files["first"], output=output, device="cpu", **given))
    return 0


def test_two_ranks_give_the_scores_of_one(files: dict[str, str], tmp_path: Path) -> None:
    ranks.run(_on_ranks, 2, tmp_path, files, str(tmp_path / "two"))
    together = json.loads((tmp_path / "two" / "results.json").read_text())
    alone = _evaluate(files, tmp_path / "one", ["data", "sts", "bitext", "classification"])
    assert together.keys() == alone.keys()
    for name, found in alone.items():
        for figure, value in found.items():
            if isinstance(value, float):
                assert together[name][figure] == pytest.approx(value, abs=2e-6), (name, figure)  # mteb keeps 6 places


# --- names and data --------------------------------------------------------------------------------------------


def test_names_stand_for_benchmarks_tasks_and_subsets(door: ModuleType) -> None:
    names = ["beir", "mteb-en-v1", "MTEB(eng, v2)", "MIRACL", "miracl-hard-18", "bucc", "Tatoeba/deu-eng", "miracl/sw"]
    beir, old, new, miracl, hard, bucc, german, swahili = door.suites(names)
    assert [len(suite.tasks) for suite in (beir, old, new)] == [15, 56, 41]
    assert (miracl.name, len(miracl.tasks[0].hf_subsets), len(hard.tasks[0].hf_subsets)) == ("miracl", 16, 18)
    assert (swahili.name, swahili.tasks[0].hf_subsets) == ("MIRACLRetrieval/sw", ["sw"])
    assert (bucc.name, german.tasks[0].hf_subsets) == ("BUCC", ["deu-eng"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("SciFakt", "did you mean SciFact"),
        ("Tatoeba/xx-yy", "no subset xx-yy; it has"),
        ("ViDoRe(v1)", "is not of text alone"),
    ],
)
def test_a_name_that_is_none_is_an_error_with_near_ones(door: ModuleType, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        door.suites([name])


def test_copies_of_a_task_s_data_serve_where_nothing_can_be_fetched(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    copies, draw = tmp_path / "copies", random.Random(2)
    _lines(
        copies / "scifact" / "corpus.jsonl", [{"_id": f"d{n}", "title": "A", "text": _text(draw)} for n in range(30)]
    )
    _lines(copies / "scifact" / "queries.jsonl", [{"_id": f"q{n}", "text": _text(draw)} for n in range(20)])
    (copies / "scifact" / "qrels").mkdir()
    judged = "".join(f"q{n}\td{n}\t1\n" for n in range(20))
    (copies / "scifact" / "qrels" / "test.tsv").write_text(judged, encoding="utf-8")
    for source, place in (("bitext", "Tatoeba/deu-eng.tsv"), ("sts", "STSBenchmark.tsv")):
        (copies / place).parent.mkdir(exist_ok=True)
        (copies / place).write_bytes(Path(files[source]).read_bytes())
    (copies / "SciDocsRR.jsonl").write_bytes(Path(files["reranking"]).read_bytes())
    (copies / "Banking77Classification").symlink_to(files["classification"])
    forums = "android english gaming gis mathematica physics programmers stats tex unix webmasters wordpress"
    (copies / "cqadupstack").mkdir()
    for forum in forums.split():
        (copies / "cqadupstack" / forum).symlink_to(copies / "scifact")
    tasks = ["SciFact", "Tatoeba/deu-eng", "STSBenchmark", "SciDocsRR", "Banking77Classification"]
    tasks += ["CQADupstackRetrieval", "NFCorpus"]
    changes = {"tasks": tasks, "task_data": str(copies), "data": str(copies / "scifact")}
    found = _evaluate(files, tmp_path / "out", [], offline=True, compare=True, **changes)
    assert found.keys() == {"scifact", *tasks} - {"NFCorpus"}
    assert found["SciFact"]["score"] == pytest.approx(found["scifact"]["ndcg_at_10"], abs=1e-5)
    assert found["CQADupstackRetrieval"]["score"] == pytest.approx(found["SciFact"]["score"])
    local = _evaluate(files, tmp_path / "local", ["sts", "bitext", "reranking", "classification"])
    for task, name in zip(tasks[1:5], ("pairs", "graded", "groups", "moods"), strict=True):
        assert found[task]["score"] == pytest.approx(local[name]["score"])
    assert list(json.loads((tmp_path / "out" / "evaluation.json").read_text())["missing"]) == ["NFCorpus"]
    assert "tasks without a result: 1" in caplog.text
    printed = capsys.readouterr().out
    assert "E5 v2" in printed
    assert "– / 72.0 / –" in printed  # SciFact
    with pytest.raises(UserError, match="task_data=nowhere: no such folder"):
        _evaluate(files, tmp_path / "out", [], tasks="SciFact", task_data="nowhere")
    with pytest.raises(UserError, match=r"(?s)tasks without a result: 1\n  NFCorpus: .*start the same command again"):
        _evaluate(files, tmp_path / "out", [], **changes)


def test_the_means_of_a_benchmark_are_over_tasks_and_over_types(door: ModuleType) -> None:
    entries = {
        "a": {"type": "STS", "score": 0.8},
        "b": {"type": "STS", "score": 0.6},
        "c": {"type": "Retrieval", "score": 0.1},
    }
    found = door.summary(entries, ["d"])
    assert (found["tasks"], found["missing"], found["by_type"]["Retrieval"]) == (3, ["d"], 0.1)
    assert found["by_type"]["STS"] == pytest.approx(0.7)
    assert found["score"] == pytest.approx(0.5)
    assert found["mean_of_types"] == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("sts", "a\tb\t1\nc\td\tmuch\n", "line 2: score='much' is no number"),
        ("sts", "a\tb\t1\nc\td\t1\n", "all scores are the same"),
        ("sts", "a\tb\t1\textra\n", "line 1: 4 columns, not 3"),
        ("bitext", "a\tb\nc\t \n", "line 2: no sentence2"),
        ("bitext", "", "the file is empty"),
    ],
)
def test_a_bad_row_of_a_table_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, text: str, message: str
) -> None:
    (tmp_path / "bad.tsv").write_text(text, encoding="utf-8")
    assert main(["evaluate", "model=none", f"{key}={tmp_path / 'bad.tsv'}", f"output={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert f"{key}={tmp_path / 'bad.tsv'}" in error
    assert message in error


def test_labels_and_groups_that_cannot_be_scored_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "moods"
    with pytest.raises(UserError, match=r"classification=.*no train.jsonl or train.tsv"):
        localdata.labelled(folder)
    _lines(folder / "train.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": 2}])
    _lines(folder / "test.jsonl", [{"text": "a", "label": "y"}])
    with pytest.raises(UserError, match="the label 'y' is in test and not in train"):
        localdata.labelled(folder)
    with pytest.raises(UserError, match="line 1: a row has a query, a list of positives"):
        localdata.groups(Path(_lines(tmp_path / "groups.jsonl", [{"query": "a", "positive": ["b"]}])))


# --- the published figures --------------------------------------------------------------------------------------


def test_published_figures_make_their_published_means() -> None:
    tables = yaml.safe_load(published.FILE.read_text(encoding="utf-8"))["tables"]
    weights = dict(zip(
        ("Classification", "Clustering", "PairClassification", "Reranking", "Retrieval", "STS", "Summarization"),
        (12, 11, 3, 4, 15, 10, 1), strict=True,
    ))  # fmt: skip
    english, miracl = tables["MTEB(eng, v1)"], tables["miracl"]
    for family in ("e5-unsupervised", "e5"):
        means = sum(np.array(english[kind][family]) * weight for kind, weight in weights.items()) / 56
        assert means == pytest.approx(np.array(english["mean"][family]), abs=0.12)
    languages = [row for name, row in miracl.items() if len(name) == 2]
    assert len(languages) == 16
    assert np.mean([row["me5"] for row in languages], axis=0) == pytest.approx(miracl["mean"]["me5"], abs=0.06)
    assert np.mean([row["me5-instruct"] for row in languages]) == pytest.approx(65.7, abs=0.06)
    single = [row["mean"] for name, row in tables.items() if list(row) == ["mean"] and name != "BEIR"]
    sets = [row["e5-v2"][1] for row in single if "e5-v2" in row]
    assert (len(sets), np.mean(sets)) == (15, pytest.approx(50.23, abs=0.01))


def test_a_published_row_stands_beside_ours_only_where_the_tasks_are_the_same() -> None:
    tables = {"B": {"mean": {"e5": 40.0}, "STS": {"e5": 80.0}, "recall_at_100": {"e5": 90.0}, "other": {"e5": 1.0}}}
    whole = {"B": {"score": 0.5, "by_type": {"STS": 0.7}, "recall_at_100": 0.9}}
    known = {"families": {"e5": "E5"}, "tables": tables}
    assert [(line.row, *line.ours) for line in published.lines([whole], known)] == [
        ("mean", 0.5),
        ("STS", 0.7),
        ("recall_at_100", 0.9),
    ]
    assert published.table([whole], ["ours"], known)[1] == ["B", "mean", "50.0", "40.0"]
    assert published.lines([{"B": whole["B"] | {"missing": ["x"]}}], known) == []
    assert published.lines([{"C": whole["B"]}], known) == []
