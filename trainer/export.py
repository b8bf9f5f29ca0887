"""Stage `export`: a checkpoint as a folder that sentence-transformers and transformers open (trainer/classic.py)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from data.errors import UserError
from data.settings import key

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from trainer.card import Card
    from trainer.classic import Checks
    from trainer.encoder import Model

_log = logging.getLogger("quintet")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Keys of `quintet export`."""

    run_dir: str = key("", help="run folder whose newest complete checkpoint is exported")
    average: int = key(1, help="with run_dir: the mean of its newest so many checkpoints", low=1)
    checkpoint: str | list[str] = key(
        "", help="checkpoint folder (or any model folder) instead of run_dir; several: their mean"
    )
    output: str = key("", help="folder to write; empty: model/ in run_dir")
    dtype: str = key("fp32", help="numbers of the stored weights", choices=("fp32", "fp16", "bf16"))
    dimensions: int = key(
        0, help="cut vectors to their first so many numbers, best a size of loss.matryoshka.sizes; 0: whole", low=0
    )
    onnx: bool = key(False, help="write the fp32 graph too, onnx/model.onnx, checked in onnxruntime")
    int8: bool = key(False, help="with onnx: and one with weights in 8 bits, compared with the fp32 vectors")
    license: str = key("", help="licence of the weights for the model card, as the hub writes it: mit, apache-2.0, ...")
    push: str = key("", help="upload the export to this repository of the Hugging Face hub: ORGANISATION/NAME")
    private: bool = key(True, help="with push: only members of the organisation see the repository")
    dry_run: bool = key(False, help="with push: list what would go up, and upload nothing")
    overwrite: bool = key(False, help="replace an output that is there")

    def check(self) -> list[str]:
        from trainer import hub

        problems = [problem for problem in [hub.problem(self.push) if self.push else ""] if problem]
        if self.int8 and not self.onnx:
            problems.append("int8=true: is made of the ONNX graph; add onnx=true")
        if self.dry_run and not self.push:
            problems.append("dry_run=true: lists what push would upload; add push=ORGANISATION/NAME")
        if bool(self.run_dir) == bool(self.checkpoint):
            given = f"run_dir={self.run_dir} checkpoint={self.checkpoint}"
            problems.append(f"{given}: give one of the two, run_dir or checkpoint")
        if not self.output and not self.run_dir:
            problems.append("output: give the folder to write; only with run_dir there is a default")
        if self.average > 1 and not self.run_dir:
            problems.append(f"average={self.average}: takes the checkpoints of run_dir; list yours as checkpoint=[...]")
        return problems


def run(config: Config) -> None:
    """Export a checkpoint.

    Raises:
        UserError: no complete checkpoint, an output that is in the way, a library or a token that is missing, or a
            refusal of the hub.
        QuintetError: the exported folder does not give the same vectors.
    """
    from trainer import card, classic, hub, onnxfile
    from trainer.crossencoder import has_head

    if config.onnx:
        onnxfile.require()
    if config.push and not config.dry_run:
        hub.require_token()
    output = Path(config.output or Path(config.run_dir) / "model")
    classic.refuse_existing(output, config.overwrite)
    sources = _sources(config)
    _log.info("exporting %s", ", ".join(map(str, sources)))
    run_dir = Path(config.run_dir) if config.run_dir else _run_of(sources[0])
    name = run_dir.resolve().name if run_dir and output.name == "model" else output.resolve().name
    about = card.of_run(run_dir, name) if run_dir else card.Card(name)
    about = replace(about, license=config.license)
    if config.push:
        about = replace(about, name=config.push.split("/")[1], place=config.push)
    write = _export_ranker if has_head(str(sources[0]), key="checkpoint") else _export_encoder
    found = write(sources, output, about, config)
    print(f"{output}: reloaded in sentence-transformers and transformers, max abs difference {found.difference:.1e}")
    if found.graphs:
        print(found.graphs)
    if config.push:
        print(_push(output, config))


def _push(output: Path, config: Config) -> str:
    """Upload the export, or say what an upload would take along."""
    from data.tables import table
    from trainer import hub

    if not config.dry_run:
        return f"uploaded to {hub.push(output, config.push, private=config.private)}"
    files, left = hub.listing(output)
    rows = [(name, f"{size:,}") for name, size in files.items()]
    rows.append(("all", f"{sum(files.values()):,}"))
    lines = [
        f"would go up to {config.push} ({'private' if config.private else 'public'}):",
        table(("file", "bytes"), rows),
    ]
    return "\n".join([*lines, *(f"stays here: {name}" for name in left)])


def _sources(config: Config) -> list[Path]:
    """The model folders to export: one, or several for their mean."""
    from trainer import checkpoint

    if config.checkpoint:
        given = [config.checkpoint] if isinstance(config.checkpoint, str) else config.checkpoint
        return [_model_of_checkpoint(Path(folder)) for folder in given]
    if config.average > 1:
        return [found.folder / "model" for found in checkpoint.newest_few(config.run_dir, config.average)]
    newest = checkpoint.newest(config.run_dir)
    if newest is None:
        raise UserError(f"run_dir={config.run_dir}: no checkpoint there; train first, or give checkpoint=FOLDER")
    return [newest.folder / "model"]


def _export_encoder(sources: list[Path], output: Path, about: Card, config: Config) -> Checks:
    from trainer import classic
    from trainer.encoder import open_model

    model = open_model(sources[0])
    _take_mean(model.encoder.backbone, sources)
    if config.dimensions:
        _cut(model, about, config.dimensions)
    return classic.write(
        model,
        output,
        about,
        _sentence_transformers,
        dtype=config.dtype,
        onnx=config.onnx,
        int8=config.int8,
        overwrite=config.overwrite,
    )


def _cut(model: Model, about: Card, dimensions: int) -> None:
    """Let the model give shorter vectors, and warn where such were not trained."""
    from trainer.card import untrained_size

    if dimensions >= model.encoder.size:
        raise UserError(f"dimensions={dimensions}: the model's vectors have {model.encoder.size} numbers; give fewer")
    model.encoder.dimensions = dimensions
    if doubt := untrained_size(about, dimensions):
        _log.warning("dimensions=%d: %s", dimensions, doubt)


def _export_ranker(sources: list[Path], output: Path, about: Card, config: Config) -> Checks:
    from data.tokens import load_tokenizer
    from trainer import ranker
    from trainer.crossencoder import open_teacher

    if config.dimensions:
        raise UserError(f"dimensions={config.dimensions}: this is a cross-encoder, which gives no vectors to cut")
    if config.int8:
        raise UserError("int8=true: is for embedding models; a cross-encoder's logits in 8 bits are not checked here")
    teacher, tokenizer = open_teacher(str(sources[0])), load_tokenizer(str(sources[0]))
    _take_mean(teacher.encoder.backbone, sources)
    return ranker.write(
        teacher,
        tokenizer,
        output,
        about,
        _cross_encoder,
        dtype=config.dtype,
        onnx=config.onnx,
        overwrite=config.overwrite,
    )


def _take_mean(backbone: PreTrainedModel, sources: list[Path]) -> None:
    """Give a model that was opened from the first of several folders the mean of their weights."""
    from trainer.average import average

    if len(sources) > 1:
        _, unexpected = backbone.load_state_dict(average(sources), strict=False)
        assert not unexpected, unexpected


def _model_of_checkpoint(folder: Path) -> Path:
    """The model inside a checkpoint of ours, after a check of all its files; any other folder is a model itself."""
    from trainer import checkpoint
    from trainer.encoder import local_folder

    if (folder / checkpoint.MANIFEST).exists() or folder.name.startswith("step-"):
        return checkpoint.load(folder, deep=True).folder / "model"
    return local_folder(str(folder), "checkpoint")


def _run_of(source: Path) -> Path | None:
    """The run folder around run_dir/checkpoints/step-N/model, if the model lies in one."""
    run_dir = source.resolve().parent.parent.parent
    return run_dir if (run_dir / "config.yaml").is_file() else None


def _sentence_transformers(folder: Path, texts: Sequence[str], prompt_name: str) -> Tensor:
    """The vectors of a user who opens the folder in sentence-transformers."""
    import torch
    from sentence_transformers import SentenceTransformer

    from trainer.classic import quiet

    options = {"dtype": torch.float32}
    with quiet():
        reader = SentenceTransformer(
            str(folder), device="cpu", local_files_only=True, trust_remote_code=False, model_kwargs=options
        )
        return reader.encode(list(texts), prompt_name=prompt_name, convert_to_tensor=True, show_progress_bar=False)


def _cross_encoder(folder: Path, queries: Sequence[str], passages: Sequence[str]) -> Tensor:
    """The logits of a user who opens the folder as a CrossEncoder of sentence-transformers."""
    import torch
    from sentence_transformers import CrossEncoder

    from trainer.classic import quiet

    options = {"dtype": torch.float32}
    with quiet():
        reader = CrossEncoder(
            str(folder), device="cpu", local_files_only=True, trust_remote_code=False, model_kwargs=options
        )
        pairs = list(zip(queries, passages, strict=True))
        return reader.predict(pairs, convert_to_tensor=True, show_progress_bar=False)
