"""Token ids: bulk encoding and composing against transformers' own calls, and the tokenizer that is trained."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data.errors import UserError
from data.tokens import Ragged, TextEncoder, concat, fingerprint, load_tokenizer, ragged, spans, train_tokenizer

TEXTS = [
    *tiny.TEXTS,
    "",
    "a",
    "  two  blanks and a tab\there ",
    "Cafe\u0301 \ufb01ne \u00bd",
    "unknown: \u16a0\u16c7\u16bb \U0001f600",
    "</s> and [SEP] and <mask> in the text",
    "word " * 60,
]
PREFIXES = ["", "query: ", "passage: ", "Instruct: Find the sentence\nQuery: "]


def _xlmr() -> PreTrainedTokenizerFast:
    """Unigram that splits at white space first, as XLM-R's tokenizer does."""
    tokenizer = tiny.unigram()
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    return tokenizer


def _mpnet() -> PreTrainedTokenizerFast:
    """WordPiece in MPNet's layout: <s> ... </s>, put there by RoBERTa's post-processor."""
    special = ["<s>", "<pad>", "</s>", "[UNK]", "<mask>"]
    tokenizer = tiny.wordpieces(special)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="[UNK]")


def _byte_bpe() -> PreTrainedTokenizerFast:
    """Byte-level BPE with one special token, at the end, as the decoders that are made into embedders have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<end>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(tiny.TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<end>")


TOKENIZERS = {
    "bert": tiny.wordpiece(),
    "unigram": tiny.unigram(),
    "xlmr": _xlmr(),
    "mpnet": _mpnet(),
    "byte_bpe": _byte_bpe(),
}
COMPOSING = ["bert", "xlmr", "mpnet"]


def _reference(tokenizer: Any, texts: list[str], prefix: str, max_length: int) -> list[list[int]]:
    return [tokenizer(prefix + text, truncation=True, max_length=max_length)["input_ids"] for text in texts]


# Encoding


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("family", TOKENIZERS)
@pytest.mark.parametrize("max_length", [3, 9, 64])
def test_encode_gives_the_ids_of_the_tokenizer(family: str, prefix: str, max_length: int) -> None:
    tokens = TextEncoder(TOKENIZERS[family], max_length).encode(TEXTS, prefix)
    assert tokens.ids.dtype == tokens.lengths.dtype == np.int32
    assert tokens.lists() == _reference(TOKENIZERS[family], TEXTS, prefix, max_length)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("family", COMPOSING)
@pytest.mark.parametrize("max_length", [3, 9, 64])
def test_compose_gives_the_ids_of_the_tokenizer(family: str, prefix: str, max_length: int) -> None:
    texts = [text.strip() for text in TEXTS]
    encoder = TextEncoder(TOKENIZERS[family], max_length)
    composed = encoder.compose(encoder.body(texts), prefix)
    assert composed.lists() == _reference(TOKENIZERS[family], texts, prefix, max_length)
    assert composed.ids.dtype == composed.lengths.dtype == np.int32


@given(st.lists(st.text(max_size=40), max_size=6), st.sampled_from(sorted(TOKENIZERS)), st.integers(3, 12))
def test_any_text_encodes_as_the_tokenizer_does(texts: list[str], family: str, max_length: int) -> None:
    tokens = TextEncoder(TOKENIZERS[family], max_length).encode(texts, "query: ")
    assert tokens.lists() == _reference(TOKENIZERS[family], texts, "query: ", max_length)


def test_body_is_whole_and_without_special_tokens() -> None:
    tokenizer = TOKENIZERS["bert"]
    body = TextEncoder(tokenizer, 5).body(TEXTS)
    assert body.lists() == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]


def test_composes_tells_the_tokenizers_for_which_it_holds() -> None:
    texts = [text.strip() for text in TEXTS]
    told = {family: TextEncoder(tokenizer, 64).composes(texts, "query: ") for family, tokenizer in TOKENIZERS.items()}
    assert [told[family] for family in COMPOSING] == [True] * 3
    assert not told["byte_bpe"]
    # pieces grow together over a boundary that is no blank
    assert not TextEncoder(TOKENIZERS["xlmr"], 64).composes(["passage:passage:"], "passage:passage")


def test_an_encoder_neither_takes_nor_leaves_truncation_and_padding() -> None:
    tokenizer = tiny.wordpiece()
    expected = tokenizer(tiny.TEXTS[0])["input_ids"]
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=4)
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=7)
    before = tokenizer.backend_tokenizer.to_str()
    tokens = TextEncoder(tokenizer, 64).encode([tiny.TEXTS[0]])
    assert tokens.lists() == [expected]
    assert len(tokens.ids) > 7
    assert tokenizer.backend_tokenizer.to_str() == before


def test_a_length_without_room_for_text_is_refused() -> None:
    with pytest.raises(UserError, match="max_length=2: no room"):
        TextEncoder(TOKENIZERS["bert"], 2)


# Ragged arrays


@given(st.lists(st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=5), max_size=5), max_size=4))
def test_ragged_arrays_hold_their_rows(parts: list[list[list[int]]]) -> None:
    rows = [row for part in parts for row in part]
    joined = concat([ragged(part) for part in parts])
    assert joined.lists() == rows
    assert joined.offsets.tolist() == np.cumsum([0, *map(len, rows)]).tolist()
    backwards = np.arange(len(rows))[::-1]
    assert joined.take(np.repeat(backwards, 2)).lists() == [row for row in rows[::-1] for _ in range(2)]


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 9))))
def test_spans_count_from_their_starts(pairs: list[tuple[int, int]]) -> None:
    starts = np.array([start for start, _ in pairs], np.int64)
    lengths = np.array([length for _, length in pairs], np.int32)
    assert spans(starts, lengths).tolist() == [start + i for start, length in pairs for i in range(length)]


def test_nothing_encodes_and_composes_to_nothing() -> None:
    encoder = TextEncoder(TOKENIZERS["bert"], 8)
    assert encoder.encode([]).lists() == encoder.compose(Ragged(np.empty(0, np.int32), np.empty(0, np.int32))).lists()


# Opening


def test_a_tokenizer_is_opened_from_its_folder(tmp_path: Path) -> None:
    TOKENIZERS["xlmr"].save_pretrained(tmp_path)
    opened = load_tokenizer(str(tmp_path))
    assert opened(TEXTS)["input_ids"] == TOKENIZERS["xlmr"](TEXTS)["input_ids"]
    assert fingerprint(opened) == fingerprint(TOKENIZERS["xlmr"])


def test_a_folder_without_a_tokenizer_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"tokenizer={tmp_path}/nowhere: cannot be opened"):
        load_tokenizer(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=f"tokenizer={tmp_path}: cannot be opened"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_without_a_fast_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    with pytest.raises(UserError, match="ByT5Tokenizer has no fast version"):
        load_tokenizer(str(tmp_path))


def test_the_fingerprint_follows_the_ids_and_nothing_else() -> None:
    tokenizer = tiny.wordpiece()
    first = fingerprint(tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding()
    assert fingerprint(tokenizer) == first
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    assert fingerprint(tokenizer) != first


# Training


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(tiny.TEXTS * 3, 450, folder)
    return folder


def test_a_trained_tokenizer_has_the_layout_of_xlmr(trained: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == ["<s>", "<pad>", "</s>", "<unk>"]
    assert len(tokenizer) <= 450
    assert tokenizer.mask_token_id == len(tokenizer) - 1
    assert (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id) == (0, 2, 1)
    ids = tokenizer("the fox")["input_ids"]
    assert (ids[0], ids[-1]) == (0, 2)
    assert tokenizer(["the", "the lazy dog"], padding=True)["input_ids"][0][-1] == 1


@pytest.mark.parametrize(
    "text", ["\u16a0\u16c7\u16bb \u16eb", "\U0001f600\U0001f680", "the \u0ca0_\u0ca0 fox", "<0x0A>"]
)
def test_any_script_comes_back_from_its_ids(trained: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_trained_tokenizer_composes(trained: Path) -> None:
    encoder = TextEncoder(load_tokenizer(str(trained)), 64)
    texts = [text.strip() for text in TEXTS]
    assert all(encoder.composes(texts, prefix) for prefix in PREFIXES)


def test_the_same_texts_train_the_same_tokenizer_in_another_process(trained: Path, tmp_path: Path) -> None:
    tests = str(Path(__file__).parent)
    code = f"import sys; sys.path[:0] = [{tests!r}, {str(Path(tests).parent)!r}]\n"
    code += (
        f"import tiny; from data.tokens import train_tokenizer; train_tokenizer(tiny.TEXTS * 3, 450, {str(tmp_path)!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()


def test_rare_characters_are_left_to_bytes(tmp_path: Path) -> None:
    train_tokenizer(["common words here"] * 1000 + ["rare \u6f22"], 400, tmp_path, character_coverage=0.999)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.convert_tokens_to_ids("\u6f22") == tokenizer.unk_token_id
    assert tokenizer.tokenize("\u6f22")[-3:] == ["<0xE6>", "<0xBC>", "<0xA2>"]


def test_a_vocabulary_that_cannot_hold_the_characters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="vocab_size=270: too small"):
        train_tokenizer(tiny.TEXTS, 270, tmp_path)


def test_training_on_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no text to train on"):
        train_tokenizer(["", " "], 400, tmp_path)
