"""An exported folder gives the same vectors in every library that opens it, or it is not there."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

from data.errors import QuintetError, UserError
from trainer import checkpoint, classic, export
from trainer.card import Card
from trainer.embed import encode_texts
from trainer.encoder import Encoder, Model, open_model

READER = export._sentence_transformers
FAMILIES = [tiny.bert, tiny.xlmr, tiny.mpnet]
TEXTS = [*tiny.TEXTS, "", "one", "many words in a row " * 50]

# The names under which MTEB 2 looks prompts up; with any other name it ignores all of a model's prompts.
MTEB_NAMES = {
    "query",
    "document",
    "BitextMining",
    "Classification",
    "MultilabelClassification",
    "Clustering",
    "PairClassification",
    "Reranking",
    "Retrieval",
    "STS",
    "Summarization",
}


def _model(
    folder: Path, family: Callable[..., Path] = tiny.bert, pooling: str = "mean", normalize: bool = True
) -> Model:
    model = open_model(family(folder / "source"))
    encoder = Encoder(model.encoder.backbone, pooling, normalize).eval()
    return replace(model, encoder=encoder, query_prompt="q: ", passage_prompt="p: ", max_length=32)


def _one_by_one(model: Model, folder: Path, prompt: str) -> torch.Tensor:
    """The vectors out of the exported weights alone, by plain transformers code without any padding."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    backbone = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    vectors = []
    for text in TEXTS:
        inputs = tokenizer(prompt + text, truncation=True, max_length=32, return_tensors="pt")
        with torch.no_grad():
            hidden = backbone(**inputs).last_hidden_state[0]
        vector = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[model.pooling]
        vectors.append(vector / vector.norm() if model.normalize else vector)
    return torch.stack(vectors)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("family", FAMILIES)
def test_exported_vectors_are_the_trainers_in_both_libraries(
    tmp_path: Path, family: Callable[..., Path], pooling: str
) -> None:
    model = _model(tmp_path, family, pooling)
    difference = classic.write(model, tmp_path / "out", Card(), READER)
    reader = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    for name, prompt in (("query", "q: "), ("document", "p: ")):
        ours = encode_texts(model, TEXTS, prompt)
        theirs = reader.encode(TEXTS, prompt_name=name, convert_to_tensor=True)
        assert (ours - theirs).abs().max() < 1e-5
        assert (ours - _one_by_one(model, tmp_path / "out", prompt)).abs().max() < 1e-5
    assert difference < 1e-5
    assert reader.similarity_fn_name == "cosine"
    assert reader.max_seq_length == 32


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_cards_own_code_gives_the_same_vectors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], pooling: str, normalize: bool
) -> None:
    model = _model(tmp_path, tiny.xlmr, pooling, normalize)
    classic.write(model, tmp_path / "out", Card(), READER)
    blocks = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)
    seen: list[list[float]] = []
    for block in blocks:
        capsys.readouterr()
        space: dict = {}
        exec(block.replace("path/to/this/folder", str(tmp_path / "out")), space)
        seen.append([torch.as_tensor(space[side]).squeeze().tolist() for side in ("queries", "passages")])
    query = encode_texts(model, ["how tall is the tower?"], "q: ")[0]
    passage = encode_texts(model, ["The tower is 330 metres tall."], "p: ")[0]
    assert len(blocks) == 2
    for queries, passages in seen:
        assert queries == pytest.approx(query.tolist(), abs=1e-5)
        assert passages == pytest.approx(passage.tolist(), abs=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
def test_opening_the_export_gives_the_same_model_back(tmp_path: Path, normalize: bool) -> None:
    model = _model(tmp_path, tiny.xlmr, "last", normalize)
    classic.write(model, tmp_path / "out", Card(), READER)
    again = open_model(tmp_path / "out")
    for name in ("query_prompt", "passage_prompt", "max_length", "pooling", "normalize"):
        assert getattr(again, name) == getattr(model, name)
    assert torch.equal(encode_texts(again, TEXTS), encode_texts(model, TEXTS))


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_precision_is_stored_as_such_and_compared_with_the_rounded_weights(
    tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    model = _model(tmp_path)
    before = encode_texts(model, TEXTS)
    assert classic.write(model, tmp_path / "out", Card(), READER, dtype=name) < 1e-5
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in list(file.keys())} == {dtype}
    assert torch.equal(encode_texts(model, TEXTS), before)  # the model in hand is left as it was
    assert 0 < (encode_texts(open_model(tmp_path / "out"), TEXTS) - before).abs().max() < 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_readers_miss_no_weight_and_meet_no_stranger(tmp_path: Path, family: Callable[..., Path]) -> None:
    classic.write(_model(tmp_path, family), tmp_path / "out", Card(), READER)
    _, report = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


def test_prompts_go_by_the_names_that_mteb_accepts(tmp_path: Path) -> None:
    classic.write(_model(tmp_path), tmp_path / "out", Card(), READER)
    prompts = SentenceTransformer(str(tmp_path / "out"), device="cpu").prompts
    assert set(prompts) <= MTEB_NAMES
    assert (prompts["query"], prompts["document"], prompts["STS"]) == ("q: ", "p: ", "q: ")


@pytest.mark.parametrize("change", [1e-4, float("nan")])
def test_a_reader_that_disagrees_prevents_the_export(tmp_path: Path, change: float) -> None:
    def altered(folder: Path, texts: Sequence[str], prompt_name: str) -> torch.Tensor:
        vectors = READER(folder, texts, prompt_name).clone()
        vectors[3, 5] += change
        return vectors

    model = _model(tmp_path)
    (tmp_path / "place").mkdir()
    with pytest.raises(QuintetError, match="nothing was written"):
        classic.write(model, tmp_path / "place" / "out", Card(), altered)
    assert list((tmp_path / "place").iterdir()) == []


def test_an_output_that_is_there_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    model = _model(tmp_path)
    (tmp_path / "place" / "out").mkdir(parents=True)
    (tmp_path / "place" / "out" / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match="overwrite=true"):
        classic.write(model, tmp_path / "place" / "out", Card(), READER)
    assert (tmp_path / "place" / "out" / "precious.txt").read_text() == "mine"
    classic.write(model, tmp_path / "place" / "out", Card(), READER, overwrite=True)
    assert [path.name for path in (tmp_path / "place").iterdir()] == ["out"]
    assert not (tmp_path / "place" / "out" / "precious.txt").exists()


def test_a_full_disk_is_told_and_leaves_nothing_behind(tmp_path: Path, tmpfs: Callable[[str], Path]) -> None:
    place = tmpfs("64k")
    with pytest.raises(UserError, match="No space left"):
        classic.write(_model(tmp_path), place / "out", Card(), READER)
    assert list(place.iterdir()) == []


# --- the stage -------------------------------------------------------------------------------------------------


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run folder with two checkpoints, of which the newer has other weights."""
    run_dir = tmp_path / "run"
    for step, seed in ((5, 0), (10, 1)):
        source = tiny.bert(tmp_path / f"weights-{step}")
        backbone = AutoModel.from_pretrained(source)
        torch.manual_seed(seed)
        torch.nn.init.normal_(backbone.embeddings.word_embeddings.weight)
        backbone.save_pretrained(source)

        def write(staging: Path, source: Path = source) -> None:
            shutil.copytree(source, staging / "model")

        checkpoint.Saving(run_dir, step, write, {}).publish()
    config = {"model": {"path": "intfloat/e5-small", "token": "${oc.env:SECRET}"}, "lr": 2e-4, "steps": 10}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    scores = {"ndcg_at_10": 0.5, "mrr_at_10": 0.4, "recall_at_100": 0.9, "accuracy_at_1": 0.25}
    (run_dir / "results.json").write_text(json.dumps({"holdout": {**scores, "bm25": {**scores, "ndcg_at_10": 0.125}}}))
    return run_dir


def test_a_run_is_exported_from_its_newest_checkpoint_with_its_facts_on_the_card(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export.run(export.Config(run_dir=str(run_dir)))
    assert "max abs difference" in capsys.readouterr().out
    newest = run_dir / "checkpoints" / checkpoint.folder_name(10) / "model"
    exported = encode_texts(open_model(run_dir / "model"), TEXTS)
    assert torch.equal(exported, encode_texts(open_model(newest), TEXTS))
    text = (run_dir / "model" / "README.md").read_text()
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert metadata["library_name"] == "sentence-transformers"
    assert metadata["base_model"] == "intfloat/e5-small"
    (entry,) = metadata["model-index"][0]["results"]
    assert {row["type"]: row["value"] for row in entry["metrics"]}["ndcg_at_10"] == 0.5
    assert "| holdout | BM25 | 0.125 |" in text
    assert "| peak learning rate | 0.0002 |" in text
    assert "SECRET" not in text


def test_a_checkpoint_is_exported_by_name(run_dir: Path, tmp_path: Path) -> None:
    folder = run_dir / "checkpoints" / checkpoint.folder_name(5)
    export.run(export.Config(checkpoint=str(folder), output=str(tmp_path / "out")))
    exported = encode_texts(open_model(tmp_path / "out"), TEXTS)
    assert torch.equal(exported, encode_texts(open_model(folder / "model"), TEXTS))
    assert "intfloat/e5-small" in (tmp_path / "out" / "README.md").read_text()


def test_what_cannot_be_exported_is_named(run_dir: Path, tmp_path: Path) -> None:
    folder = run_dir / "checkpoints" / checkpoint.folder_name(5)
    weights = folder / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    for config, message in (
        (export.Config(checkpoint=str(folder), output=str(tmp_path / "out")), "model.safetensors"),
        (export.Config(checkpoint=str(tmp_path / "nowhere"), output=str(tmp_path / "out")), "nowhere"),
        (export.Config(run_dir=str(tmp_path / "nowhere")), "no checkpoint there"),
    ):
        with pytest.raises(UserError, match=message):
            export.run(config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, ["give one of the two", "output"]),
        ({"run_dir": "a", "checkpoint": "b", "output": "c"}, ["give one of the two"]),
        ({"checkpoint": "b"}, ["output"]),
        ({"run_dir": "a"}, []),
    ],
)
def test_contradicting_keys_are_told(values: dict[str, str], words: list[str]) -> None:
    problems = export.Config(**values).check()
    assert len(problems) == len(words)
    for problem, word in zip(problems, words, strict=True):
        assert word in problem
