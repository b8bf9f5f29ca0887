"""A cross-encoder as a folder that transformers and sentence-transformers open, read and compared before it appears.

config.json, model.safetensors, tokenizer files      transformers' ...ForSequenceClassification with one label
pairing.json                                         how its rows are made, for `quintet distill`
onnx/model.onnx                                      on request, the same as a graph (trainer/onnxfile.py)
README.md                                            model card
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from trainer import classic, onnxfile
from trainer.card import Card, RankerFacts, ranker_readme
from trainer.crossencoder import CrossEncoder, Teacher
from trainer.gradcache import pad

# Between our logits and a reader's, in fp32. Logits are of order 10 where cosines are of order 1.
TOLERANCE = 1e-4

# Opens a folder as its users do: (folder, queries, passages) -> logits [n] in fp32.
Reader = Callable[[Path, Sequence[str], Sequence[str]], Tensor]

# Short, since readers cut long pairs in their own ways; those that this model cuts are left out.
_QUERIES = ("a", "", "tower", "how tall is the tower?", "Wie groß ist der Fluß?", "温度を設定します")
_PASSAGES = ("b", "The tower is 330 metres tall.", "", "Выберите устройство.", "one line\nanother", "これは試験です。")


def write(
    teacher: Teacher,
    tokenizer: Any,
    folder: Path,
    card: Card,
    reader: Reader,
    *,
    dtype: str = "fp32",
    onnx: bool = False,
    overwrite: bool = False,
) -> classic.Checks:
    """Write the cross-encoder, open it with `reader` and with transformers, and publish it when logits are equal.

    `onnx` adds its graph, which onnxruntime must give the same logits for. The differences are those of any logit.

    Raises:
        UserError, QuintetError: as `classic.publish`.
    """
    graphs: list[onnxfile.Graphs] = []

    def make(staging: Path) -> float:
        rounded = _write_files(teacher, tokenizer, staging, dtype)
        ours = _logits(rounded, teacher)
        difference = _compare(ours, teacher, staging, reader)
        if onnx:
            graphs.append(_write_graph(rounded, ours, teacher, staging))
        parameters = sum(parameter.numel() for parameter in rounded.parameters())
        settings = teacher.pairs.settings
        text = ranker_readme(card, RankerFacts(parameters, settings.max_length, settings.template, onnx))
        (staging / "README.md").write_text(text, encoding="utf-8")
        return difference

    return classic.Checks(classic.publish(folder, make, TOLERANCE, overwrite=overwrite), graphs[0] if graphs else None)


def _write_files(teacher: Teacher, tokenizer: Any, folder: Path, dtype: str) -> CrossEncoder:
    """Write all files but the card; return the model with the weights as they were stored, in fp32 on the CPU."""
    module = CrossEncoder(copy.deepcopy(teacher.encoder.backbone), teacher.encoder.separator).eval()
    module.to("cpu", classic.DTYPES[dtype])
    # sentence-transformers would squeeze the one logit into 0..1; a teacher's scores are the logits themselves.
    module.backbone.config.sentence_transformers = {"activation_fn": "torch.nn.modules.linear.Identity"}
    with classic.quiet():
        module.backbone.save_pretrained(folder, max_shard_size="1000GB")
    types = [] if module.separator is None else ["token_type_ids"]
    inputs = ["input_ids", *types, "attention_mask"]
    classic.write_tokenizer(tokenizer, teacher.pairs.settings.max_length, folder, inputs)
    teacher.pairs.save(folder)
    return module.float()


def _logits(module: CrossEncoder, teacher: Teacher) -> Tensor:
    """The model's own logits of the samples."""
    queries, passages = _samples(teacher)
    ids, mask = pad(teacher.pairs.encode(queries, passages), torch.arange(len(queries)).numpy(), teacher.padding_id)
    with torch.no_grad():
        logits: Tensor = module(ids, mask)[:, 0]
    return logits


def _compare(ours: Tensor, teacher: Teacher, folder: Path, reader: Reader) -> float:
    """The largest difference between the model's logits and those of the reader and of transformers."""
    queries, passages = _templated(teacher)
    theirs = (reader(folder, queries, passages), _transformers(folder, queries, passages))
    return float(torch.stack([(ours - logits).abs().max() for logits in theirs]).max())


def _samples(teacher: Teacher) -> tuple[list[str], list[str]]:
    """The pairs of short texts that this cross-encoder reads whole."""
    whole = teacher.pairs.whole(_QUERIES, _PASSAGES)
    return list(itertools.compress(_QUERIES, whole)), list(itertools.compress(_PASSAGES, whole))


def _templated(teacher: Teacher) -> tuple[list[str], list[str]]:
    """The same as it reads them."""
    (queries, passages), template = _samples(teacher), teacher.pairs.settings.template
    queries = [template.query.replace("{query}", text) for text in queries]
    return queries, [template.passage.replace("{passage}", text) for text in passages]


def _transformers(folder: Path, queries: Sequence[str], passages: Sequence[str]) -> Tensor:
    """What a user of transformers gets: all pairs in one padded batch."""
    with classic.quiet():
        options = {"dtype": torch.float32, "trust_remote_code": False}
        model = AutoModelForSequenceClassification.from_pretrained(folder, **options).eval()
    with torch.no_grad():
        logits: Tensor = model(**_tokens(folder, queries, passages)).logits
    return logits[:, 0]


def _tokens(folder: Path, queries: Sequence[str], passages: Sequence[str]) -> dict[str, Tensor]:
    """Pairs as the exported tokenizer makes them."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    inputs = tokenizer(list(queries), list(passages), padding=True, truncation="only_second", return_tensors="pt")
    return dict(inputs)


def _write_graph(module: CrossEncoder, ours: Tensor, teacher: Teacher, folder: Path) -> onnxfile.Graphs:
    """Write the ONNX graph and run it in onnxruntime, all pairs together and one by one. Raises QuintetError."""
    classic.use_common_attention(module.backbone)
    queries, passages = _templated(teacher)
    inputs = _tokens(folder, queries, passages)
    onnxfile.write(module.backbone, inputs, "logits", folder)
    session = onnxfile.Session(folder / onnxfile.FILE)
    alone = [session.run(_tokens(folder, [query], [passage])) for query, passage in zip(queries, passages, strict=True)]
    logits = torch.stack([session.run(inputs), torch.cat(alone)])[:, :, 0]
    return onnxfile.Graphs(onnxfile.check(float((logits - ours).abs().max())))
