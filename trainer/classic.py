"""The classic layout of sentence-transformers: a model as a folder, checked by reading it before it appears.

All versions of sentence-transformers read it:

    config.json, model.safetensors, tokenizer files      what transformers needs
    modules.json, 1_Pooling/, 2_Normalize/               what is done with its output
    2_Dense/, 3_Normalize/                               where vectors are cut: a matrix that leaves the first numbers
    onnx/                                                on request, the same as a graph (trainer/onnxfile.py)
    sentence_bert_config.json                            longest text
    config_sentence_transformers.json                    prompts and similarity
    README.md                                            model card
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from data.errors import QuintetError, UserError
from data.files import sync, system_errors
from trainer import onnxfile
from trainer.card import Card, Facts, readme
from trainer.embed import encode_texts
from trainer.encoder import Encoder, Model, pool
from trainer.firsttoken import read_all_tokens

# Opens a folder as its users do: (folder, texts, prompt name) -> vectors [n, D] in fp32, each after that prompt.
Reader = Callable[[Path, Sequence[str], str], Tensor]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCE = 1e-5  # between our vectors and a reader's, in fp32; float sums in another order stay below 1e-6

# MTEB looks a prompt up by the type of its task, then by query or document; prompts under other names are left out with
# a warning (before 2.26, all of them). E5 puts the query's prompt before all texts of the types below.
SYMMETRIC_TASKS = (
    "BitextMining",
    "Classification",
    "MultilabelClassification",
    "Clustering",
    "PairClassification",
    "Reranking",
    "STS",
    "Summarization",
)

# Texts of several scripts and lengths for the comparison: none at all, one word, more than any position table holds.
_TEXTS = (
    "",
    "tower",
    "How do I set the temperature of the living room?",
    "Die Straße führt über den Fluß; naïve café, 3,5 °C.",
    "Выберите устройство для подключения к сети.",
    "温度を設定します。これは試験です。",
    "كيف أضبط درجة الحرارة في غرفة المعيشة؟",
    "यह एक छोटा वाक्य है जिसमें कुछ शब्द हैं।",
    "ตั้งค่าอุณหภูมิของห้องนั่งเล่น",
    "one line\nanother line\twith a tab  and  blanks 🙂",
    "A sentence of middling length, repeated a few times. " * 8,
    "The longest text goes well beyond the last position. " * 200,
)


@dataclasses.dataclass(frozen=True)
class Checks:
    """What reading the folder back gave: the largest difference of any number, and that of the ONNX graphs."""

    difference: float
    graphs: onnxfile.Graphs | None = None


def write(
    model: Model,
    folder: Path,
    card: Card,
    reader: Reader,
    *,
    dtype: str = "fp32",
    onnx: bool = False,
    int8: bool = False,
    overwrite: bool = False,
) -> Checks:
    """Write the model as a folder, open it with `reader` and with transformers, and publish it when vectors are equal.

    The weights are rounded to `dtype` first and all comparing is done in fp32 on the CPU, so the tolerance is one
    for every dtype. The folder appears by one rename: it is whole and checked, or not there.

    Args:
        onnx: write the fp32 ONNX graph too, and run it in onnxruntime.
        int8: and that graph in 8 bits.

    Raises:
        UserError: the folder is there and `overwrite` is false, or it cannot be written.
        QuintetError: a difference above TOLERANCE, or above onnxfile.TOLERANCE of the graph.
    """
    graphs: list[onnxfile.Graphs] = []

    def make(staging: Path) -> float:
        rounded = _write_files(model, staging, dtype)
        difference = _compare(rounded, staging, reader)
        if onnx:
            graphs.append(_write_graphs(rounded, staging, int8))
        text = readme(card, _facts(model, graphs[0] if graphs else None))
        (staging / "README.md").write_text(text, encoding="utf-8")
        return difference

    return Checks(publish(folder, make, TOLERANCE, overwrite=overwrite), graphs[0] if graphs else None)


def publish(folder: Path, make: Callable[[Path], float], tolerance: float, *, overwrite: bool) -> float:
    """Put a model's folder in place when it reads back as it was: make(staging folder) -> the difference that it found.

    Raises:
        UserError: the folder is there and `overwrite` is false, or it cannot be written.
        QuintetError: a difference above the tolerance.
    """
    refuse_existing(folder, overwrite)
    staging = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with system_errors():
            difference = make(staging)
        if not difference <= tolerance:
            raise QuintetError(
                f"export: the reloaded model differs by {difference:.1e} (allowed {tolerance:.0e}); nothing was written"
            )
        _move(staging, folder)
    except OSError as error:
        raise UserError(f"output={folder}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return difference


def refuse_existing(folder: Path, overwrite: bool) -> None:
    """Raise UserError when the folder is there and may not be replaced."""
    if folder.exists() and not overwrite:
        raise UserError(f"output={folder}: is there already; choose another folder or set overwrite=true")


def _move(staging: Path, folder: Path) -> None:
    """Put the finished folder in place; an old one steps aside first and goes last."""
    old = folder.with_name(f".{folder.name}.old.{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    try:
        staging.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


# --- files -----------------------------------------------------------------------------------------------------


def _write_files(model: Model, folder: Path, dtype: str) -> Model:
    """Write all files but the card; return the model with the weights as they were stored, in fp32 on the CPU."""
    dimensions = model.encoder.dimensions
    encoder = Encoder(copy.deepcopy(model.encoder.backbone), model.pooling, model.normalize, dimensions).eval()
    encoder.to("cpu", DTYPES[dtype])
    use_common_attention(encoder.backbone)
    with quiet():  # one file: the classic layout has no parts
        encoder.backbone.save_pretrained(folder, state_dict=_state(encoder.backbone), max_shard_size="1000GB")
    write_tokenizer(model.tokenizer, model.max_length, folder)
    for name, content in _settings_files(model).items():
        write_json(folder / name, content)
    if dimensions:
        cut = torch.eye(dimensions, encoder.backbone.config.hidden_size, dtype=DTYPES[dtype])
        save_file({"linear.weight": cut}, folder / "2_Dense" / "model.safetensors", {"format": "pt"})
    return dataclasses.replace(model, encoder=encoder.float())


def use_common_attention(backbone: PreTrainedModel) -> None:
    """Let a backbone compute attention as any reader's does, instead of by ours, and its last layer in full."""
    read_all_tokens(backbone)
    backbone.set_attn_implementation("eager" if backbone.config.model_type == "mpnet" else "sdpa")


def _state(backbone: PreTrainedModel) -> dict[str, Tensor]:
    """The weights, and zeros for the pooler that transformers puts on BERT and its kin.

    No embedding of ours uses it, but without it every reader is told that weights are missing and that the model
    should be trained before use.
    """
    with torch.device("meta"):
        usual = type(backbone)(backbone.config).state_dict()
    pooler = {name: torch.zeros(like.shape, dtype=backbone.dtype) for name, like in usual.items() if "pooler." in name}
    return pooler | backbone.state_dict()


def write_tokenizer(
    tokenizer: Any, max_length: int, folder: Path, inputs: Sequence[str] = ("input_ids", "attention_mask")
) -> None:
    """Save a tokenizer so that a reader who takes its own word for it cuts and pads as training did.

    `inputs` are what the model takes of what a tokenizer may give.
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length, tokenizer.padding_side, tokenizer.truncation_side = max_length, "right", "right"
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":  # the name since transformers 5; older ones know this:
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        settings["model_input_names"] = list(inputs)  # they would add token types, which MPNet does not take
    for name in ("is_local", "local_files_only"):  # how it was opened here
        settings.pop(name, None)
    write_json(file, settings)


def write_json(file: Path, content: Any) -> None:
    """Write a JSON file as people read it."""
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _settings_files(model: Model) -> dict[str, Any]:
    """The JSON files of the classic layout."""
    hidden = int(model.encoder.backbone.config.hidden_size)
    # sentence-transformers' own cut (truncate_dim) is the reader's, not the folder's, and does not normalise again.
    cut = ["Dense"] if model.encoder.dimensions else []
    kinds = ["Transformer", "Pooling", *cut, *(["Normalize"] if model.normalize else [])]
    paths = ["", *(f"{number}_{kind}" for number, kind in enumerate(kinds) if number)]
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(zip(paths, kinds, strict=True))
    ]
    pooling = {
        "word_embedding_dimension": hidden,
        "pooling_mode_cls_token": model.pooling == "cls",
        "pooling_mode_mean_tokens": model.pooling == "mean",
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
        "pooling_mode_weightedmean_tokens": False,
        "pooling_mode_lasttoken": model.pooling == "last",
        "include_prompt": True,
    }
    prompts = {"query": model.query_prompt, "document": model.passage_prompt}
    prompts |= {**dict.fromkeys(SYMMETRIC_TASKS, model.query_prompt), **model.prompts}
    settings = {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    dense = {
        "in_features": hidden,
        "out_features": model.encoder.size,
        "bias": False,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    configs = {"Pooling": pooling, "Dense": dense, "Normalize": {}}
    return {
        "modules.json": modules,
        **{f"{path}/config.json": configs[kind] for path, kind in zip(paths[1:], kinds[1:], strict=True)},
        "sentence_bert_config.json": {"max_seq_length": model.max_length, "do_lower_case": False},
        "config_sentence_transformers.json": settings,
    }


def _facts(model: Model, graphs: onnxfile.Graphs | None) -> Facts:
    return Facts(
        size=model.encoder.size,
        whole=int(model.encoder.backbone.config.hidden_size),
        parameters=sum(parameter.numel() for parameter in model.encoder.parameters()),
        max_length=model.max_length,
        pooling=model.pooling,
        normalize=model.normalize,
        query_prompt=model.query_prompt,
        passage_prompt=model.passage_prompt,
        prompts={name: text for name, text in model.prompts.items() if name not in SYMMETRIC_TASKS},
        graphs=graphs,
    )


# --- comparison ------------------------------------------------------------------------------------------------


def _compare(model: Model, folder: Path, reader: Reader) -> float:
    """The largest difference between the model's vectors and those of the reader and of transformers."""
    differences: list[Tensor] = []
    for name, prompt in (("query", model.query_prompt), ("document", model.passage_prompt)):
        ours = encode_texts(model, _TEXTS, prompt, tokens_per_chunk=256)  # other chunks, and so padding, than theirs
        theirs = (reader(folder, _TEXTS, name), _transformers(folder, [prompt + text for text in _TEXTS], model))
        differences += [(ours - vectors).abs().max() for vectors in theirs]
    return float(torch.stack(differences).max())  # torch's maximum keeps a NaN, Python's may drop it


def _transformers(folder: Path, texts: Sequence[str], model: Model) -> Tensor:
    """What a user of transformers gets: all texts in one padded batch."""
    with quiet():
        backbone = AutoModel.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    inputs = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        hidden = backbone(**inputs).last_hidden_state
    return _finished(hidden, inputs["attention_mask"], model)


def _finished(hidden: Tensor, mask: Tensor, model: Model) -> Tensor:
    """Vectors out of the numbers of tokens, by what the folder's other modules do."""
    vectors = pool(hidden, mask.bool(), model.pooling)[:, : model.encoder.size]
    return torch.nn.functional.normalize(vectors, dim=1) if model.normalize else vectors


def _write_graphs(model: Model, folder: Path, int8: bool) -> onnxfile.Graphs:
    """Write the ONNX graph, and the one in int8, and run them on the sample texts in onnxruntime.

    Raises:
        QuintetError: the graph's vectors are not the model's.
    """
    example = torch.tensor([[0, 1, 2], [2, 1, 0]])
    inputs = {"input_ids": example, "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    onnxfile.write(model.encoder.backbone, inputs, "last_hidden_state", folder)
    prompts = (model.query_prompt, model.passage_prompt)
    ours = torch.cat([encode_texts(model, _TEXTS, prompt, tokens_per_chunk=256) for prompt in prompts])
    texts = [prompt + text for prompt in prompts for text in _TEXTS]
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)

    def vectors(file: str) -> Tensor:
        """[2, n, D]: the texts in one padded batch, and one by one."""
        session = onnxfile.Session(folder / file)
        rows = [_graph_vectors(session, tokenizer, batch, model) for batch in (texts, *([text] for text in texts))]
        return torch.stack([rows[0], torch.cat(rows[1:])])

    difference = onnxfile.check(float((vectors(onnxfile.FILE) - ours).abs().max()))
    if not int8:
        return onnxfile.Graphs(difference)
    onnxfile.quantize(folder)
    cosine = torch.cosine_similarity(vectors(onnxfile.INT8_FILE), ours, dim=-1)
    return onnxfile.Graphs(difference, float(cosine.mean()), float(cosine.min()))


def _graph_vectors(session: onnxfile.Session, tokenizer: Any, texts: Sequence[str], model: Model) -> Tensor:
    inputs = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
    return _finished(session.run(inputs), inputs["attention_mask"], model)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' bars and reports on weights out of the log."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
