"""Cross-encoders of several families against transformers' own calls, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import teachers
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from data.errors import UserError
from data.pairing import PairEncoder, PairTemplate
from data.tokens import load_tokenizer
from trainer.attention import feed
from trainer.crossencoder import build_cross_encoder, fingerprint, load_cross_encoder, open_teacher
from trainer.embed import encode

QUERIES = ["heizung", "the quick brown fox", "Wie stelle ich die Heizung ein?", "温度", "fox"]
PASSAGES = [" ".join(tiny.TEXTS), *tiny.TEXTS[1:5]]


@pytest.mark.parametrize("family", teachers.FAMILIES)
def test_logits_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    folder = teachers.FAMILIES[family](tmp_path / family)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    inputs = tokenizer(QUERIES, PASSAGES, truncation="only_second", max_length=40, padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = model(**inputs).logits
    teacher = open_teacher(str(folder), max_length=40, max_query_length=28)
    rows = teacher.pairs.encode(QUERIES, PASSAGES)
    columns = zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True)
    assert rows.lists() == [ids[: sum(mask)] for ids, mask in columns], "no query is cut"
    logits = encode(teacher.encoder, rows, tokens_per_chunk=90)
    assert wanted.std() > 0.1
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["bert", "electra", "xlmr"])
def test_packed_rows_have_the_logits_and_gradients_of_padded_ones(family: str, tmp_path: Path) -> None:
    teacher = open_teacher(str(teachers.FAMILIES[family](tmp_path)), max_length=40)
    rows, order = teacher.pairs.encode(QUERIES, PASSAGES), np.array([3, 0, 4, 1, 2])
    assert teacher.encoder.packable
    teacher.encoder.double()  # weights this large enlarge float32's rounding
    results = []
    for packed in (False, True):
        teacher.encoder.zero_grad()
        logits = feed(teacher.encoder, rows, order, torch.device("cpu"), packed=packed, padding_id=teacher.padding_id)
        (logits[:, 0] * torch.linspace(-1, 1, 5)).sum().backward()
        results.append((logits, [p.grad for p in teacher.encoder.parameters() if p.grad is not None]))
    (wanted, gradients), (found, own) = results
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-10)
    assert len(own) == len(gradients)
    for ours, theirs in zip(own, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


def test_token_types_reach_the_model(tmp_path: Path) -> None:
    teacher = open_teacher(str(teachers.bert(tmp_path)))
    rows = teacher.pairs.encode(QUERIES, PASSAGES)
    typed = encode(teacher.encoder, rows)
    teacher.encoder.separator = None
    assert (encode(teacher.encoder, rows) - typed).abs().max() > 0.01


def test_an_encoder_gets_a_head_and_keeps_its_weights(tmp_path: Path) -> None:
    folder = tiny.bert(tmp_path)
    torch.manual_seed(3)
    first = load_cross_encoder(str(folder), load_tokenizer(str(folder)))
    torch.manual_seed(3)
    again = load_cross_encoder(str(folder), load_tokenizer(str(folder)))
    stored = load_file(folder / "model.safetensors")
    state = first.backbone.state_dict()
    assert torch.equal(state["bert.encoder.layer.0.output.dense.weight"], stored["encoder.layer.0.output.dense.weight"])
    assert torch.equal(state["classifier.weight"], again.backbone.state_dict()["classifier.weight"])
    assert state["classifier.weight"].shape == (1, 32)


def test_a_pooler_of_zeros_is_drawn_anew(tmp_path: Path) -> None:
    folder = tiny.bert(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights = {name: tensor * 0 if name.startswith("pooler") else tensor for name, tensor in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = load_cross_encoder(str(folder), load_tokenizer(str(folder)))
    assert model.backbone.base_model.pooler.dense.weight.std() > 0.01


def test_the_position_table_bounds_the_rows(tmp_path: Path) -> None:
    for family, longest in (("bert", 70), ("xlmr", 68)):
        folder = teachers.FAMILIES[family](tmp_path / family)
        assert open_teacher(str(folder)).pairs.settings.max_length == longest
        with pytest.raises(UserError, match=f"max_length={longest + 1}: .* ends at {longest} tokens"):
            open_teacher(str(folder), max_length=longest + 1)


def test_a_random_one_has_one_label() -> None:
    model = build_cross_encoder("bert", teachers.typed_wordpiece(), **tiny.SIZES)
    assert model(torch.tensor([[2, 5, 3, 6, 3]]), torch.ones(1, 5, dtype=torch.bool)).shape == (1, 1)
    with pytest.raises(UserError, match=r"model\.architecture=berd"):
        build_cross_encoder("berd", tiny.wordpiece())


@pytest.mark.parametrize("opens", [open_teacher, lambda path: load_cross_encoder(path, tiny.wordpiece())])
def test_two_labels_are_refused(opens: Any, tmp_path: Path) -> None:
    folder = teachers.bert(tmp_path, num_labels=2)
    with pytest.raises(UserError, match=f"{folder}: it has 2 labels; .* 1 label"):
        opens(str(folder))


def test_what_is_no_teacher_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"teacher=.*nowhere"):
        open_teacher(str(tmp_path / "nowhere"))
    encoder = tiny.xlmr(tmp_path / "encoder", num_labels=1)
    with pytest.raises(UserError, match=r"has no classifier.* train it with quintet teacher"):
        open_teacher(str(encoder))


def test_settings_of_the_folder_hold_unless_others_are_given(tmp_path: Path) -> None:
    folder = teachers.xlmr(tmp_path)
    template = PairTemplate(query="query: {query}")
    PairEncoder(load_tokenizer(str(folder)), 50, max_query_length=10, template=template).save(folder)
    settings = open_teacher(str(folder)).pairs.settings
    assert (settings.template, settings.max_length, settings.max_query_length) == (template, 50, 10)
    settings = open_teacher(str(folder), max_length=30, query="{query}").pairs.settings
    assert (settings.template, settings.max_length, settings.max_query_length) == (PairTemplate(), 30, 15)


def test_the_fingerprint_tells_teachers_apart_and_does_not_depend_on_the_place(tmp_path: Path) -> None:
    first = teachers.bert(tmp_path / "first")
    copies = [shutil.copytree(first, tmp_path / name) for name in ("again", "bias", "words", "config")]
    found = {fingerprint(open_teacher(str(path))) for path in (first, copies[0])}
    assert len(found) == 1
    weights = load_file(first / "model.safetensors")
    weights["classifier.bias"] += 1
    save_file(weights, copies[1] / "model.safetensors", metadata={"format": "pt"})
    tiny.wordpiece().save_pretrained(copies[2])
    config = json.loads((first / "config.json").read_text())
    (copies[3] / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    found.update(fingerprint(open_teacher(str(path))) for path in copies[1:])
    found.add(fingerprint(open_teacher(str(first), max_length=40)))
    found.add(fingerprint(open_teacher(str(first), max_query_length=7)))
    found.add(fingerprint(open_teacher(str(first), passage="passage: {passage}")))
    assert len(found) == 7
