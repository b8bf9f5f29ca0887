"""Embeddings that do not depend on how texts are fed: padded, packed, alone, or through sentence-transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from data.errors import UserError
from data.tokens import TextEncoder
from trainer import gradcache
from trainer.attention import Segments, pack
from trainer.device import can_compile, training_chunk_tokens
from trainer.encoder import (
    Encoder,
    ModelSettings,
    compile_layers,
    freeze_positions,
    load_backbone,
    open_model,
    save_settings,
)

FAMILIES = [tiny.bert, tiny.xlmr, tiny.mpnet]
TEXTS = [*tiny.TEXTS, "fox", "the", " ".join(tiny.TEXTS[:2])]


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.__name__)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return request.param(tmp_path_factory.mktemp("encoder") / "model")


def tokens(model, texts=TEXTS):
    return TextEncoder(model.tokenizer, 40).encode(texts, "query: ")


def one_by_one(encoder: Encoder, texts) -> torch.Tensor:
    """The reference: every text alone, so that there is nothing to pad and nothing to pack."""
    alone = [gradcache.pad(texts, np.array([row])) for row in range(len(texts.lengths))]
    with torch.no_grad():
        return torch.cat([encoder(*inputs) for inputs in alone])


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_padded_equals_alone(folder: Path, pooling: str):
    model = open_model(folder)
    encoder = Encoder(model.encoder.backbone, pooling).eval()
    texts = tokens(model)
    ids, mask = gradcache.pad(texts, np.arange(len(TEXTS)), model.tokenizer.pad_token_id)
    with torch.no_grad():
        assert torch.allclose(encoder(ids, mask), one_by_one(encoder, texts), atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_packed_equals_alone_where_the_family_can_be_packed(folder: Path, pooling: str):
    model = open_model(folder)
    encoder = Encoder(model.encoder.backbone, pooling).eval()
    assert encoder.packable == ("mpnet" not in encoder.backbone.config.model_type)
    texts = tokens(model)
    wanted = one_by_one(encoder, texts)
    if not encoder.packable:
        return  # trainer/build.py refuses model.attention=packed for it, see test_train.py
    rows = np.array([3, 0, 1, 9, 2, 4, 5, 6, 7, 8])
    ids, segments = pack(batch_of(texts).tokens, rows)
    with torch.no_grad():
        packed = encoder(ids, segments=segments)
        padded = encoder(*gradcache.pad(texts, rows, model.tokenizer.pad_token_id))
    assert torch.allclose(packed, wanted[rows], atol=1e-5)
    assert torch.allclose(padded, wanted[rows], atol=1e-5), "the packed kernel leaves padded calls alone"


def batch_of(texts):
    from data.collate import Batch

    none = np.empty(0, np.int64)
    return Batch(tokens=texts, num_queries=0, num_negatives=0, query_hash=none, passage_hash=none, record_ids=none)


def test_packed_texts_do_not_see_each_other(tmp_path: Path):
    encoder = open_model(tiny.bert(tmp_path / "bert")).encoder

    def second(first_text: list[int]) -> torch.Tensor:
        ids = torch.tensor([[*first_text, 9, 8, 7]])
        length = len(first_text)
        positions = torch.tensor([[*range(length), 0, 1, 2]])
        with torch.no_grad():
            return encoder(
                ids, segments=Segments(torch.tensor([0, length, length + 3], dtype=torch.int32), 9, positions)
            )[1]

    assert torch.allclose(second([5, 6]), second([20, 21, 22, 23]), atol=1e-6)


def test_positions_of_the_roberta_family_start_behind_their_padding_number(tmp_path: Path):
    assert open_model(tiny.bert(tmp_path / "b")).encoder.first_position == 0
    assert open_model(tiny.xlmr(tmp_path / "x")).encoder.first_position == 2
    assert open_model(tiny.xlmr(tmp_path / "y")).encoder.max_positions == tiny.SIZES["max_position_embeddings"] - 2


def test_mean_pooling_equals_sentence_transformers_on_the_same_folder(folder: Path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    theirs = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    expected = theirs.encode(["query: " + text for text in TEXTS], normalize_embeddings=True, convert_to_tensor=True)
    model = open_model(folder)
    ids, mask = gradcache.pad(tokens_whole(model), np.arange(len(TEXTS)), model.tokenizer.pad_token_id)
    with torch.no_grad():
        assert torch.allclose(model.encoder(ids, mask), expected, atol=1e-5)


def tokens_whole(model):
    return TextEncoder(model.tokenizer, 64).encode(TEXTS, "query: ")


def test_frozen_positions_get_no_gradient_and_everything_else_does(tmp_path: Path):
    encoder = Encoder(load_backbone(str(tiny.xlmr(tmp_path / "x"))))
    frozen = freeze_positions(encoder)
    assert frozen == tiny.SIZES["max_position_embeddings"] * tiny.SIZES["hidden_size"]
    encoder(torch.tensor([[0, 9, 12, 2]]), torch.ones(1, 4, dtype=torch.bool)).sum().backward()
    without = [name for name, parameter in encoder.named_parameters() if parameter.grad is None]
    assert without == ["backbone.embeddings.position_embeddings.weight"]


def test_settings_written_beside_the_weights_are_read_back(tmp_path: Path):
    folder = tiny.bert(tmp_path / "b")
    save_settings(folder, ModelSettings("q> ", "p> ", "cls", False, 17))
    model = open_model(folder)
    assert (model.query_prompt, model.passage_prompt, model.pooling) == ("q> ", "p> ", "cls")
    assert (model.normalize, model.max_length) == (False, 17)


def test_a_missing_model_is_named_with_the_mend(tmp_path: Path):
    with pytest.raises(UserError, match=r"no config\.json"):
        open_model(tmp_path)
    with pytest.raises(UserError, match="nobody/nothing"):
        open_model("nobody/nothing")


def test_weights_of_another_shape_or_with_holes_are_refused(tmp_path: Path):
    folder = tiny.bert(tmp_path / "b")
    weights = load_file(folder / "model.safetensors")
    lacking = {name: tensor for name, tensor in weights.items() if "layer.1.attention" not in name}
    save_file(lacking, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layer\.1\.attention"):
        open_model(folder)


def test_weights_that_are_only_a_pickle_are_not_opened(tmp_path: Path):
    folder = tiny.bert(tmp_path / "b")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="safetensors"):
        open_model(folder)


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path):
    folder = tiny.bert(tmp_path / "b")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError):
        open_model(folder)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_gradients_in_bf16_are_those_in_fp32_up_to_its_rounding(tmp_path: Path, pooling: str):
    """With padding in the batch, in training, where attention on a CPU is our own."""
    model = open_model(tiny.bert(tmp_path / "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    model = replace(model, encoder=Encoder(model.encoder.backbone, pooling).train())
    texts = tokens(model)
    ids, mask = gradcache.pad(texts, np.arange(len(texts)), model.tokenizer.pad_token_id)
    weights = torch.randn(len(texts), model.encoder.size, generator=torch.Generator().manual_seed(0))
    gradients = []
    for bf16 in (False, True):
        model.encoder.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            (model.encoder(ids, mask) * weights).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.encoder.parameters() if p.grad is not None]))
    exact, rounded = gradients
    assert torch.cosine_similarity(exact, rounded, dim=0) > 0.999


@pytest.mark.parametrize(("layers", "hidden", "tokens"), [(12, 384, 65_536), (12, 768, 32_768), (24, 1024, 12_288)])
def test_a_training_chunk_on_a_gpu_has_the_same_activations_whatever_the_model(layers: int, hidden: int, tokens: int):
    assert training_chunk_tokens(None, "cuda", layers, hidden) == tokens
    assert training_chunk_tokens(100, "cuda", layers, hidden) == 100
    assert training_chunk_tokens(None, "cpu", layers, hidden) == 2048


class Layer(nn.Module):
    """Such as a backbone has, but small: what is compiled for a CPU takes seconds a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.dropout = nn.Linear(8, 8), nn.Dropout(0.3)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.dropout(nn.functional.gelu(self.dense(hidden)))


class Stack(nn.Module):
    config = SimpleNamespace(num_hidden_layers=3)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


@pytest.mark.skipif(not can_compile(), reason="torch.compile needs a C compiler and Python's headers")
def test_compiled_layers_compute_the_same_and_a_replay_draws_the_same_dropout():
    inputs = torch.randn(20, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()  # as word vectors do
    weights = torch.linspace(-1, 1, 8)
    chunks = [np.arange(13), np.arange(13, 20)]  # of different shape
    torch.manual_seed(0)
    stack = Stack().eval()
    plain = stack(inputs)
    torch._dynamo.reset()
    compile_layers(stack)
    with torch.no_grad():
        assert torch.allclose(stack(inputs), plain, atol=1e-6)
    stack.train()

    def gradient(keep: int) -> torch.Tensor:
        stack.zero_grad()
        gradcache.forward_backward(
            *(lambda rows: stack(inputs[rows]), chunks, keep, lambda found: ((found * weights).sum(), {})),
            torch.Tensor.backward,
            seed=1,
        )
        return torch.cat([p.grad.flatten() for p in stack.parameters()])

    kept, replayed = gradient(keep=2), gradient(keep=0)
    assert torch.equal(kept, replayed)
    assert not torch.allclose(stack(inputs), plain, atol=1e-2), "dropout was drawn"
    frames = torch._dynamo.utils.counters["frames"]
    assert frames["ok"] == frames["total"] < 9, "the layers share what is compiled, for each of three ways of running"
