"""What depends on the objective: the module that is trained, what its batches hold, and the loss.

`open_task` is the one place where the objective is asked for. Everything else in a run is the same for all three:

    contrastive, distillation   an Encoder; queries, positives and negatives are embedded each on their own
    ranking                     a CrossEncoder; a row is a query and a passage read together, its output one logit
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.collate import Batch, Collate
from data.errors import UserError
from data.mixture import Mixture
from data.pairing import PairEncoder
from data.rules import query_prefix
from data.scores import FINGERPRINT, ScoreCache, fingerprints, open_cache
from data.targets import Targets
from data.tokens import Ragged, fingerprint
from trainer import heldout, objectives, teacher
from trainer.crossencoder import build_cross_encoder, load_cross_encoder
from trainer.embed import encode
from trainer.encoder import (
    Encoder,
    Model,
    ModelSettings,
    build_random,
    freeze_positions,
    load_backbone,
    open_model,
    save_settings,
)
from trainer.step import Objective
from trainer.train import Config

log = logging.getLogger("quintet")


@dataclass(frozen=True)
class Task:
    """The parts of a run that its objective decides.

    module: trained; it has a `backbone` of transformers, which checkpoints save, and `max_positions`.
    collate: makes its batches.
    objective: its loss.
    describe: writes, into a checkpoint's model folder, what must be known of it beside the backbone.
    state: what may not change while a run goes on, as plain data.
    targets: the teacher's scores, where the objective has a teacher.
    evaluate: held-out metrics by name, of a module's rows of token ids; None where vectors are searched with.
    """

    module: nn.Module
    collate: Collate
    objective: Objective
    describe: Callable[[Path], None]
    state: dict[str, Any]
    targets: Targets | None = None
    evaluate: Callable[[Callable[[Ragged], Tensor]], dict[str, float]] | None = None


def open_task(config: Config, sources: Mixture, tokenizer: Any, path: str, device: torch.device) -> Task:
    """The task of a run whose model is opened from `path` (its checkpoint's, when it goes on).

    Raises:
        UserError: the model, the tokenizer, the scores or the guide cannot be opened, or do not fit together.
    """
    if config.objective == "ranking":
        return _ranking(config, tokenizer, path)
    return _embedding(config, sources, tokenizer, path, device)


def _embedding(config: Config, sources: Mixture, tokenizer: Any, path: str, device: torch.device) -> Task:
    prompts, targets = config.prompts, _targets(config)
    encoder = build_encoder(config, tokenizer, path)
    options = _options(config, encoder, tokenizer, device)
    objective: Objective = partial(objectives.contrastive, temperature=config.temperature, options=options)
    if config.objective == "distillation" and targets:
        objective = partial(
            objectives.distillation,
            temperature=config.temperature,
            alpha=config.alpha,
            term=config.loss.distill,
            options=options,
        )
    named = _instructions(config, sources)
    settings = ModelSettings(prompts.query, prompts.passage, config.model.pooling, True, config.max_length, named)
    return Task(
        encoder,
        Collate(tokenizer, config.max_length, prompts, config.negatives, targets=targets),
        objective,
        partial(save_settings, settings=settings),
        {"objective": config.objective, "negatives": config.negatives, "teacher": targets.teacher if targets else ""},
        targets,
    )


def _instructions(config: Config, sources: Mixture) -> dict[str, str]:
    """The prompt of the queries of every source that has an instruction, by the source's name."""
    named = {s.name: query_prefix(config.prompts, s.instruction) for s in sources.sources if s.instruction}
    if named and config.prompts.passage:
        log.warning(
            "prompts.passage=%r: the passages of sources with an instruction have no prefix, but the model will be "
            "exported with this one; set prompts.passage= when it is an instruct model",
            config.prompts.passage,
        )
    return named


def _ranking(config: Config, tokenizer: Any, path: str) -> Task:
    assert isinstance(config, teacher.Config), "the stage `teacher` alone has this objective"
    joint = PairEncoder(
        tokenizer, config.max_length, max_query_length=config.max_query_length, template=config.template
    )
    torch.manual_seed(config.seed)  # every rank draws the same weights
    if path == "random":
        module = build_cross_encoder(config.model.architecture, tokenizer, **_sizes(config))
    else:
        module = load_cross_encoder(path, tokenizer, **_dropouts(config))
    _prepare(config, module, tokenizer)
    return Task(
        module,
        Collate(tokenizer, config.max_length, config.prompts, config.negatives, joint=joint.encode),
        objectives.ranking,
        joint.save,
        {"objective": config.objective, "negatives": config.negatives, "pairing": asdict(joint.settings)},
        evaluate=partial(heldout.evaluate, _held_out(config, joint)),
    )


def _held_out(config: Config, joint: PairEncoder) -> list[heldout.Groups]:
    return heldout.load(config.eval.data, config.eval.limit, joint) if config.eval.data else []


def build_encoder(config: Config, tokenizer: Any, path: str) -> Encoder:
    """The encoder of a run: pretrained, random, or a checkpoint's (`path`), with its dropout and frozen parts set."""
    model = config.model
    if path == "random":
        torch.manual_seed(config.seed)  # every rank builds the same weights
        backbone = build_random(model.architecture, len(tokenizer), tokenizer.pad_token_id, **_sizes(config))
    else:
        backbone = load_backbone(path, **_dropouts(config))
    encoder = Encoder(backbone, model.pooling)
    _prepare(config, encoder, tokenizer)
    return encoder


def _sizes(config: Config) -> dict[str, Any]:
    """The configuration of a random model in transformers' words."""
    offset = 2  # the RoBERTa family's position table starts behind its padding number
    return {
        "hidden_size": config.model.hidden_size,
        "num_hidden_layers": config.model.layers,
        "num_attention_heads": config.model.heads,
        "intermediate_size": config.model.intermediate_size,
        "max_position_embeddings": config.model.max_positions + offset,
        **_dropouts(config),
    }


def _dropouts(config: Config) -> dict[str, Any]:
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    return {} if config.model.dropout is None else dict.fromkeys(names, config.model.dropout)


def _prepare(config: Config, module: Any, tokenizer: Any) -> None:
    """Make a module ready for training, once it fits the texts."""
    _check_fits(config, module, tokenizer)
    model = config.model
    if model.path != "random" if model.freeze_positions is None else model.freeze_positions:
        freeze_positions(module)
    module.train()


def _check_fits(config: Config, module: Any, tokenizer: Any) -> None:
    if config.max_length > module.max_positions:
        raise UserError(
            f"max_length={config.max_length}: the model's position table ends at {module.max_positions} tokens; "
            "lower max_length"
        )
    vocabulary = int(module.backbone.config.vocab_size)
    if len(tokenizer) > vocabulary:
        raise UserError(
            f"tokenizer={config.tokenizer}: it has {len(tokenizer)} pieces, the model {vocabulary}; they do not belong "
            "together"
        )


# --- what an embedding's loss asks others: a teacher's scores, a guide's similarities ------------------------------


def _targets(config: Config) -> Targets | None:
    """The scores of the teacher, read; None when there is none."""
    folder, fingerprint = config.scores, config.teacher_fingerprint
    if not folder:
        return None
    if fingerprint and not FINGERPRINT.fullmatch(fingerprint):
        raise UserError(f"teacher_fingerprint={fingerprint}: not 32 hexadecimal digits; `quintet distill` prints it")
    waits = config.missing_scores == "wait"  # for a worker that may not have written anything yet
    if waits and not fingerprint and not fingerprints(folder) and not FINGERPRINT.fullmatch(Path(folder).name):
        raise UserError(f"scores={folder}: empty yet; name whose scores to wait for: teacher_fingerprint=...")
    cache = ScoreCache(folder, fingerprint) if waits and fingerprint else open_cache(folder, fingerprint)
    log.info("scores=%s: %d scores of teacher %s", folder, cache.load(), cache.fingerprint)
    return Targets(cache, folder, config.missing_scores)


def _options(config: Config, encoder: Encoder, tokenizer: Any, device: torch.device) -> objectives.Options:
    loss, sizes = config.loss, config.loss.matryoshka.sizes
    if sizes and max(sizes) >= encoder.size:
        raise UserError(f"loss.matryoshka.sizes={sizes}: not below the {encoder.size} numbers of a whole embedding")
    return objectives.Options(
        both_directions=loss.both_directions,
        same_tower=loss.same_tower,
        margin=loss.margin,
        teacher_margin=loss.teacher_margin,
        guide=_guide(config, encoder, tokenizer, device) if loss.guide.path else None,
        guide_margin=loss.guide.margin,
        guide_weight=loss.guide.weight,
        sizes=tuple(zip(sizes, loss.matryoshka.weights or [1.0] * len(sizes), strict=True)),
    )


def _guide(config: Config, encoder: Encoder, tokenizer: Any, device: torch.device) -> Callable[[Batch], Tensor]:
    """Embeds a batch with the guide, which reads the very token ids that are trained on, prompts included."""
    path = config.loss.guide.path
    model: Model = open_model(path, device=device)
    if fingerprint(model.tokenizer) != fingerprint(tokenizer):
        raise UserError(f"loss.guide.path={path}: its tokenizer is another one than this model's; choose another guide")
    if model.encoder.max_positions < config.max_length:
        raise UserError(f"loss.guide.path={path}: it reads {model.encoder.max_positions} tokens, max_length is more")
    if config.loss.guide.weight and model.encoder.size != encoder.size:
        raise UserError(
            f"loss.guide.weight={config.loss.guide.weight:g}: {path} has embeddings of {model.encoder.size} numbers, "
            f"this model of {encoder.size}; choose another guide, or 0"
        )
    embed = partial(encode, tokens_per_chunk=config.tokens_per_chunk, device=device, precision=config.precision)
    return lambda batch: embed(model.encoder, batch.tokens)
