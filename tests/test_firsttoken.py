"""The last layer for first tokens only, against transformers' own, which computes it for every token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import teachers
import tiny
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel

from data.tokens import Ragged, ragged
from trainer import classic
from trainer.attention import feed
from trainer.crossencoder import CrossEncoder
from trainer.encoder import Encoder, compile_layers
from trainer.firsttoken import is_for_first_tokens, once_a_text, reads_first_tokens
from trainer.gradcache import pad

LENGTHS = (9, 4, 1, 7)
ROWS = np.array([2, 0, 3, 1])
MODELS: dict[str, Callable[..., Path]] = {"bert": teachers.bert, "electra": teachers.electra, "xlmr": teachers.xlmr}


def texts() -> Ragged:
    """Rows without padding's number and separators, so that types and positions are all the same rule."""
    random = np.random.default_rng(0)
    return ragged([random.integers(10, 40, length).tolist() for length in LENGTHS])


def opened(kind: Any, folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = kind.from_pretrained(folder, attn_implementation="eager")
    return model.double().eval()


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def check(found: Tensor, own: nn.Module, wanted: Tensor, reference: nn.Module) -> None:
    """Values, and every parameter's gradient for the same upstream."""
    upstream = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for values, module in ((found, own), (wanted, reference)):
        module.zero_grad()
        (values.double() * upstream).sum().backward()
    assert wanted.std() > 1e-3
    torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=1e-5)  # ours come out in fp32
    ours, theirs = gradients(own), gradients(reference)
    assert set(ours) == set(theirs)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", MODELS)
def test_a_cross_encoder_is_the_one_of_transformers(family: str, packed: bool, tmp_path: Path) -> None:
    folder = MODELS[family](tmp_path)
    reference = opened(AutoModelForSequenceClassification, folder)
    model = CrossEncoder(opened(AutoModelForSequenceClassification, folder))
    assert reads_first_tokens(model.backbone)
    padding = model.backbone.config.pad_token_id
    found = feed(model, texts(), ROWS, torch.device("cpu"), packed=packed, padding_id=padding)
    ids, mask = pad(texts(), ROWS, padding)
    check(found, model.backbone, reference(input_ids=ids, attention_mask=mask.long()).logits, reference)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", [tiny.bert, tiny.xlmr])
def test_cls_pooling_is_the_first_token_of_transformers(
    family: Callable[[Path], Path], packed: bool, tmp_path: Path
) -> None:
    folder = family(tmp_path)
    reference, encoder = opened(AutoModel, folder), Encoder(opened(AutoModel, folder), "cls")
    assert reads_first_tokens(encoder.backbone)
    padding = encoder.backbone.config.pad_token_id
    found = feed(encoder, texts(), ROWS, torch.device("cpu"), packed=packed, padding_id=padding)
    ids, mask = pad(texts(), ROWS, padding)
    hidden = reference(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    check(found, encoder.backbone, nn.functional.normalize(hidden[:, 0], dim=1), reference)


def test_dropout_is_drawn_and_a_replay_draws_the_same(tmp_path: Path) -> None:
    folder = teachers.bert(tmp_path, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    model = CrossEncoder(AutoModelForSequenceClassification.from_pretrained(folder)).train()
    ids, mask = pad(texts(), ROWS, 0)

    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(ids, mask)

    first = drawn(0)
    with torch.no_grad():
        assert torch.equal(drawn(0), first)
    assert not torch.allclose(drawn(1), first, atol=1e-3)


@pytest.mark.parametrize("packed", [False, True])
def test_the_products_that_nobody_reads_are_not_computed(packed: bool, tmp_path: Path) -> None:
    """By torch's own count, which leaves out attention on a CPU: 2 D^2 parameters of the layer, keys and values, meet
    every token, and what else it has every text."""
    counts, size = {}, tiny.SIZES["hidden_size"]
    assert tiny.SIZES["intermediate_size"] == 2 * size, "so a layer has 8 D^2"
    tokens = sum(LENGTHS) if packed else len(LENGTHS) * max(LENGTHS)
    for pooling in ("cls", "last"):
        encoder = Encoder(AutoModel.from_pretrained(tiny.bert(tmp_path / pooling)), pooling).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            feed(encoder, texts(), ROWS, torch.device("cpu"), packed=packed)
        counts[pooling] = counter.get_total_flops()
    assert counts["last"] - counts["cls"] == 2 * 6 * size**2 * (tokens - len(LENGTHS))


def test_what_is_once_a_text_is_all_of_the_layer_but_keys_and_values(tmp_path: Path) -> None:
    encoder = Encoder(AutoModel.from_pretrained(tiny.bert(tmp_path)), "cls")
    names = {id(p): name for name, p in encoder.backbone.named_parameters()}
    found = {names[id(parameter)] for parameter in once_a_text(encoder.backbone)}
    last = {name for name in names.values() if name.startswith("encoder.layer.1.")}
    assert last - found == {
        f"encoder.layer.1.attention.self.{part}.{kind}" for part in ("key", "value") for kind in ("weight", "bias")
    }
    assert found < last


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_other_poolings_read_every_token(pooling: str, tmp_path: Path) -> None:
    """Also where the backbone was another encoder's before."""
    before = Encoder(AutoModel.from_pretrained(tiny.bert(tmp_path)), "cls")
    encoder = Encoder(before.backbone, pooling)
    assert not reads_first_tokens(encoder.backbone)
    assert once_a_text(encoder.backbone) == []


def test_a_family_of_its_own_kind_keeps_its_layers(tmp_path: Path) -> None:
    encoder = Encoder(AutoModel.from_pretrained(tiny.mpnet(tmp_path)), "cls")
    assert not reads_first_tokens(encoder.backbone)


def test_an_exports_backbone_gives_every_token_again(tmp_path: Path) -> None:
    encoder = Encoder(AutoModel.from_pretrained(tiny.bert(tmp_path)), "cls")
    classic.use_common_attention(encoder.backbone)
    ids, mask = pad(texts(), ROWS, 0)
    assert encoder.backbone(input_ids=ids, attention_mask=mask.long()).last_hidden_state.shape[:2] == ids.shape
    assert encoder(ids, mask).shape == (len(LENGTHS), encoder.size)
    assert not encoder.packable, "common attention would let packed texts see each other"


def test_it_is_left_out_of_what_is_compiled(tmp_path: Path) -> None:
    encoder = Encoder(AutoModel.from_pretrained(tiny.bert(tmp_path)), "cls")
    compile_layers(encoder.backbone)
    layers = encoder.backbone.encoder.layer
    assert [layer._compiled_call_impl is None for layer in layers] == [False, True]
    assert [is_for_first_tokens(layer) for layer in layers] == [False, True]
