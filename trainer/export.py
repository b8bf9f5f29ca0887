"""Stage `export`: a model as a folder that sentence-transformers and transformers open, checked before it appears.

The layout is the classic one of sentence-transformers, which all its versions read:

    config.json, model.safetensors, tokenizer files      what transformers needs
    modules.json, 1_Pooling/, 2_Normalize/               what is done with its output
    sentence_bert_config.json                            longest text
    config_sentence_transformers.json                    prompts and similarity
    README.md                                            model card
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import QuintetError, UserError
from data.settings import key

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from trainer.card import Card, Facts
    from trainer.encoder import Model

_log = logging.getLogger("quintet")

TOLERANCE = 1e-5  # between our vectors and a reader's, in fp32; float sums in another order stay below 1e-6

# MTEB looks a prompt up by the type of its task, then by query or document, and ignores every prompt of a model that
# has one under another name. E5 puts the query's prompt before all texts of the types below.
_SYMMETRIC_TASKS = (
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


@dataclass(frozen=True, kw_only=True)
class Config:
    """Keys of `quintet export`."""

    run_dir: str = key("", help="run folder whose newest complete checkpoint is exported")
    checkpoint: str = key("", help="checkpoint folder (or any model folder) instead of run_dir")
    output: str = key("", help="folder to write; empty: model/ in run_dir")
    dtype: str = key("fp32", help="numbers of the stored weights", choices=("fp32", "fp16", "bf16"))
    overwrite: bool = key(False, help="replace an output that is there")

    def check(self) -> list[str]:
        problems = []
        if bool(self.run_dir) == bool(self.checkpoint):
            given = f"run_dir={self.run_dir} checkpoint={self.checkpoint}"
            problems.append(f"{given}: give one of the two, run_dir or checkpoint")
        if not self.output and not self.run_dir:
            problems.append("output: give the folder to write; only with run_dir there is a default")
        return problems


def run(config: Config) -> None:
    """Export a checkpoint.

    Raises:
        UserError: no complete checkpoint, or an output that is in the way.
        QuintetError: the exported folder does not give the same vectors.
    """
    from trainer import card, checkpoint
    from trainer.encoder import open_model

    output = Path(config.output or Path(config.run_dir) / "model")
    _refuse_existing(output, config.overwrite)
    if config.checkpoint:
        source = _model_of_checkpoint(Path(config.checkpoint))
    else:
        newest = checkpoint.newest(config.run_dir)
        if newest is None:
            raise UserError(f"run_dir={config.run_dir}: no checkpoint there; train first, or give checkpoint=FOLDER")
        source = newest.folder / "model"
    _log.info("exporting %s", source)
    run_dir = Path(config.run_dir) if config.run_dir else _run_of(source)
    name = run_dir.resolve().name if run_dir and output.name == "model" else output.resolve().name
    about = card.of_run(run_dir, name) if run_dir else card.Card(name)
    difference = write(open_model(str(source)), output, about, dtype=config.dtype, overwrite=config.overwrite)
    print(f"{output}: reloaded in sentence-transformers and transformers, max abs difference {difference:.1e}")


def _model_of_checkpoint(folder: Path) -> Path:
    """The model inside a checkpoint of ours, after a check of all its files; any other folder is a model itself."""
    from trainer import checkpoint

    if (folder / checkpoint.MANIFEST).exists() or folder.name.startswith("step-"):
        return checkpoint.load(folder, deep=True).folder / "model"
    return folder


def _run_of(source: Path) -> Path | None:
    """The run folder around run_dir/checkpoints/step-N/model, if the model lies in one."""
    run_dir = source.resolve().parent.parent.parent
    return run_dir if (run_dir / "config.yaml").is_file() else None


def write(model: Model, folder: Path, card: Card, *, dtype: str = "fp32", overwrite: bool = False) -> float:
    """Write the model as a folder, reload it in both libraries, and publish it when the vectors are equal.

    The weights are rounded to `dtype` first and all comparing is done in fp32 on the CPU, so the tolerance is one
    for every dtype. The folder appears by one rename: it is whole and checked, or not there.

    Returns:
        The largest absolute difference of any number of any vector.

    Raises:
        UserError: the folder is there and `overwrite` is false, or it cannot be written.
        QuintetError: a difference above TOLERANCE.
    """
    _refuse_existing(folder, overwrite)
    staging = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        rounded = _write_files(model, staging, card, dtype)
        difference = _compare(rounded, staging)
        if not difference <= TOLERANCE:
            raise QuintetError(
                f"export: the reloaded model differs by {difference:.1e} (allowed {TOLERANCE:.0e}); nothing was written"
            )
        _publish(staging, folder)
    except OSError as error:
        raise UserError(f"output={folder}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return difference


def _refuse_existing(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not overwrite:
        raise UserError(f"output={folder}: is there already; choose another folder or set overwrite=true")


def _publish(staging: Path, folder: Path) -> None:
    """Put the finished folder in place; an old one steps aside first and goes last."""
    from trainer.runfolder import sync_folder

    old = folder.with_name(f".{folder.name}.old.{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    try:
        staging.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


# --- files -----------------------------------------------------------------------------------------------------


def _write_files(model: Model, folder: Path, card: Card, dtype: str) -> Model:
    """Write all files; return the model with the weights as they were stored, in fp32 on the CPU."""
    import torch

    from trainer.card import readme
    from trainer.encoder import Encoder

    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    encoder = Encoder(copy.deepcopy(model.encoder.backbone), model.pooling, model.normalize).eval()
    encoder.to("cpu", dtypes[dtype])
    encoder.backbone.set_attn_implementation("eager" if encoder.backbone.config.model_type == "mpnet" else "sdpa")
    with _quiet():  # one file: the classic layout has no parts
        encoder.backbone.save_pretrained(folder, state_dict=_state(encoder.backbone), max_shard_size="1000GB")
    _write_tokenizer(model, folder)
    for name, content in _settings_files(model).items():
        _write_json(folder / name, content)
    (folder / "README.md").write_text(readme(card, _facts(model)), encoding="utf-8")
    return dataclasses.replace(model, encoder=encoder.float())


def _state(backbone: PreTrainedModel) -> dict[str, Tensor]:
    """The weights, and zeros for the pooler that transformers puts on BERT and its kin.

    No embedding of ours uses it, but without it every reader is told that weights are missing and that the model
    should be trained before use.
    """
    import torch

    with torch.device("meta"):
        usual = type(backbone)(backbone.config).state_dict()
    pooler = {name: torch.zeros(like.shape, dtype=backbone.dtype) for name, like in usual.items() if "pooler." in name}
    return pooler | backbone.state_dict()


def _write_tokenizer(model: Model, folder: Path) -> None:
    tokenizer = copy.deepcopy(model.tokenizer)
    # A reader that takes the tokenizer's own word for it cuts and pads as training did.
    tokenizer.model_max_length, tokenizer.padding_side, tokenizer.truncation_side = model.max_length, "right", "right"
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":  # the name since transformers 5; older ones know this:
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        settings["model_input_names"] = ["input_ids", "attention_mask"]  # they would add what MPNet does not take
    for name in ("is_local", "local_files_only"):  # how it was opened here
        settings.pop(name, None)
    _write_json(file, settings)


def _write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _settings_files(model: Model) -> dict[str, Any]:
    """The JSON files of the classic layout."""
    kinds = {"": "Transformer", "1_Pooling": "Pooling"} | ({"2_Normalize": "Normalize"} if model.normalize else {})
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(kinds.items())
    ]
    pooling = {
        "word_embedding_dimension": model.encoder.size,
        "pooling_mode_cls_token": model.pooling == "cls",
        "pooling_mode_mean_tokens": model.pooling == "mean",
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
        "pooling_mode_weightedmean_tokens": False,
        "pooling_mode_lasttoken": model.pooling == "last",
        "include_prompt": True,
    }
    prompts = {"query": model.query_prompt, "document": model.passage_prompt}
    prompts |= dict.fromkeys(_SYMMETRIC_TASKS, model.query_prompt)
    settings = {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    return {
        "modules.json": modules,
        "1_Pooling/config.json": pooling,
        "2_Normalize/config.json": {},
        "sentence_bert_config.json": {"max_seq_length": model.max_length, "do_lower_case": False},
        "config_sentence_transformers.json": settings,
    }


def _facts(model: Model) -> Facts:
    from trainer.card import Facts

    return Facts(
        size=model.encoder.size,
        parameters=sum(parameter.numel() for parameter in model.encoder.parameters()),
        max_length=model.max_length,
        pooling=model.pooling,
        normalize=model.normalize,
        query_prompt=model.query_prompt,
        passage_prompt=model.passage_prompt,
    )


# --- comparison ------------------------------------------------------------------------------------------------


def _compare(model: Model, folder: Path) -> float:
    """The largest difference between the model's vectors and those of both libraries opening the folder."""
    import torch

    from trainer.encode import encode_texts

    differences: list[Tensor] = []
    for name, prompt in (("query", model.query_prompt), ("document", model.passage_prompt)):
        ours = encode_texts(model, _TEXTS, prompt, tokens_per_chunk=256)  # other chunks, and so padding, than theirs
        readers = (_sentence_transformers(folder, name), _transformers(folder, prompt, model))
        differences += [(ours - theirs).abs().max() for theirs in readers]
    return float(torch.stack(differences).max())  # torch's maximum keeps a NaN, Python's may drop it


def _sentence_transformers(folder: Path, prompt_name: str) -> Tensor:
    import torch
    from sentence_transformers import SentenceTransformer

    with _quiet():
        reader = SentenceTransformer(
            str(folder),
            device="cpu",
            local_files_only=True,
            trust_remote_code=False,
            model_kwargs={"dtype": torch.float32},
        )
        return reader.encode(list(_TEXTS), prompt_name=prompt_name, convert_to_tensor=True, show_progress_bar=False)


def _transformers(folder: Path, prompt: str, model: Model) -> Tensor:
    """What a user of transformers gets: all texts in one padded batch."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    from trainer.encoder import pool

    with _quiet():
        backbone = AutoModel.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    inputs = tokenizer([prompt + text for text in _TEXTS], padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        hidden = backbone(**inputs).last_hidden_state
    vectors = pool(hidden, inputs["attention_mask"].bool(), model.pooling)
    return torch.nn.functional.normalize(vectors, dim=1) if model.normalize else vectors


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' bars and reports on weights out of the log."""
    from transformers.utils import logging as theirs

    verbosity, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(verbosity)
        if bars:
            theirs.enable_progress_bar()
