"""Builds the parts of a training run out of its configuration, and restores those that a checkpoint knows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from data import mixture
from data.errors import UserError
from data.order import Order, differences
from data.stream import Stream
from data.tokens import TextEncoder, load_tokenizer
from trainer import costs, distributed, retrieval, sets, snapshot
from trainer.checkpoint import Checkpoint
from trainer.crossencoder import CrossEncoder
from trainer.device import can_compile, training_chunk_tokens, use_same_kernels
from trainer.embed import encode, may_pack
from trainer.encoder import Encoder, compile_layers
from trainer.engine import Engine, OptimizerSettings
from trainer.firsttoken import once_a_text
from trainer.step import Stepper
from trainer.tasks import Task, open_task
from trainer.train import Config

# Held-out metrics, and examples of what was found, by name.
Evaluation = tuple[dict[str, float], dict[str, list[dict[str, Any]]]]


@dataclass(frozen=True)
class Parts:
    """What a run is made of; `records` counts the data once, flops_per_token is forward and backward."""

    engine: Engine
    stepper: Stepper
    stream: Stream
    order: Order
    tokenizer: Any
    task: Task
    evaluate: Callable[[], Evaluation]
    records: int
    flops_per_token: float


def build(config: Config, device: torch.device, saved: Checkpoint | None) -> Parts:
    """Open data and model, from the checkpoint where there is one. All ranks end together on an error."""
    model_path = str(saved.folder / "model") if saved else config.model.path
    # Rank 0 first: it may have to build an index, or fetch a model, that the others then find in place.
    distributed.on_first_rank(lambda: _open_mixture(config) and None)
    with distributed.together():
        tokenizer = load_tokenizer(model_path if saved else config.tokenizer or model_path)
        sources = _open_mixture(config)
        task = open_task(config, sources, tokenizer, model_path, device)
        order = sources.order(
            config.batch_size, lanes=config.lanes, seed=config.seed, shuffle_blocks=config.shuffle_blocks
        )
        if saved:
            order.check(saved.manifest["order"])
            _check_state(saved.manifest.get("task", task.state), task.state)
        stream = Stream(
            sources,
            order,
            task.collate,
            rank=distributed.rank(),
            world=distributed.world(),
            policy=config.damaged,  # type: ignore[arg-type]
            workers=config.data_workers,
        )
        searches = config.eval.data and not task.evaluate
        evaluation = sets.load(config.eval.data, limit=config.eval.limit) if searches else []
    torch.backends.cuda.matmul.allow_tf32 = config.tf32
    if config.deterministic and device.type == "cuda":
        use_same_kernels()
    engine = _engine(config, task.module, device)
    if saved:
        engine.restore_optimizer(saved.manifest["updates"], snapshot.moments(saved.folder))
    return Parts(
        engine,
        _stepper(config, engine, task, tokenizer),
        stream,
        order,
        tokenizer,
        task,
        _evaluation(config, engine, task, tokenizer, evaluation),
        sources.records,
        _flops_per_token(task.module, engine),
    )


def _check_state(saved: dict[str, Any], state: dict[str, Any]) -> None:
    changes = differences(saved, state)
    if changes:
        raise UserError(
            f"the checkpoint was made with other settings: {'; '.join(changes)}; restore what changed, or start again "
            "with fresh=true"
        )


def _open_mixture(config: Config) -> mixture.Mixture:
    return mixture.load(
        config.data,
        homogeneous=config.homogeneous,
        alpha=config.source_power,
        allow_pipe=config.allow_pipe,
        policy=config.damaged,  # type: ignore[arg-type]
    )


def _engine(config: Config, module: torch.nn.Module, device: torch.device) -> Engine:
    optimizer = OptimizerSettings(
        weight_decay=config.weight_decay,
        betas=config.betas,
        eps=config.eps,
        max_grad_norm=config.max_grad_norm,
    )
    world = distributed.world()
    return Engine(
        module,
        optimizer,
        stage=costs.stage_that_runs(config.zero_stage, world),
        local_batch=config.batch_size // world,
        device=device,
        bf16=config.precision == "bf16",
    )


def _stepper(config: Config, engine: Engine, task: Task, tokenizer: Any) -> Stepper:
    module: Any = engine.module  # an Encoder or a CrossEncoder
    sizes = module.backbone.config
    chunk = training_chunk_tokens(config.tokens_per_chunk, engine.device, sizes.num_hidden_layers, sizes.hidden_size)
    packed = _packed(config, module, engine.device)
    if _compiled(config, engine, packed):
        compile_layers(module.backbone)
    return Stepper(
        engine,
        task.objective,
        seed=config.seed,
        padding_id=tokenizer.pad_token_id,
        tokens_per_chunk=chunk,
        memory_budget=None if config.memory_budget_gib is None else config.memory_budget_gib * 2**30,
        packed=packed,
    )


def _compiled(config: Config, engine: Engine, packed: bool) -> bool:
    """Whether the backbone's layers are compiled: where nothing is said, where it is known to run and to pay."""
    wanted, pays = config.model.compile, packed and engine.device.type == "cuda" and engine.stage < 3
    return pays and can_compile() if wanted is None else wanted


def _packed(config: Config, encoder: Encoder | CrossEncoder, device: torch.device) -> bool:
    """Whether texts are fed without padding: where the family and, on CUDA, the kernel's half precision allow it.

    On a CPU only when it is asked for: packed texts are trained without dropout of attention weights.
    """
    wanted, family = config.model.attention, encoder.backbone.config.model_type
    half = device.type != "cuda" or config.precision == "bf16"
    if wanted == "packed" and not (encoder.packable and half):
        reason = f"{family} cannot run packed" if half else "its kernel needs precision=bf16"
        raise UserError(f"model.attention=packed: {reason}; use auto or padded")
    return wanted == "packed" or (
        wanted == "auto" and device.type == "cuda" and may_pack(encoder, device, config.precision)
    )


def _flops_per_token(trained: torch.nn.Module, engine: Engine) -> float:
    """6 x the parameters that take part in matrix products of every token: no tables, and not what is once a text."""
    tables = [module.weight for module in trained.modules() if isinstance(module, torch.nn.Embedding)]
    left_out = {id(parameter) for parameter in (*tables, *once_a_text(trained.backbone))}  # type: ignore[arg-type]
    numbers = {name: math.prod(engine.shapes[name]) for name, p in engine.parameters.items() if id(p) not in left_out}
    return 6.0 * sum(numbers.values())


def _evaluation(
    config: Config, engine: Engine, task: Task, tokenizer: Any, data: list[sets.RetrievalSet]
) -> Callable[[], Evaluation]:
    """What measures held-out data over all ranks, a collective."""
    module: Any = engine.module  # an Encoder or a CrossEncoder
    forward = partial(
        encode,
        module,
        tokens_per_chunk=config.tokens_per_chunk,
        device=engine.device,
        precision=config.precision,
        agree_max=distributed.agree_max if engine.stage == 3 else None,
    )
    if held_out := task.evaluate:
        return lambda: (held_out(forward), {})
    cutter = TextEncoder(tokenizer, config.max_length)
    return partial(_evaluate, config, data, lambda texts: forward(cutter.encode(texts)))


def _evaluate(config: Config, data: list[sets.RetrievalSet], embed: retrieval.Encode) -> Evaluation:
    """Held-out metrics and examples by name, over all ranks. A collective."""
    ranks = retrieval.Ranks(distributed.rank(), distributed.world(), distributed.gather_rows)
    values: dict[str, float] = {}
    examples: dict[str, list[dict[str, Any]]] = {}
    for held_out in data:
        result = retrieval.score(held_out, embed, config.prompts, ranks=ranks, examples=config.wandb.examples)
        values |= retrieval.named(held_out.name, result)
        if result.get("examples"):
            examples[f"eval/{held_out.name}/examples"] = result["examples"]
    return values, examples


def state_bytes(parameters: int, zero_stage: int, world: int) -> float:
    """Bytes of fp32 weights, gradients and AdamW's two moments that one of `world` ranks holds, about."""
    return sum(costs.state_parts(parameters, costs.stage_that_runs(zero_stage, world), world).values())


def describe(config: Config, parts: Parts) -> list[tuple[str, object]]:
    """The rows of the start-up summary."""
    engine, world = parts.engine, distributed.world()
    trained = sum(engine.parameters[name].numel() if engine.stage < 3 else 0 for name in engine.trained())
    shares = ", ".join(f"{name} {100 * share:.1f}%" for name, share in parts.order.shares.items())
    pool = config.batch_size
    state = state_bytes(engine.count, config.zero_stage, world)
    packed = parts.stepper.packed
    feeding = f"{'packed' if packed else 'padded chunks'}{', compiled' if _compiled(config, engine, packed) else ''}"
    candidates = (1 + config.negatives) * pool
    texts = candidates if config.objective == "ranking" else candidates + pool
    rows: list[tuple[str, object]] = [
        ("pool", f"{pool:,} queries x {candidates:,} candidates, {candidates - 1:,} negatives a query"),
        ("ranks", f"{world}, {pool // world:,} pairs each, ZeRO-{engine.stage} on {engine.device.type}"),
        ("model", f"{config.model.path}: {engine.count:,} parameters" + (f", {trained:,} trained" if trained else "")),
        ("precision", f"{config.precision}, {feeding}"),
        ("tokens", f"at most {texts * config.max_length:,} a step, {parts.stepper.tokens_per_chunk:,} a chunk"),
        ("memory", f"about {state / 2**30:.2f} GiB a rank for weights, gradients and optimizer, beside activations"),
        ("data", f"{parts.records:,} pairs: {shares}"),
        ("order", f"{config.lanes} lanes, {'one source a batch' if parts.order.homogeneous else 'mixed batches'}"),
        ("steps", f"{config.steps:,}, {config.steps * pool / parts.records:.2f} passes over the data"),
    ]
    if config.objective == "ranking":
        rows[0] = ("groups", f"{pool:,} queries, each with its passage among {1 + config.negatives}")
    if parts.task.targets:
        rows.insert(
            1, ("teacher", f"{parts.task.state['teacher']}: {config.loss.distill} + {config.alpha:g} x InfoNCE")
        )
    return rows
