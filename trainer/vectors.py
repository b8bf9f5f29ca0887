"""The work of the stage `encode`: blocks of texts to Arrow parts of ids and vectors, and those to one matrix."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import torch
from torch import Tensor

from data import mixture, scan
from data.errors import UserError
from data.index import INDEX_NAME
from data.mixture import Mixture
from data.parts import Parts, array_header
from data.reading import Policy
from data.records import normalise
from data.rules import Prompts
from trainer import distributed, sets, work
from trainer.corpus import BLOCK, embed_parts, mapped, stored, write_arrow
from trainer.embed import Embedder, load_model
from trainer.encode import Config

log = logging.getLogger("quintet")

ABOUT = "encode.json"
_TEXTS = pa.schema([("text", pa.large_string()), ("id", pa.string())])
_BATCH = 4096
# What cannot be the name of a file that is not there: patterns, URLs, pipes, tars and mixture files.
_SHARDS = re.compile(r"[*?\[{]|://|^pipe:|\.(tar|ya?ml)$")


@dataclass(frozen=True)
class Task:
    """The settings, the model, and the input where it is shards; None: the path in the settings, of other texts."""

    config: Config
    embedder: Embedder
    data: Mixture | None

    @property
    def matrix_alone(self) -> bool:
        return self.config.output.endswith(".npy")

    @property
    def policy(self) -> Policy:
        return self.config.damaged  # type: ignore[return-value]

    @cached_property
    def prompts(self) -> Prompts:
        model = self.embedder.model
        own = Prompts(query=model.query_prompt, passage=model.passage_prompt)
        return own if self.config.prompt is None else replace(own, **{self.config.side: self.config.prompt})

    @cached_property
    def plan(self) -> dict[str, Any]:
        """Everything that decides the output."""
        data = scan.identity(self.data) if self.data else _identity(str(self.config.input), self.config.side)
        names = ("side", "prompt", "dtype", "format", "damaged")
        settings = {name: getattr(self.config, name) for name in names}
        return {"stage": "encode", "model": self.embedder.identity, "input": data, **settings}


def open_task(config: Config, device: torch.device) -> Task:
    """Open input and model. Raises UserError or DataError."""
    data = None
    if _names_shards(config.input):
        data = mixture.load(config.input, allow_pipe=config.allow_pipe, policy=config.damaged)  # type: ignore[arg-type]
    else:
        sets.documents_file(str(config.input), config.side)
    model = load_model(config.model, device)
    return Task(config, Embedder(model, device, config.precision, config.tokens_per_chunk), data)


def _names_shards(given: str | list[str]) -> bool:
    """Whether an input is shards or a mixture, and not a file or folder of texts."""
    if isinstance(given, list) or Path(given).suffix in (".tar", ".yaml", ".yml"):
        return True
    place = Path(given)
    if place.is_dir():
        return (place / INDEX_NAME).is_file() or any(place.glob("*.tar"))
    return not place.exists() and _SHARDS.search(given) is not None


def _identity(path: str, side: str) -> list[Any]:
    """Changes when the file of the texts is written again."""
    file = sets.documents_file(path, side)
    status = file.stat()
    return [str(file.resolve()), status.st_size, status.st_mtime_ns]


def begin(task: Task, output: Path) -> bool:
    """Whether there is anything to do. Collective. Raises UserError when an output is in the way."""
    if not task.matrix_alone:
        return work.begin(output, ABOUT, task.plan, overwrite=task.config.overwrite)
    if output.is_dir() or (output.exists() and not task.config.overwrite):
        distributed.end(UserError(f"output={output}: is there already; name another file or set overwrite=true"))
    return True


def encode(task: Task, parts: Parts, output: Path) -> None:
    """All phases of the stage. Collective."""
    blocks = _shard_blocks(task) if task.data else _document_blocks(task, parts)
    prefix = f"{work.RESULT}/vectors" if task.config.format == "arrow" else "block"
    names = [f"{prefix}-{number:06d}.arrow" for number in range(len(blocks.sizes))]
    embed_parts(
        parts, names, blocks.sizes, blocks.read, task.embedder, partial(_write_block, task.config.dtype), "input"
    )
    distributed.on_first_rank(lambda: _finish(task, parts, names, output))


# --- reading -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Blocks:
    """The input in blocks: at most so many texts in each, and what gives a block's texts with prompts, and ids."""

    sizes: list[int]
    read: Callable[[int], tuple[list[str], list[str]]]


def _shard_blocks(task: Task) -> _Blocks:
    """One side of all records of shards; the id of one that has none is SOURCE/NUMBER."""
    data = task.data
    assert data is not None
    prompted = scan.query_texts if task.config.side == "query" else scan.passage_texts
    units = scan.units(data, BLOCK)

    def read(number: int) -> tuple[list[str], list[str]]:
        texts, ids, source = [], [], data.sources[units[number].source].name
        for first, table in scan.tables(data, units[number], policy=task.policy):
            texts += prompted(table, task.prompts)
            ids += [key or f"{source}/{first + row}" for row, key in enumerate(table["id"].to_pylist())]
        return texts, ids

    return _Blocks([unit.records for unit in units], read)


def _document_blocks(task: Task, parts: Parts) -> _Blocks:
    """The texts of a file or folder. They are put into an Arrow file first, so that every rank finds its blocks."""
    path, side = str(task.config.input), task.config.side
    found = mapped(work.once(parts, "texts.arrow", lambda target: _write_texts(target, path, side)))
    starts = [*range(0, len(found), BLOCK), len(found)]
    prompt = task.prompts.query if side == "query" else task.prompts.passage

    def read(number: int) -> tuple[list[str], list[str]]:
        block = found.slice(starts[number], starts[number + 1] - starts[number])
        return [prompt + text for text in block["text"].to_pylist()], block["id"].to_pylist()

    return _Blocks(np.diff(starts).tolist(), read)


def _write_texts(target: Path, path: str, side: str) -> None:
    """The texts of a file, normalised. Raises UserError when there is none."""
    documents, count = sets.documents(path, side), 0

    def tables() -> Iterator[pa.Table]:
        nonlocal count
        while rows := list(islice(documents, _BATCH)):
            count += len(rows)
            columns = [[normalise(text) for _, text in rows], [key for key, _ in rows]]
            yield pa.Table.from_arrays(
                [pa.array(*pair) for pair in zip(columns, _TEXTS.types, strict=True)], schema=_TEXTS
            )

    write_arrow(target, _TEXTS, tables())
    if not count:
        raise UserError(f"input={path}: there is no text in it")


# --- writing -------------------------------------------------------------------------------------------------------


def _write_block(dtype: str, path: Path, vectors: Tensor, ids: Sequence[str]) -> None:
    """An Arrow file of one batch with the columns id and vector."""
    rows = stored(vectors, dtype)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])
    table = pa.table({"id": pa.array(ids, pa.string()), "vector": lists})
    write_arrow(path, table.schema, [table], batch=len(ids))


def _finish(task: Task, parts: Parts, names: Sequence[str], output: Path) -> None:
    """Write what goes beside the vectors, and give the output its name."""
    blocks = [mapped(parts.path(name)) for name in names]
    count, size = sum(map(len, blocks)), task.embedder.model.encoder.size
    if task.config.format == "npy":
        parts.write(f"{work.RESULT}/vectors.npy", partial(_write_matrix, blocks, (count, size), task.config.dtype))
    if task.matrix_alone:
        os.replace(parts.path(f"{work.RESULT}/vectors.npy"), output)
        parts.remove()
    else:
        if task.config.format == "npy":
            parts.write(f"{work.RESULT}/ids.jsonl", partial(_write_ids, blocks))
        about = {"plan": task.plan, "model": task.config.model, "texts": count, "size": size}
        text = orjson.dumps(about, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
        parts.write(f"{work.RESULT}/{ABOUT}", lambda path: path.write_bytes(text))
        work.publish(parts, output)
    log.info("%d vectors of %d numbers are in %s", count, size, output)


def _write_matrix(blocks: Sequence[pa.Table], shape: tuple[int, int], dtype: str, path: Path) -> None:
    with open(path, "wb") as file:
        array_header(file, np.dtype(dtype), shape)
        for block in blocks:
            for chunk in block["vector"].chunks:
                file.write(chunk.flatten().to_numpy().data)


def _write_ids(blocks: Sequence[pa.Table], path: Path) -> None:
    """One id a line, as a JSON text, since an id may have a line break in it."""
    with open(path, "wb") as file:
        for block in blocks:
            file.writelines(orjson.dumps(key) + b"\n" for key in block["id"].to_pylist())
