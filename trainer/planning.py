"""What the stage `plan` does: sizes out of a recipe, rates out of a file or a data sheet, and the tables it prints."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import UserError
from data.tokens import load_tokenizer
from trainer import calibrate, cards, costs, distributed, work
from trainer.cards import CARDS, Card
from trainer.costs import PUBLISHED, Law, Shape
from trainer.device import pick_device, training_chunk_tokens
from trainer.estimate import GPU_HOP, LINK_SHARE, Job, Links, Prediction, Rates, assumed, predict
from trainer.monitor import summary
from trainer.plan import ClusterConfig, Config
from trainer.runfolder import write_json

log = logging.getLogger("quintet")

FORMAT = 1
_SIGMA_QUERY, _SIGMA_PASSAGE = 0.6, 0.9  # as benchmarks/step.py has them
_GIB, _GB = 2**30, 1e9

# What to do about each part of a step, when it is the largest.
_LIMITS = {
    "encoder products": "the card's arithmetic; shorter texts or a smaller model, a faster card, more of them",
    "between the products": "the card's memory; model.compile, where it is off, fuses what lies there",
    "calls": "starting work on the card: chunks are small for it; raise tokens_per_chunk, or use fewer GPUs",
    "weights of each chunk": "weights and gradients moved for every chunk; raise tokens_per_chunk",
    "loss": "the products of the loss, in fp32; more GPUs share them",
    "collectives": "the links; fewer GPUs, or a faster network",
    "optimizer": "the optimizer's traffic in memory; a higher zero_stage and more GPUs share half of it",
}


def measure(config: Config) -> None:
    """Take the twenty steps on every rank of this job, and write what came out. Collective."""
    device = pick_device(config.device)
    with work.job(device):
        found = calibrate.measure(config.precision, device)
        distributed.on_first_rank(lambda: _keep_calibration(config.measure, found))


def _keep_calibration(file: str, found: dict[str, Any]) -> None:
    rates = found["rates"]
    rows: list[tuple[str, object]] = [
        ("device", f"{found['device']}, {found['precision']}, ranks: {found['ranks']}, threads: {found['threads']}"),
        ("products", f"{rates['products'] / 1e9:,.0f} GFLOP/s in the encoder, {rates['loss'] / 1e9:,.0f} in the loss"),
        ("between", f"{rates['elements'] / 1e6:,.0f} million numbers written a second"),
        ("calls", f"{1e3 * rates['layer_pass']:.3g} ms for a chunk's way through a layer"),
        ("optimizer", f"{rates['update'] / _GB:.3g} GB/s, and {1e3 * rates['step']:.3g} ms a step"),
    ]
    if found["links"]:
        links = found["links"]
        rows.append(("link", f"{links['node'] / _GB:.3g} GB/s, {1e6 * links['hop']:.0f} us a hop"))
    spread = calibrate.spread(found["steps"])
    rows.append(("fit", f"the worst of the 20 steps is {100 * spread:.0f}% off"))
    summary(f"measured in 20 steps, written to {file}", rows)
    if spread > 0.5:
        log.warning("the steps do not agree with each other: is the machine busy with other work? measure again")
    _write("measure", file, found)


def plan(config: Config) -> None:
    """Print the plan, and write it where it is asked for."""
    shape = shape_of(config)
    job = job_of(config, shape)
    machine = _machine(config)
    predictions = [predict(job, world, *machine.at(world)) for world in sorted(set(config.cluster.gpus))]
    rows = [_row(config, predictions[0], prediction, machine) for prediction in predictions]
    notes = _notes(config, machine)
    summary(f"plan of {config.model.path}", _about(config, job, machine, predictions[0]))
    _print(config, rows)
    for row in rows:
        print(f"{row['gpus']:,} {_unit(config, row['gpus'])}: limited by {row['limited_by']}")
    for note in notes:
        print(f"note: {note}")
    if config.output:
        content = {"format": FORMAT, "model": config.model.path, "rates": machine.source, "notes": notes, "plans": rows}
        _write("output", config.output, content)


# --- the recipe --------------------------------------------------------------------------------------------------


def shape_of(config: Config) -> Shape:
    """The sizes of the recipe's model: from its keys, its folder, what is known of published ones, or the hub's cache.

    Raises:
        UserError: they are not to be had without fetching anything.
    """
    model = config.model
    if model.path == "random":
        vocabulary = len(load_tokenizer(config.tokenizer))
        sizes = (model.layers, model.hidden_size, model.heads, model.intermediate_size)
        return Shape(*sizes, vocabulary, model.max_positions + 2, 2)  # the offset is that of trainer/tasks.py
    file = Path(model.path).expanduser() / "config.json"
    if file.is_file():
        return _shape_in(file, model.path)
    if model.path in PUBLISHED:
        return PUBLISHED[model.path]
    cached = _cached(model.path)
    if cached:
        return _shape_in(Path(cached), model.path)
    known = ", ".join(PUBLISHED)
    raise UserError(
        f"model.path={model.path}: no such folder, and its sizes are not known here; give a folder with a config.json, "
        f"or the model that it starts from, such as one of {known}"
    )


def _cached(name: str) -> str | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # a path, and no hub id
        return None
    return found if isinstance(found, str) else None


def _shape_in(file: Path, path: str) -> Shape:
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        sizes = [int(content[name]) for name in (*names, "max_position_embeddings")]
        return Shape(*sizes, types=int(content.get("type_vocab_size", 2)))  # type: ignore[misc]
    except (OSError, ValueError, TypeError, KeyError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"model.path={path}: {file} does not tell the sizes of an encoder ({what})") from None


def job_of(config: Config, shape: Shape) -> Job:
    """The recipe as trainer/estimate.py reads it."""
    texts, loss = config.texts, config.loss
    law = Law((texts.query_tokens, _SIGMA_QUERY), (texts.passage_tokens, _SIGMA_PASSAGE), config.max_length)
    frozen = config.model.path != "random" if config.model.freeze_positions is None else config.model.freeze_positions
    return Job(
        shape=shape,
        trained=shape.trained(frozen),
        lengths=costs.draw(law, config.batch_size, config.negatives, config.seed),
        batch=config.batch_size,
        negatives=config.negatives,
        compute=_compute(config, shape),
        zero_stage=config.zero_stage,
        sizes=(shape.hidden, *loss.matryoshka.sizes),
        budget=None if config.memory_budget_gib is None else config.memory_budget_gib * _GIB,
        gathered_queries=loss.same_tower or loss.both_directions,
        directions=1 + loss.both_directions,
    )


def _compute(config: Config, shape: Shape) -> costs.Compute:
    half, dropout = config.precision == "bf16", config.model.dropout != 0
    kind = "cpu" if config.cluster.device == "cpu" else "cuda"
    chunk = training_chunk_tokens(config.tokens_per_chunk, kind, shape.layers, shape.hidden)
    if kind == "cpu":
        return costs.Compute("cpu", chunk, half=half, dropout=dropout)
    packed = half and config.model.attention != "padded"
    return costs.Compute("gpu", chunk, half=half, dropout=dropout, packed=packed)


# --- the machine -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """Ranks of one kind: measured ones by how many of them shared a node, or a card by its data sheet."""

    measured: dict[int, Rates]
    links: Links
    memory: float
    source: str

    def at(self, world: int) -> tuple[Rates, Links, float]:
        """What a rank of `world` has: rates of the measurement with the nearest number of ranks in a node."""
        beside = min(world, self.links.per_node)
        ranks = min(self.measured, key=lambda count: abs(count - beside))
        return self.measured[ranks], self.links, self.memory


def _machine(config: Config) -> Machine:
    """Rates from the files of `measured`, or assumed; links as measured, as given, or as on the data sheet."""
    cluster, found = config.cluster, {}
    card = _card(cluster)
    for file in config.measured:
        content = calibrate.read(file)
        _check_same(config, file, content)
        found[int(content["ranks"])] = content
    if card is None:
        return _host(cluster, found)
    if not found:
        _check_precision(config, card)
    links = Links(LINK_SHARE * card.node_link, LINK_SHARE * card.network, card.per_node, GPU_HOP)
    rates = {1: assumed(card, half=config.precision == "bf16", tf32=config.tf32)}
    if found:
        rates = {ranks: content["rates"] for ranks, content in found.items()}
    source = _source(found) if found else f"assumed: shares of {cluster.device}'s data sheet, see docs/plan.md"
    return Machine(rates, links, card.memory, source)


def _host(cluster: ClusterConfig, found: dict[int, Any]) -> Machine:
    """CPUs: all that is known was measured."""
    most, several = max(found), [content["links"] for content in found.values() if content["links"]]
    per_node = cluster.per_node or most
    world = max(cluster.gpus)
    if world > 1 and not several and cluster.node_gbs is None:
        raise UserError(
            f"measured: one rank measured alone, so the link of {world} ranks is unknown; measure with `quintet launch "
            "--ranks 2 plan measure=FILE`, or give cluster.node_gbs"
        )
    if world > per_node and cluster.network_gbs is None:
        raise UserError(f"cluster.network_gbs: must be given for {world} ranks, {per_node} of them in a node")
    link = several[-1] if several else Links((cluster.node_gbs or 1.0) * _GB, 0.0, per_node, 1e-4)
    links = Links(
        node=link.node if cluster.node_gbs is None else cluster.node_gbs * _GB,
        network=(cluster.network_gbs or 0.0) * _GB or link.node,
        per_node=per_node,
        hop=link.hop,
    )
    memory = found[most]["memory"] if cluster.memory_gib is None else cluster.memory_gib * _GIB
    return Machine({ranks: content["rates"] for ranks, content in found.items()}, links, memory, _source(found))


def _source(found: dict[int, Any]) -> str:
    one = next(iter(found.values()))
    ranks = " and ".join(map(str, sorted(found)))
    return f"measured: {one['device']}, {one['precision']}, ranks in a node: {ranks}, threads of each: {one['threads']}"


def _card(cluster: ClusterConfig) -> Card | None:
    """The named card with what the keys say otherwise; None for a CPU."""
    if cluster.device == "cpu":
        return None
    card = CARDS[cluster.device]

    def given(value: float | None, unit: float, default: float) -> float:
        return default if value is None else value * unit

    return Card(
        memory=given(cluster.memory_gib, _GIB, card.memory),
        bf16=given(cluster.bf16_tflops, 1e12, card.bf16),
        tf32=card.tf32,
        fp32=given(cluster.fp32_tflops, 1e12, card.fp32),
        bandwidth=given(cluster.memory_gbs, _GB, card.bandwidth),
        node_link=given(cluster.node_gbs, _GB, card.node_link),
        per_node=cluster.per_node or card.per_node,
        network=given(cluster.network_gbs, _GB, card.network),
    )


def _check_precision(config: Config, card: Card) -> None:
    if config.precision == "bf16" and not card.bf16:
        raise UserError(f"precision=bf16: {config.cluster.device} has no bf16 products; use precision=fp32")


def _check_same(config: Config, file: str, content: dict[str, Any]) -> None:
    """A measurement is of the device and the precision that are planned for."""
    if content["precision"] != config.precision:
        raise UserError(
            f"measured={file}: is of precision={content['precision']}, the recipe has {config.precision}; measure "
            f"again with precision={config.precision}"
        )
    card = cards.named(str(content["device"]))
    if (card is None) != (config.cluster.device == "cpu") or (card and card != CARDS[config.cluster.device]):
        raise UserError(f"measured={file}: is of {content['device']}; give the cluster.device of that name")


# --- what is shown -----------------------------------------------------------------------------------------------


def _row(config: Config, first: Prediction, found: Prediction, machine: Machine) -> dict[str, Any]:
    """One number of GPUs, as plain data: the whole of what is known about it."""
    hours = config.steps * found.step / 3600
    price, held = config.cluster.price, sum(found.memory.values())
    capacity = machine.memory
    largest = max(found.seconds, key=found.seconds.__getitem__)
    share = f"{100 * found.seconds[largest] / found.step:.0f}% of the step"
    limit = f"{largest} ({share}): {_LIMITS[largest]}"
    if held > capacity:
        limit = f"memory: {held / _GIB:.1f} GiB of {capacity / _GIB:.1f}; lower tokens_per_chunk or memory_budget_gib"
    return {
        "gpus": found.world,
        "pairs_per_gpu": config.batch_size // found.world,
        "seconds": found.seconds,
        "step_s": found.step,
        "tokens_per_s": found.tokens / found.step,
        "slowest_rank": found.imbalance,
        "replayed": found.replayed,
        "memory_bytes": found.memory,
        "fits": held <= capacity,
        "sent_bytes": found.sent,
        "efficiency": first.step * first.world / (found.step * found.world),
        "hours": hours,
        "gpu_hours": hours * found.world,
        "cost": None if price is None else price * hours * found.world,
        "limited_by": limit,
    }


def _about(config: Config, job: Job, machine: Machine, first: Prediction) -> list[tuple[str, object]]:
    shape = job.shape
    sizes = f"{shape.layers} x {shape.hidden}, {shape.vocabulary:,} pieces"
    tokens = first.tokens / job.batch
    chunk = f"chunks of {job.compute.tokens_per_chunk:,}, {'packed' if job.compute.packed else 'padded'}"
    return [
        ("model", f"{sizes}: {shape.parameters:,} parameters, {job.trained:,} trained"),
        ("batch", f"{job.batch:,} pairs with {job.negatives} negatives, {config.steps:,} steps"),
        ("tokens", f"{tokens:.0f} a pair, {first.tokens:,} a step, at most {config.max_length} a text; {chunk}"),
        ("run", f"{config.precision}, {_stage(config, job)}, on {config.cluster.device}"),
        ("rates", machine.source),
    ]


def _stage(config: Config, job: Job) -> str:
    asked, alone = job.zero_stage, costs.stage_that_runs(job.zero_stage, 1)
    if asked == alone or 1 not in config.cluster.gpus:
        return f"ZeRO-{asked}"
    others = f", ZeRO-{asked} on more" if max(config.cluster.gpus) > 1 else ""
    return f"ZeRO-{alone} on one {_unit(config, 1)}{others}"


def _notes(config: Config, machine: Machine) -> list[str]:
    notes = []
    uneven = [gpus for gpus in config.cluster.gpus if config.lanes % gpus]
    if uneven:
        wanted = " or ".join(f"{gpus:,}" for gpus in uneven)
        notes.append(f"lanes={config.lanes} cannot be dealt to {wanted} ranks: set lanes to a multiple of them")
    if config.loss.guide.path:
        notes.append("loss.guide: the guide's own forward pass is not in the plan")
    if max(config.cluster.gpus) > machine.links.per_node:
        notes.append("exchange between nodes was never measured: it is bytes over the share of a data sheet")
    notes.append("not in the plan: waiting for data, checkpoints, evaluation, start-up, failures")
    return notes


def _unit(config: Config, count: int = 2) -> str:
    return ("rank" if config.cluster.device == "cpu" else "GPU") + ("s" if count > 1 else "")


def _print(config: Config, rows: list[dict[str, Any]]) -> None:
    """A column for each number of GPUs; parts under their totals."""
    from rich.console import Console
    from rich.table import Table

    table = Table(_unit(config), *(f"{row['gpus']:,}" for row in rows))
    for column in table.columns[1:]:
        column.justify = "right"
    for section in _sections(rows):
        for name, values in section:
            table.add_row(name, *values)
        table.add_section()
    console = Console()
    wide = console if console.is_terminal else Console(width=120)  # a file or a pipe has no edge to fold at
    wide.print(table)


def _sections(rows: list[dict[str, Any]]) -> list[list[tuple[str, list[str]]]]:
    def parts(key: str, unit: float) -> list[tuple[str, list[str]]]:
        names = dict.fromkeys(name for row in rows for name, value in row[key].items() if value)
        return [(f"  {name}", [f"{row[key].get(name, 0) / unit:,.3g}" for row in rows]) for name in names]

    def line(name: str, key: str, form: str, unit: float = 1.0) -> tuple[str, list[str]]:
        return (name, [form.format(row[key] / unit) for row in rows])

    def total(name: str, key: str, unit: float) -> tuple[str, list[str]]:
        return (name, [f"{sum(row[key].values()) / unit:,.3g}" for row in rows])

    result = [
        [line("step, s", "step_s", "{:,.3g}"), *parts("seconds", 1)],
        [line("slowest rank, over the mean", "slowest_rank", "{:.1%}"), line("replayed", "replayed", "{:.0%}")],
        [total("memory a rank, GiB", "memory_bytes", _GIB), *parts("memory_bytes", _GIB)],
        [total("sent a rank and step, MB", "sent_bytes", 1e6), *parts("sent_bytes", 1e6)],
        [
            line("tokens/s", "tokens_per_s", "{:,.0f}"),
            line("efficiency", "efficiency", "{:.1%}"),
            line("wall time, h", "hours", "{:,.4g}"),
            line("GPU-hours", "gpu_hours", "{:,.4g}"),
        ],
    ]
    if rows[0]["cost"] is not None:
        result[-1].append(line("cost", "cost", "{:,.0f}"))
    return result


def _write(key: str, file: str, content: dict[str, Any]) -> None:
    target = Path(file).expanduser()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_json(target, content)
    except OSError as error:
        raise UserError(f"{key}={file}: cannot be written ({error.strerror or error}); name another") from None
