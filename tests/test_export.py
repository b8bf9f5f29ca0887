"""An exported folder gives the same vectors in every library that opens it, or it is not there."""

from __future__ import annotations

import base64
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import onnx
import onnxruntime
import pairs
import pytest
import teachers
import tiny
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.backend.utils import backend_should_export
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from data.errors import QuintetError, UserError
from data.pairing import read_settings
from trainer import checkpoint, classic, export, hub, onnxfile, ranker
from trainer.card import Card
from trainer.classic import Checks
from trainer.crossencoder import open_teacher
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
    difference = classic.write(model, tmp_path / "out", Card(), READER).difference
    reader = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    for name, prompt in (("query", "q: "), ("document", "p: ")):
        ours = encode_texts(model, TEXTS, prompt)
        theirs = reader.encode(TEXTS, prompt_name=name, convert_to_tensor=True)
        assert (ours - theirs).abs().max() < 1e-5
        assert (ours - _one_by_one(model, tmp_path / "out", prompt)).abs().max() < 1e-5
    assert difference < 1e-5
    assert reader.similarity_fn_name == "cosine"
    assert reader.max_seq_length == 32


def _run_blocks(folder: Path) -> list[dict]:
    """What the names stand for when each block of the card's code has run."""
    spaces = []
    for block in re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL):
        spaces.append({})
        exec(block.replace("path/to/this/folder", str(folder)), spaces[-1])
    return spaces


@pytest.mark.parametrize(
    ("pooling", "normalize", "dimensions"),
    [("mean", True, 0), ("cls", True, 0), ("last", False, 0), ("mean", True, 12), ("cls", False, 12)],
)
def test_the_cards_own_code_gives_the_same_vectors(
    tmp_path: Path, pooling: str, normalize: bool, dimensions: int
) -> None:
    model = _model(tmp_path, tiny.xlmr, pooling, normalize)
    model.encoder.dimensions = dimensions
    classic.write(model, tmp_path / "out", Card(), READER, onnx=not normalize)
    spaces = _run_blocks(tmp_path / "out")
    seen = [[torch.as_tensor(space[side]).squeeze().tolist() for side in ("queries", "passages")] for space in spaces]
    query = encode_texts(model, ["how tall is the tower?"], "q: ")[0]
    passage = encode_texts(model, ["The tower is 330 metres tall."], "p: ")[0]
    assert len(spaces) == (2 if normalize else 3)  # sentence-transformers, transformers, and onnxruntime
    assert len(query) == (dimensions or 32)
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
    assert classic.write(model, tmp_path / "out", Card(), READER, dtype=name).difference < 1e-5
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


# --- cut vectors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_cut_vectors_are_the_first_numbers_brought_to_unit_length_for_every_reader(tmp_path: Path, dtype: str) -> None:
    model = _model(tmp_path)
    whole = encode_texts(model, TEXTS, "q: ")
    model.encoder.dimensions = 12
    classic.write(model, tmp_path / "out", Card(), READER, dtype=dtype)
    cut = whole[:, :12] / whole[:, :12].norm(dim=1, keepdim=True)
    tolerance = 1e-5 if dtype == "fp32" else 1e-2
    reader = SentenceTransformer(str(tmp_path / "out"), device="cpu")  # with the weights' own dtype
    assert reader.get_embedding_dimension() == 12
    assert (reader.encode(TEXTS, prompt_name="query", convert_to_tensor=True).float() - cut).abs().max() < tolerance
    again = open_model(tmp_path / "out")
    assert again.encoder.size == 12
    assert (encode_texts(again, TEXTS, "q: ") - cut).abs().max() < tolerance


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: {"linear.weight": weights["linear.weight"] * 2},
        lambda weights: {"linear.weight": weights["linear.weight"].flip(0)},
        lambda weights: {**weights, "linear.bias": torch.zeros(12)},
    ],
)
def test_a_dense_layer_that_does_more_than_cut_is_refused(tmp_path: Path, change: Callable[[dict], dict]) -> None:
    model = _model(tmp_path)
    model.encoder.dimensions = 12
    classic.write(model, tmp_path / "out", Card(), READER)
    file = tmp_path / "out" / "2_Dense" / "model.safetensors"
    save_file({name: value.contiguous() for name, value in change(load_file(file)).items()}, file)
    with pytest.raises(UserError, match="more than cut"):
        open_model(tmp_path / "out")


# --- ONNX ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.__name__)
def graph(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path, Checks]:
    """A model of each family, its export with both graphs, and what the export found."""
    place = tmp_path_factory.mktemp("graph")
    model = _model(place, request.param)
    return model, place / "out", classic.write(model, place / "out", Card(), READER, onnx=True, int8=True)


def _onnx_vectors(file: Path, tokenizer: object, texts: Sequence[str]) -> np.ndarray:
    """Mean-pooled unit vectors by numpy alone, each text as a batch of its own."""
    session = onnxruntime.InferenceSession(str(file))
    vectors = []
    for text in texts:
        inputs = tokenizer(text, truncation=True, max_length=32, return_tensors="np")  # type: ignore[operator]
        (hidden,) = session.run(None, {each.name: inputs[each.name] for each in session.get_inputs()})
        mean = hidden[0].mean(0)
        vectors.append(mean / np.linalg.norm(mean))
    return np.array(vectors)


def test_the_onnx_graph_gives_the_trainers_vectors_at_any_length(graph: tuple[Model, Path, Checks]) -> None:
    model, folder, found = graph
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["q: " + text for text in TEXTS]
    lengths = {len(tokenizer(text, truncation=True, max_length=32)["input_ids"]) for text in texts}
    assert len(lengths) > 4
    assert max(lengths) == 32
    theirs = _onnx_vectors(folder / "onnx" / "model.onnx", tokenizer, texts)
    assert np.abs(theirs - encode_texts(model, TEXTS, "q: ").numpy()).max() < 1e-5
    assert found.graphs is not None
    assert found.graphs.difference < 1e-5


def test_the_int8_graph_is_near_and_its_cosine_is_what_is_reported(graph: tuple[Model, Path, Checks]) -> None:
    model, folder, found = graph
    tokenizer = AutoTokenizer.from_pretrained(folder)
    exact = encode_texts(model, TEXTS, "q: ").numpy()
    rounded = _onnx_vectors(folder / onnxfile.INT8_FILE, tokenizer, ["q: " + text for text in TEXTS])
    cosine = (exact * rounded).sum(1)
    assert found.graphs is not None
    assert found.graphs.lowest is not None
    assert 0.9 < found.graphs.lowest <= found.graphs.cosine < 0.999999  # it is another graph
    assert cosine.mean() == pytest.approx(found.graphs.cosine, abs=0.01)
    assert f"{found.graphs.cosine:.4f} on average" in (folder / "README.md").read_text()


def test_the_graph_lies_where_sentence_transformers_looks_and_names_no_file_of_ours(
    graph: tuple[Model, Path, Checks],
) -> None:
    _, folder, _ = graph
    found = backend_should_export(folder, True, {}, "model.onnx", "*.onnx", "ONNX")
    assert found == (False, {"subfolder": "onnx", "file_name": "model.onnx"})
    chosen = backend_should_export(folder, True, {"file_name": onnxfile.INT8_FILE}, "model.onnx", "*.onnx", "ONNX")
    assert chosen == (False, {"subfolder": "onnx", "file_name": "model_qint8_quantized.onnx"})
    assert b".py" not in (folder / onnxfile.FILE).read_bytes()
    (opset,) = [each.version for each in onnx.load(folder / onnxfile.FILE).opset_import if not each.domain]
    assert opset == onnxfile.OPSET


def test_a_large_models_weights_lie_beside_the_graph_under_the_hubs_name(tmp_path: Path) -> None:
    backbone = _model(tmp_path).encoder.backbone
    classic.use_common_attention(backbone)
    ids = torch.tensor([[2, 7, 9, 3], [2, 8, 3, 0]])
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    onnxfile.write(backbone, inputs, "last_hidden_state", tmp_path, one_file_bytes=1000)
    assert sorted(path.name for path in (tmp_path / "onnx").iterdir()) == ["model.onnx", "model.onnx_data"]
    with torch.no_grad():
        ours = backbone(**inputs).last_hidden_state
    assert (onnxfile.Session(tmp_path / onnxfile.FILE).run(inputs) - ours).abs()[ids > 0].max() < 1e-5


def test_a_graph_that_disagrees_prevents_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(QuintetError, match="nothing was written"):
        onnxfile.check(float("nan"))
    honest = onnxfile.Session.run
    monkeypatch.setattr(onnxfile.Session, "run", lambda session, inputs: honest(session, inputs) + 2e-4)
    with pytest.raises(QuintetError, match=r"model\.onnx differs"):
        classic.write(_model(tmp_path, normalize=False), tmp_path / "out", Card(), READER, onnx=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", [tiny.bert, tiny.xlmr])
def test_a_cross_encoders_graph_and_its_cards_code_give_its_logits(tmp_path: Path, family: Callable[..., Path]) -> None:
    source = AutoModelForSequenceClassification.from_pretrained(family(tmp_path / "encoder"), num_labels=1)
    source.save_pretrained(tmp_path / "source")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "source")
    teacher = open_teacher(str(tmp_path / "source"), query="query: {query}", max_length=48)
    found = ranker.write(teacher, tokenizer, tmp_path / "out", Card(), export._cross_encoder, onnx=True)
    assert found.graphs is not None
    assert found.graphs.difference < 1e-5
    encoder, onnx_scores = _run_blocks(tmp_path / "out")
    texts = "query: how tall is the tower?", "The tower is 330 metres tall."
    inputs = tokenizer(*texts, return_tensors="pt", truncation=True, max_length=48)
    with torch.no_grad():
        expected = float(source.eval()(**inputs).logits)
    assert float(encoder["scores"][0]) == pytest.approx(expected, abs=1e-5)
    assert float(onnx_scores["scores"][0]) == pytest.approx(expected, abs=1e-5)


def test_a_cross_encoder_of_short_rows_is_exported(tmp_path: Path) -> None:
    """Readers know nothing of its cut of queries, and cut both texts where it cuts the passage alone."""
    teachers.bert(tmp_path / "source")
    teacher = open_teacher(str(tmp_path / "source"), max_length=16, max_query_length=2)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "source")
    found = ranker.write(teacher, tokenizer, tmp_path / "out", Card(), export._cross_encoder, onnx=True)
    assert found.difference < 1e-4
    assert found.graphs is not None
    assert found.graphs.difference < 1e-4


def test_a_re_ranker_of_others_is_exported_as_one(tmp_path: Path) -> None:
    """It has no pairing.json, and its encoder alone would be another model."""
    source = teachers.bert(tmp_path / "source")
    export.run(export.Config(checkpoint=str(source), output=str(tmp_path / "out")))
    readers = [CrossEncoder(str(folder), device="cpu") for folder in (source, tmp_path / "out")]
    pairs = [("how tall is the tower?", "The tower is 330 metres tall."), ("a", "b")]
    wanted, got = (reader.predict(pairs, activation_fn=torch.nn.Identity()) for reader in readers)
    assert got == pytest.approx(wanted, abs=1e-5)
    assert read_settings(tmp_path / "out") is not None


def test_a_folder_that_is_no_model_is_named_with_its_key(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"checkpoint={tmp_path}: the folder has no config.json"):
        export.run(export.Config(checkpoint=str(tmp_path), output=str(tmp_path / "out")))


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


def test_the_card_tells_the_data_the_versions_and_the_limits_and_nothing_private(run_dir: Path, tmp_path: Path) -> None:
    shards = tmp_path / "private-folder" / "shards"
    pairs.write_shards(shards, pairs.pairs(8), source="titles")
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(yaml.safe_dump({"sources": {"web": {"shards": [str(shards)]}}}))
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    config |= {"data": [str(shards), str(mixture)], "loss": {"matryoshka": {"sizes": [8, 16]}}}
    config["model"] = {"path": "/home/somebody/private-folder/model"}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    found = {"versions": {"python": "3.11.7", "torch": "2.13.0", "faiss": None}, "host": "myhost", "devices": ["H"] * 2}
    (run_dir / "environment.json").write_text(json.dumps(found))
    results = json.loads((run_dir / "results.json").read_text())
    results["holdout"] |= {
        "by_lang": {"de": {"ndcg_at_10": 0.25, "queries": 3}, "el": {"ndcg_at_10": 0.75, "queries": 4}}
    }
    results["sts"] = {"spearman": 0.625, "pairs": 12}
    (run_dir / "results.json").write_text(json.dumps(results))
    export.run(export.Config(run_dir=str(run_dir), license="mit"))
    text = (run_dir / "model" / "README.md").read_text()
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert metadata["license"] == "mit"
    assert metadata["language"] == ["de", "el", "en", "ja"]
    assert [entry["metrics"][0]["value"] for entry in metadata["model-index"][0]["results"]] == [0.5, 0.625]
    for line in (
        "Trained on 16 pairs from 2 sources",
        "| titles | 8 |",
        "| web | 8 |",
        "Pairs by language: de 4, el 4, en 4, ja 4.",
        "| sts | spearman | 0.625 |",
        "| holdout | el | 4 | 0.750 |",
        "Vectors may be cut: 8, 16 numbers were trained",
        "Versions: python 3.11.7, torch 2.13.0.",
        "Hardware: 2 x H.",
        "Texts are cut at 70 tokens",
        "scored on `holdout`, `sts` and nothing else",
    ):
        assert line in text, line
    for secret in ("private-folder", "somebody", "myhost", "SECRET", "faiss", "No licence"):
        assert secret not in text, secret


@pytest.mark.parametrize(("size", "words"), [(16, ""), (12, "not a size that was trained (trained were 8, 16)")])
def test_a_cut_to_a_size_that_was_not_trained_is_warned_of(
    run_dir: Path, caplog: pytest.LogCaptureFixture, size: int, words: str
) -> None:
    config = yaml.safe_load((run_dir / "config.yaml").read_text()) | {"loss": {"matryoshka": {"sizes": [8, 16]}}}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    export.run(export.Config(run_dir=str(run_dir), dimensions=size))
    text = (run_dir / "model" / "README.md").read_text()
    warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == bool(words)
    assert all(words in told for told in [*warned, text])
    assert ("a size that was trained (Matryoshka)" in text) == (not words)


def test_a_cut_that_cuts_nothing_is_refused(run_dir: Path) -> None:
    with pytest.raises(UserError, match="have 32 numbers; give fewer"):
        export.run(export.Config(run_dir=str(run_dir), dimensions=32))


# --- the hub -------------------------------------------------------------------------------------------------------


class _Hub(ThreadingHTTPServer):
    """As much of the hub as an upload talks to: what was asked of it, and the files of the commit."""

    def __init__(self, private: bool) -> None:
        super().__init__(("127.0.0.1", 0), _HubHandler)
        self.private, self.created, self.files, self.tokens = private, {}, {}, set()
        self.there, self.deleted, self.refuses = ["onnx/model.onnx", "README.md", "notes.txt"], [], False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _HubHandler(BaseHTTPRequestHandler):
    server: _Hub

    def log_message(self, *values: object) -> None:
        pass

    def do_GET(self) -> None:
        if "/tree/" in self.path:
            self._answer([{"type": "file", "path": path, "size": 1, "oid": "0" * 40} for path in self.server.there])
        else:
            self._answer({"id": "org/name", "private": self.server.private, "siblings": [], "tags": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.tokens.add(self.headers["Authorization"])
        if self.server.refuses:
            self.send_response(400)
            self.send_header("Content-Length", "0")
            self.send_header("X-Error-Message", "this name is reserved")
            self.end_headers()
        elif self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            self._answer({"url": f"{self.server.address}/org/name"})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif self.path == "/api/models/org/name/preupload/main":
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            self._answer({"files": [{**file, "shouldIgnore": False} for file in files]})
        elif self.path == "/api/models/org/name/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    self.server.deleted.append(line["value"]["path"])
            self._answer({"commitUrl": f"{self.server.address}/org/name/commit/1", "commitOid": "1"})
        else:
            self.send_error(404)

    def _answer(self, content: dict | list) -> None:
        text = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@pytest.fixture
def hub_server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Hub]:
    """A stand-in for the hub on this machine, which huggingface_hub talks to."""
    server = _Hub(private=request.param)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
    monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
    huggingface_hub.close_session()
    yield server
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("hub_server", [True], indirect=True)
def test_a_push_uploads_the_listed_files_of_the_export_and_no_others(
    run_dir: Path, hub_server: _Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    export.run(export.Config(run_dir=str(run_dir), push="org/name"))
    assert f"uploaded to {hub_server.address}/org/name" in capsys.readouterr().out
    folder = run_dir / "model"
    assert hub_server.created["visibility"] == "private"
    assert hub_server.tokens == {"Bearer hf_stand_in"}
    assert hub_server.files == {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    assert hub_server.deleted == ["onnx/model.onnx"]  # of older weights; what is no export's stays
    assert 'SentenceTransformer("org/name")' in hub_server.files["README.md"].decode()
    for stranger in ("optimizer.safetensors", "metrics.jsonl", "wandb/run.json", "2_Dense/optimizer.pt"):
        (folder / stranger).parent.mkdir(exist_ok=True)
        (folder / stranger).write_text("private")
    hub_server.files.clear()
    hub.push(folder, "org/name", private=True)
    assert set(hub_server.files) == set(hub.listing(folder)[0])
    assert hub.listing(folder)[1] == [
        "2_Dense/optimizer.pt",
        "metrics.jsonl",
        "optimizer.safetensors",
        "wandb/run.json",
    ]
    assert b"private" not in hub_server.files.values()


@pytest.mark.parametrize("hub_server", [False], indirect=True)
def test_nothing_goes_to_a_public_repository_where_a_private_one_was_asked_for(run_dir: Path, hub_server: _Hub) -> None:
    with pytest.raises(UserError, match="set private=false"):
        export.run(export.Config(run_dir=str(run_dir), push="org/name"))
    assert not hub_server.files
    export.run(export.Config(run_dir=str(run_dir), push="org/name", private=False, overwrite=True))
    assert hub_server.created["visibility"] == "public"
    assert "model.safetensors" in hub_server.files


@pytest.mark.parametrize("hub_server", [True], indirect=True)
def test_what_the_hub_says_to_a_push_is_told_and_the_export_stays(run_dir: Path, hub_server: _Hub) -> None:
    hub_server.refuses = True
    with pytest.raises(
        UserError, match=r"the hub refused: .*this name is reserved.*; the export is in .*/model, so start again"
    ):
        export.run(export.Config(run_dir=str(run_dir), push="org/name"))
    assert (run_dir / "model" / "model.safetensors").is_file()


def test_a_dry_run_lists_files_with_their_sizes_and_needs_no_token(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    export.run(export.Config(run_dir=str(run_dir), push="org/name", dry_run=True))
    printed = capsys.readouterr().out
    size = (run_dir / "model" / "model.safetensors").stat().st_size
    assert re.search(rf"^model.safetensors +{size:,}$", printed, re.MULTILINE)
    assert "would go up to org/name (private)" in printed
    with pytest.raises(UserError, match="hf auth login"):
        export.run(export.Config(run_dir=str(run_dir), push="org/name", overwrite=True))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"run_dir": "a", "push": "name"}, ["ORGANISATION/NAME"]),
        ({"run_dir": "a", "push": "org/../name"}, ["ORGANISATION/NAME"]),
        ({"run_dir": "a", "int8": True}, ["add onnx=true"]),
        ({"run_dir": "a", "dry_run": True}, ["add push="]),
        ({}, ["give one of the two", "output"]),
        ({"run_dir": "a", "checkpoint": "b", "output": "c"}, ["give one of the two"]),
        ({"checkpoint": "b"}, ["output"]),
        ({"run_dir": "a"}, []),
    ],
)
def test_contradicting_keys_are_told(values: dict[str, Any], words: list[str]) -> None:
    problems = export.Config(**values).check()
    assert len(problems) == len(words)
    for problem, word in zip(problems, words, strict=True):
        assert word in problem
