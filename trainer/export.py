"""Stage `export`: a checkpoint as a folder that sentence-transformers and transformers open (trainer/classic.py)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data.errors import UserError
from data.settings import key

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from trainer.card import Card

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
    overwrite: bool = key(False, help="replace an output that is there")

    def check(self) -> list[str]:
        problems = []
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
        UserError: no complete checkpoint, or an output that is in the way.
        QuintetError: the exported folder does not give the same vectors.
    """
    from data.pairing import read_settings
    from trainer import card, classic

    output = Path(config.output or Path(config.run_dir) / "model")
    classic.refuse_existing(output, config.overwrite)
    sources = _sources(config)
    _log.info("exporting %s", ", ".join(map(str, sources)))
    run_dir = Path(config.run_dir) if config.run_dir else _run_of(sources[0])
    name = run_dir.resolve().name if run_dir and output.name == "model" else output.resolve().name
    about = card.of_run(run_dir, name) if run_dir else card.Card(name)
    write = _export_ranker if read_settings(sources[0]) else _export_encoder
    difference = write(sources, output, about, config)
    print(f"{output}: reloaded in sentence-transformers and transformers, max abs difference {difference:.1e}")


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


def _export_encoder(sources: list[Path], output: Path, about: Card, config: Config) -> float:
    from trainer import classic
    from trainer.encoder import open_model

    model = open_model(sources[0])
    _take_mean(model.encoder.backbone, sources)
    return classic.write(model, output, about, _sentence_transformers, dtype=config.dtype, overwrite=config.overwrite)


def _export_ranker(sources: list[Path], output: Path, about: Card, config: Config) -> float:
    from data.tokens import load_tokenizer
    from trainer import ranker
    from trainer.crossencoder import open_teacher

    teacher, tokenizer = open_teacher(str(sources[0])), load_tokenizer(str(sources[0]))
    _take_mean(teacher.encoder.backbone, sources)
    return ranker.write(
        teacher, tokenizer, output, about, _cross_encoder, dtype=config.dtype, overwrite=config.overwrite
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

    if (folder / checkpoint.MANIFEST).exists() or folder.name.startswith("step-"):
        return checkpoint.load(folder, deep=True).folder / "model"
    return folder


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
